"""Teacher of a denoiser: a frozen network whose features of the clean images a loss reads, and which are stored with latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.formats.tensors import fingerprint

TEACHER = "teacher"
"""Name of the features in a batch, and of their tensor in a file."""


@dataclass(frozen=True)
class Teacher:
    """Features of images by a layer of a network.

    Attributes:
        network: frozen, in evaluation mode; :class:`ldm.clip.image.ImageTower` or :class:`ldm.clip.timm_tower.TimmTower`,
            with ``feature_map`` and ``settings``.
        layer: number of a block, from 1.
    """

    network: nn.Module
    layer: int

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and settings, with the layer."""
        network: Any = self.network
        return f"{fingerprint(network.state_dict(), network.settings)}, layer {self.layer}"

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Return the features ``[b z h w]`` fp32 of ``image [b 3 H W]`` in [-1, 1] on the device of the network."""
        network: Any = self.network
        found: Tensor = network.feature_map(image, self.layer)
        return found.float()
