"""The fields of a request: those of SamplingSettings that JSON can give, with their types and help sentences."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from ldm.config import from_dict, to_dict
from ldm.diffusion import Guidance
from ldm.sampling_settings import SamplingSettings

JSON_TYPES: dict[str, Any] = {
    "Prompt": str,
    "str": str,
    "int": int,
    "float": float,
    "Sequence[int]": int,
    "Sequence[float]": list[float],
    "Mapping[str, Any]": dict[str, Any],
    "Guidance": dict[str, Any],
}
"""Types of the fields of a request by the first type in a setting's annotation; settings of other types have no field."""

OF_THE_SERVER = ("batch_size", "output_type", "lora_folder", "progress")
"""Settings that the server chooses."""

EXAMPLES: dict[str, Any] = {"prompt": "a red apple", "num_inference_steps": 20, "guidance_scale": 5.0, "seed": 1}
"""Values in the documentation of the API."""


def _fields() -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for entry in dataclasses.fields(SamplingSettings):
        kind = JSON_TYPES.get(str(entry.type).split(" | ")[0])
        if kind is not None and entry.name not in OF_THE_SERVER:
            examples = [EXAMPLES[entry.name]] if entry.name in EXAMPLES else None
            fields[entry.name] = (kind | None, Field(None, description=entry.metadata["help"], examples=examples))
    return fields


if TYPE_CHECKING:

    class SamplingFields(BaseModel):
        """Settings of a sampling, all of them optional."""

else:
    SamplingFields = create_model(
        "SamplingFields",
        __config__=ConfigDict(extra="forbid", strict=True),
        __doc__="Settings of a sampling, all of them optional; see docs/sampling.md.",
        **_fields(),
    )


def settings_of(fields: BaseModel | None, **more: Any) -> SamplingSettings:
    """Return the settings that the fields of a request, and ``more`` in addition to them, stand for; None is not given.

    Raises:
        LdmError: a value is not valid.
    """
    names = SamplingFields.model_fields
    given = {} if fields is None else {name: value for name, value in fields if name in names}
    given |= {name: value for name, value in more.items() if value is not None}
    given = {name: value for name, value in given.items() if value is not None}
    if "guidance" in given:
        given["guidance"] = from_dict(Guidance, given["guidance"], "guidance")
    return SamplingSettings.of(**given, progress=False)


def fields_of(settings: SamplingSettings) -> dict[str, Any]:
    """Return the fields of a request that stand for settings, those that are not at their defaults, as values of JSON."""
    given = arguments(settings).items()
    return {name: to_dict(value) for name, value in given if name in SamplingFields.model_fields}


def arguments(settings: SamplingSettings) -> dict[str, Any]:
    """Return the settings that are not at their defaults as keyword arguments."""
    values = {entry.name: (getattr(settings, entry.name), entry.default) for entry in dataclasses.fields(settings)}
    return {name: value for name, (value, default) in values.items() if value is not default and value != default}
