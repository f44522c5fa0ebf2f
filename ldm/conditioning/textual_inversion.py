"""Textual inversions: tokens with embeddings of their own, added to the text encoders of a model (Gal et al. 2208.01618).

The tokens extend the tokenizer and the token embeddings, as in diffusers, so formats that hold these hold the tokens, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.clip.text import TextTowerConfig
from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning.long_prompts import text_towers
from ldm.errors import SamplingError


@dataclass(frozen=True)
class TextualInversion:
    """A token with one or several vectors.

    Attributes:
        token: how prompts write it.
        vectors: ``[k width]``, by text encoder; the others of k tokens are ``token_1``, ``token_2``, ...
        fingerprint: hash of the file.
        adapter: name of the LoRA whose file it is part of; it is unloaded with it.
    """

    token: str
    vectors: Mapping[str, Tensor]
    fingerprint: str
    adapter: str | None = None

    @property
    def tokens(self) -> list[str]:
        k = len(next(iter(self.vectors.values())))
        return [self.token, *(f"{self.token}_{index}" for index in range(1, k))]


@dataclass(frozen=True)
class Vocabulary:
    """State of a model before textual inversions: its tokenizer, configs, and the rows of embeddings beyond the tokenizer's."""

    tokenizer: Tokenizer
    config: Any
    towers: Mapping[str, TextTowerConfig]
    rest: Mapping[str, Tensor]


@dataclass(frozen=True)
class TextualInversions:
    """The textual inversions of a model, and its vocabulary without them."""

    loaded: Sequence[TextualInversion] = ()
    original: Vocabulary | None = field(default=None, repr=False)

    def record(self) -> dict[str, Any]:
        """Return their entry in the record of a generated image."""
        entries = [{"name": each.token, "file": each.fingerprint} for each in self.loaded]
        return {"textual_inversions": entries} if entries else {}


def add_inversions(model: Any, added: Sequence[TextualInversion]) -> None:
    """Add textual inversions to a model.

    Args:
        model: a LatentDiffusion with CLIP text encoders.
        added: with vectors for each of its text encoders.

    Raises:
        CheckpointError: a token is in the vocabulary already; the model stays as it is.
    """
    _set(model, [*model.textual_inversions.loaded, *added])


def remove_inversions(model: Any, is_removed: Callable[[TextualInversion], bool]) -> None:
    """Remove textual inversions from a model; the weights without any are bit for bit what they were."""
    _set(model, [each for each in model.textual_inversions.loaded if not is_removed(each)])


def known_tokens(model: Any, tokens: Sequence[str]) -> set[str]:
    """Return the tokens as a set.

    Raises:
        SamplingError: one is not that of a textual inversion.
    """
    loaded = [each.token for each in model.textual_inversions.loaded]
    for token in tokens:
        if token not in loaded:
            raise SamplingError(f"no textual inversion {token!r} is loaded; loaded: {', '.join(loaded) or 'none'}.")
    return set(tokens)


def _set(model: Any, loaded: Sequence[TextualInversion]) -> None:
    """Extend the original vocabulary of a model by the tokens of ``loaded``."""
    if not loaded and not model.textual_inversions.loaded:
        return
    towers = text_towers(model.conditioner)
    original = model.textual_inversions.original or Vocabulary(
        model.tokenizer,
        model.config,
        {name: tower.config for name, tower in towers.items()},
        {name: tower.token_embedding.weight[model.tokenizer.vocab_size :].clone() for name, tower in towers.items()},
    )
    tokenizer = original.tokenizer.with_tokens([token for each in loaded for token in each.tokens])
    for name, tower in towers.items():
        embedding = tower.token_embedding.weight
        vectors = [each.vectors[name].to(embedding) for each in loaded]
        known = [embedding[: original.tokenizer.vocab_size], *vectors]
        rest = original.rest[name][sum(map(len, vectors)) :].to(embedding)
        rows = torch.cat([*known, rest]).detach()
        tower.token_embedding = nn.Embedding.from_pretrained(rows, freeze=not embedding.requires_grad)
        config = original.towers[name]
        if loaded:  # the end token no longer has the highest id
            eos_id = tokenizer.eos_id if config.eos_id is None else config.eos_id
            config = replace(config, vocab_size=len(rows), eos_id=eos_id)
        tower.config = config
    configs = {name: tower.config for name, tower in towers.items()}
    model.config = replace(original.config, conditioner=original.config.conditioner.with_encoders(configs))
    model.tokenizer = tokenizer if loaded else original.tokenizer
    model.conditioner.set_vocabulary(model.config.conditioner, model.tokenizer)
    model.textual_inversions = TextualInversions(tuple(loaded), original) if loaded else TextualInversions()


def changed_modules(model: Any) -> Iterator[str]:
    """Yield the names of the modules that :func:`add_inversions` changes; see :func:`ldm.nn.views.view`."""
    towers = text_towers(model.conditioner)
    yield from (component.prefix for name, component in model.components.items() if name in towers)
    for name, module in model.conditioner.named_modules():
        if hasattr(module, "set_vocabulary"):
            yield f"conditioner.{name}".rstrip(".")
