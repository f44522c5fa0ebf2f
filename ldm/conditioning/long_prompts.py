"""Encoding of prompts of any length and with word weights by a text tower."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ldm.clip.text import TextOutput, TextTower, TextTowerConfig
from ldm.clip.tokenizer import Tokenizer
from ldm.errors import ConfigError, SamplingError
from ldm.nn.wrappers import innermost
from ldm.prompts import WeightedPrompt


def check_vocabulary(tokenizer: Tokenizer, config: TextTowerConfig) -> None:
    """Check that a text encoder has an embedding for each token.

    Raises:
        ConfigError: it has fewer.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the text encoder embeddings for {config.vocab_size} only; "
            "use the tokenizer that belongs to it."
        )


def text_towers(conditioner: Any) -> dict[str, TextTower]:
    """Return the CLIP text encoders of a conditioner, by component."""
    encoders = ((name, innermost(each)) for name, each in conditioner.pretrained_encoders())
    return {name: each for name, each in encoders if isinstance(each, TextTower)}


def check_clip_skip(conditioner: Any, clip_skip: int | None) -> None:
    """Check the number of last layers that the context leaves out (None: not given).

    Raises:
        SamplingError: a text encoder has fewer layers, or there is no CLIP text encoder.
    """
    depths = [tower.config.context_depth for tower in text_towers(conditioner).values()]
    if clip_skip is not None and clip_skip > min(depths, default=-1):
        limit = f"give at most {min(depths)}" if depths else "leave it out, since this model has no CLIP text encoder"
        raise SamplingError(f"clip_skip is {clip_skip}; {limit}.")


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
    parts = [_windows(text, tokenizer) for text in prompts]
    counts = [len(tokens) for tokens, _ in parts]
    clip_skip = max(text.clip_skip for text in prompts)
    states, pooled = tower(torch.cat([tokens for tokens, _ in parts]).to(device), clip_skip)
    if any(text.weights for text in prompts):
        weights = [_weights(text, places) for text, (_, places) in zip(prompts, parts, strict=True)]
        states = weighted(states, torch.cat(weights).to(device))

    most, n = max(counts), states.shape[1]
    if most == 1:
        return TextOutput(states, pooled), None
    pooled = torch.stack([rows[0] for rows in pooled.split(counts)])
    if min(counts) == most:
        return TextOutput(states.reshape(len(texts), most * n, -1), pooled), None
    empty, _ = tower(tokenizer("").to(device), clip_skip)
    filled = [torch.cat([rows, empty.expand(most - len(rows), -1, -1)]).flatten(0, 1) for rows in states.split(counts)]
    present = torch.arange(most, device="cpu") < torch.tensor(counts, device="cpu")[:, None]
    return TextOutput(torch.stack(filled), pooled), present.repeat_interleave(n, dim=1).to(device)


def _windows(text: WeightedPrompt, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Return the windows of a text as :meth:`Tokenizer.windows` does; a new one begins at each of its breaks."""
    if not text.breaks:
        return tokenizer.windows(text, text.cut)
    starts = (0, *text.breaks)
    parts = [tokenizer.windows(text[start:end], text.cut) for start, end in pairwise((*starts, len(text)))]
    places = [torch.where(place < 0, place, place + start) for (_, place), start in zip(parts, starts, strict=True)]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat(places)


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
