"""Conditionings that change with the noise level, for prompts that change between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning.conditioner import Conditioner
from ldm.nn.conditioning import Conditioning
from ldm.prompts import Prompt, PromptOptions


@dataclass(frozen=True)
class ConditioningSchedule:
    """Conditionings of the successive phases of a sampling.

    Attributes:
        records: one for each phase, each for all rows of the batch.
        ends: decreasing noise levels: the phase after ``records[i]`` begins at ``ends[i]``; the last has no end.
    """

    records: tuple[Conditioning, ...]
    ends: tuple[float, ...] = ()

    def at(self, sigma: Tensor) -> Conditioning:
        """Return the record at noise levels ``sigma [b]``; each row of the batch is in the phase of its own level."""
        if not self.ends:
            return self.records[0]
        phase = sum((sigma <= end).long() for end in self.ends)
        return self._joined[phase * len(sigma) + torch.arange(len(sigma), device=sigma.device)]

    @cached_property
    def _joined(self) -> Conditioning:
        """The records of all phases concatenated, ``len(records) * b`` rows."""
        return Conditioning.cat(self.records)

    def map(self, function: Callable[[Conditioning], Conditioning]) -> ConditioningSchedule:
        """Return the same phases with ``function`` applied to each record."""
        return ConditioningSchedule(tuple(map(function, self.records)), self.ends)

    @staticmethod
    def cat(parts: Sequence[ConditioningSchedule]) -> ConditioningSchedule:
        """Concatenate schedules with the same ends along the batch, in order."""
        assert len({part.ends for part in parts}) == 1, "the phases end at different levels"
        return ConditioningSchedule(
            tuple(Conditioning.cat(records) for records in zip(*(part.records for part in parts), strict=True)),
            parts[0].ends,
        )


def conditioning_schedules(
    conditioner: Conditioner,
    conditions: Mapping[str, Sequence[Any]],
    negative_prompts: Sequence[Prompt] | None,
    reading: PromptOptions,
    levels: Tensor,
) -> tuple[ConditioningSchedule, ConditioningSchedule]:
    """Compute the conditional and the unconditional schedule of a sampling along ``levels [steps + 1]``.

    Args:
        conditions: raw conditions by name, an entry for each image; prompts are under ``text``.
        negative_prompts: negative prompts, one for each image; None if there are none.

    Raises:
        SamplingError: a prompt is not in the syntax of ``reading``.
    """
    steps, prompts = len(levels) - 1, conditions.get("text", ())
    changes = set[int]().union(*(reading.changes(prompt, steps) for prompt in (*prompts, *(negative_prompts or ()))))
    starts = [0, *sorted(step for step in changes if 0 < step < steps)]

    def conditional(step: int) -> Conditioning:
        return _mixed(conditioner, conditions, [reading.at(prompt, step, steps) for prompt in prompts])

    def unconditional(step: int) -> Conditioning:
        if negative_prompts is None:
            return conditioner.unconditional(conditions)
        negatives = [reading.at(prompt, step, steps) for prompt in negative_prompts]
        return _mixed(lambda inputs: conditioner.unconditional(inputs, inputs["text"]), conditions, negatives)

    ends = tuple(levels[starts[1:]].tolist())
    return ConditioningSchedule(tuple(map(conditional, starts)), ends), ConditioningSchedule(
        tuple(map(unconditional, starts)), ends
    )


def _mixed(
    encode: Callable[[Mapping[str, Sequence[Any]]], Conditioning],
    inputs: Mapping[str, Sequence[Any]],
    mixtures: Sequence[Sequence[tuple[float, str | None]]],
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
