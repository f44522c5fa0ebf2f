"""Encoding of prompts of any length and with word weights by a text tower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.clip.text import TextOutput, TextTower
from ldm.clip.tokenizer import Tokenizer
from ldm.prompts import WeightedPrompt


def read(texts: Sequence[str], tokenizer: Tokenizer, tower: TextTower) -> tuple[TextOutput, Tensor | None]:
    """Encode each text in windows of the tower's length n and concatenate the contexts of its windows, k at most.

    A string that is not a :class:`WeightedPrompt` is truncated to one window. Texts of fewer than k windows are padded with
    windows of the empty text, which are masked.

    Returns:
        Context ``[b k*n d]`` and pooled state ``[b e]`` of the first window; the mask ``[b k*n]``, None if all
        texts have the same number of windows.
    """
    device = tower.token_embedding.weight.device
    if not any(isinstance(text, WeightedPrompt) for text in texts):
        return tower(tokenizer(list(texts)).to(device)), None
    prompts = [text if isinstance(text, WeightedPrompt) else WeightedPrompt(text, cut=True) for text in texts]
    parts = [tokenizer.windows(text, text.cut) for text in prompts]
    counts = [len(tokens) for tokens, _ in parts]
    states, pooled = tower(torch.cat([tokens for tokens, _ in parts]).to(device))
    if any(text.weights for text in prompts):
        weights = [_weights(text, places) for text, (_, places) in zip(prompts, parts, strict=True)]
        states = weighted(states, torch.cat(weights).to(device))

    most, n = max(counts), states.shape[1]
    if most == 1:
        return TextOutput(states, pooled), None
    pooled = torch.stack([rows[0] for rows in pooled.split(counts)])
    if min(counts) == most:
        return TextOutput(states.reshape(len(texts), most * n, -1), pooled), None
    empty, _ = tower(tokenizer("").to(device))
    filled = [torch.cat([rows, empty.expand(most - len(rows), -1, -1)]).flatten(0, 1) for rows in states.split(counts)]
    present = torch.arange(most, device="cpu") < torch.tensor(counts, device="cpu")[:, None]
    return TextOutput(torch.stack(filled), pooled), present.repeat_interleave(n, dim=1).to(device)


def weighted(states: Tensor, weights: Tensor) -> Tensor:
    """Multiply token states c ``[k n d]`` by their weights w ``[k n]``, then restore the mean magnitude of each window:

    c' = w c mean|c| / mean|w c|

    Automatic1111 restores the mean itself, which is close to 0 after a layer norm and thus numerically unstable.
    """
    scaled = states * weights[..., None].to(states.dtype)
    before, after = (each.float().abs().mean((1, 2), keepdim=True) for each in (states, scaled))
    return scaled * (before / after).to(states.dtype)


def _weights(text: WeightedPrompt, places: Tensor) -> Tensor:
    """Return the weight of each token, ``[k n]``: that of its last character, or 1 for start, end and padding."""
    weights = [*(text.weights or [1.0] * len(text)), 1.0]
    return torch.tensor(weights, dtype=torch.float32, device="cpu")[places]
