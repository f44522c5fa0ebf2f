"""CLIP: a text and an image tower with a common embedding space."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.clip.image import ImageTowerConfig, to_size
from ldm.clip.text import TextTowerConfig
from ldm.config import config_field
from ldm.errors import ConfigError

MAX_LOGIT_SCALE = math.log(100.0)
"""Maximum logit scale; above it training becomes unstable (Radford et al. 2021, section 2.5)."""


@dataclass(frozen=True)
class CLIPConfig:
    """A text and an image tower with a common embedding."""

    text: TextTowerConfig = config_field(help="the text tower")
    image: ImageTowerConfig | None = config_field(
        None, "the image tower; null = none: a pretrained text encoder that is not trained"
    )
    embed_dim: int | None = config_field(
        768, "width of the common embedding; both towers are projected to it; null = a text encoder without projection"
    )
    temperature: float = config_field(0.07, "initial softmax temperature; learned, and clamped to at least 0.01")

    def __post_init__(self) -> None:
        if self.image is not None and self.embed_dim is None:
            raise ConfigError("embed_dim is null, but there is an image tower; give the width of the common embedding.")
        if self.embed_dim is not None and self.embed_dim < 1:
            raise ConfigError(f"embed_dim must be at least 1, not {self.embed_dim}.")
        if self.text.embed_dim not in (None, self.embed_dim):
            raise ConfigError(
                f"text.embed_dim is {self.text.embed_dim}, embed_dim {self.embed_dim}; leave the former out."
            )
        if not 0.01 <= self.temperature <= 1.0:
            raise ConfigError(f"temperature must be between 0.01 and 1, not {self.temperature}.")

    def build(self) -> CLIP:
        return CLIP(self)


class CLIP(nn.Module):
    """Contrastive language-image model (Radford et al. 2021, arXiv 2103.00020).

    ``text.config`` has the common ``embed_dim`` filled in, so that the tower can be rebuilt from its own config.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        assert config.image is not None, "CLIP needs an image tower"
        assert config.embed_dim is not None
        self.text = replace(config.text, embed_dim=config.embed_dim).build()
        self.image = config.image.build(config.embed_dim)
        self.image_size = config.image.image_size
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Encode ``tokens [b n] -> [b embed_dim]`` of unit length."""
        return F.normalize(self.text(tokens).pooled, dim=-1)

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode ``image [b 3 h w]`` in [-1, 1] ``-> [b embed_dim]`` of unit length.

        An image of another size is resized to that of the image tower, without keeping its aspect ratio.
        """
        return F.normalize(self.image(to_size(image, self.image_size)).embedding, dim=-1)

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features ``[b embed_dim]`` of ``image [b 3 h w]`` and of ``tokens [b n]``, and the logit scale."""
        return self.encode_image(image), self.encode_text(tokens), self.logit_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp the factor on the cosines to [1, 100]; to be called after each optimizer step."""
        self.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
