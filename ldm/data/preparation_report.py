"""Report of a preparation: which images were used, which were left out and why, and which shards they are in."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from ldm.data.shards import SPLITS
from ldm.errors import some

SMALL_SPLIT = 16
"""Number of images under which val or test is reported as too small."""

LARGEST_HELD_OUT = 0.4
"""Largest fraction of the images that is suggested for val and test together."""

WORTH_A_LINE = 0.05
"""Fraction of the area that cropping removes, from which it is reported on the terminal."""


class LeftOut(Exception):
    """Raised for an image that is not used; ``reason`` groups images in the report, ``detail`` describes this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass
class Report:
    """Counts of the images of a folder that were used, and names of those that were not.

    Attributes:
        images: number of images in each split.
        left_out: reason to names, relative to the folder, each with a detail or an empty text.
        ignored: number of other files by suffix.
        aspect_ratios: width / height of each image that is used.
        classes: names of the classes, in the order of their numbers.
        caption_format: ``data.captions.format`` of the captions.
        named_splits: whether the splits are those of folders or files named after them.
        shards: checksums of the shards of each split by file name; see :mod:`ldm.data.shard_set`.
    """

    images: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    left_out: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    ignored: Counter[str] = field(default_factory=Counter)
    aspect_ratios: list[float] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    caption_format: Literal["text", "json"] = "text"
    named_splits: bool = False
    shards: dict[str, dict[str, str | None]] = field(default_factory=dict)

    def leave_out(self, reason: str, name: str, detail: str = "") -> None:
        """Record that ``name`` is not used."""
        self.left_out[reason][printable(name)] = printable(detail)

    def as_json(self) -> str:
        """Return the text of ``report.json``."""
        content = {
            "pictures": self.images,
            "left_out": self.left_out,
            "ignored_files": dict(sorted(self.ignored.items())),
            "area_outside_of_square": round(cropped_area(self.aspect_ratios, 1.0), 4),
            **({"classes": self.classes} if self.classes else {}),
            "shards": self.shards,
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def summary(self) -> str:
        """Return lines for the terminal: the splits, and each reason to leave images out with the first three names."""
        lines = [", ".join(f"{count} {split}" for split, count in self.images.items())]
        if self.named_splits:
            lines.append("splits: by the names of the source, such as train and validation; --shares makes others")
        if self.classes:
            lines.append(
                f"classes: {len(self.classes)} ({some(self.classes)}), listed in report.json in the order of their numbers"
            )
        for reason, names in self.left_out.items():
            first = ", ".join(itertools.islice(names, 3)) + (", ..." if len(names) > 3 else "")
            lines.append(f"left out, {reason}: {len(names)} ({first})")
        if self.ignored:
            lines.append(
                "no images: " + ", ".join(f"{n} {suffix or '(no suffix)'}" for suffix, n in self.ignored.items())
            )
        return "\n".join([*lines, *self._advice_on_fit()])

    def advice_on_shares(self, shares: Sequence[float]) -> str | None:
        """Return a sentence that suggests other shares if val or test is too small to measure by; None if it is not."""
        total = sum(self.images.values())
        given = {split: share for split, share in zip(SPLITS, shares, strict=True) if share > 0 and split != "train"}
        small = [f"{split} has {self.images[split]}" for split in given if self.images[split] < SMALL_SPLIT]
        if not small:
            return None
        share = math.ceil(200 * SMALL_SPLIT / total) / 100  # twice the least, since a split varies by chance
        if share * len(given) <= LARGEST_HELD_OUT:
            others = {split: share if split in given else 0 for split in SPLITS[1:]}
            better = ",".join(f"{each:g}" for each in (round(1 - sum(others.values()), 2), *others.values()))
            advice = f"use --shares {better}"
        else:
            advice = "add images, or use --shares 1,0,0 and data.val: null to train on all of them without validation"
        return f"of {total} images, {' and '.join(small)}, which is too few to measure by; {advice}."

    def _advice_on_fit(self) -> list[str]:
        """Return a line on what cropping to squares removes, with what would keep it; nothing if it is little."""
        lost = cropped_area(self.aspect_ratios, 1.0)
        if lost < WORTH_A_LINE:
            return []
        typical = Fraction(statistics.median(self.aspect_ratios)).limit_denominator(4)
        kept = "data.fit: pad (borders) or stretch (distorted) keeps all of them"
        lost_then = cropped_area(self.aspect_ratios, float(typical)) if typical > 0 else lost
        if lost_then < lost / 2:
            height, width = typical.denominator, typical.numerator
            kept += f", and data.size: [height, width] in the ratio {height}:{width} all but {lost_then:.0%}"
        return [f"cropping to squares would remove {lost:.0%} of the area of the images; {kept}"]


def cropped_area(aspect_ratios: Sequence[float], target: float) -> float:
    """Return the mean fraction of an image that is cut off by cropping to the aspect ratio ``target``; 0 without images."""
    kept = [min(ratio / target, target / ratio) for ratio in aspect_ratios]
    return 1.0 - sum(kept) / len(kept) if kept else 0.0


def printable(text: str) -> str:
    """Return the text with an escape for each control character, line break and byte that is not UTF-8.

    >>> printable("caf\\udce9\\n.jpg")
    'caf\\\\xe9\\\\n.jpg'
    """
    return "".join(each if each.isprintable() else _escape(each) for each in text)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python represents an undecodable byte of a file name
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
