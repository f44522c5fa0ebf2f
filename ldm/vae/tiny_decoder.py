"""Tiny decoder: a small network in place of a first stage's decoder, for previews and fast sampling.

Residual blocks of two convolutions with ReLU, without norms and attention, as in TAESD (https://github.com/madebyollin/taesd).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import config_field
from ldm.errors import ConfigError
from ldm.nn.gradient_checkpointing import CheckpointedBlock
from ldm.nn.input_output import input_or_output
from ldm.nn.residual import Upsample
from ldm.vae.first_stage import FirstStageConfig


@dataclass(frozen=True)
class TinyDecoderConfig:
    """Config of a tiny decoder; its factor is ``patch * 2 ** (len(widths) - 1)``, which must be that of the first stage."""

    kind: ClassVar[str] = "tiny decoder"  # in messages

    widths: tuple[int, ...] = config_field((64, 64, 64, 64), "channels at each resolution, the finest first")
    blocks: int = config_field(3, "residual blocks at each resolution")
    patch: int = config_field(
        1, "side in pixels of the patch that is predicted at each position of the finest resolution"
    )
    latent_channels: int = config_field(4, "channels of the latent")
    image_channels: int = config_field(3, "channels of the image")

    def __post_init__(self) -> None:
        if not self.widths:
            raise ConfigError("widths is empty; the tiny decoder needs at least one width.")
        for name in ("blocks", "patch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")

    @property
    def factor(self) -> int:
        """Pixels for each latent position, along each side."""
        return int(self.patch * 2 ** (len(self.widths) - 1))

    def check_fit(self, first_stage: FirstStageConfig) -> None:
        """Check that it decodes the latents of a first stage.

        Raises:
            ConfigError: it does not.
        """
        for name in ("latent_channels", "image_channels", "factor"):
            needed = getattr(first_stage, name)
            if getattr(self, name) != needed:
                remedy = "choose widths and patch for that factor" if name == "factor" else f"set it to {needed}"
                raise ConfigError(
                    f"the tiny decoder's {name} is {getattr(self, name)}, but the first stage's is {needed}; {remedy}."
                )

    def build(self) -> TinyDecoder:
        return TinyDecoder(self)


class TinyBlock(CheckpointedBlock):
    """Residual block x + conv(relu(conv(relu(x)))): ``[b c h w] -> [b c h w]``."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class TinyDecoder(nn.Module):
    """Decoder of normalized latents, the outputs of :meth:`ldm.vae.first_stage.FirstStage.normalize`.

    Args:
        config: its config.
    """

    def __init__(self, config: TinyDecoderConfig):
        super().__init__()
        self.config = config
        coarsest, *finer = config.widths[::-1]
        layers: list[nn.Module] = [input_or_output(nn.Conv2d(config.latent_channels, coarsest, 3, padding=1))]
        layers += [TinyBlock(coarsest) for _ in range(config.blocks)]
        width = coarsest
        for each in finer:
            layers += [Upsample(width, each)]
            layers += [TinyBlock(each) for _ in range(config.blocks)]
            width = each
        out = input_or_output(nn.Conv2d(width, config.image_channels * config.patch**2, 3, padding=1))
        self.layers = nn.Sequential(*layers, nn.ReLU(), out, nn.PixelShuffle(config.patch))

    def forward(self, latent: Tensor) -> Tensor:
        """Decode normalized ``latent [b z h w]`` to images ``[b c fh fw]``, approximately in [-1, 1] (not clamped)."""
        return self.layers(latent.contiguous(memory_format=torch.channels_last))

    def decode(self, latent: Tensor) -> Tensor:
        """Call :meth:`forward`; see :meth:`ldm.vae.tiling.Tiling.decode`."""
        return self(latent)
