"""The options of loading a model, shared by :func:`ldm.load`, ``Pipeline.from_pretrained`` and the commands."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from ldm.config import config_field, former_names
from ldm.errors import unknown

Source = str | PathLike[str]
"""Name, path or hub id of a model; see :func:`ldm.load`."""


@dataclass(frozen=True)
class LoadOptions:
    """Options of reading a source, and sources of parts that replace its own."""

    vae: Source | None = config_field(None, "source of a VAE in place of the model's own")
    denoiser: Source | None = config_field(
        None, "source of a denoiser (U-Net) in place of the model's own", formerly="unet"
    )
    text_encoder: Source | None = config_field(None, "source of a text encoder in place of the model's own")
    text_encoder_2: Source | None = config_field(None, "source of a second text encoder in place of the model's own")
    tiny_decoder: Source | None = config_field(None, "source of a tiny decoder, also for a model that has none")
    revision: str | None = config_field(None, "branch, tag or commit of a hub id")
    subfolder: str | None = config_field(None, "folder of the model within the source, such as unet")
    variant: str | None = config_field(
        None, "variant of the weights in a folder or on the hub, such as fp16, where it exists"
    )
    prediction_type: str | None = config_field(
        None, "epsilon or v_prediction; null = as the source says, else epsilon; weights do not tell"
    )
    ema: bool = config_field(
        True, "use the averaged weights of an LDM file, or a checkpoint of a training, that has both"
    )
    checkpoint: str | None = config_field(
        None, "best, last or a step: checkpoint to use of a run folder, also before the end of its training"
    )

    @classmethod
    def of(cls, options: LoadOptions | None, changes: Mapping[str, Any]) -> LoadOptions:
        """Return ``options`` (None: the defaults) with some fields changed, by current or former names.

        Raises:
            TypeError: there is no such option.
        """
        named, former = {}, former_names(cls)
        for name, value in changes.items():
            if name in former:
                warnings.warn(
                    f"the option {name!r} is now called {former[name]!r}; rename it.", FutureWarning, stacklevel=3
                )
            named[former.get(name, name)] = value
        fields = [entry.name for entry in dataclasses.fields(cls)]
        for name in named:
            if name not in fields:
                raise TypeError(unknown("option", name, fields))
        return dataclasses.replace(options or cls(), **named)

    def replacements(self) -> dict[str, Source]:
        """Return the sources of replaced parts, by component."""
        given = {name: getattr(self, argument) for name, argument in ARGUMENTS.items()}
        return {name: source for name, source in given.items() if source is not None}


ARGUMENTS = {
    "first_stage": "vae",
    **{name: name for name in ("denoiser", "text_encoder", "text_encoder_2", "tiny_decoder")},
}
"""Components of a model that can be replaced, and the option of each."""
