"""ControlNet (Zhang, Rao & Agrawala 2023, arXiv 2302.05543): the encoder of a U-Net that also sees an image, the hint.

Its outputs pass through 1 x 1 convolutions that start at zero and are added to the skips and the middle of the U-Net.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import config_field
from ldm.denoiser.unet import UNetConfig, UNetEncoder, set_to_zero
from ldm.errors import ConfigError
from ldm.nn.conditioning import Conditioning


@dataclass(frozen=True)
class ControlNetConfig:
    """Config of a ControlNet."""

    kind: ClassVar[str] = "controlnet"  # in messages

    encoder: UNetConfig = config_field(help="U-Net whose encoder it has; out_channels has no effect")
    hint_channels: int = config_field(3, "channels of the hint")
    hint_widths: tuple[int, ...] = config_field(
        (16, 32, 96, 256), "channels of the embedding of the hint at each resolution, the finest first"
    )
    global_pool: bool = config_field(
        False, "average each output over its positions, and act on the conditional estimates of guidance only"
    )
    size_embedding_width: int | None = config_field(
        None, "width of the embedding of each size in the vector, as diffusers' files of SDXL state it; null = no sizes"
    )

    def __post_init__(self) -> None:
        if not self.hint_widths or min(*self.hint_widths, self.hint_channels) < 1:
            raise ConfigError(
                f"hint_widths is {list(self.hint_widths)} and hint_channels {self.hint_channels}; give at least one width, "
                "and numbers of 1 or more."
            )

    @property
    def factor(self) -> int:
        """Positions of the hint for each position of the latent, along each side."""
        return int(2 ** (len(self.hint_widths) - 1))

    def build(self) -> ControlNet:
        return ControlNet(self)


class HintEmbedding(nn.Module):
    """Convolutions with SiLU between, every second of which halves the resolution; the last starts at zero.

    Args:
        channels: channels of the hint.
        widths: channels at each resolution, the finest first.
        out_width: channels of the result.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], out_width: int):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, widths[0], 3, padding=1)])
        for width, coarser in pairwise(widths):
            self.convs.append(nn.Conv2d(width, width, 3, padding=1))
            self.convs.append(nn.Conv2d(width, coarser, 3, stride=2, padding=1))
        self.convs.append(nn.Conv2d(widths[-1], out_width, 3, padding=1))
        set_to_zero(self.convs[-1])

    def forward(self, hint: Tensor) -> Tensor:
        """``[b channels fh fw] -> [b out_width h w]``, where f is ``ControlNetConfig.factor``."""
        first, *others = self.convs
        x = first(hint)
        for conv in others:
            x = conv(F.silu(x))
        return x


class ControlNet(UNetEncoder):
    """The encoder half and the middle of a U-Net, the embedding of the hint, and a zero convolution for each output."""

    def __init__(self, config: ControlNetConfig):
        super().__init__(config.encoder)
        self.controlnet_config = config
        self.hint = HintEmbedding(config.hint_channels, config.hint_widths, self.skip_widths[0])
        widths = [*self.skip_widths, self.skip_widths[-1]]
        self.zeros = nn.ModuleList(nn.Conv2d(width, width, 1) for width in widths)
        for zero in self.zeros:
            set_to_zero(zero)

    def forward(  # type: ignore[override]
        self, x: Tensor, noise_level: Tensor, cond: Conditioning, hint: Tensor
    ) -> list[Tensor]:
        """Evaluate the network.

        Args:
            x, noise_level, cond: of the evaluation of the U-Net; ``cond.concat`` is used if the config has its channels.
            hint: ``[b w h w']``, the output of ``self.hint`` for the hint image in [0, 1].

        Returns:
            The ``residuals`` of :meth:`ldm.denoiser.UNet.forward`: ``[b skip_widths[i] h_i w_i]`` each, the last for the
            middle; with ``global_pool`` of one position.
        """
        if cond.concat is not None and self.config.in_channels == x.shape[1]:
            cond = replace(cond, concat=None)
        x, embedding = self.embed(x, noise_level, cond)
        features = self.encode(x + hint, embedding, cond)
        outputs = zip(self.zeros, [*features.skips, features.middle], strict=True)
        residuals = [zero(feature) for zero, feature in outputs]
        if self.controlnet_config.global_pool:
            return [residual.mean((2, 3), keepdim=True) for residual in residuals]
        return residuals
