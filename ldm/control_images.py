"""Images that control a sampling through the ControlNets of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.checks import number
from ldm.conditioning import ConditioningSchedule
from ldm.errors import SamplingError
from ldm.image_arguments import ImageSource, listed_images, read_image
from ldm.model import LatentDiffusion
from ldm.nn.conditioning import Control


@dataclass(frozen=True)
class ControlImage:
    """A hint image for a ControlNet, and how much and when it acts.

    Args:
        name: name of the ControlNet.
        image: the hint, such as edges or a depth map: an image, the name of its file, an array or a tensor (see
            :mod:`ldm.image_arguments`); or a list with one for each prompt. It is scaled to the size of the generated
            image, whose proportions it must have.
        scale: factor of the outputs of the ControlNet; 0 = without effect.
        start, end: shares of the steps, 0 to 1, between which it acts.

    Raises:
        SamplingError: a value is not valid, or an image cannot be read.
    """

    name: str
    image: ImageSource | Sequence[ImageSource] = field(repr=False)
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise SamplingError(f"the name of a ControlNet is {self.name!r}; give a string.")
        what = f"of the ControlNet {self.name!r}"
        object.__setattr__(self, "scale", float(number(f"the scale {what}", self.scale)))
        for name in ("start", "end"):
            object.__setattr__(self, name, float(number(f"the {name} {what}", getattr(self, name), 0, 1)))
        if self.start >= self.end:
            raise SamplingError(
                f"the start {what} is {self.start:g} and its end {self.end:g}; the end must be greater."
            )
        images = tuple(read_image(each) for each in listed_images(self.image))
        if not images:
            raise SamplingError(f"the list of images {what} is empty; give one, or one for each prompt.")
        object.__setattr__(self, "image", images)


def control_images(value: Any) -> tuple[ControlImage, ...]:
    """Return one or several :class:`ControlImage` as a tuple.

    Raises:
        SamplingError: it is something else.
    """
    given = tuple(value) if isinstance(value, Iterable) else (value,)
    for each in given:
        if not isinstance(each, ControlImage):
            raise SamplingError(
                f"controlnets has an entry of type {type(each).__name__}; give ldm.control_images.ControlImage, one or several."
            )
    return given


@dataclass(frozen=True)
class ControlHints:
    """The hints of a ControlNet for some images of a call.

    Attributes:
        name, scale, start, end: as in :class:`ControlImage`.
        fingerprint: that of the ControlNet.
        images: ``[n 3 H W]`` in [0, 1], or one for all images.
    """

    name: str
    scale: float
    start: float
    end: float
    fingerprint: str
    images: Tensor

    def __getitem__(self, rows: slice) -> ControlHints:
        """Return the hints of some of the images."""
        return self if len(self.images) == 1 else replace(self, images=self.images[rows])

    def record(self) -> dict[str, Any]:
        """Return its entry in the record of a generated image."""
        span = {"start": self.start, "end": self.end} if (self.start, self.end) != (0, 1) else {}
        return {"name": self.name, "file": self.fingerprint, "scale": self.scale, **span}


def hints_of(
    model: LatentDiffusion, given: Sequence[ControlImage], latent_size: tuple[int, int], n: int, repeats: int
) -> tuple[ControlHints, ...]:
    """Return the hints of a call, in the size of its images.

    Args:
        model: the model.
        given: the images by their ControlNets.
        latent_size: height and width of the latents.
        n: number of images that the call makes.
        repeats: number of them for each prompt.

    Raises:
        SamplingError: no ControlNet has such a name, or images do not fit in their number or proportions.
    """
    factor, hints = model.config.first_stage.factor, []
    size = factor * latent_size[0], factor * latent_size[1]
    for control in given:
        controlnet = model.controlnets.named(control.name)
        images: Any = control.image
        if len(images) not in (1, n // repeats, n):
            raise SamplingError(
                f"{len(images)} images of the ControlNet {control.name!r} do not fit {n // repeats} prompts; give one, or "
                "one for each."
            )
        scaled = torch.stack([_scaled(image, size, factor, control.name) for image in images])
        scaled = scaled if len(images) in (1, n) else scaled.repeat_interleave(repeats, 0)
        settings = control.scale, control.start, control.end, controlnet.fingerprint
        hints.append(ControlHints(control.name, *settings, scaled))
    return tuple(hints)


def with_controls(
    model: LatentDiffusion,
    given: Sequence[ControlHints],
    conditional: ConditioningSchedule,
    unconditional: ConditioningSchedule,
    levels: Tensor,
    images: Sequence[int],
    n: int,
) -> tuple[ConditioningSchedule, ConditioningSchedule]:
    """Add the controls to the conditionings of a sampling, and return both.

    Args:
        model: the model, whose ControlNets embed the hints.
        given: the hints.
        conditional: conditionings with a row for each prompt.
        unconditional: those for the unconditional estimates of guidance, with a row for each image; a ControlNet with
            ``global_pool`` does not act on them.
        levels: falling noise levels ``[steps + 1]``.
        images: the image of each row of ``conditional``.
        n: number of images.
    """
    positive, negative = [], []
    for hints in given:
        controlnet = model.controlnets.named(hints.name)
        embedded = controlnet.embed(hints.images).expand(n, -1, -1, -1)
        interval = _interval(levels, hints.start, hints.end)
        positive.append(_control(hints.name, embedded[list(images)], hints.scale, *interval))
        pooled = controlnet.network.controlnet_config.global_pool
        negative.append(_control(hints.name, embedded, 0.0 if pooled else hints.scale, *interval))
    return (
        conditional.map(lambda record: replace(record, controls=tuple(positive))),
        unconditional.map(lambda record: replace(record, controls=tuple(negative))),
    )


def _control(name: str, hint: Tensor, scale: float, least: float, most: float) -> Control:
    """Return a control that is the same for all rows but for its hint ``[b w h w']``."""
    shape, values = (len(hint),), (scale, least, most)
    return Control(name, hint, *(torch.full(shape, value, dtype=torch.float32, device=hint.device) for value in values))


def _interval(levels: Tensor, start: float, end: float) -> tuple[float, float]:
    """Return the noise levels between which the steps lie that are within these shares, as in :class:`Control`."""
    steps = len(levels) - 1
    first, last = math.ceil(round(start * steps, 9)), math.floor(round(end * steps, 9))
    if first >= last:
        return math.inf, math.inf
    return (-1.0 if last == steps else levels[last].item()), (math.inf if first == 0 else levels[first].item())


def _scaled(image: Tensor, size: tuple[int, int], factor: int, name: str) -> Tensor:
    """Return an image ``[3 h w]`` in the given size; proportions may differ by what rounding to the factor changes."""
    (height, width), (own_height, own_width) = size, image.shape[1:]
    if (own_height, own_width) == size:
        return image
    differs = min(abs(own_width * height / own_height - width), abs(own_height * width / own_width - height))
    if differs > factor:
        raise SamplingError(
            f"the image of the ControlNet {name!r} has {own_width} x {own_height} pixels, other proportions than the "
            f"{width} x {height} of the generated image; cut it, or give a width and height that fit."
        )
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
