"""What a caller asks of a sampling, checked and brought into lists of one entry for each image."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ldm.diffusion import OPTIONS, SAMPLERS, SPECS, Denoiser, Guidance
from ldm.errors import SamplingError, unknown
from ldm.modalities import MODALITIES
from ldm.modalities.arguments import argument_of, condition_lists
from ldm.modalities.base import listed
from ldm.modalities.caption import prompts
from ldm.modalities.sizes import Pair
from ldm.prompts import Prompt, PromptOptions

SEED_LIMIT = 2**63


@dataclass(frozen=True)
class Request:
    """What is asked of some images: an entry for each of them.

    Attributes:
        wanted: what to show, by the name that the conditioner reads; None where it is left out.
        unwanted: prompts to keep away from; None for none.
        seeds: of their noise.
        guidance: its scale is one for all, or one for each.
        reading: of the prompts.
        defaults: what some conditions are unless the caller says otherwise; a record tells where he does.
    """

    wanted: Mapping[str, list[Any]]
    unwanted: list[Prompt] | None
    seeds: list[int]
    guidance: Guidance
    reading: PromptOptions
    defaults: Mapping[str, Pair]

    def __len__(self) -> int:
        return len(self.seeds)

    def record(self, index: int, settings: Mapping[str, Any]) -> dict[str, str]:
        """What an image says of itself: what was asked of it, and how all were made."""
        own = self[index : index + 1]
        guidance = own.guidance.record()
        if isinstance(guidance["guidance_scale"], Sequence):
            guidance["guidance_scale"] = guidance["guidance_scale"][0]
        asked = {
            modality.argument: str(own.wanted[key][0])
            for key, modality in MODALITIES.items()
            if modality.argument and own.wanted.get(key, [None])[0] is not None
        }
        asked |= {"negative_prompt": str(own.unwanted[0])} if own.unwanted else {}
        told = {name: pair for name, default in self.defaults.items() if (pair := own.wanted[name][0]) != default}
        settings = {**settings, **guidance, **told, **self.reading.record()}
        return asked | {"seed": str(own.seeds[0]), "settings": json.dumps(settings)}

    def __getitem__(self, rows: slice) -> Request:
        """The request of some of the images."""
        scale = self.guidance.scale
        return Request(
            {name: values[rows] for name, values in self.wanted.items()},
            self.unwanted and self.unwanted[rows],
            self.seeds[rows],
            replace(self.guidance, scale=scale[rows] if isinstance(scale, Sequence) else scale),
            self.reading,
            self.defaults,
        )


class Edit:
    """What an editing task changes about a sampling; this one changes nothing.

    ``rows`` says which of the asked-for images the batch at hand holds.
    """

    def levels(self, levels: Tensor) -> Tensor:
        """The noise levels to walk through, ``[steps + 1]``."""
        return levels

    def start(self, x: Tensor, unit: Tensor, sigma: float, rows: slice) -> Tensor:
        """Where to start at level ``sigma``, in place of ``x``, which is made of ``unit`` noise; all ``[b c h w]``."""
        return x

    def wrap(self, denoise: Denoiser, rows: slice) -> Denoiser:
        """The denoiser to sample with."""
        return denoise

    def finish(self, pictures: Tensor, rows: slice) -> Tensor:
        """What becomes of the decoded images, ``[b 3 h w]`` in [0, 1]."""
        return pictures

    def record(self) -> dict[str, Any]:
        """What the images' record of their settings says of it."""
        return {}


def request(
    reads: Sequence[str],
    conditions: Mapping[str, Any],
    negative_prompt: Prompt | Sequence[Prompt] | None,
    guidance: Guidance,
    seed: int | Sequence[int] | None,
    repeats: int,
    reading: PromptOptions,
    defaults: Mapping[str, Pair] = MappingProxyType({}),
) -> Request:
    """The request of ``repeats`` images for each of the ``conditions``, one image's after the other.

    Args:
        reads: what the conditioner reads.
        conditions: by that name, ``prompt`` and ``label`` by theirs; one that is None counts as left out.
        negative_prompt, guidance, seed, reading: as of :meth:`ldm.pipeline.Pipeline.__call__`.
        defaults: what it reads besides, and takes so where the caller does not give it.

    Raises:
        SamplingError: something missing, of the wrong type, of different lengths, or that the model does not read.
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
    wanted = {name: values if len(values) == n else values * n for name, values in asked.items()}
    avoided = _negatives(reads, negative_prompt, n)
    for prompt in (*wanted.get("text", ()), *(avoided or ())):
        reading.changes(prompt, steps=1)  # raises where it is not in the syntax
    if isinstance(guidance.scale, Sequence):
        scales = _one_each("guidance scales", list(guidance.scale), n, "prompts")
        guidance = replace(guidance, scale=[float(scale) for scale in scales for _ in range(repeats)])
    return Request(
        {name: [value for value in values for _ in range(repeats)] for name, values in wanted.items()},
        avoided and [prompt for prompt in avoided for _ in range(repeats)],
        _seeds(seed, n * repeats),
        guidance,
        reading,
        defaults,
    )


def _negatives(reads: Sequence[str], negative_prompt: Prompt | Sequence[Prompt] | None, n: int) -> list[Prompt] | None:
    """A negative prompt for each of ``n`` prompts, or None if there is none."""
    if negative_prompt is None:
        return None
    if "text" not in reads:
        raise SamplingError("this model reads no prompt; leave negative_prompt out.")
    given = prompts("negative_prompt", negative_prompt)
    given = given * n if isinstance(negative_prompt, Prompt) else given
    return _one_each("negative prompts", given, n, "prompts")


def _seeds(seed: int | Sequence[int] | None, n: int) -> list[int]:
    """A seed for each of ``n`` images: those given, s, s + 1, ... from one, or so from one drawn at random."""
    given = [one_seed()] if seed is None else listed(seed)
    for item in given:
        if not isinstance(item, Integral) or not 0 <= int(item) < SEED_LIMIT - n:
            raise SamplingError(f"the seed {item!r} is no whole number from 0 to 2^63 - {n + 1}.")
    if seed is None or isinstance(seed, Integral):
        return [int(given[0]) + index for index in range(n)]
    return [int(item) for item in _one_each("seeds", given, n, "images")]


def one_seed() -> int:
    """A seed drawn at random."""
    return secrets.randbelow(2**32)


def check_solver(sampler: str, options: Mapping[str, Any], guidance: Guidance) -> None:
    """Raises a SamplingError for an unknown sampler, or an option or guidance that it does not take."""
    check_sampler(sampler)
    for name in options:
        if name not in SPECS[sampler].options:
            takers = ", ".join(taker for taker, spec in SPECS.items() if name in spec.options)
            instead = f", or choose one of {takers}" if takers else ""
            raise SamplingError(f"the sampler {sampler} takes no {name}; leave it out{instead}.")
        fits, what = OPTIONS[name]
        if not fits(options[name]):
            raise SamplingError(f"{name} is {options[name]!r}; it must be {what}.")
    if SPECS[sampler].adaptive and guidance.projection is not None and guidance.projection.momentum:
        raise SamplingError(
            f"the sampler {sampler} repeats steps, which momentum would count twice; set momentum to 0."
        )


def check_sampler(sampler: str) -> None:
    """Raises a SamplingError for an unknown sampler."""
    if sampler not in SAMPLERS:
        raise SamplingError(unknown("sampler", sampler, SAMPLERS))


def check_counts(**counts: Any) -> None:
    """Raises a SamplingError for what is neither None nor a whole number above 0, by its name."""
    for name, count in counts.items():
        if count is not None and (not isinstance(count, Integral) or count < 1):
            raise SamplingError(f"{name} is {count!r}; it must be a whole number, 1 or more.")


def _one_each(name: str, given: list[Any], n: int, whom: str) -> list[Any]:
    """``given``, if there are ``n`` of them; else a SamplingError."""
    if len(given) != n:
        raise SamplingError(f"{len(given)} {name} do not fit {n} {whom}; give one for each, or one that is in no list.")
    return given
