"""Image towers: networks that encode an image into CLIP's embedding space."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.clip.patch_dropout import drop_patches
from ldm.clip.transformer import Activation, check_shape, stack
from ldm.config import Kind, config_field, to_dict
from ldm.errors import ConfigError
from ldm.nn.input_output import input_or_output

HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation that normalize [0, 1] to [-1, 1]."""


class ImageOutput(NamedTuple):
    """Output of an image tower.

    Attributes:
        states: ``[b 1+n width]``, the hidden states of the entire image and of the patches.
        embedding: ``[b embed_dim]``.
    """

    states: Tensor
    embedding: Tensor


class ImageTower(nn.Module):
    """Encoder of an image into hidden states, and of these into one embedding.

    ``patch_dropout`` is the share of the patches of an image that it does not see in training mode.
    """

    patch_dropout: float = 0.0

    def states(self, image: Tensor) -> Tensor:
        """``image [b 3 h w]`` of the config's size in [-1, 1] ``-> [b 1+n width]``, the first of the entire image."""
        raise NotImplementedError

    def block_states(self, image: Tensor) -> list[Tensor]:
        """Return the output ``[b 1+n width]`` of each block for ``image [b 3 h w]`` in [-1, 1], of any size."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Number of blocks."""
        raise NotImplementedError

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings that its outputs depend on, apart from the weights, as JSON values."""
        raise NotImplementedError

    def feature_map(self, image: Tensor, layer: int) -> Tensor:
        """Return the patches in the output of a block, from 1, as ``[b width h w]``; the image is as for :meth:`block_states`."""
        patches = self.block_states(image)[layer - 1][:, 1:]
        side = math.isqrt(patches.shape[1])
        return patches.transpose(1, 2).unflatten(2, (side, side))

    def embed(self, states: Tensor) -> Tensor:
        """``[b 1+n width] -> [b embed_dim]``"""
        raise NotImplementedError

    def forward(self, image: Tensor) -> ImageOutput:
        """Encode ``image [b 3 h w]`` of the config's size in [-1, 1]."""
        states = self.states(image)
        return ImageOutput(states, self.embed(states))


class ImageTowerConfig(Kind):
    """Base class of image tower configs; ``build(embed_dim)`` returns an :class:`ImageTower`."""

    image_size: int
    width: int

    def build(self, embed_dim: int) -> ImageTower:
        raise NotImplementedError


def to_size(image: Tensor, size: int) -> Tensor:
    """Resize images ``[b 3 h w]`` in [-1, 1] to ``[b 3 size size]``, without cropping or keeping the aspect ratio."""
    if image.shape[2:] == (size, size):
        return image
    return F.interpolate(image, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


@dataclass(frozen=True)
class ViTConfig(ImageTowerConfig, kind="vit"):
    """The vision transformer of CLIP; the defaults are those of OpenAI's ViT-L/14."""

    image_size: int = config_field(224, "height and width of the images, in pixels")
    patch_size: int = config_field(14, "height and width of a patch, in pixels; must divide image_size")
    width: int = config_field(1024, "channels of a token")
    layers: int = config_field(24, "transformer blocks")
    heads: int = config_field(16, "attention heads; must divide width")
    mlp_ratio: float = config_field(4.0, "hidden width of a block's feed-forward layer over width")
    activation: Activation = config_field("gelu", "quick_gelu for OpenAI's weights, gelu for all others")
    pool: Literal["class", "mean"] = config_field(
        "class", "hidden state to project: that of the class token, or the mean over the patches"
    )
    mean: tuple[float, float, float] = config_field(HALF, "mean of the RGB channels, for pixels in [0, 1]; subtracted")
    std: tuple[float, float, float] = config_field(
        HALF, "standard deviation of the RGB channels; mean = std = 0.5 keeps [-1, 1]"
    )

    def __post_init__(self) -> None:
        check_shape(self.width, self.layers, self.heads)
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise ConfigError(f"patches of {self.patch_size} pixels do not divide the image_size {self.image_size}.")
        if min(self.std) <= 0:
            raise ConfigError(f"the std of the pixels must be positive, not {list(self.std)}.")

    def build(self, embed_dim: int) -> VisionTransformer:
        return VisionTransformer(self, embed_dim)


class VisionTransformer(ImageTower):
    """Patches, a class token and learned positions through a transformer (Dosovitskiy et al. 2021, arXiv
    2010.11929), with CLIP's layer norm before it (Radford et al. 2021, section 2.4)."""

    def __init__(self, config: ViTConfig, embed_dim: int):
        super().__init__()
        self.config = config
        patches = (config.image_size // config.patch_size) ** 2
        self.patch_embedding = input_or_output(
            nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        )
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.position_embedding = nn.Parameter(torch.empty(patches + 1, config.width))
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = stack(
            config.layers, config.width, config.heads, config.mlp_ratio, config.activation, causal=False
        )
        self.final_norm = nn.LayerNorm(config.width)
        self.projection = input_or_output(nn.Linear(config.width, embed_dim, bias=False))
        for parameter in (self.class_embedding, self.position_embedding, self.projection.weight):
            nn.init.normal_(parameter, std=config.width**-0.5)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def settings(self) -> Mapping[str, Any]:
        return to_dict(self.config)

    def states(self, image: Tensor) -> Tensor:
        x = self._tokens(image)
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)

    def block_states(self, image: Tensor) -> list[Tensor]:
        states = [self._tokens(to_size(image, self.config.image_size))]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states[1:]

    def _tokens(self, image: Tensor) -> Tensor:
        """``image [b 3 h w]`` of the config's size ``-> [b 1+n width]``, the input of the first block."""
        size = self.config.image_size
        assert image.shape[2:] == (size, size), f"{tuple(image.shape)} is not a batch of {size} x {size} pixels"
        patches = rearrange(self.patch_embedding(self._normalized(image)), "b c h w -> b (h w) c")
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1) + self.position_embedding
        if self.patch_dropout and self.training:
            x = torch.cat([x[:, :1], drop_patches(x[:, 1:], self.patch_dropout)], dim=1)
        return self.norm_in(x)

    def _normalized(self, image: Tensor) -> Tensor:
        """Normalize images in [-1, 1] by the mean and std that the weights were trained with."""
        mean, std = self.config.mean, self.config.std
        if mean == std == HALF:
            return image
        return (image - (2 * image.new_tensor(mean) - 1)[:, None, None]) / (2 * image.new_tensor(std))[:, None, None]

    def embed(self, states: Tensor) -> Tensor:
        pooled = states[:, 0] if self.config.pool == "class" else states[:, 1:].mean(dim=1)
        return self.projection(pooled)
