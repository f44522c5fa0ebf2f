"""Contrastive losses of stage 2, computed by open_clip."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import Kind, config_field


class CLIPLossConfig(Kind, default="cross_entropy"):
    """Base class of the configs of stage 2 losses.

    ``build()`` returns a module that is called with

    - ``image_features, text_features [b embed_dim]`` of unit length, row i of both being a pair,
    - ``scale``, the factor on the cosines (the exponential of ``CLIP.logit_scale``),
    - ``rank`` and ``world_size`` of the process: with several, the loss contrasts the batches of all processes,

    and returns the mean loss of a pair. Its parameters are trained with the CLIP.
    """

    @property
    def features(self) -> tuple[str, ...]:
        """Modules of the CLIP whose outputs the loss takes as the argument ``features``, by their names in it."""
        return ()

    def build(self) -> nn.Module:
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropyConfig(CLIPLossConfig, kind="cross_entropy"):
    """Cross-entropy of image to caption and of caption to image, averaged (Radford et al. 2021, arXiv 2103.00020)."""

    def build(self) -> CrossEntropy:
        return CrossEntropy()


class CrossEntropy(nn.Module):
    """open_clip's ``ClipLoss``."""

    def forward(
        self, image_features: Tensor, text_features: Tensor, scale: Tensor, rank: int = 0, world_size: int = 1
    ) -> Tensor:
        from open_clip.loss import ClipLoss  # needed in training only; imports torchvision

        many = world_size > 1
        loss = ClipLoss(local_loss=many, gather_with_grad=many, rank=rank, world_size=world_size)
        with warnings.catch_warnings() if many else nullcontext():
            if many:  # the gathering functions of torch that open_clip calls are deprecated
                warnings.simplefilter("ignore", FutureWarning)
            with torch.autocast(image_features.device.type, enabled=False):  # bf16 has steps of 0.5 near logits of 100
                return loss(image_features.float(), text_features.float(), scale.float())


@dataclass(frozen=True)
class SigLIPConfig(CLIPLossConfig, kind="siglip"):
    """Sigmoid loss of every pair of an image and a caption (Zhai et al. 2023, arXiv 2303.15343).

    The paper starts at a scale of 10, which is ``clip.model.temperature: 0.1``.
    """

    bias: float = config_field(-10.0, "initial value of the learned logit bias")

    def build(self) -> SigLIP:
        return SigLIP(self.bias)


class SigLIP(nn.Module):
    """open_clip's ``SigLipLoss``, with the learned logit bias that it takes.

    -1/b sum_ij log sigmoid(z_ij (scale cos_ij + bias)), z = 1 for pairs and -1 otherwise (Algorithm 1).
    """

    def __init__(self, bias: float):
        super().__init__()
        self.logit_bias = nn.Parameter(torch.tensor(bias))

    def forward(
        self, image_features: Tensor, text_features: Tensor, scale: Tensor, rank: int = 0, world_size: int = 1
    ) -> Tensor:
        from open_clip.loss import SigLipLoss  # needed in training only; imports torchvision

        loss: Any = SigLipLoss(rank=rank, world_size=world_size)
        with torch.autocast(image_features.device.type, enabled=False):
            return loss(image_features.float(), text_features.float(), scale.float(), self.logit_bias)
