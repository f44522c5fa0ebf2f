"""Feature networks: what turns images, and for some captions, into the vectors that metrics compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.discovery import import_modules
from ldm.errors import CheckpointError, unknown
from ldm.formats.tensors import fingerprint


@dataclass(frozen=True)
class FeatureNetwork:
    """A network whose features metrics compare.

    Attributes:
        name: name in receipts and on the command line.
        fingerprint: hash of its weights.
        resize: filter by which it resizes images to its own size.
        images: function of images ``[b 3 h w]`` in [-1, 1] ``-> [b d]`` fp32 on the CPU.
        captions: function of captions ``-> [b d]`` of unit length, in the same space; None if it has no text tower.
    """

    name: str
    fingerprint: str
    resize: str
    images: Callable[[Tensor], Tensor]
    captions: Callable[[Sequence[str]], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features ``[b d]`` of images ``[b 3 h w]``: uint8, or floats in [-1, 1], which are rounded to 8 bits."""
        return self.images(quantized(images).float() / 127.5 - 1)


def quantized(images: Tensor) -> Tensor:
    """Return images ``[b 3 h w]`` in [-1, 1] as uint8, as an image file would hold them; uint8 is unchanged."""
    if images.dtype == torch.uint8:
        return images
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


Opener = Callable[[str | None, torch.device], FeatureNetwork]
"""Function of a source, None for the default one, and a device."""

NETWORKS: dict[str, Opener] = {}
"""Feature networks by name, see :func:`feature_network`; :func:`open_network` imports those of the folder ``networks``."""


def feature_network(name: str) -> Callable[[Opener], Opener]:
    """Register a function that opens a feature network.

    It raises a :class:`CheckpointError` in one sentence if the weights are not on this machine.
    """

    def register(opener: Opener) -> Opener:
        NETWORKS[name] = opener
        return opener

    return register


def open_network(given: str, device: torch.device) -> FeatureNetwork:
    """Open a feature network by ``name`` or ``name=source``, such as ``clip=openai/clip-vit-large-patch14``.

    Raises:
        CheckpointError: the name is unknown, or the weights are not on this machine.
    """
    import_modules("ldm.evaluation.networks")
    name, _, source = given.partition("=")
    if name not in NETWORKS:
        raise CheckpointError(unknown("feature network", name, NETWORKS))
    return NETWORKS[name](source or None, device)


def weights_hash(module: nn.Module) -> str:
    """Return a hash of the names and values of a module's state, in fp32: 16 hexadecimal digits."""
    return fingerprint(module.state_dict(), {})


def existing_file(path: str, needed_for: str) -> Path:
    """Return the path of a file of weights.

    Raises:
        CheckpointError: it does not exist.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}, the weights of {needed_for}, is no file; give the path of one on this machine.")
    return Path(path)
