"""Towers of a CLIP as feature networks: that of stage 2, and those of other projects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.clip.model import CLIP
from ldm.clip.tokenizer import Tokenizer
from ldm.errors import CheckpointError
from ldm.evaluation.features import FeatureNetwork, feature_network, weights_hash
from ldm.formats import read
from ldm.formats.checkpoint import CLIP_COMPONENTS, OTHERS, Checkpoint, joined
from ldm.formats.clip import clip_of
from ldm.formats.native import load_strictly

CAPTIONS = 256
"""Number of captions encoded at once, which bounds the memory."""


@feature_network("own")
def own_tower(source: str | None, device: torch.device) -> FeatureNetwork:
    """Open the image tower of stage 2 from its file; :meth:`ldm.evaluation.subject.Subject` passes that of the run."""
    missing = (
        "the feature network 'own' is the image tower of stage 2, and this run has no result of it; train stage clip, or give "
        "--features own=FILE."
    )
    return _tower("own", source, device, missing)


@feature_network("clip")
def foreign_tower(source: str | None, device: torch.device) -> FeatureNetwork:
    """Open a CLIP of transformers or open_clip; CMMD and CLIP scores of papers use ViT-L/14 at 336 pixels or ViT-B/32."""
    missing = (
        "the feature network 'clip' needs its weights; give --features clip=SOURCE, a folder or hub id of transformers or "
        "open_clip that is on this machine."
    )
    return _tower("clip", source, device, missing)


def _tower(name: str, source: str | None, device: torch.device, missing: str) -> FeatureNetwork:
    """Open a CLIP from its source; ``missing`` is the error if there is none."""
    if source is None:
        raise CheckpointError(missing)
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
