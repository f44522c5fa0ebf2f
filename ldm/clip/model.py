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
"""Above it training becomes unstable (Radford et al. 2021, section 2.5)."""


@dataclass(frozen=True)
class CLIPConfig:
    """A text and an image tower with a common embedding."""

    text: TextTowerConfig = config_field(help="the text tower")
    image: ImageTowerConfig | None = config_field(
        None, "the image tower; null = there is none: a text encoder that is only used"
    )
    embed_dim: int | None = config_field(
        768, "width of the common embedding; both towers are projected to it; null = a text encoder without projection"
    )
    temperature: float = config_field(0.07, "softmax temperature at the start; learnt, and never below 0.01")

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
            raise ConfigError(f"a temperature lies between 0.01 and 1, not at {self.temperature}.")

    def build(self) -> CLIP:
        return CLIP(self)


class CLIP(nn.Module):
    """Contrastive language-image model (Radford et al. 2021, arXiv 2103.00020).

    ``text.config`` has the common ``embed_dim`` filled in, so that the tower can leave with its config alone.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        assert config.image is not None, "a text encoder alone is no CLIP"
        assert config.embed_dim is not None
        self.text = replace(config.text, embed_dim=config.embed_dim).build()
        self.image = config.image.build(config.embed_dim)
        self.image_size = config.image.image_size
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """``tokens [b n] -> [b embed_dim]`` of unit length."""
        return F.normalize(self.text(tokens).pooled, dim=-1)

    def encode_image(self, image: Tensor) -> Tensor:
        """``image [b 3 h w]`` in [-1, 1] ``-> [b embed_dim]`` of unit length.

        An image of another size than the image tower's is brought to it, all of it, squeezed if it is no square.
        """
        return F.normalize(self.image(to_size(image, self.image_size)), dim=-1)

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``image [b 3 h w], tokens [b n]`` to the features ``[b embed_dim]`` of both and the factor on their cosines."""
        return self.encode_image(image), self.encode_text(tokens), self.logit_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """To be called after each optimizer step: keeps the factor on the cosines within [1, 100]."""
        self.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
