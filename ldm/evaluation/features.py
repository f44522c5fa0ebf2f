"""Feature networks: what turns images, and for some captions, into the vectors that metrics compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.clip.model import CLIP
from ldm.clip.tokenizer import Tokenizer
from ldm.errors import CheckpointError, unknown
from ldm.formats import read
from ldm.formats.checkpoint import CLIP_COMPONENTS, OTHERS, Checkpoint, joined
from ldm.formats.clip import clip_of
from ldm.formats.native import load_strictly
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


CAPTIONS = 256
"""Number of captions encoded at once, which bounds the memory."""

Opener = Callable[[str | None, torch.device], FeatureNetwork]
"""Function of a source, None for the default one, and a device."""

NETWORKS: dict[str, Opener] = {}
"""Feature networks by name, see :func:`feature_network`."""


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
    from ldm.evaluation import inception

    assert inception is not None  # importing the module registers it
    name, _, source = given.partition("=")
    if name not in NETWORKS:
        raise CheckpointError(unknown("feature network", name, NETWORKS))
    return NETWORKS[name](source or None, device)


@feature_network("own")
def own_tower(source: str | None, device: torch.device) -> FeatureNetwork:
    """Open the image tower of stage 2 from its file; :meth:`ldm.evaluation.subject.Subject` passes that of the run."""
    if source is None:
        raise CheckpointError(
            "the feature network 'own' is the image tower of stage 2, and this run has no result of it; train stage clip, "
            "or give --features own=FILE."
        )
    return _tower("own", source, device)


@feature_network("clip")
def foreign_tower(source: str | None, device: torch.device) -> FeatureNetwork:
    """Open a CLIP of transformers or open_clip; CMMD and CLIP scores of papers use ViT-L/14 at 336 pixels or ViT-B/32."""
    if source is None:
        raise CheckpointError(
            "the feature network 'clip' needs its weights; give --features clip=SOURCE, a folder or hub id of transformers or "
            "open_clip that is on this machine."
        )
    return _tower("clip", source, device)


def _tower(name: str, source: str, device: torch.device) -> FeatureNetwork:
    found = read(source)
    if not found.parts.keys() >= {*CLIP_COMPONENTS, OTHERS}:
        raise CheckpointError(
            f"the feature network {name!r} needs a CLIP with both towers, but {source} holds none; "
            f"give --features {name}=SOURCE with another one."
        )
    clip, tokenizer = clip_from(found)
    return clip_network(name, clip.to(device), tokenizer)


def clip_from(found: Checkpoint) -> tuple[CLIP, Tokenizer | None]:
    """Build the CLIP of a checkpoint in evaluation mode, its parameters frozen, in fp32."""
    clip = clip_of(found)
    load_strictly(clip, joined(found.parts, CLIP_COMPONENTS), found.source, torch.float32)
    return clip.eval().requires_grad_(False), found.tokenizer


def clip_network(name: str, clip: CLIP, tokenizer: Tokenizer | None) -> FeatureNetwork:
    """Return the feature network of a CLIP: embeddings of unit length."""
    device = next(clip.parameters()).device

    def images(batch: Tensor) -> Tensor:
        return clip.encode_image(batch.to(device)).float().cpu()

    @torch.no_grad()
    def captions(texts: Sequence[str]) -> Tensor:
        assert tokenizer is not None
        parts = (list(texts[start : start + CAPTIONS]) for start in range(0, len(texts), CAPTIONS))
        return torch.cat([clip.encode_text(tokenizer(part).to(device)).float().cpu() for part in parts])

    resize = f"bicubic with antialias to {clip.image_size}"
    return FeatureNetwork(name, weights_hash(clip), resize, images, captions if tokenizer is not None else None)


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
