"""Editing of images. Each task is a start and a wrapper of the denoiser over the pipeline's one sampling loop.

>>> from ldm import Pipeline, editing
>>> pipe = Pipeline.from_pretrained("emoji")
>>> editing.image_to_image(pipe, "a green apple", "apple.png", strength=0.7)[0].save("green.png")
>>> editing.inpaint(pipe, "a green apple", "apple.png", "mask.png")

What a function does not name goes on to the pipeline: ``seed``, ``guidance_scale``, ``sampler``, ``label``, ...
``image`` is a PIL image, the name of a file, or a list of them, one for each prompt; one image serves several
prompts and one prompt several images. ``strength``, 0 to 1, is the share of the sampling's steps that are made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from ldm.conditioning import LowResConditioner
from ldm.diffusion import Denoiser
from ldm.errors import SamplingError
from ldm.image_io import read_picture, to_tensor
from ldm.inputs import Edit, check_counts, one_seed
from ldm.modalities.arguments import entries
from ldm.modalities.base import listed
from ldm.pipeline import Pipeline
from ldm.prompts import Blend, Prompt

Picture = Image.Image | str | Path


@dataclass(frozen=True, kw_only=True)
class ImageToImage(Edit):
    """Starts from images with noise on them, in the midst of the levels (SDEdit, Meng et al. 2108.01073).

    Attributes:
        latents: normalised, one for each image to make, ``[n c h w]``.
        strength: share of the steps to make; at 1 it starts from noise alone.
        images: what the latents are of, ``[n 3 H W]`` in [0, 1]; with no step to make, they are the result.
    """

    latents: Tensor
    strength: float
    pictures: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise SamplingError(f"strength is {self.strength}; it must be from 0 to 1.")

    def levels(self, levels: Tensor) -> Tensor:
        steps = len(levels) - 1
        return levels[steps - math.ceil(round(steps * self.strength, 9)) :]

    def start(self, x: Tensor, unit: Tensor, sigma: float, rows: slice) -> Tensor:
        return x if self.strength == 1 else self.latents[rows] + sigma * unit

    def finish(self, pictures: Tensor, rows: slice) -> Tensor:
        return pictures if self.strength or self.pictures is None else self.pictures[rows]

    def record(self) -> dict[str, Any]:
        return {"task": type(self).__name__, "strength": self.strength}


@dataclass(frozen=True, kw_only=True)
class Inpaint(ImageToImage):
    """Keeps the known part: to the solver, the denoiser has found it already (cf. Lugmayr et al. 2201.09865).

    Where the clean image is known, D(x, s) is that image; each solver then leaves x there at the image with
    the noise that belongs to its level.

    Attributes:
        mask: 1 where latents are to be made anew, 0 where they are known, ``[n 1 h w]``.
        blend: how much of the pixels is made anew, ``[n 1 H W]``.
    """

    mask: Tensor
    blend: Tensor

    def start(self, x: Tensor, unit: Tensor, sigma: float, rows: slice) -> Tensor:
        free = super().start(x, unit, sigma, rows)
        return torch.lerp(self.latents[rows] + sigma * unit, free, self.mask[rows])

    def wrap(self, denoise: Denoiser, rows: slice) -> Denoiser:
        known, mask = self.latents[rows], self.mask[rows]
        return lambda x, sigma: torch.lerp(known, denoise(x, sigma), mask)

    def finish(self, pictures: Tensor, rows: slice) -> Tensor:
        assert self.pictures is not None
        known = self.pictures[rows]
        return torch.lerp(known, super().finish(pictures, rows), self.blend[rows])


def image_to_image(
    pipe: Pipeline,
    prompt: Prompt | Sequence[Prompt] | None,
    image: Picture | Sequence[Picture],
    strength: float = 0.8,
    **settings: Any,
) -> Any:
    """Pictures like ``image``, changed towards the prompt, the more the greater the ``strength``; 0 gives them back.

    Raises:
        SamplingError: ``strength`` outside of [0, 1]; images that cannot be read, of several sizes or of one that
            the model cannot make, or fewer than prompts; and whatever the pipeline raises.
    """
    pictures, settings, repeats = _paired(pipe, prompt, image, settings)
    latents, pictures = (each.repeat_interleave(repeats, 0) for each in (pipe.encode(pictures), pictures))
    return pipe(**settings, edit=ImageToImage(latents=latents, strength=strength, pictures=pictures))


def inpaint(
    pipe: Pipeline,
    prompt: Prompt | Sequence[Prompt] | None,
    image: Picture | Sequence[Picture],
    mask_image: Picture | Sequence[Picture],
    strength: float = 1.0,
    blur: float = 0.0,
    **settings: Any,
) -> Any:
    """Paint what is white in ``mask_image`` anew; what is black stays as it is, to the bit, but for the edge that is blurred.

    Works with any model; one whose conditioner reads ``inpaint`` (a 9-channel U-Net) is also shown the known part.

    Args:
        mask_image: of the size of its image; one for all, or one for each.
        blur: deviation of the mask's edge in pixels, over which old and new are blended.

    Raises:
        SamplingError: as :func:`image_to_image`; a mask of another size than its image.
    """
    pictures, settings, repeats = _paired(pipe, prompt, image, settings)
    sharp, blend = _masks(mask_image, pictures, blur)
    mask = F.max_pool2d(sharp, pipe.model.config.first_stage.factor)
    if "inpaint" in pipe.model.config.conditioner.input_keys:
        known = pipe.encode(torch.where(sharp > 0.5, 0.5, pictures))
        condition = {"inpaint": list(torch.cat([mask, known], dim=1))}
        settings["condition"] |= condition
    parts = (each.repeat_interleave(repeats, 0) for each in (pipe.encode(pictures), mask, pictures, blend))
    latents, mask, pictures, blend = parts
    edit = Inpaint(latents=latents, strength=strength, pictures=pictures, mask=mask, blend=blend)
    return pipe(**settings, edit=edit)


def outpaint(
    pipe: Pipeline,
    prompt: Prompt | Sequence[Prompt] | None,
    image: Picture,
    left: int = 0,
    top: int = 0,
    right: int = 0,
    bottom: int = 0,
    **settings: Any,
) -> Any:
    """Continue an image by so many pixels on its sides; ``settings`` as of :func:`inpaint`.

    Raises:
        SamplingError: as :func:`inpaint`; no side to continue.
    """
    margins = {"left": left, "top": top, "right": right, "bottom": bottom}
    check_counts(**{side: margin or None for side, margin in margins.items()})  # 0 continues nothing
    if not any(margins.values()):
        raise SamplingError("outpaint needs a side to continue; give left, top, right or bottom in pixels.")
    picture = read_picture(image)
    canvas = np.pad(np.asarray(picture), ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = Image.new("L", (canvas.shape[1], canvas.shape[0]), "white")
    mask.paste(0, (left, top, left + picture.width, top + picture.height))
    return inpaint(pipe, prompt, Image.fromarray(canvas), mask, **settings)


def variations(pipe: Pipeline, image: Picture | Sequence[Picture], **settings: Any) -> Any:
    """Pictures that show what ``image`` shows, by a model that is conditioned on the embedding of an image.

    Raises:
        SamplingError: the model reads no image.
    """
    if "image" not in pipe.model.config.conditioner.input_keys:
        raise SamplingError(
            "this model reads no image, which variations need; "
            "train one with the conditioner image, or try image_to_image."
        )
    return pipe(**_with_condition(settings, image=listed(image)))


def style_transfer(
    pipe: Pipeline,
    image: Picture | Sequence[Picture],
    style: Picture | Prompt,
    strength: float = 0.6,
    **settings: Any,
) -> Any:
    """The content of ``image`` in a style: that of an image if the model reads images, else that of a prompt.

    :func:`image_to_image` in which the denoiser attends to the style's embedding at all its steps.

    Raises:
        SamplingError: as :func:`image_to_image`; a style image for a model that reads none.
    """
    if isinstance(style, Prompt) and not (isinstance(style, str) and _is_file(style)):
        return image_to_image(pipe, style, image, strength, **settings)
    if "image" not in pipe.model.config.conditioner.input_keys:
        raise SamplingError("this model reads no image; describe the style in a prompt.")
    prompt = settings.pop("prompt", None)
    return image_to_image(pipe, prompt, image, strength, **_with_condition(settings, image=[style]))


def interpolate(
    pipe: Pipeline,
    prompt: Prompt | tuple[Prompt, Prompt] | None = None,
    *,
    seeds: tuple[int, int],
    frames: int = 8,
    **settings: Any,
) -> Any:
    """A row of images between those of two seeds, along the great circle between their starting noise.

    Args:
        prompt: one for all images, or a pair, from the first of which the row blends to the second.
        seeds: of the first and the last image; the same twice changes the prompt alone.

    Raises:
        SamplingError: as the pipeline; fewer than two frames; several prompts that are no pair.
    """
    check_counts(frames=frames)
    if frames < 2:
        raise SamplingError("frames is 1; a row from one image to the other needs 2 or more.")
    if "num_images_per_prompt" in settings:
        raise SamplingError("a row has as many images as frames; leave num_images_per_prompt out.")
    shape = pipe.latent_shape(settings.get("height"), settings.get("width"))
    first, last = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds)
    shares = torch.linspace(0, 1, frames).tolist()
    noise = torch.stack([slerp(first, last, share) for share in shares])
    settings |= {"latents": noise, "seed": [seeds[0]] * frames}
    if prompt is None or isinstance(prompt, Prompt):
        return pipe(prompt, num_images_per_prompt=frames, **settings)
    if len(prompt) != 2:
        raise SamplingError(f"{len(prompt)} prompts are given; a row leads from one to the other, so give two.")
    return pipe([Blend(*prompt, share) for share in shares], **settings)


def high_resolution(
    pipe: Pipeline,
    prompt: Prompt | Sequence[Prompt] | None,
    height: int,
    width: int,
    strength: float = 0.6,
    **settings: Any,
) -> Any:
    """Pictures larger than the model was trained on, in two passes: sample small, enlarge the latent, refine.

    Sampled at once, a large image repeats its subject, since the network has never seen so many latents. The first
    pass has the proportions asked for, and about as many pixels as the model was trained on.

    Raises:
        SamplingError: as :func:`image_to_image`.
    """
    _, rows, columns = pipe.latent_shape(height, width)
    trained = math.prod(pipe.model.latent_shape()[1:])
    scale = min(1.0, math.sqrt(trained / (rows * columns)))
    factor = pipe.model.config.first_stage.factor
    small = {"height": max(1, round(rows * scale)) * factor, "width": max(1, round(columns * scale)) * factor}
    draft = {name: value for name, value in settings.items() if name not in ("output_type", "callback")}
    seed = settings.pop("seed", None)
    seed = one_seed() if seed is None else seed
    latents = pipe(prompt, **draft | small | {"seed": seed, "output_type": "latent"})
    enlarged = F.interpolate(latents, size=(rows, columns), mode="bicubic")
    edit = ImageToImage(latents=enlarged, strength=strength)
    return pipe(prompt, height=height, width=width, seed=seed, edit=edit, **settings)


def upscale(pipe: Pipeline, image: Picture | Sequence[Picture], **settings: Any) -> Any:
    """Pictures like ``image``, larger by the factor of a model that was trained to enlarge (its conditioner is low_res).

    Raises:
        SamplingError: the model enlarges no images; images that cannot be read or are of several sizes.
    """
    parts = pipe.model.conditioner.modules()
    factor = next((part.config.factor for part in parts if isinstance(part, LowResConditioner)), None)
    if factor is None:
        raise SamplingError(
            "this model enlarges no images; train one with the conditioner low_res, as configs/emoji_sr.yaml does."
        )
    pictures = _stacked(image, settings)
    height, width = (factor * side for side in pictures.shape[-2:])
    return pipe(**_with_condition(settings, low_res=list(2 * pictures - 1)), height=height, width=width)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation of noise: keeps the length, which a straight line would cut (White 1609.04468)."""
    angle = torch.acos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1)).item()
    if angle == 0:
        return a
    return (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)


def _paired(pipe: Pipeline, prompt: Any, image: Any, settings: dict[str, Any]) -> tuple[Tensor, dict[str, Any], int]:
    """Pictures, settings that ask for as many, and how many are made of each.

    The images are ``[m 3 h w]`` in [0, 1]; one is repeated for each prompt, one prompt for each of them.
    """
    stacked = _stacked(image, settings).to(pipe.device)
    if pipe.model.config.first_stage.image_channels == 1:
        stacked = stacked.mean(1, keepdim=True)
    height, width = stacked.shape[-2:]
    pipe.latent_shape(height, width)  # raises where the model cannot make it

    m, repeats = len(stacked), settings.get("num_images_per_prompt", 1)
    check_counts(num_images_per_prompt=repeats)
    asked = {"prompt": prompt, "label": settings.get("label"), **(settings.get("condition") or {})}
    lists = {name: entries(name, value) for name, value in asked.items() if value is not None}
    n = max((len(values) for values in lists.values()), default=1)
    if n > 1 and m not in (1, n):
        what = next(name for name, values in lists.items() if len(values) == n)
        raise SamplingError(f"{m} images do not fit {n} of {what}; give one, or one for each.")
    lists = {name: values * m if len(values) == 1 else values for name, values in lists.items()}
    settings = settings | {name: lists.pop(name, None) for name in ("prompt", "label")}
    settings |= {"condition": lists, "height": height, "width": width}
    if not pipe.model.config.conditioner.input_keys:
        settings["num_images_per_prompt"] = m * repeats
    return stacked.expand(max(m, n), -1, -1, -1), settings, repeats


def _stacked(image: Any, settings: Mapping[str, Any]) -> Tensor:
    """The images that are asked for, ``[m 3 h w]`` in [0, 1]."""
    if "height" in settings or "width" in settings:
        raise SamplingError("the size goes by the image; resize it, and leave height and width out.")
    pictures = [read_picture(picture) for picture in listed(image)]
    sizes = dict.fromkeys(picture.size for picture in pictures)
    if len(sizes) != 1:
        given = ", ".join(f"{width} x {height}" for width, height in sizes) or "none"
        raise SamplingError(f"the images must be of one size, but they are {given}; edit them one by one.")
    return torch.stack([to_tensor(picture) for picture in pictures])


def _with_condition(settings: Mapping[str, Any], **more: list[Any]) -> dict[str, Any]:
    return {**settings, "condition": {**(settings.get("condition") or {}), **more}}


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # too long for a name
        return False


def _masks(mask_image: Any, pictures: Tensor, blur: float) -> tuple[Tensor, Tensor]:
    """The masks as they are and with a soft edge, ``[m 1 h w]`` in [0, 1]."""
    height, width = pictures.shape[-2:]
    masks = [read_picture(mask).convert("L") for mask in listed(mask_image)]
    for mask in masks:
        if mask.size != (width, height):
            raise SamplingError(
                f"the mask is {mask.width} x {mask.height} pixels, but its image {width} x {height}; resize it."
            )
    if len(masks) not in (1, len(pictures)):
        raise SamplingError(f"{len(masks)} masks do not fit {len(pictures)} images; give one, or one for each.")
    soft = [mask.filter(ImageFilter.GaussianBlur(blur)) for mask in masks]
    sharp, blend = (torch.stack([to_tensor(mask) for mask in each]).to(pictures) for each in (masks, soft))
    shape = (len(pictures), 1, height, width)
    return sharp.expand(shape), blend.expand(shape)
