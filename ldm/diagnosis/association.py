"""Association of captions with their images, measured with and without the CLIP of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.clip.model import CLIP
from ldm.clip.tokenizer import Tokenizer
from ldm.data.samples import Batch
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.statistics import Comparison, dependence, paired
from ldm.formats import read
from ldm.formats.checkpoint import CLIP_COMPONENTS, OTHERS, joined
from ldm.formats.clip import clip_of as build_clip
from ldm.formats.native import load_strictly

SIDE = 4
"""Side of the thumbnails that images are compared by."""


class RunCLIP(NamedTuple):
    """The CLIP of a run, with its tokenizer."""

    model: CLIP
    tokenizer: Tokenizer


def clip_of(run: OpenedRun) -> RunCLIP | None:
    """Return the CLIP that the run has trained or names as ``clip.checkpoint``; None if there is none with both towers."""
    stage, weights = run.experiment.clip, run.stages.get("clip")
    path = None if stage is None else stage.checkpoint
    if path is not None and Path(path).exists():
        found = read(path)
        if not found.parts.keys() >= {*CLIP_COMPONENTS, OTHERS} or found.tokenizer is None:
            return None
        model, tokenizer = build_clip(found), found.tokenizer
        load_strictly(model, joined(found.parts, CLIP_COMPONENTS), path, torch.float32)
    elif path is None and weights is not None and weights.header.tokenizer is not None:
        model, tokenizer = weights.header.config.build(), weights.header.tokenizer
        load_strictly(model, weights.average, weights.path, torch.float32)
    else:
        return None
    return RunCLIP(model.eval().requires_grad_(False).to(run.device), tokenizer)


@torch.no_grad()
def similarity(clip: RunCLIP, batch: Batch, tokenizer: Tokenizer | None = None) -> Comparison:
    """Compare the similarity of images with their own and with other captions; pairs whose captions are equal are left out.

    Args:
        clip: the CLIP.
        batch: images and captions.
        tokenizer: tokenizer to use instead of the CLIP's own.
    """
    device, captions = next(clip.model.parameters()).device, batch["text"]
    tokens = (tokenizer or clip.tokenizer)(captions, longest=True).to(device)
    tokens = tokens.clamp(max=clip.model.text.config.vocab_size - 1)
    text, image = clip.model.encode_text(tokens), clip.model.encode_image(batch["image"].to(device))
    text, image = F.normalize(text, dim=-1), F.normalize(image, dim=-1)
    order = np.roll(np.arange(len(captions)), len(captions) // 2 or 1)
    rows = [i for i, other in enumerate(order) if captions[i] != captions[other]]
    own, others = (text * image).sum(1).cpu(), (text[order] * image).sum(1).cpu()
    return paired(own[rows], others[rows])


def caption_dependence(batch: Batch) -> float:
    """Return how far captions and images are from independence, in standard deviations (see :func:`dependence`).

    Captions are compared by their words, weighted by rarity, images by thumbnails of 4 × 4 pixels; so nothing is needed that was
    trained. Weak relations, such as to small details, may not show.
    """
    words, thumbnails = _words(batch["text"]), F.adaptive_avg_pool2d(batch["image"].float(), SIDE).flatten(1).double()
    thumbnails = (thumbnails - thumbnails.mean(0)) / thumbnails.std(0).clamp(min=1e-6)
    distance = torch.cdist(thumbnails, thumbnails).square()
    kernel = (
        torch.exp(-distance / distance[distance > 0].median().clamp(min=1e-12)) if (distance > 0).any() else distance
    )
    return dependence(kernel, words @ words.T, torch.Generator().manual_seed(0))


def _words(captions: Sequence[str]) -> Tensor:
    """Return normalized vectors of the words of each caption, ``[n words]``, weighted by inverse frequency."""
    split = [set(caption.lower().replace(",", " ").split()) for caption in captions]
    vocabulary = {word: i for i, word in enumerate(sorted(set().union(*split)))}
    counts = torch.zeros(len(captions), max(1, len(vocabulary)), dtype=torch.float64)
    for row, words in enumerate(split):
        for word in words:
            counts[row, vocabulary[word]] = 1
    rarity = (len(captions) / counts.sum(0).clamp(min=1)).log()
    return F.normalize(counts * rarity, dim=1)


def reads_text(run: OpenedRun) -> bool:
    """Return whether the denoiser or the CLIP of the experiment is trained on captions."""
    return "text" in run.experiment.denoiser.conditioner.input_keys or run.experiment.clip is not None
