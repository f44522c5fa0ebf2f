"""Writing of a prepared set: samples come one by one, and go to the shards of their split."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from ldm.data.indexing import index_shards
from ldm.data.measures import IndexOptions, language_identifier
from ldm.data.preparation_report import Report
from ldm.data.shard_format import SPLITS, Sample, ShardWriter
from ldm.data.shard_set import INDEX, REPORT, has_set, replacement
from ldm.data.transforms import shrink
from ldm.errors import DataError
from ldm.formats.tensors import write_atomically, written_atomically
from ldm.image_files import open_image
from ldm.image_io import rgb_or_rgba

FAILED = f"failed_{REPORT}"  # written instead, if no image can be used and the set of an earlier run stays
DEFAULT_SHARES = (0.98, 0.01, 0.01)
SPLIT_WORDS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""First words of the names of folders and files that Hugging Face takes for splits."""

COPIED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif"}
"""Suffixes of the formats of which shards get the files as they are; others are converted to PNG."""

_INDEXED_HERE = 16  # shards up to which the index is made without further processes


def split_named(name: str) -> str | None:
    """Return the split that a folder or file is named after; None if it is after none.

    >>> split_named("validation-00000-of-00002"), split_named("trains")
    ('val', None)
    """
    word = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    return next((split for split, words in SPLIT_WORDS.items() if word in words), None)


def named_splits(splits: Sequence[str | None]) -> bool:
    """Return True if names give the splits of a set: all name one, and train and another one are named."""
    return None not in splits and "train" in splits and len(set(splits)) > 1


def split_of(place: int, shares: Sequence[float]) -> str:
    """Return the split into whose share of the 64-bit numbers ``place`` falls; it does not change when the set grows."""
    bounds = itertools.accumulate(shares)
    return next((split for split, bound in zip(SPLITS, bounds, strict=True) if place < bound * 2**64), SPLITS[0])


def check_shares(shares: Sequence[float]) -> None:
    """Raise a DataError if these are not fractions of the three splits."""
    if len(shares) != len(SPLITS) or min(shares) < 0 or not abs(sum(shares) - 1) <= 1e-6:
        raise DataError(
            f"the shares {', '.join(map(str, shares))} are not three non-negative numbers that add up to 1."
        )


def check_sizes(min_size: int, max_size: int | None) -> None:
    """Raise a DataError if these are not sizes of images in pixels."""
    for name, size in {"smallest": min_size, "largest": max_size}.items():
        if size is not None and size < 1:
            raise DataError(f"the {name} size of an image is {size} pixels; give at least 1.")


def place_of(key: str) -> int:
    """Return 64 bits of the hash of a key, by which the split of a sample is chosen."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def image_member(data: bytes, max_size: int | None) -> tuple[bytes, str, tuple[int, int]]:
    """Return the file of an image as shards hold it, its suffix, and width and height of the original.

    Args:
        data: the file, which can be decoded.
        max_size: longer side in pixels above which the image is scaled down; None: images keep their size.
    """
    image = open_image(data)
    suffix = COPIED.get(image.format or "")
    if suffix is None or (max_size is not None and max(image.size) > max_size):
        encoded = io.BytesIO()
        small = rgb_or_rgba(image) if max_size is None else shrink(rgb_or_rgba(image), max_size)
        if suffix == "jpg":
            small.save(encoded, "JPEG", quality=95, subsampling=0)
        else:
            suffix = "png"
            small.save(encoded, "PNG")
        data = encoded.getvalue()
    return data, suffix, image.size


class SetWriter:
    """Writer of the shards of a set in a folder; use it in a ``with`` block.

    Args:
        folder: gets a folder for each split.
        shard_size: samples per shard.

    Attributes:
        images: number of samples of each split.
        checksums: checksum of each finished shard of a split by file name.
    """

    def __init__(self, folder: Path, shard_size: int):
        self.folder, self.shard_size = folder, shard_size
        self.images = dict.fromkeys(SPLITS, 0)
        self.checksums: dict[str, dict[str, str | None]] = {split: {} for split in SPLITS}
        self._open: dict[str, tuple[Path, ShardWriter, ExitStack]] = {}

    def __enter__(self) -> SetWriter:
        return self

    def __exit__(self, *error: object) -> None:
        with ExitStack() as stack:
            for split in list(self._open):
                _, _, file = self._open[split]
                stack.push(file) if any(error) else stack.callback(self._finish, split)

    def add(self, split: str, sample: Sample) -> None:
        """Append a sample to the current shard of a split."""
        if split not in self._open:
            path, stack = self.folder / split / f"{len(self.checksums[split]):06d}.tar", ExitStack()
            self._open[split] = (
                path,
                stack.enter_context(ShardWriter(stack.enter_context(written_atomically(path)))),
                stack,
            )
        _, writer, _ = self._open[split]
        writer.add(sample.key, sample.members())
        self.images[split] += 1
        if writer.count == self.shard_size:
            self._finish(split)

    def _finish(self, split: str) -> None:
        path, writer, stack = self._open.pop(split)
        self.checksums[split][path.name] = writer.checksum
        stack.close()


def write_set(
    source: str,
    destination: Path,
    fill: Callable[[SetWriter], None],
    report: Report,
    *,
    shard_size: int,
    workers: int,
    options: IndexOptions,
) -> None:
    """Write ``<split>/000000.tar``, ..., ``<split>/index.parquet`` and ``report.json`` under ``destination``.

    The set of an earlier run is replaced once the new one is complete; an error or an interruption leaves it as it was.

    Args:
        source: name of the source, for messages.
        destination: folder of the set.
        fill: function that adds the samples, and lists in the report those that it leaves out.
        report: gets the counts and checksums.
        shard_size: samples per shard.
        workers: number of processes that make the index of many shards.
        options: content of the index.

    Raises:
        DataError: no sample is left to train on, or a file cannot be written.
    """
    if shard_size < 1:
        raise DataError(f"the shard size is {shard_size}; a shard needs at least one image.")
    if options.languages:
        language_identifier(options.languages)  # a mistake ends here, before any image is read
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create the folder {destination}: {error.strerror}; give another.") from None
    try:
        with replacement(destination, SPLITS) as temporary:
            with SetWriter(temporary, shard_size) as writer:
                fill(writer)
            report.images, report.shards = writer.images, writer.checksums
            if not report.images["train"]:
                path = destination / (FAILED if has_set(destination) else REPORT)
                report.shards = {}
                write_atomically(path, lambda file: file.write_text(report.as_json(), encoding="utf-8"))
                raise DataError(f"no image of {source} is left to train on; see the reasons in {path}.")
            for split in SPLITS:
                if report.images[split]:
                    _write_index(temporary / split, workers, options)
            (temporary / REPORT).write_text(report.as_json(), encoding="utf-8")
        (destination / FAILED).unlink(missing_ok=True)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise DataError(
            f"cannot prepare {destination}: {error.strerror or error}{where}; the shards in it are unchanged."
        ) from None


def _write_index(folder: Path, workers: int, options: IndexOptions) -> None:
    paths = sorted(folder.glob("*.tar"))
    # A process starts slower than a few shards are read.
    processes = workers if len(paths) > _INDEXED_HERE else 1
    index_shards(paths, folder / INDEX, workers=processes, work=folder / ".indexing", options=options)
