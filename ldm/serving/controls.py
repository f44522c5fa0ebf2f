"""ControlNets in requests: by the names of the server's list, with images that clients send."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ldm.control_images import ControlImage
from ldm.errors import SamplingError
from ldm.image_output import Images, with_record
from ldm.pipeline import Pipeline
from ldm.sampling_settings import SamplingSettings
from ldm.serving.fields import fields_of
from ldm.serving.jobs import Work

MAX_SCALE = 10.0


class ControlField(BaseModel):
    """A ControlNet that acts on a job, with its image."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(description="Name of a ControlNet of the server.")
    image: str = Field(
        description="Hint image, such as edges: a PNG, JPEG or WebP in base64, or the name of an image in the gallery."
    )
    scale: float = Field(1.0, ge=-MAX_SCALE, le=MAX_SCALE, description="Factor of its effect.")
    start: float = Field(0.0, ge=0, le=1, description="Share of the steps from which it acts.")
    end: float = Field(1.0, ge=0, le=1, description="Share of the steps up to which it acts.")


@dataclass(frozen=True)
class Controlled:
    """The work of a job on which ControlNets act. It can be made again from the result.

    Attributes:
        work: the work without them.
        controls: the fields of the request with their images.
        keep: stores an image and returns the name by which requests can give it again.
    """

    work: Work
    controls: Sequence[tuple[ControlField, Image.Image]]
    keep: Callable[[Image.Image], str]

    def __call__(self, pipe: Pipeline, settings: SamplingSettings) -> Images:
        """Return the image, whose record has the request that makes it again."""
        given = [ControlImage(each.name, image, each.scale, each.start, each.end) for each, image in self.controls]
        images = self.work(pipe, replace(settings, controlnets=given))
        kept = [each.model_dump(exclude_defaults=True) | {"image": self.keep(image)} for each, image in self.controls]
        for image in images:
            record = {str(name): text for name, text in image.info.items()}
            request = json.loads(record["request"]) if "request" in record else fields_of(settings)
            with_record(image, record | {"request": json.dumps(request | {"controlnets": kept})})
        return images


def check_controls(controls: Sequence[ControlField], names: Sequence[str]) -> None:
    """Check the ControlNets of a request.

    Raises:
        SamplingError: the server has no such ControlNet, one is used twice, or its end is not after its start.
    """
    given = [each.name for each in controls]
    for each in controls:
        if each.name not in names:
            known = f"; choose one of {', '.join(names)}" if names else "; start it with --controlnet NAME=SOURCE"
            raise SamplingError(f"this server has no ControlNet {each.name[:100]!r}{known}.")
        if given.count(each.name) > 1:
            raise SamplingError(f"the ControlNet {each.name!r} is given twice; give it once.")
        if each.start >= each.end:
            raise SamplingError(
                f"the start of the ControlNet {each.name!r} is {each.start:g} and its end {each.end:g}; the end must be greater."
            )


def units_of(scripts: Mapping[str, Any]) -> list[ControlField]:
    """Return the units of the ControlNet extension of AUTOMATIC1111's web UI, from ``alwayson_scripts`` of a request.

    Raises:
        SamplingError: a unit is malformed, or needs a preprocessor.
    """
    script: Any = next((value for name, value in scripts.items() if name.lower() == "controlnet"), {})
    units = script.get("args", []) if isinstance(script, Mapping) else None
    if not isinstance(units, list) or not all(isinstance(unit, Mapping) for unit in units):
        raise SamplingError(
            "alwayson_scripts.controlnet is malformed; give {'args': [{'model': NAME, 'image': BASE64}]}."
        )
    return [_field_of(unit) for unit in units if unit.get("enabled", True)]


def _field_of(unit: Mapping[str, Any]) -> ControlField:
    module = str(unit.get("module") or "none")
    if module.lower() != "none":
        raise SamplingError(
            f"the preprocessor {module[:100]!r} of a ControlNet is not run by this server; send its result as image, with the "
            "module none."
        )
    image: Any = next((unit[name] for name in ("image", "input_image") if unit.get(name)), None)
    names = {"scale": "weight", "start": "guidance_start", "end": "guidance_end"}
    values = {own: unit[theirs] for own, theirs in names.items() if unit.get(theirs) is not None}
    name: Any = unit.get("model")
    if isinstance(name, str):
        name = name.partition(" [")[0]  # the web UI adds a hash: "canny [d14c016b]"
    try:
        return ControlField(name=name, image=image, **values)
    except ValidationError as error:
        first = error.errors()[0]
        place = names | {"name": "model"}
        key = str(first["loc"][0])
        raise SamplingError(f"{place.get(key, key)} of a ControlNet is not valid ({first['msg']}).") from None
