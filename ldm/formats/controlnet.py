"""ControlNets as files and folders, read for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.config import to_dict
from ldm.denoiser import ControlNetConfig, UNetConfig
from ldm.denoiser.controlnets import LoadedControlNet
from ldm.errors import CheckpointError
from ldm.formats import read
from ldm.formats.checkpoint import CONTROLNET
from ldm.formats.hub import is_hub_id
from ldm.formats.native import build_on_meta, load_strictly
from ldm.formats.tensors import CONFIG, INDEX, STEMS, fingerprint
from ldm.load_options import LoadOptions, Source
from ldm.model import LatentDiffusion, ModelConfig
from ldm.nn.adapters import unwrapped
from ldm.paths import expanded


class ControlNetMismatch(CheckpointError):
    """A ControlNet that is for another kind of model."""


def read_controlnet(
    source: Source, model: LatentDiffusion, name: str | None = None, options: LoadOptions | None = None
) -> LoadedControlNet:
    """Read a ControlNet for a model, in the precision and on the device of its denoiser.

    Args:
        source: a folder of diffusers, or of one of its pipelines with a ControlNet; a single file of the original
            repository, with or without the prefix ``control_model.``; or a hub id of either.
        model: the model.
        name: its name; default: that of the file or folder, without ending.
        options: revision, subfolder and variant.

    Raises:
        CheckpointError: the source cannot be read, or has no ControlNet.
        ControlNetMismatch: the ControlNet is for another kind of model.
    """
    options = options or LoadOptions()
    source = source if options.subfolder else _within_pipeline(source)
    part = read(source, options).part(CONTROLNET)
    model = unwrapped(model)
    _check_fit(source, part.config, model.config)
    network = build_on_meta(part.config.build, part.state, source)
    weight = next(model.denoiser.parameters())
    load_strictly(network, part.state, str(source), weight.dtype)
    network = network.to(weight.device).eval().requires_grad_(False)
    return LoadedControlNet(
        _name_of(options.subfolder or source) if name is None else name,
        network,
        fingerprint(part.state, to_dict(part.config)),
    )


def _within_pipeline(source: Source) -> Source:
    """Return the folder of the ControlNet in that of a pipeline of diffusers; any other source as it is."""
    if isinstance(source, str) and is_hub_id(source):
        return source
    folder = Path(expanded(source))
    inner = folder / "controlnet"
    return inner if (folder / INDEX).is_file() and (inner / CONFIG).is_file() else source


def _name_of(source: Source) -> str:
    path = Path(source)
    name = path.parent.name if path.name.startswith(STEMS) and path.parent.name else path.name
    return name.removesuffix(path.suffix) if path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") else name


def _check_fit(source: Source, config: ControlNetConfig, model: ModelConfig) -> None:
    denoiser, latents = model.denoiser, model.first_stage.latent_channels
    if not isinstance(denoiser, UNetConfig):
        raise ControlNetMismatch(
            f"{source} is a ControlNet, which the denoiser {denoiser.kind} of this model does not take."
        )
    encoder = config.encoder
    pairs: dict[str, tuple[Any, Any]] = {
        "width of the context": (encoder.context_width, denoiser.context_width),
        "width of the vector": (encoder.vector_width, denoiser.vector_width),
        "widths of the levels": ([each.width for each in encoder.levels], [each.width for each in denoiser.levels]),
        "blocks of the levels": ([each.blocks for each in encoder.levels], [each.blocks for each in denoiser.levels]),
        "factor between image and latent": (config.factor, model.first_stage.factor),
    }
    if encoder.in_channels not in (latents, denoiser.in_channels):
        pairs["number of latent channels"] = (encoder.in_channels, latents)
    for what, (own, needed) in pairs.items():
        if own != needed:
            raise ControlNetMismatch(
                f"{source} is a ControlNet for another kind of model: its {what} is {own}, but that of this model "
                f"{needed}; use one that was trained for this kind of model."
            )
