"""Report of a preparation: which images were used, which were left out and why, and which shards they are in."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from ldm.data.shards import SPLITS


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
        shards: checksums of the shards of each split by file name; see :mod:`ldm.data.shard_set`.
    """

    images: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    left_out: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    ignored: Counter[str] = field(default_factory=Counter)
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
            "shards": self.shards,
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def summary(self) -> str:
        """Return lines for the terminal: the splits, and each reason to leave images out with the first three names."""
        lines = [", ".join(f"{count} {split}" for split, count in self.images.items())]
        for reason, names in self.left_out.items():
            first = ", ".join(itertools.islice(names, 3)) + (", ..." if len(names) > 3 else "")
            lines.append(f"left out, {reason}: {len(names)} ({first})")
        if self.ignored:
            lines.append(
                "no images: " + ", ".join(f"{n} {suffix or '(no suffix)'}" for suffix, n in self.ignored.items())
            )
        return "\n".join(lines)


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
