"""Conditionings that change with the noise level, for prompts that change between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning.conditioner import Conditioner
from ldm.diffusion import Composition
from ldm.nn.conditioning import Conditioning
from ldm.prompts import Prompt, PromptOptions, WeightedPrompt

Mixtures = Sequence[Sequence[tuple[float, WeightedPrompt | None]]]
"""For each row, the texts that are mixed and their shares."""


@dataclass(frozen=True)
class ConditioningSchedule:
    """Conditionings of the successive phases of a sampling.

    Attributes:
        records: the different ones, each for all rows of the batch.
        ends: decreasing noise levels: phase i ends at ``ends[i]``; the last has no end.
        order: index of the record of each phase; default: one record for each phase.
    """

    records: tuple[Conditioning, ...]
    ends: tuple[float, ...] = ()
    order: tuple[int, ...] = ()

    def at(self, sigma: Tensor) -> Conditioning:
        """Return the record at noise levels ``sigma [b]``; each row of the batch is in the phase of its own level."""
        if not self.ends:
            return self.records[0]
        order = self.order or range(len(self.records))
        ends = torch.tensor(self.ends, dtype=sigma.dtype, device=sigma.device)
        phase = (sigma[:, None] <= ends).sum(1)
        record = torch.tensor(order, device=sigma.device)[phase]
        return self._joined[record * len(sigma) + torch.arange(len(sigma), device=sigma.device)]

    @cached_property
    def _joined(self) -> Conditioning:
        """The records concatenated, ``len(records) * b`` rows."""
        return Conditioning.cat(self.records)

    def map(self, function: Callable[[Conditioning], Conditioning]) -> ConditioningSchedule:
        """Return the same phases with ``function`` applied to each record."""
        return replace(self, records=tuple(map(function, self.records)))

    @staticmethod
    def cat(parts: Sequence[ConditioningSchedule]) -> ConditioningSchedule:
        """Concatenate schedules with the same phases along the batch, in order."""
        assert len({(part.ends, part.order) for part in parts}) == 1, "the phases differ"
        records = zip(*(part.records for part in parts), strict=True)
        return replace(parts[0], records=tuple(map(Conditioning.cat, records)))


def conditioning_schedules(
    conditioner: Conditioner,
    conditions: Mapping[str, Sequence[Any]],
    negative_prompts: Sequence[Prompt] | None,
    reading: PromptOptions,
    levels: Tensor,
) -> tuple[ConditioningSchedule, ConditioningSchedule, Composition | None]:
    """Compute the conditional and the unconditional schedule of a sampling along ``levels [steps + 1]``.

    As in diffusers, ``clip_skip`` is for the conditional one only.

    Args:
        conditioner: encodes the conditions.
        conditions: raw conditions by name, an entry for each of b images; prompts are under ``text``.
        negative_prompts: negative prompts, one for each image; None if there are none.
        reading: how prompts are parsed.
        levels: falling noise levels.

    Returns:
        The conditional schedule, with a row for each prompt; the unconditional one, with b rows; and which rows make
        up which image, None if each image has one prompt.

    Raises:
        SamplingError: a prompt is not in the syntax of ``reading``.
    """
    steps = len(levels) - 1
    composed, composition = _composed(conditions, reading)
    prompts, unskipped = composed.get("text", ()), replace(reading, clip_skip=None)
    changes = set[int]().union(*(reading.changes(prompt, steps) for prompt in (*prompts, *(negative_prompts or ()))))
    starts = [0, *sorted(step for step in changes if 0 < step < steps)]

    def unconditional(texts: Mixtures) -> Conditioning:
        if negative_prompts is None:
            return conditioner.unconditional(conditions)
        return _mixed(lambda inputs: conditioner.unconditional(inputs, inputs["text"]), conditions, texts)

    records: dict[Any, tuple[Conditioning, Conditioning]] = {}
    order: list[int] = []
    for step in starts:
        positive = [reading.at(prompt, step, steps) for prompt in prompts]
        negative = [unskipped.at(prompt, step, steps) for prompt in negative_prompts or ()]
        key = _key(positive), _key(negative)
        if key not in records:
            records[key] = _mixed(conditioner, composed, positive), unconditional(negative)
        order.append(list(records).index(key))
    ends = tuple(levels[starts[1:]].tolist())
    conditionals, unconditionals = zip(*records.values(), strict=True)
    return (
        ConditioningSchedule(conditionals, ends, tuple(order)),
        ConditioningSchedule(unconditionals, ends, tuple(order)),
        composition,
    )


def _composed(
    conditions: Mapping[str, Sequence[Any]], reading: PromptOptions
) -> tuple[Mapping[str, Sequence[Any]], Composition | None]:
    """Return the conditions with an entry for each prompt that is joined by AND, and which of them make up which image."""
    parts = [reading.composition(prompt) for prompt in conditions.get("text", ())]
    if all(len(part) == 1 for part in parts):
        return conditions, None
    rows, weights, prompts = zip(*((row, *each) for row, part in enumerate(parts) for each in part), strict=True)
    composed = {name: [values[row] for row in rows] for name, values in conditions.items()}
    return composed | {"text": prompts}, Composition(rows, weights)


def _key(mixtures: Mixtures) -> Any:
    """Return a value by which mixtures that are encoded alike are equal."""
    return tuple(tuple((share, text and text.key) for share, text in mixture) for mixture in mixtures)


def _mixed(
    encode: Callable[[Mapping[str, Sequence[Any]]], Conditioning],
    inputs: Mapping[str, Sequence[Any]],
    mixtures: Mixtures,
) -> Conditioning:
    """Encode ``inputs`` with a weighted mixture of texts for each row; without mixtures, encode them unchanged."""
    if not mixtures:
        return encode(inputs)
    rows = [row for row, mixture in enumerate(mixtures) for _ in mixture]
    texts = [text for mixture in mixtures for _, text in mixture]
    record = encode({name: [values[row] for row in rows] for name, values in inputs.items()} | {"text": texts})
    if len(rows) == len(mixtures):
        return record
    shares = torch.block_diag(
        *(torch.tensor([[share for share, _ in mixture]], dtype=torch.float32, device="cpu") for mixture in mixtures)
    )

    def mix(part: Tensor) -> Tensor:
        mixed = torch.tensordot(shares.to(part.device), part.float(), dims=1)
        return mixed > 0 if part.dtype == torch.bool else mixed.to(part.dtype)

    return record.map(mix)
