"""Self-conditioning in sampling (Chen, Zhang & Hinton 2022, arXiv 2208.04202, section 3.2): estimates for the next evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.guidance import Composition
from ldm.nn.conditioning import Conditioning

Evaluate = Callable[[Tensor, Tensor, Conditioning, Any], Tensor]
"""Function of noisy images ``[n ...]``, noise levels ``[n]``, conditioning and options to the estimates of x0 ``[n ...]``."""


class SelfConditioning:
    """A denoiser that gets, as ``Conditioning.estimate``, the estimate of its evaluation before: zeros in the first.

    All rows of an image, also those of the unconditional model, get its conditional estimate without guidance. In training, too,
    the estimate is one of the network itself; guidance would raise its contrast from one evaluation to the next.

    It belongs to the sampling of one batch.

    Args:
        denoise: denoiser without state.
        images: number of images of the batch.
        composition: that of :func:`ldm.diffusion.guided`, which orders the rows of an evaluation.
    """

    def __init__(self, denoise: Evaluate, images: int, composition: Composition | None = None):
        self.denoise, self.images, self.composition = denoise, images, composition
        self.prompts = tuple(range(images)) if composition is None else composition.rows
        self.estimate: Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning, options: Any = None) -> Tensor:
        """Evaluate the denoiser for the conditional rows, and those of the unconditional and the perturbed model after them."""
        if self.estimate is None:
            given = torch.zeros_like(x)
        else:
            rows = [*self.prompts, *range(self.images), *self.prompts]
            given = self.estimate[rows[: len(x)]]
        estimates = self.denoise(x, sigma, replace(cond, estimate=given), options)
        conditional = estimates[: len(self.prompts)]
        if self.composition is not None:
            unconditional = estimates[len(self.prompts) :][: self.images]
            conditional = self.composition.combine(conditional, unconditional)
        self.estimate = conditional
        return estimates
