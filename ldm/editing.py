"""Editing of images. Each task is a start and a wrapper of the denoiser for the pipeline's one sampling loop.

>>> from ldm import Pipeline, editing
>>> pipe = Pipeline.from_pretrained("emoji")
>>> editing.image_to_image(pipe, "a green apple", "apple.png", strength=0.7)[0].save("green.png")
>>> editing.inpaint(pipe, "a green apple", "apple.png", "mask.png")

``settings`` are those of :class:`ldm.sampling_settings.SamplingSettings`: ``seed``, ``guidance_scale``, ``label``, ...
``image`` is a PIL image, the name of a file, an array ``[h w c]`` or a tensor ``[c h w]`` (uint8 in [0, 255] or floats in
[0, 1]; see :mod:`ldm.image_arguments`), or several of them, one for each prompt; one image serves several prompts and
one prompt several images. ``strength``, 0 to 1, is the share of the sampling steps that are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from ldm.checks import number, plain, whole_number
from ldm.conditioning import LowResConditioner
from ldm.devices import usual_torch_state
from ldm.diffusion import Denoiser, seeded_noise
from ldm.errors import SamplingError
from ldm.image_arguments import ImageSource, listed_images, read_image, read_mask
from ldm.image_io import to_tensor
from ldm.inputs import one_seed, seed_list
from ldm.modalities.arguments import entries
from ldm.modalities.base import listed
from ldm.pipeline import Pipeline
from ldm.prompts import Blend, Prompt
from ldm.sampling_loop import Edit
from ldm.sampling_settings import SamplingSettings


@dataclass(frozen=True, kw_only=True)
class ImageToImage(Edit):
    """Sampling that starts from images with noise added, at an intermediate level (SDEdit, Meng et al. 2108.01073).

    Attributes:
        latents: normalized, one for each image to make, ``[n c h w]``.
        strength: share of the steps to take; at 1 it starts from noise alone.
        images: the images of the latents, ``[n 3 H W]`` in [0, 1]; the result if there is no step to take.
    """

    latents: Tensor
    strength: float
    images: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", number("strength", self.strength, 0, 1))

    def levels(self, levels: Tensor) -> Tensor:
        steps = len(levels) - 1
        return levels[steps - math.ceil(round(steps * self.strength, 9)) :]

    def start(self, x: Tensor, unit: Tensor, sigma: float, rows: slice) -> Tensor:
        return x if self.strength == 1 else self.latents[rows] + sigma * unit

    def finish(self, images: Tensor, rows: slice) -> Tensor:
        return images if self.strength or self.images is None else self.images[rows]

    def record(self) -> dict[str, Any]:
        return {"task": type(self).__name__, "strength": self.strength}


@dataclass(frozen=True, kw_only=True)
class Inpaint(ImageToImage):
    """Sampling that keeps the known part of images (cf. Lugmayr et al. 2201.09865).

    Where the clean image is known, D(x, s) is set to it; each solver then keeps x there at the image plus the noise of
    its level.

    Attributes:
        mask: 1 where latents are generated, 0 where they are known, ``[n 1 h w]``.
        blend: share of the generated image in each pixel, ``[n 1 H W]``.
    """

    mask: Tensor
    blend: Tensor

    def start(self, x: Tensor, unit: Tensor, sigma: float, rows: slice) -> Tensor:
        free = super().start(x, unit, sigma, rows)
        return torch.lerp(self.latents[rows] + sigma * unit, free, self.mask[rows])

    def wrap(self, denoise: Denoiser, rows: slice) -> Denoiser:
        known, mask = self.latents[rows], self.mask[rows]
        return lambda x, sigma: torch.lerp(known, denoise(x, sigma), mask)

    def finish(self, images: Tensor, rows: slice) -> Tensor:
        assert self.images is not None
        known = self.images[rows]
        return torch.lerp(known, super().finish(images, rows), self.blend[rows])


@usual_torch_state()
def image_to_image(
    pipe: Pipeline,
    prompt: Prompt | Sequence[Prompt] | None,
    image: ImageSource | Sequence[ImageSource],
    strength: float = 0.8,
    **settings: Any,
) -> Any:
    """Change images towards the prompt, the more the greater the ``strength``; at 0 they are returned unchanged.

    Raises:
        SamplingError: ``strength`` outside of [0, 1]; images that cannot be read, of several sizes or of one that
            the model cannot make, or fewer than prompts; and whatever the pipeline raises.
    """
    strength = number("strength", strength, 0, 1)
    images, paired, repeats = _paired(pipe, image, SamplingSettings.of(prompt, **settings))
    latents, images = (each.repeat_interleave(repeats, 0) for each in (pipe.encode(images), images))
    return _sampled(pipe, paired, edit=ImageToImage(latents=latents, strength=strength, images=images))


@usual_torch_state()
def inpaint(
    pipe: Pipeline,
    prompt: Prompt | Sequence[Prompt] | None,
    image: ImageSource | Sequence[ImageSource],
    mask_image: ImageSource | Sequence[ImageSource],
    strength: float = 1.0,
    blur: float = 0.0,
    **settings: Any,
) -> Any:
    """Repaint images where ``mask_image`` is white; where it is black, pixels stay bitwise the same, except in a blurred edge.

    Works with any model; one whose conditioner reads ``inpaint`` (a 9-channel U-Net) is also given the known part.

    Args:
        mask_image: of the size of its image; one for all, or one for each. What is transparent is black.
        blur: standard deviation in pixels of the Gaussian that blurs the mask's edge, over which old and new are blended.

    Raises:
        SamplingError: as :func:`image_to_image`; a mask of another size than its image.
    """
    strength, blur = number("strength", strength, 0, 1), number("blur", blur, 0)
    images, paired, repeats = _paired(pipe, image, SamplingSettings.of(prompt, **settings))
    sharp, blend = _masks(mask_image, images, blur)
    mask = F.max_pool2d(sharp, pipe.model.config.first_stage.factor)
    if "inpaint" in pipe.model.config.conditioner.input_keys:
        known = pipe.encode(torch.where(sharp > 0.5, 0.5, images))
        paired = _with_condition(paired, inpaint=list(torch.cat([mask, known], dim=1)))
    parts = (each.repeat_interleave(repeats, 0) for each in (pipe.encode(images), mask, images, blend))
    latents, mask, images, blend = parts
    edit = Inpaint(latents=latents, strength=strength, images=images, mask=mask, blend=blend)
    return _sampled(pipe, paired, edit=edit)


@usual_torch_state()
def outpaint(
    pipe: Pipeline,
    prompt: Prompt | Sequence[Prompt] | None,
    image: ImageSource,
    left: int = 0,
    top: int = 0,
    right: int = 0,
    bottom: int = 0,
    **settings: Any,
) -> Any:
    """Extend an image by a number of pixels on each side; ``settings`` as in :func:`inpaint`.

    Raises:
        SamplingError: as :func:`inpaint`; no side to extend.
    """
    margins = {"left": left, "top": top, "right": right, "bottom": bottom}
    left, top, right, bottom = (whole_number(side, margin, 0) for side, margin in margins.items())
    if not any((left, top, right, bottom)):
        raise SamplingError("outpaint needs a side to continue; give left, top, right or bottom in pixels.")
    known = read_image(image)
    canvas = F.pad(known[None], (left, right, top, bottom), mode="replicate")[0]
    mask = F.pad(torch.zeros_like(known[0]), (left, right, top, bottom), value=1.0)
    return inpaint(pipe, prompt, canvas, mask, **settings)


@usual_torch_state()
def variations(pipe: Pipeline, image: ImageSource | Sequence[ImageSource], **settings: Any) -> Any:
    """Generate images of the same content as ``image``, with a model that is conditioned on image embeddings.

    Raises:
        SamplingError: the model reads no image.
    """
    if "image" not in pipe.model.config.conditioner.input_keys:
        raise SamplingError(
            "this model reads no image, which variations need; "
            "train one with the conditioner image, or try image_to_image."
        )
    return _sampled(
        pipe,
        _with_condition(
            SamplingSettings.of(**settings), image=[2 * read_image(each) - 1 for each in listed_images(image)]
        ),
    )


@usual_torch_state()
def style_transfer(
    pipe: Pipeline,
    image: ImageSource | Sequence[ImageSource],
    style: Image.Image | Path | np.ndarray | Tensor | Prompt | Sequence[Prompt],
    strength: float = 0.6,
    **settings: Any,
) -> Any:
    """Render the content of ``image`` in a style: that of a prompt, or of an image for models that read one.

    A string is a prompt, whatever files there are, and a list of strings has one for each image; the file of an image is a
    :class:`pathlib.Path`. This is :func:`image_to_image` whose denoiser attends to the style's embedding in all steps.

    Raises:
        SamplingError: as :func:`image_to_image`; a style image for a model that reads none; the name of an image file as a
            string; a prompt in addition to a style that is a prompt.
    """
    prompts = style if isinstance(style, list | tuple) else [style]
    if prompts and all(isinstance(each, Prompt) for each in prompts):
        for each in prompts:
            if isinstance(each, str) and Path(each).suffix.lower() in Image.registered_extensions():
                raise SamplingError(
                    f"the style {each!r} is a string, hence a prompt; give pathlib.Path({each!r}) for an image."
                )
        if settings.pop("prompt", None) is not None:
            raise SamplingError("the style is a prompt already; leave prompt out.")
        return image_to_image(pipe, cast(Any, style), image, strength, **settings)
    condition = {**(settings.pop("condition", None) or {}), "image": [2 * read_image(cast(Any, style)) - 1]}
    if "image" not in pipe.model.config.conditioner.input_keys:
        raise SamplingError("this model reads no image; describe the style in a prompt.")
    return image_to_image(pipe, settings.pop("prompt", None), image, strength, condition=condition, **settings)


@usual_torch_state()
def interpolate(
    pipe: Pipeline,
    prompt: Prompt | tuple[Prompt, Prompt] | None = None,
    *,
    seeds: tuple[int, int],
    frames: int = 8,
    **settings: Any,
) -> Any:
    """Generate a row of images from one seed to another, along the great circle between their starting noise.

    Args:
        prompt: one for all images, or a pair; the row then blends from the first to the second.
        seeds: of the first and the last image; if they are equal, the prompt alone changes.
        frames: number of images.

    Raises:
        SamplingError: as the pipeline; fewer than two frames; several prompts that are no pair.
    """
    frames = whole_number("frames", frames)
    if frames < 2:
        raise SamplingError("frames is 1; a row from one image to the other needs 2 or more.")
    if "num_images_per_prompt" in settings:
        raise SamplingError("a row has as many images as frames; leave num_images_per_prompt out.")
    for name in ("seed", "latents", "generator"):
        if settings.get(name) is not None:
            raise SamplingError(f"the noise of a row follows from seeds; leave {name} out.")
    if len(ends := listed(plain(seeds))) != 2:
        raise SamplingError(f"seeds is {plain(seeds)!r}; a row leads from one seed to another, so give two.")
    first_seed, last_seed = seed_list(ends, 2)
    shape = pipe.latent_shape(settings.get("height"), settings.get("width"))
    first, last = seeded_noise([first_seed, last_seed], shape)(math.inf, 0.0)
    shares = torch.linspace(0, 1, frames, dtype=torch.float32, device="cpu").tolist()
    noise = torch.stack([slerp(first, last, share) for share in shares])
    settings |= {"latents": noise, "seed": [first_seed] * frames}
    if prompt is None or isinstance(prompt, Prompt):
        return pipe(prompt, num_images_per_prompt=frames, **settings)
    if len(prompt) != 2:
        raise SamplingError(f"{len(prompt)} prompts are given; a row leads from one to the other, so give two.")
    return pipe([Blend(*prompt, share) for share in shares], **settings)


@usual_torch_state()
def high_resolution(
    pipe: Pipeline,
    prompt: Prompt | Sequence[Prompt] | None,
    height: int,
    width: int,
    strength: float = 0.6,
    **settings: Any,
) -> Any:
    """Generate images larger than the model was trained on, in two passes: sample small, enlarge the latent, refine.

    Sampled in one pass, a large image repeats its subject, since the network has never seen so many latents. The first
    pass has the proportions of the result, and about as many pixels as the training images.

    Raises:
        SamplingError: as :func:`image_to_image`.
    """
    _, rows, columns = pipe.latent_shape(height, width)
    trained = math.prod(pipe.model.latent_shape()[1:])
    scale = min(1.0, math.sqrt(trained / (rows * columns)))
    factor = pipe.model.config.first_stage.factor
    small = {"height": max(1, round(rows * scale)) * factor, "width": max(1, round(columns * scale)) * factor}
    large = SamplingSettings.of(prompt, height=height, width=width, **settings)
    large = replace(large, seed=one_seed() if large.seed is None else large.seed)
    strength = number("strength", strength, 0, 1)
    latents = _sampled(pipe, large, **small, output_type="latent", callback=None)
    enlarged = F.interpolate(latents, size=(rows, columns), mode="bicubic")
    return _sampled(pipe, large, edit=ImageToImage(latents=enlarged, strength=strength))


@usual_torch_state()
def upscale(pipe: Pipeline, image: ImageSource | Sequence[ImageSource], **settings: Any) -> Any:
    """Enlarge images by the factor of a model that was trained for super-resolution (its conditioner is low_res).

    Raises:
        SamplingError: the model enlarges no images; images that cannot be read or are of several sizes.
    """
    parts = pipe.model.conditioner.modules()
    factor = next((part.config.factor for part in parts if isinstance(part, LowResConditioner)), None)
    if factor is None:
        raise SamplingError(
            "this model enlarges no images; train one with the conditioner low_res, as configs/emoji_sr.yaml does."
        )
    record = SamplingSettings.of(**settings)
    images = _stacked(image, record)
    height, width = (factor * side for side in images.shape[-2:])
    return _sampled(pipe, _with_condition(record, low_res=list(2 * images - 1)), height=height, width=width)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Interpolate noise spherically, which keeps its length, unlike a straight line (White 1609.04468)."""
    angle = torch.acos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1)).item()
    if angle == 0:
        return a
    return (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)


def _sampled(pipe: Pipeline, settings: SamplingSettings, **changes: Any) -> Any:
    return pipe.sample(replace(settings, **changes)).result()


def _paired(pipe: Pipeline, image: Any, settings: SamplingSettings) -> tuple[Tensor, SamplingSettings, int]:
    """Return the images, the settings with one condition of each name for each of them, and the results per image.

    The images are ``[m 3 h w]`` in [0, 1]; one is repeated for each prompt, one prompt for each of them.
    """
    stacked = _stacked(image, settings).to(pipe.device)
    if pipe.model.config.first_stage.image_channels == 1:
        stacked = stacked.mean(1, keepdim=True)
    height, width = stacked.shape[-2:]
    pipe.latent_shape(height, width)  # raises where the model cannot make it

    m, repeats = len(stacked), settings.num_images_per_prompt
    conditions = {"prompt": settings.prompt, "label": settings.label, **(settings.condition or {})}
    lists = {name: entries(name, value) for name, value in conditions.items() if value is not None}
    n = max((len(values) for values in lists.values()), default=1)
    if n > 1 and m not in (1, n):
        what = next(name for name, values in lists.items() if len(values) == n)
        raise SamplingError(f"{m} images do not fit {n} of {what}; give one, or one for each.")
    lists = {name: values * m if len(values) == 1 else values for name, values in lists.items()}
    settings = replace(
        settings,
        prompt=lists.pop("prompt", None),
        label=lists.pop("label", None),
        condition=lists,
        height=height,
        width=width,
        num_images_per_prompt=repeats if pipe.model.config.conditioner.input_keys else m * repeats,
    )
    return stacked.expand(max(m, n), -1, -1, -1), settings, repeats


def _stacked(image: Any, settings: SamplingSettings) -> Tensor:
    """Read the images as ``[m 3 h w]`` in [0, 1]."""
    if (settings.height, settings.width) != (None, None):
        raise SamplingError("the size goes by the image; resize it, and leave height and width out.")
    images = [read_image(each) for each in listed_images(image)]
    if not images:
        raise SamplingError("the list of images is empty; give one or several.")
    sizes = dict.fromkeys((each.shape[2], each.shape[1]) for each in images)
    if len(sizes) != 1:
        given = ", ".join(f"{width} x {height}" for width, height in sizes)
        raise SamplingError(f"the images must be of one size, but they are {given}; edit them one by one.")
    return torch.stack(images)


def _with_condition(settings: SamplingSettings, **more: list[Any]) -> SamplingSettings:
    return replace(settings, condition={**(settings.condition or {}), **more})


def _blurred(mask: Tensor, blur: float) -> Tensor:
    image = Image.fromarray((255 * mask).round().byte().numpy())
    return to_tensor(image.filter(ImageFilter.GaussianBlur(blur)))[0]


def _masks(mask_image: Any, images: Tensor, blur: float) -> tuple[Tensor, Tensor]:
    """Read the masks, as they are and with a soft edge, ``[m 1 h w]`` in [0, 1]."""
    height, width = images.shape[-2:]
    masks = [read_mask(mask) for mask in listed_images(mask_image)]
    for mask in masks:
        if mask.shape != (height, width):
            raise SamplingError(
                f"the mask is {mask.shape[1]} x {mask.shape[0]} pixels, but its image {width} x {height}; resize it."
            )
    if len(masks) not in (1, len(images)):
        raise SamplingError(f"{len(masks)} masks do not fit {len(images)} images; give one, or one for each.")
    soft = [_blurred(mask, blur) if blur else mask for mask in masks]
    sharp, blend = (torch.stack(each)[:, None].to(images) for each in (masks, soft))
    shape = (len(images), 1, height, width)
    return sharp.expand(shape), blend.expand(shape)
