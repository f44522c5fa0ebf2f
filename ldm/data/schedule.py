"""Schedule of groups: an endless sequence in which each group occurs in an exact proportion."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

ROUND = 1024
"""Largest number of places of a round, apart from rounding."""


class Schedule:
    """Endless sequence of group numbers in random order, in rounds of about equal size.

    After ``e`` rounds, a group has occurred ``e q - a`` times, rounded to the nearest whole number, where ``q`` is its share of
    a round and ``a`` its advance. So rounding does not add up: the shares of whole rounds are exact to half a place. The number
    of places of a round varies, by at most one for each group. In a round, the occurrences of a group are spread evenly: one at
    random in each of as many equal parts of the round. So all groups advance together, which keeps shards read in sequence.

    Args:
        shares: share of each group; they add up to 1.
        places: number of places of an epoch, which consists of whole rounds.
        seed, key: seed of the random order, and numbers from 1 that tell schedules with one seed apart.
        advance: number of places that each group had before the first one; it is left out until it has come to its share.
    """

    def __init__(
        self,
        shares: Sequence[Fraction],
        places: Fraction,
        seed: int,
        key: Sequence[int],
        advance: Sequence[Fraction] | None = None,
    ):
        rounds = math.ceil(places / ROUND)
        self._quotas = [share * places / rounds for share in shares]
        self._advance = advance or [Fraction(0)] * len(shares)
        self._seed, self._key = seed, key
        self._number, self._before, self._groups = self._round(0)  # the round in which the last place was found

    def take(self, start: int, count: int) -> tuple[np.ndarray, list[int]]:
        """Return the groups of ``count`` places from number ``start`` on, and how often each group occurs before them."""
        if not 0 <= start - sum(self._before) < len(self._groups):
            self._number, self._before, self._groups = self._round(self._round_of(start))
        first = start - sum(self._before)
        earlier = np.bincount(self._groups[:first], minlength=len(self._quotas))
        before = [each + more for each, more in zip(self._before, earlier.tolist(), strict=True)]
        parts = [self._groups[first : first + count]]
        missing, number = count - len(parts[0]), self._number
        while missing > 0:
            number += 1
            parts.append(self._round(number)[2][:missing])
            missing -= len(parts[-1])
        return np.concatenate(parts), before

    def _round(self, number: int) -> tuple[int, list[int], np.ndarray]:
        """Return the number of a round, how often each group occurs before it, and the groups in it."""
        before, after = self._occurrences(number), self._occurrences(number + 1)
        counts = [end - start for start, end in zip(before, after, strict=True)]
        groups = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
        part = np.concatenate([np.arange(count) for count in counts])
        generator = np.random.default_rng([self._seed, number, 0, *self._key])
        times = (part + generator.random(len(groups))) / np.repeat(counts, counts)
        return number, before, groups[np.argsort(times, kind="stable")]

    def _occurrences(self, rounds: int) -> list[int]:
        """Return how often each group occurs in the first ``rounds`` rounds."""
        exact = (rounds * quota - held for quota, held in zip(self._quotas, self._advance, strict=True))
        return [max(0, math.floor(each + Fraction(1, 2))) for each in exact]

    def _round_of(self, place: int) -> int:
        """Return the number of the round that contains a place."""
        enough = (place + sum(self._advance) + len(self._quotas)) / sum(self._quotas)
        return (
            bisect.bisect_right(range(math.ceil(enough) + 1), place, key=lambda number: sum(self._occurrences(number)))
            - 1
        )
