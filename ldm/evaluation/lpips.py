"""LPIPS, by the package lpips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import CheckpointError, DataError, missing_extra

BACKBONE = "alexnet-owt-7be5be79.pth"
"""File of torchvision's AlexNet, the backbone of LPIPS, in torch's hub folder."""

SMALLEST = 31
"""Smallest side of an image, in pixels, that AlexNet's poolings leave something of."""


def lpips_network(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that maps two batches of images ``[b 3 h w]`` in [-1, 1] to their LPIPS ``[b]``, with AlexNet.

    The distance is that of Zhang et al. 2018 (arXiv 1801.03924, equation 1), version 0.1 of the package.

    Raises:
        MissingExtraError: the package lpips is not installed.
        CheckpointError: the weights of AlexNet are not on this machine.
        DataError: the function is given images that are too small.
    """
    try:
        from lpips import LPIPS
    except ImportError:
        raise missing_extra("lpips", "the metric lpips", "lpips") from None
    path = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE
    if not path.is_file():
        raise CheckpointError(
            f"the metric lpips needs the weights of AlexNet, and {path} does not exist; put torchvision's file there, or leave "
            "lpips out."
        )
    network = LPIPS(net="alex", verbose=False).eval().requires_grad_(False).to(device)

    def distance(image: Tensor, reconstruction: Tensor) -> Tensor:
        if (side := min(image.shape[2:])) < SMALLEST:
            raise DataError(
                f"LPIPS needs images of at least {SMALLEST} pixels, and these have {side}; leave lpips out."
            )
        values: Tensor = network(image.float(), reconstruction.float())
        return values.flatten()

    return distance
