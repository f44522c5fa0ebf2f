"""Edits of images as jobs: image-to-image, inpainting, outpainting and enlarging. All can be made again from the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ldm import editing
from ldm.conditioning import LowResConditioner
from ldm.errors import SamplingError
from ldm.image_output import Images, with_record
from ldm.pipeline import Pipeline
from ldm.sampling_settings import SamplingSettings
from ldm.serving.controls import ControlField
from ldm.serving.fields import SamplingFields, arguments, fields_of
from ldm.serving.gallery import Gallery
from ldm.serving.uploads import decoded_base64

ENLARGING_STRENGTH = 0.3
"""Share of the steps that refine an image after it was enlarged by interpolation."""

MAX_FACTOR = 8


class Margins(BaseModel):
    """Pixels by which outpainting extends each side of an image."""

    model_config = ConfigDict(extra="forbid", strict=True)

    left: int = Field(default=0, ge=0)
    top: int = Field(default=0, ge=0)
    right: int = Field(default=0, ge=0)
    bottom: int = Field(default=0, ge=0)


class EditFields(SamplingFields):
    """Settings of a sampling, an image that it changes, and ControlNets that act on it."""

    image: str | None = Field(
        None, description="Image to change: a PNG, JPEG or WebP in base64, or the name of an image in the gallery."
    )
    mask: str | None = Field(None, description="Mask, likewise, white where the image is repainted.")
    blur: float | None = Field(None, description="Standard deviation in pixels of the blur of the mask's edge.")
    strength: float | None = Field(None, description="Share of the steps that change the image, 0 to 1.")
    outpaint: Margins | None = Field(None, description="Pixels by which the image is extended.")
    enlarge: int | None = Field(
        None,
        ge=2,
        le=MAX_FACTOR,
        description="Factor by which the image is enlarged: that of a model trained for it, or any of another model, which "
        "then refines an interpolated image.",
    )
    controlnets: list[ControlField] | None = Field(None, description="ControlNets that act, each with its image.")


def edit_arguments(fields: EditFields, gallery: Gallery) -> dict[str, Any] | None:
    """Return the arguments of :meth:`Service.edit` that a request gives; None if it names no image.

    Raises:
        SamplingError: an image is no base64, or another field needs one.
    """
    names = ("mask", "blur", "strength", "outpaint", "enlarge")
    given = {name: getattr(fields, name) for name in names if getattr(fields, name) is not None}
    if fields.image is None:
        for name in given:
            raise SamplingError(f"{name} is about an image; give image too.")
        return None
    given["image"] = content_of(fields.image, "image", gallery)
    if fields.mask is not None:
        given["mask"] = content_of(fields.mask, "mask", gallery)
    return given


def content_of(given: str, name: str, gallery: Gallery) -> bytes:
    """Return the bytes of an image that a request gives, in base64 or by its name in the gallery.

    Raises:
        SamplingError: it is neither.
    """
    path = gallery.file(given)
    return decoded_base64(given, name) if path is None else path.read_bytes()


@dataclass(frozen=True)
class Edit:
    """The work of a job that edits an image; without mask, margins and factor it is image-to-image.

    Attributes:
        image: the image.
        keep: stores an image and returns the name by which requests can give it again.
        mask: of the size of the image, white where it is repainted.
        strength: share of the steps, 0 to 1; default: that of the edit.
        blur: standard deviation in pixels of the blur of the mask's edge.
        outpaint: pixels by which the image is extended.
        enlarge: factor by which it is enlarged.

    Raises:
        SamplingError: two edits at once, or a blur without an edge.
    """

    image: Image.Image
    keep: Callable[[Image.Image], str]
    mask: Image.Image | None = None
    strength: float | None = None
    blur: float | None = None
    outpaint: Margins | None = None
    enlarge: int | None = None

    def __post_init__(self) -> None:
        edits = [name for name in ("mask", "outpaint", "enlarge") if getattr(self, name) is not None]
        if len(edits) > 1:
            raise SamplingError(
                f"{' and '.join(edits)} are different edits; give one of them, and edit the result again."
            )
        if self.blur is not None and edits not in (["mask"], ["outpaint"]):
            raise SamplingError("blur is about the edge of a mask; give mask or outpaint too.")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        margins, factor = self.outpaint or Margins(), self.enlarge or 1
        width, height = self.image.size
        return factor * (height + margins.top + margins.bottom), factor * (width + margins.left + margins.right)

    def __call__(self, pipe: Pipeline, settings: SamplingSettings) -> Images:
        """Return the edited image, whose record has the request that makes it again."""
        more = arguments(settings)
        prompt = more.pop("prompt", None)
        given = {name: getattr(self, name) for name in ("strength", "blur") if getattr(self, name) is not None}
        if self.enlarge is not None:
            images = _enlarged(pipe, prompt, self.image, self.enlarge, given, more)
        elif self.outpaint is not None:
            images = editing.outpaint(pipe, prompt, self.image, **self.outpaint.model_dump(), **given, **more)
        elif self.mask is not None:
            images = editing.inpaint(pipe, prompt, self.image, self.mask, **given, **more)
        else:
            images = editing.image_to_image(pipe, prompt, self.image, **given, **more)
        request = {"request": json.dumps(fields_of(settings) | given | self._inputs())}
        for image in images:
            with_record(image, {str(name): text for name, text in image.info.items()} | request)
        return images

    def _inputs(self) -> dict[str, Any]:
        inputs: dict[str, Any] = {"image": self.keep(self.image)}
        if self.mask is not None:
            inputs["mask"] = self.keep(self.mask)
        if self.outpaint is not None:
            inputs["outpaint"] = self.outpaint.model_dump()
        if self.enlarge is not None:
            inputs["enlarge"] = self.enlarge
        return inputs


def enlarging_factor(pipe: Pipeline) -> int | None:
    """Return the factor of a model that was trained to enlarge images; None for another model."""
    parts = pipe.model.conditioner.modules()
    return next((part.config.factor for part in parts if isinstance(part, LowResConditioner)), None)


def _enlarged(
    pipe: Pipeline, prompt: Any, image: Image.Image, factor: int, given: dict[str, Any], more: dict[str, Any]
) -> Images:
    trained = enlarging_factor(pipe)
    if trained is None:
        large = image.resize((factor * image.width, factor * image.height), Image.Resampling.LANCZOS)
        return editing.image_to_image(pipe, prompt, large, **{"strength": ENLARGING_STRENGTH} | given, **more)
    if factor != trained:
        raise SamplingError(f"enlarge is {factor}; this model was trained to enlarge by {trained}.")
    return editing.upscale(pipe, image, prompt=prompt, **more)
