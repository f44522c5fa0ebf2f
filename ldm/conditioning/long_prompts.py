"""Prompts of any length, and of words with weights, through a text tower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.clip.text import TextOutput, TextTower
from ldm.clip.tokenizer import Tokenizer
from ldm.prompts import WeightedPrompt


def read(texts: Sequence[str], tokenizer: Tokenizer, tower: TextTower) -> tuple[TextOutput, Tensor | None]:
    """Encodes each text in as many windows of the tower's length n as it needs, k at most, their contexts end to end.

    A string that is no :class:`WeightedPrompt` is cut to one window. Windows that a text does not have are those of the empty
    text, and masked.

    Returns:
        Context ``[b k*n d]`` and pooled state ``[b e]``, that of the first window; the mask ``[b k*n]``, None if all
        texts have as many windows.
    """
    device = tower.token_embedding.weight.device
    if not any(isinstance(text, WeightedPrompt) for text in texts):
        return tower(tokenizer(list(texts)).to(device)), None
    asked = [text if isinstance(text, WeightedPrompt) else WeightedPrompt(text, cut=True) for text in texts]
    parts = [tokenizer.windows(text, text.cut) for text in asked]
    counts = [len(tokens) for tokens, _ in parts]
    states, pooled = tower(torch.cat([tokens for tokens, _ in parts]).to(device))
    if any(text.weights for text in asked):
        weights = [_weights(text, places) for text, (_, places) in zip(asked, parts, strict=True)]
        states = weighted(states, torch.cat(weights).to(device))

    most, n = max(counts), states.shape[1]
    if most == 1:
        return TextOutput(states, pooled), None
    pooled = torch.stack([rows[0] for rows in pooled.split(counts)])
    if min(counts) == most:
        return TextOutput(states.reshape(len(texts), most * n, -1), pooled), None
    empty, _ = tower(tokenizer("").to(device))
    filled = [torch.cat([rows, empty.expand(most - len(rows), -1, -1)]).flatten(0, 1) for rows in states.split(counts)]
    there = torch.arange(most) < torch.tensor(counts)[:, None]
    return TextOutput(torch.stack(filled), pooled), there.repeat_interleave(n, dim=1).to(device)


def weighted(states: Tensor, weights: Tensor) -> Tensor:
    """States c of tokens ``[k n d]`` times their weights w ``[k n]``, the mean magnitude of each window restored:

    c' = w c mean|c| / mean|w c|

    Automatic1111 restores the mean itself, which is next to 0 after a layer norm and then is no measure.
    """
    scaled = states * weights[..., None].to(states.dtype)
    before, after = (each.float().abs().mean((1, 2), keepdim=True) for each in (states, scaled))
    return scaled * (before / after).to(states.dtype)


def _weights(text: WeightedPrompt, places: Tensor) -> Tensor:
    """Weight of each token, ``[k n]``: that of its last character, 1 for start, end and padding."""
    return torch.tensor([*(text.weights or [1.0] * len(text)), 1.0])[places]
