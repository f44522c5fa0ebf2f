"""Conditioner for inpainting: the additional input channels of nine-channel U-Nets, as in Stable Diffusion inpainting.

A mask (1 where the image is generated) and the latents of the masked image, grey under the mask, are concatenated to the
noisy latent (Rombach et al. 2112.10752, section 4.5). Training samples random masks: rectangles, free-form strokes (as in
LaMa, Suvorov et al. 2109.07161), and in a fraction of the examples the entire image, so that the model can also
generate without a known part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning.conditioner import Conditioner, ConditionerConfig, training_images
from ldm.config import config_field
from ldm.errors import ConfigError, SamplingError
from ldm.nn.conditioning import Conditioning
from ldm.nn.ranks import draw_rows

MOST_RECTANGLES, MOST_STROKES, MOST_BENDS = 3, 3, 5
"""Maximum numbers of rectangles and of strokes in a mask, and of bends in a stroke."""

SIDES = (0.2, 0.8)
"""Shortest and longest side of a rectangle, as fractions of the image's side."""

BRUSHES = (0.08, 0.3)
"""Thinnest and widest stroke, as fractions of the image's shorter side."""

LENGTHS = (0.1, 0.5)
"""Shortest and longest segment between two bends of a stroke, as fractions of the image's shorter side."""


@dataclass(frozen=True)
class InpaintConditionerConfig(ConditionerConfig, kind="inpaint"):
    """A mask and the latents of the known part of an image; without dropout, so that guidance has no effect on it."""

    latent_channels: int = config_field(4, "channels of the first stage's latents")
    whole: float = config_field(0.25, "fraction of the training examples in which the entire image is masked")

    def __post_init__(self) -> None:
        if self.latent_channels < 1 or not 0 <= self.whole <= 1:
            raise ConfigError(
                f"latent_channels must be at least 1 and whole in [0, 1], not {self.latent_channels} and {self.whole}."
            )

    @property
    def input_keys(self) -> tuple[str, ...]:
        return ("inpaint",)

    @property
    def concat_channels(self) -> int:
        return 1 + self.latent_channels

    def build(self, tokenizer: Tokenizer | None = None) -> InpaintConditioner:
        return InpaintConditioner(self)


class InpaintConditioner(Conditioner):
    """Conditioner whose concat is ``inpaint``: ``[1 + c h w]`` each, mask and latents as made by :func:`ldm.editing.inpaint`."""

    unaffected_by_cfg = True

    def __init__(self, config: InpaintConditionerConfig):
        super().__init__()
        self.config = config

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        """Compute the conditioning of a batch; see :class:`Conditioner`.

        Raises:
            SamplingError: an entry is missing, or not a tensor of that shape.
        """
        known, channels = list(inputs["inpaint"]), self.config.concat_channels
        for part in known:
            if not isinstance(part, Tensor) or part.ndim != 3 or len(part) != channels:
                raise SamplingError(
                    f"this model inpaints images; use editing.inpaint, or give condition={{'inpaint': [...]}} with a mask "
                    f"and latents of shape [{channels}, h, w] for each."
                )
        return Conditioning(concat=torch.stack(known))

    def prepare_batch(
        self, batch: Mapping[str, Any], encode: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> Mapping[str, Any]:
        """Add ``inpaint [b 1 + c h/f w/f]`` to the batch, from its images under masks drawn from ``generator``.

        Raises:
            DataError: latents are cached.
        """
        images = training_images(batch, "inpaint")
        n, _, height, width = images.shape

        def draw(count: int) -> Tensor:
            return torch.stack([draw_mask(height, width, self.config.whole, generator) for _ in range(count)])

        masks = draw_rows(draw, n, generator).to(images)
        known = encode(images * (1 - masks))
        return {**batch, "inpaint": torch.cat([F.adaptive_max_pool2d(masks, known.shape[-2:]), known], dim=1)}


def draw_mask(height: int, width: int, whole: float, generator: torch.Generator) -> Tensor:
    """Draw a mask ``[1 height width]``, 1 where masked: all ones with probability ``whole``, else rectangles or strokes."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(
            torch.rand((), generator=generator, dtype=torch.float32, device=generator.device)
        )

    def count(most: int) -> int:
        return 1 + int(uniform(0, most))

    if uniform(0, 1) < whole:
        return torch.ones(1, height, width, dtype=torch.float32, device="cpu")
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    if uniform(0, 1) < 0.5:
        for _ in range(count(MOST_RECTANGLES)):
            w, h = uniform(*SIDES) * width, uniform(*SIDES) * height
            left, top = uniform(0, width) - w / 2, uniform(0, height) - h / 2
            draw.rectangle((left, top, left + w, top + h), 1)
    else:
        side = min(height, width)
        for _ in range(count(MOST_STROKES)):
            brush, angle = uniform(*BRUSHES) * side, uniform(0, 2 * math.pi)
            x, y = uniform(0, width), uniform(0, height)
            for _ in range(1 + count(MOST_BENDS)):
                length = uniform(*LENGTHS) * side
                start = (x, y)
                x = min(max(x + length * math.cos(angle), 0), width)
                y = min(max(y + length * math.sin(angle), 0), height)
                draw.circle(start, brush / 2, 1)
                draw.line((*start, x, y), 1, round(brush))
                angle += uniform(-math.pi / 2, math.pi / 2)
    return torch.from_numpy(np.array(mask, np.float32))[None]
