"""The request of a sampling: conditions, negative prompts and seeds, checked, as lists with an entry for each image."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from types import MappingProxyType
from typing import Any

from ldm.checks import shown
from ldm.control_images import ControlHints
from ldm.diffusion import Guidance
from ldm.errors import SamplingError
from ldm.modalities import MODALITIES
from ldm.modalities.arguments import argument_of, condition_lists
from ldm.modalities.base import listed
from ldm.modalities.caption import prompts
from ldm.modalities.sizes import Pair
from ldm.prompts import Prompt, PromptOptions

SEED_LIMIT = 2**63


@dataclass(frozen=True)
class Request:
    """The request of some images, with an entry for each of them.

    Attributes:
        conditions: by the name that the conditioner reads; entries are None where a condition is left out.
        negative_prompts: one for each image; None for none.
        seeds: of the images' noise.
        guidance: its scale is one for all, or one for each image.
        prompt_options: how prompts are parsed.
        defaults: values of conditions that may be left out; the record of an image names those that differ.
        controls: hints of ControlNets.
    """

    conditions: Mapping[str, list[Any]]
    negative_prompts: list[Prompt] | None
    seeds: list[int]
    guidance: Guidance
    prompt_options: PromptOptions
    defaults: Mapping[str, Pair]
    controls: Sequence[ControlHints] = ()

    def __len__(self) -> int:
        return len(self.seeds)

    def record(self, index: int, settings: Mapping[str, Any]) -> dict[str, str]:
        """Return the record of an image: its own conditions and seed, and the ``settings`` of all as JSON."""
        own = self[index : index + 1]
        guidance = own.guidance.record()
        if isinstance(guidance["guidance_scale"], Sequence):
            guidance["guidance_scale"] = guidance["guidance_scale"][0]
        record = {
            modality.argument: str(own.conditions[key][0])
            for key, modality in MODALITIES.items()
            if modality.argument and own.conditions.get(key, [None])[0] is not None
        }
        record |= {"negative_prompt": str(own.negative_prompts[0])} if own.negative_prompts else {}
        changed = {name: pair for name, usual in self.defaults.items() if (pair := own.conditions[name][0]) != usual}
        return record | {
            "seed": str(own.seeds[0]),
            "settings": json.dumps({**settings, **guidance, **changed}, sort_keys=True),
        }

    def __getitem__(self, rows: slice) -> Request:
        """Return the request of some of the images."""
        scale = self.guidance.scale
        return Request(
            {name: values[rows] for name, values in self.conditions.items()},
            self.negative_prompts and self.negative_prompts[rows],
            self.seeds[rows],
            replace(self.guidance, scale=scale[rows] if isinstance(scale, Sequence) else scale),
            self.prompt_options,
            self.defaults,
            [hints[rows] for hints in self.controls],
        )


def request(
    reads: Sequence[str],
    conditions: Mapping[str, Any],
    negative_prompt: Prompt | Sequence[Prompt] | None,
    guidance: Guidance,
    seed: int | Sequence[int] | None,
    repeats: int,
    prompt_options: PromptOptions,
    defaults: Mapping[str, Pair] = MappingProxyType({}),
) -> Request:
    """Create the request of ``repeats`` images for each entry of the conditions, in order.

    Args:
        reads: names of the conditions that the conditioner reads.
        conditions: by these names, ``prompt`` and ``label`` by theirs; one that is None counts as left out.
        negative_prompt, guidance, seed: as in :class:`ldm.sampling_settings.SamplingSettings`.
        defaults: further conditions that the conditioner reads, with their values if they are left out.

    Raises:
        SamplingError: a condition that is missing, of the wrong type or length, or that the model does not read.
    """
    asked = condition_lists(reads, defaults, {name: value for name, value in conditions.items() if value is not None})
    lengths = {name: len(values) for name, values in asked.items()}
    n = max(lengths.values(), default=1)
    for name, length in lengths.items():
        if length not in (1, n):
            longest = max(lengths, key=lambda key: lengths[key])
            raise SamplingError(
                f"{length} of {argument_of(name)} do not fit {n} of {argument_of(longest)}; give one, or one for each."
            )
    entries_of = {name: values if len(values) == n else values * n for name, values in asked.items()}
    negatives = _negatives(reads, negative_prompt, n)
    prompt_options.check(entries_of.get("text", ()))
    prompt_options.check(negatives or (), negative=True)
    if isinstance(guidance.scale, Sequence):
        scales = _one_each("guidance scales", list(guidance.scale), n, "prompts")
        guidance = replace(guidance, scale=[float(scale) for scale in scales for _ in range(repeats)])
    return Request(
        {name: [value for value in values for _ in range(repeats)] for name, values in entries_of.items()},
        negatives and [prompt for prompt in negatives for _ in range(repeats)],
        seed_list(seed, n * repeats),
        guidance,
        prompt_options,
        defaults,
    )


def _negatives(reads: Sequence[str], negative_prompt: Prompt | Sequence[Prompt] | None, n: int) -> list[Prompt] | None:
    """Return a negative prompt for each of ``n`` prompts, or None if there is none."""
    if negative_prompt is None:
        return None
    if "text" not in reads:
        raise SamplingError("this model reads no prompt; leave negative_prompt out.")
    given = prompts("negative_prompt", negative_prompt)
    given = given * n if isinstance(negative_prompt, Prompt) else given
    return _one_each("negative prompts", given, n, "prompts")


def seed_list(seed: int | Sequence[int] | None, n: int) -> list[int]:
    """Return a seed for each of ``n`` images: those given, or s, s + 1, ... from one, by default a random one."""
    given = [one_seed()] if seed is None else listed(seed)
    for item in given:
        if isinstance(item, bool) or not isinstance(item, Integral) or not 0 <= int(item) < SEED_LIMIT - n:
            raise SamplingError(f"the seed {shown(item)} is no whole number from 0 to 2^63 - {n + 1}.")
    if seed is None or isinstance(seed, Integral):
        return [int(given[0]) + index for index in range(n)]
    return [int(item) for item in _one_each("seeds", given, n, "images")]


def one_seed() -> int:
    """Draw a random seed."""
    return secrets.randbelow(2**32)


def _one_each(name: str, given: list[Any], n: int, whom: str) -> list[Any]:
    """Return ``given`` if there are ``n`` of them; else raise a SamplingError."""
    if len(given) != n:
        raise SamplingError(f"{len(given)} {name} do not fit {n} {whom}; give one for each, or one that is in no list.")
    return given
