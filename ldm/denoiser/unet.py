"""The cross-attention U-Net of latent diffusion (Rombach et al. 2022, arXiv 2112.10752; SD 1, SD 2 and SDXL by config)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import config_field
from ldm.denoiser.config import DenoiserConfig
from ldm.denoiser.spatial_transformer import SpatialTransformer
from ldm.errors import ConfigError, SamplingError
from ldm.nn.attention import AttentionOptions
from ldm.nn.conditioning import Conditioning
from ldm.nn.conv import Conv3x3
from ldm.nn.embeddings import NoiseEmbedding, mlp, pad_rows
from ldm.nn.group_norm import GroupNorm, silu
from ldm.nn.input_output import input_or_output
from ldm.nn.residual import ResidualBlock, Upsample

OUTER = 1
"""Number of blocks of ``down`` that are evaluated in spite of stored deep features; one more is of ``up``."""


@dataclass(frozen=True)
class LevelSpec:
    """Config of one resolution of the U-Net; the next level has half of it."""

    width: int = config_field(help="channels at this resolution")
    blocks: int = config_field(2, "residual blocks on the way down (one more on the way up)")
    depth: int = config_field(0, "transformer blocks after each residual block; 0 = no attention at this resolution")


@dataclass(frozen=True)
class UNetConfig(DenoiserConfig, kind="unet"):
    """Config of residual blocks and spatial transformers on a pyramid of resolutions, with skip connections."""

    levels: tuple[LevelSpec, ...] = config_field(help="resolutions, the finest first")
    in_channels: int = config_field(4, "channels of the latent, plus those of Conditioning.concat")
    out_channels: int = config_field(4, "channels of the latent")
    context_width: int | None = config_field(None, "width of the context; null = no cross-attention")
    vector_width: int | None = config_field(None, "width of the conditioning vector; null = no vector")
    middle_depth: int = config_field(1, "transformer blocks in the middle; 0 = no attention there")
    heads: int | None = config_field(None, "attention heads at each level; give this or head_width")
    head_width: int | None = config_field(None, "channels of a head; give this or heads")
    projection: Literal["conv", "linear"] = config_field(
        "linear", "projections of the spatial transformers: conv as in SD 1, linear as in SD 2"
    )
    groups: int = config_field(32, "groups of the group norms")
    dropout: float = config_field(0.0, "dropout in residual blocks and feed-forwards", changeable=True)
    self_conditioning: float = config_field(
        0.0,
        "share of the training batches in which further channels of the input hold the network's own estimate of the clean "
        "latent (Chen et al. 2208.04202, section 3.2), in place of zeros; 0.5 in the paper, 0 = no such channels",
        omit_default=True,
    )

    def __post_init__(self) -> None:
        if not 0 <= self.self_conditioning < 1:
            raise ConfigError(
                f"self_conditioning is {self.self_conditioning}; it must be at least 0, and below 1, since the first evaluation "
                "of a sampling has no estimate."
            )
        if not self.levels:
            raise ConfigError("the U-Net needs at least one level.")
        if (self.heads is None) == (self.head_width is None):
            raise ConfigError("give either heads or head_width.")
        for i, level in enumerate(self.levels):
            if level.width % self.groups:
                raise ConfigError(f"levels[{i}].width {level.width} is not divisible by {self.groups} groups.")
            attends = level.depth or (i == len(self.levels) - 1 and self.middle_depth)
            if attends and level.width % (self.heads or self.head_width or 1):
                given = f"heads {self.heads}" if self.heads else f"head_width {self.head_width}"
                raise ConfigError(f"levels[{i}].width {level.width} is not divisible by {given}.")

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.levels) - 1))

    @property
    def has_perturbed_attention(self) -> bool:
        return self.middle_depth > 0

    @property
    def has_deep_features(self) -> bool:
        return True

    @property
    def has_token_merging(self) -> bool:
        return self.finest_attention is not None

    @property
    def transformer_depths(self) -> tuple[int, ...]:
        return tuple(level.depth for level in self.levels)

    @property
    def finest_attention(self) -> int | None:
        """The first level with attention, whose self-attentions are the largest."""
        return next((i for i, level in enumerate(self.levels) if level.depth), None)

    def with_width(self, factor: float) -> UNetConfig:
        multiple = math.lcm(self.groups, self.heads or self.head_width or 1)
        levels = (replace(each, width=multiple * max(1, round(factor * each.width / multiple))) for each in self.levels)
        return replace(self, levels=tuple(levels))

    def build(self) -> UNet:
        return UNet(self)


class UNetBlock(nn.Module):
    """Residual block, then a spatial transformer if the level has attention; in the decoder, a skip is concatenated first.

    ``level`` is the index of its level, None in the middle.
    """

    def __init__(
        self,
        config: UNetConfig,
        in_width: int,
        width: int,
        depth: int,
        upsample: int | None = None,
        level: int | None = None,
    ):
        super().__init__()
        self.level = level
        self.out_channels = width
        self.upsample = Upsample(upsample) if upsample else None
        self.residual = ResidualBlock(
            in_width, width, 4 * config.levels[0].width, config.groups, dropout=config.dropout
        )
        heads = config.heads or width // (config.head_width or width)
        self.transformer = (
            SpatialTransformer(
                width,
                depth,
                heads,
                config.context_width,
                config.projection == "linear",
                config.groups,
                config.dropout,
                merges=level is not None and level == config.finest_attention,
            )
            if depth
            else None
        )

    def forward(
        self,
        x: Tensor,
        embedding: Tensor,
        cond: Conditioning,
        skip: Tensor | None = None,
        options: AttentionOptions | None = None,
    ) -> Tensor:
        """``x [b c h w], embedding [b e], skip [b d h' w'] -> [b width h' w']``"""
        if skip is not None:
            x = x if self.upsample is None else self.upsample(x, skip.shape[-2:])
            x = torch.cat([x, skip], dim=1)
        x = self.residual(x, embedding)
        return x if self.transformer is None else self.transformer(x, cond, options)


class Downsample(nn.Module):
    """3 x 3 convolution of stride 2; odd sizes round up (12, 6, 3, 2)."""

    def __init__(self, width: int):
        super().__init__()
        self.out_channels = width
        self.conv = Conv3x3(width, width, stride=2)

    def forward(self, x: Tensor, *unused: object) -> Tensor:
        """``[b c h w] -> [b c ceil(h/2) ceil(w/2)]``; takes the arguments of a block, but uses only ``x``."""
        return self.conv(x)


class Features(NamedTuple):
    """Output of the encoder of a U-Net.

    Attributes:
        skips: ``[b skip_widths[i] h_i w_i]``, the outputs of ``conv_in`` and of each block of ``down``.
        middle: ``[b width h w]``, the output of the middle blocks at the lowest resolution.
        embedding: ``[b e]``, of noise level and vector, after SiLU; b rounded up by :func:`ldm.nn.embeddings.pad_rows`.
    """

    skips: list[Tensor]
    middle: Tensor
    embedding: Tensor


class UNetEncoder(nn.Module):
    """The first half of a U-Net: embeddings, ``conv_in``, the blocks of each resolution, and those in the middle.

    Attributes:
        skip_widths: channels of each skip.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        top = config.levels[0].width
        self.noise_embedding = NoiseEmbedding(top, 4 * top)
        self.vector_embedding = mlp(config.vector_width, 4 * top) if config.vector_width else None
        in_channels = config.in_channels + (config.out_channels if config.self_conditioning else 0)
        self.conv_in = input_or_output(nn.Conv2d(in_channels, top, 3, padding=1))

        self.down = nn.ModuleList()
        width, self.skip_widths = top, [top]
        for i, level in enumerate(config.levels):
            if i > 0:
                self.down.append(Downsample(width))
                self.skip_widths.append(width)
            for _ in range(level.blocks):
                self.down.append(UNetBlock(config, width, level.width, level.depth, level=i))
                width = level.width
                self.skip_widths.append(width)

        self.middle = nn.ModuleList(
            [UNetBlock(config, width, width, config.middle_depth), UNetBlock(config, width, width, 0)]
        )
        start_as_identity(self)

    def forward(
        self, x: Tensor, noise_level: Tensor, cond: Conditioning, options: AttentionOptions | None = None
    ) -> Features:
        """Encode ``x``; the arguments are those of :meth:`UNet.forward`."""
        return self.encode(*self.embed(x, noise_level, cond), cond, options)

    def encode(
        self, x: Tensor, embedding: Tensor, cond: Conditioning, options: AttentionOptions | None = None
    ) -> Features:
        """Evaluate the blocks after :meth:`embed`, whose outputs are the first two arguments."""
        skips, outer = [x], _without_identity(options)
        for block in self.down:
            x = block(x, embedding, cond, None, outer)
            skips.append(x)
        for block in self.middle:
            x = block(x, embedding, cond, options=options)
        return Features(skips, x, embedding)

    def embed(self, x: Tensor, noise_level: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """Return the output of ``conv_in`` and the embedding of noise level and vector, as in :class:`Features`."""
        if cond.concat is not None:
            if cond.concat.shape[-2:] != x.shape[-2:]:
                given, needed = (" x ".join(map(str, each.shape[-2:])) for each in (cond.concat, x))
                raise SamplingError(
                    f"the condition has the size {given} in latents, but the image {needed}; "
                    "give the height and width that fit the condition."
                )
            x = torch.cat([x, cond.concat.to(x)], dim=1)
        if self.config.self_conditioning:
            shape = len(x), self.config.out_channels, *x.shape[2:]
            x = torch.cat([x, x.new_zeros(shape) if cond.estimate is None else cond.estimate.to(x)], dim=1)
        embedding = self.noise_embedding(pad_rows(noise_level))
        if self.vector_embedding is not None:
            assert cond.vector is not None, "the conditioner gives a vector if the config has a vector_width"
            embedding = embedding + self.vector_embedding(pad_rows(cond.vector.to(embedding)))
        embedding = F.silu(embedding)

        return self.conv_in(x.contiguous(memory_format=torch.channels_last)), embedding


class UNet(UNetEncoder):
    """F(x, noise level, conditioning): an encoder, then a decoder that takes in the encoder's skips in reverse order."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        width, skips = self.skip_widths[-1], list(self.skip_widths)
        self.up = nn.ModuleList()
        for i, level in reversed(list(enumerate(config.levels))):
            for j in range(level.blocks + 1):
                upsample = width if j == 0 and i < len(config.levels) - 1 else None
                self.up.append(UNetBlock(config, width + skips.pop(), level.width, level.depth, upsample, i))
                width = level.width

        self.norm_out = GroupNorm(config.groups, width)
        self.conv_out = input_or_output(nn.Conv2d(width, config.out_channels, 3, padding=1))
        start_as_identity(self.up)
        set_to_zero(self.conv_out)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        noise_level: Tensor,
        cond: Conditioning,
        options: AttentionOptions | None = None,
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """Evaluate the network.

        Args:
            x: ``[b in_channels h w]``, scaled by the parametrization; any height and width.
            noise_level: ``[b]``, as the parametrization embeds it (the timestep in SD).
            cond: the conditions: ``context [b n context_width]``, ``vector [b vector_width]``, ``concat [b c h w]``,
                ``estimate [b out_channels h w]``.
            options: changes to the evaluation; ``identity`` acts on the middle blocks.
            residuals: tensors that are added to each skip and, the last, to the middle; empty = none. The output of a ControlNet
                (Zhang et al. 2023, arXiv 2302.05543).

        Returns:
            ``[b out_channels h w]``, the target of the parametrization.

        Raises:
            SamplingError: ``cond.concat`` has another height or width than ``x``.
        """
        deep = None if options is None else options.deep_features
        if deep is not None and (features := deep.reusable(len(x))) is not None:
            return self._outer(x, noise_level, cond, options, residuals, features)
        skips, x, embedding = super().forward(x, noise_level, cond, options)
        if residuals:
            *for_skips, for_middle = residuals
            skips = [skip + residual for skip, residual in zip(skips, for_skips, strict=True)]
            x = x + for_middle
        outer = _without_identity(options)
        for block in self.up:
            if deep is not None and len(skips) == OUTER + 1:
                deep.store(x)
            x = block(x, embedding, cond, skips.pop(), outer)
        return self.conv_out(silu(self.norm_out(x)))

    def _outer(
        self,
        x: Tensor,
        noise_level: Tensor,
        cond: Conditioning,
        options: AttentionOptions | None,
        residuals: Sequence[Tensor],
        features: Tensor,
    ) -> Tensor:
        """Evaluate ``conv_in`` and the first and last blocks alone, given the ``features`` that the others would return."""
        x, embedding = self.embed(x, noise_level, cond)
        skips, outer = [x], _without_identity(options)
        for block in self.down[:OUTER]:
            x = block(x, embedding, cond, None, outer)
            skips.append(x)
        if residuals:
            skips = [skip + residual for skip, residual in zip(skips, residuals, strict=False)]
        x = features
        for block in self.up[-len(skips) :]:
            x = block(x, embedding, cond, skips.pop(), outer)
        return self.conv_out(silu(self.norm_out(x)))

    def set_token_routing(self, shares: Sequence[float]) -> None:
        """Set the share of the positions that skip the transformer blocks of each level in training mode, the finest first.

        In the middle, where positions are few, none skips.
        """
        for block in (*self.down, *self.up):
            if isinstance(block, UNetBlock) and block.level is not None and block.transformer is not None:
                block.transformer.token_routing = shares[block.level]

    def copy_encoder(self) -> UNetEncoder:
        """Return a copy of the encoder that shares no parameters with this network, to be trained as a ControlNet."""
        with torch.device("meta"):
            encoder = UNetEncoder(self.config)
        weights = self.state_dict()
        encoder.load_state_dict({name: weights[name].clone() for name in encoder.state_dict()}, assign=True)
        return encoder.train(self.training)


def _without_identity(options: AttentionOptions | None) -> AttentionOptions | None:
    """Return the options that act outside of the middle blocks."""
    if options is None or options.token_merging is None:
        return None
    return AttentionOptions(token_merging=options.token_merging)


def start_as_identity(module: nn.Module) -> None:
    """Zero the last layer of each residual branch (Dhariwal & Nichol 2021, arXiv 2105.05233)."""
    for part in module.modules():
        if isinstance(part, ResidualBlock):
            set_to_zero(part.conv2)
        elif isinstance(part, SpatialTransformer):
            set_to_zero(part.proj_out)


def set_to_zero(layer: nn.Module) -> None:
    """Set all parameters of a layer to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
