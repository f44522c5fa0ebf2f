"""Distances between pairs of images by other packages: SSIM by torchmetrics, LPIPS by lpips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import CheckpointError, missing_extra

BACKBONE = "alexnet-owt-7be5be79.pth"
"""File of torchvision's AlexNet, the backbone of LPIPS, in torch's hub folder."""

WINDOW = 11
"""Side of the window of SSIM in pixels; smaller images have none."""


def ssim(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the structural similarity of each pair of images ``[b c h w]`` in [-1, 1]: ``[b]`` (Wang et al. 2004, equation 13).

    With a Gaussian window of standard deviation 1.5 and 11 pixels, and images reflected at their borders; NaN for images that are
    smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(image.shape[2:]) < WINDOW:
        return torch.full((len(image),), torch.nan, device=image.device)
    values = structural_similarity_index_measure(
        (reconstruction.float() + 1) / 2, (image.float() + 1) / 2, data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)
    return values.reshape(len(image))


def lpips_network(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function that maps two batches of images ``[b 3 h w]`` in [-1, 1] to their LPIPS ``[b]``, with AlexNet.

    The distance is that of Zhang et al. 2018 (arXiv 1801.03924, equation 1), version 0.1 of the package.

    Raises:
        MissingExtraError: the package lpips is not installed.
        CheckpointError: the weights of AlexNet are not on this machine.
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
        values: Tensor = network(image.float(), reconstruction.float())
        return values.flatten()

    return distance
