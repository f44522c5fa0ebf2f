"""The convolutional autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.1 and appendix G)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import config_field
from ldm.errors import ConfigError
from ldm.nn.attention import scaled_dot_product_attention
from ldm.nn.conv import Conv1x1
from ldm.nn.gradient_checkpointing import CheckpointedBlock
from ldm.nn.group_norm import GroupNorm, silu
from ldm.nn.input_output import input_or_output
from ldm.nn.residual import ResidualBlock, Upsample
from ldm.vae.first_stage import FirstStage, FirstStageConfig
from ldm.vae.posterior import DiagonalGaussian, Posterior


@dataclass(frozen=True)
class ConvolutionalConfig(FirstStageConfig):
    """Fields shared by the first stages with this convolutional encoder and decoder; factor = 2 ** (levels - 1)."""

    widths: tuple[int, ...] = config_field(
        (128, 256, 512, 512), "channels at each resolution, the finest first; n widths give factor 2^(n-1)"
    )
    blocks: int = config_field(2, "residual blocks per resolution in the encoder (one more in the decoder)")
    latent_channels: int = config_field(4, "channels of the latent")
    image_channels: int = config_field(3, "channels of the image")
    groups: int = config_field(32, "groups of the group norms")
    middle_attention: bool = config_field(True, "self-attention over the positions of the coarsest resolution")
    quant_conv: bool = config_field(
        True, "1 x 1 convolutions after the encoder and before the decoder; SD 3 and FLUX have none", omit_default=True
    )

    overflows_fp16: bool = config_field(
        False, "whether fp16 cannot hold its values, so that an fp16 model runs it in fp32", omit_default=True
    )

    def __post_init__(self) -> None:
        if not self.widths:
            raise ConfigError("widths is empty; the autoencoder needs at least one width.")
        for i, width in enumerate(self.widths):
            if width % self.groups:
                raise ConfigError(f"widths[{i}] = {width} is not divisible by {self.groups} groups.")

    @property
    def factor(self) -> int:
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class AutoencoderKLConfig(ConvolutionalConfig, kind="autoencoder_kl"):
    """VAE: convolutional encoder and decoder, and a diagonal Gaussian posterior; factor = 2 ** (levels - 1)."""

    def build(self) -> AutoencoderKL:
        return AutoencoderKL(self)


class SpatialAttention(CheckpointedBlock):
    """Single-head self-attention over the positions of a feature map, pre-normed and residual: ``[b c h w] -> [b c h w]``."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (Conv1x1(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (projection(h).flatten(2).transpose(1, 2).unsqueeze(1) for projection in (self.q, self.k, self.v))
        h = scaled_dot_product_attention(q, k, v)  # b 1 (h w) c
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).unflatten(2, x.shape[-2:]))


class Downsample(nn.Module):
    """3 x 3 convolution of stride 2, padded by one at the right and the bottom: ``[b c h w] -> [b c h/2 w/2]``."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest resolution: ``[b c h w] -> [b c h w]``."""

    def __init__(self, width: int, groups: int, attention: bool):
        super().__init__()
        self.block_1 = ResidualBlock(width, width, groups=groups, eps=1e-6)
        self.attn_1 = SpatialAttention(width, groups) if attention else nn.Identity()
        self.block_2 = ResidualBlock(width, width, groups=groups, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution and the resampling to the next: ``[b c h w] -> [b width h' w']``."""

    def __init__(self, in_width: int, width: int, blocks: int, groups: int, resample: type[nn.Module] | None):
        super().__init__()
        widths = [in_width] + [width] * blocks
        self.block = nn.ModuleList(ResidualBlock(a, b, groups=groups, eps=1e-6) for a, b in pairwise(widths))
        self.resample = resample(width) if resample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.resample(x)


class Encoder(nn.Module):
    """``[b image_channels h w] -> [b out_channels h/f w/f]``: the parameters of the posterior, before the quant convolution."""

    def __init__(self, config: ConvolutionalConfig, out_channels: int):
        super().__init__()
        widths, top = config.widths, config.widths[-1]
        self.conv_in = input_or_output(nn.Conv2d(config.image_channels, widths[0], 3, padding=1))
        self.down = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                width,
                config.blocks,
                config.groups,
                Downsample if i < len(widths) - 1 else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid = Middle(top, config.groups, config.middle_attention)
        self.norm_out = GroupNorm(config.groups, top, eps=1e-6)
        self.conv_out = input_or_output(nn.Conv2d(top, out_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.coarse(self.fine(x))

    def fine(self, x: Tensor) -> Tensor:
        """``[b image_channels h w] -> [b top h/f w/f]``"""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return h

    def coarse(self, h: Tensor) -> Tensor:
        """``[b top h w] -> [b out_channels h w]``"""
        return self.conv_out(silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """``[b latent_channels h/f w/f] -> [b image_channels h w]``"""

    def __init__(self, config: ConvolutionalConfig):
        super().__init__()
        widths = config.widths[::-1]  # the coarsest first
        self.conv_in = input_or_output(nn.Conv2d(config.latent_channels, widths[0], 3, padding=1))
        self.mid = Middle(widths[0], config.groups, config.middle_attention)
        self.up = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                width,
                config.blocks + 1,
                config.groups,
                Upsample if i < len(widths) - 1 else None,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = input_or_output(nn.Conv2d(widths[-1], config.image_channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        return self.fine(self.coarse(z))

    def coarse(self, z: Tensor) -> Tensor:
        """``[b latent_channels h w] -> [b top h w]``"""
        return self.mid(self.conv_in(z))

    def fine(self, h: Tensor) -> Tensor:
        """``[b top h/f w/f] -> [b image_channels h w]``"""
        for level in self.up:
            h = level(h)
        return self.conv_out(silu(self.norm_out(h)))


class ConvolutionalAutoencoder(FirstStage):
    """Encoder and decoder with a 1 x 1 convolution on each side of the latents; a subclass implements the posterior.

    Args:
        config: config of the networks.
        parameters: channels of the encoder's output, the parameters of the posterior.
    """

    def __init__(self, config: ConvolutionalConfig, parameters: int):
        super().__init__(config.latent_channels, config.factor)
        self.config = config
        self.encoder = Encoder(config, parameters)
        z = config.latent_channels
        self.quant_conv = input_or_output(nn.Conv2d(parameters, parameters, 1)) if config.quant_conv else nn.Identity()
        self.post_quant_conv = input_or_output(nn.Conv2d(z, z, 1)) if config.quant_conv else nn.Identity()
        self.decoder = Decoder(config)

    def make_posterior(self, parameters: Tensor) -> Posterior:
        """Return the posterior, given its parameters ``[b parameters h w]``, the output of the encoder in fp32."""
        raise NotImplementedError

    def encode(self, image: Tensor) -> Posterior:
        return self._posterior(self.encoder(image.contiguous(memory_format=torch.channels_last)))

    def decode(self, latent: Tensor) -> Tensor:
        return self.decoder(self._decoder_input(latent))

    def _posterior(self, h: Tensor) -> Posterior:
        return self.make_posterior(self.quant_conv(h).float())

    def _decoder_input(self, latent: Tensor) -> Tensor:
        return self.post_quant_conv(latent.contiguous(memory_format=torch.channels_last))

    # ldm.vae.tiling.Tileable

    def fine_encode(self, image: Tensor) -> Tensor:
        return self.encoder.fine(image.contiguous(memory_format=torch.channels_last))

    def coarse_encode(self, features: Tensor) -> Posterior:
        return self._posterior(self.encoder.coarse(features))

    def coarse_decode(self, latent: Tensor) -> Tensor:
        return self.decoder.coarse(self._decoder_input(latent))

    def fine_decode(self, features: Tensor) -> Tensor:
        return self.decoder.fine(features)

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.conv_out.weight

    @property
    def encoding_modules(self) -> Sequence[nn.Module]:
        return [self.encoder, self.quant_conv]

    @property
    def called_modules(self) -> Sequence[nn.Module]:
        return [self.encoder, self.decoder]


class AutoencoderKL(ConvolutionalAutoencoder):
    """VAE: the encoder's output is mean and log-variance of a diagonal Gaussian over the latents."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__(config, 2 * config.latent_channels)

    def make_posterior(self, parameters: Tensor) -> DiagonalGaussian:
        mean, logvar = parameters.chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar)
