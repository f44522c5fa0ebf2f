"""Conversion of a folder of images with captions to shards of train, val and test.

A caption is in ``x.txt`` next to ``x.jpg``, or in a ``metadata.csv`` or ``metadata.jsonl`` (columns ``file_name`` and
``text``, as Hugging Face's imagefolder has them) in the same folder or above. Files of further modalities, such as
``x.cls`` or ``x.boxes.json``, have the image's name too; if one image has such a file, all need one. Images that cannot be
used are left out and listed in ``report.json``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data.shards import IMAGE_SUFFIXES, MEMBERS, SPLITS, Sample, write_shard
from ldm.data.transforms import decode, shrink
from ldm.errors import DataError
from ldm.formats.tensors import write_atomically
from ldm.modalities.caption import CAPTION

READABLE = {*(f".{suffix}" for suffix in IMAGE_SUFFIXES), ".bmp", ".gif", ".tif", ".tiff"}
METADATA = ("metadata.csv", "metadata.jsonl")
REPORT = "report.json"
_EXAMINED_AT_ONCE = 1024
_FILES = {suffix: modality for suffix, modality in MEMBERS.items() if modality != CAPTION}
"""Modalities with a file of their own next to an image; captions may also come from metadata."""


@dataclass
class Report:
    """Counts of the images of a folder that were used, and names of those that were not.

    Attributes:
        images: number of images in each split.
        left_out: reason to names, relative to the folder, each with a detail or an empty text.
        ignored: number of other files by suffix.
    """

    images: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    left_out: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    ignored: Counter[str] = field(default_factory=Counter)

    def leave_out(self, reason: str, name: str, detail: str = "") -> None:
        """Record that ``name`` is not used."""
        self.left_out[reason][name] = detail

    def as_json(self) -> str:
        """Return the text of ``report.json``."""
        content = {
            "pictures": self.images,
            "left_out": self.left_out,
            "ignored_files": dict(sorted(self.ignored.items())),
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


@dataclass(frozen=True)
class _Candidate:
    path: Path
    name: str
    key: str
    text: str
    files: Mapping[str, Path]  # of further modalities, by suffix

    @property
    def place(self) -> int:
        """64 bits of the key's hash, which determine the split and the order in the shards."""
        return int.from_bytes(hashlib.blake2b(self.key.encode(), digest_size=8).digest(), "big")


def split_of(place: int, shares: Sequence[float]) -> str:
    """Return the split into whose share of the 64-bit numbers ``place`` falls; it does not change when the folder grows."""
    bounds = itertools.accumulate(shares)
    return next((split for split, bound in zip(SPLITS, bounds, strict=True) if place < bound * 2**64), SPLITS[0])


def prepare_folder(
    source: Path,
    destination: Path,
    *,
    shard_size: int = 1000,
    min_size: int = 1,
    max_size: int | None = None,
    shares: Sequence[float] = (0.98, 0.01, 0.01),
    workers: int = 4,
) -> Report:
    """Write ``<split>/000000.tar``, ... and ``report.json`` under ``destination``; a second run writes the same bytes.

    Args:
        source: folder of images and captions, searched recursively.
        destination: folder of the shards; those of an earlier run are replaced.
        shard_size: images per shard.
        min_size: shorter side, in pixels, under which an image is left out.
        max_size: longer side, in pixels, above which an image is scaled down and encoded again (JPEG as JPEG
            of quality 95, others as PNG). None copies the files' bytes; formats that shards do not
            support are always converted to PNG.
        shares: fractions of train, val and test; they add up to 1.
        workers: number of decoding threads.

    Raises:
        DataError: an invalid setting, a missing folder, unreadable metadata, or no usable image.
    """
    if len(shares) != len(SPLITS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise DataError(
            f"the shares {', '.join(map(str, shares))} are not three non-negative numbers that add up to 1."
        )
    if shard_size < 1:
        raise DataError(f"the shard size is {shard_size}; a shard needs at least one image.")
    if not source.is_dir():
        raise DataError(f"the folder {source} does not exist; give the folder of your images.")
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create the folder {destination}: {error.strerror}; give another.") from None
    report = Report()
    splits: dict[str, list[_Candidate]] = {split: [] for split in SPLITS}
    candidates = _candidates(source, destination, report)
    for candidate in _examined(candidates, min_size, workers, report):
        splits[split_of(candidate.place, shares)].append(candidate)
    for split, usable in splits.items():
        report.images[split] = len(usable)
        _write_split(destination / split, usable, shard_size, max_size)
    write_atomically(destination / REPORT, lambda path: path.write_text(report.as_json(), encoding="utf-8"))
    if not splits["train"]:
        raise DataError(f"no image of {source} is left to train on; see the reasons in {destination / REPORT}.")
    return report


def _candidates(source: Path, destination: Path, report: Report) -> list[_Candidate]:
    """List the images that have a caption, a unique key and all files, in the order of their names."""
    source, destination = source.resolve(), destination.resolve()
    files = sorted(path for path in source.rglob("*") if path.is_file() and destination not in path.parents)
    annotations = {
        suffix: {path.with_name(path.name.removesuffix(f".{suffix}")): path for path in files if _has(path, suffix)}
        for suffix in _FILES
    }
    files = [path for path in files if not any(_has(path, suffix) for suffix in _FILES)]
    images = {path: path.relative_to(source).as_posix() for path in files if path.suffix.lower() in READABLE}
    metadata = [path for path in files if path.name in METADATA]
    captions = _metadata_captions(source, metadata, set(images), report)
    for path in files:
        if path not in images and path not in metadata and path.suffix.lower() != f".{CAPTION.suffix}":
            report.ignored[path.suffix.lower()] += 1
    candidates: dict[str, _Candidate] = {}
    for path, name in images.items():
        text = captions[path] if path in captions else _caption_file(path)
        # A key ends at the first dot of a shard's file name.
        key = path.relative_to(source).with_name(path.stem.replace(".", "_")).as_posix()
        if text is None:
            report.leave_out("no caption", name)
        elif not text.strip():
            report.leave_out("empty caption", name)
        elif "\ufffd" in text:
            report.leave_out("caption is not UTF-8", name)
        elif key in candidates:
            report.leave_out("same name but for suffix or dots", name, candidates[key].name)
        else:
            stem = path.with_suffix("")
            found = {suffix: paths[stem] for suffix, paths in annotations.items() if stem in paths}
            lacking = next((suffix for suffix, paths in annotations.items() if paths and suffix not in found), None)
            if lacking is not None:
                report.leave_out(f"no {_FILES[lacking].noun} (.{lacking})", name)
            else:
                candidates[key] = _Candidate(path, name, key, text.strip(), found)
    return list(candidates.values())


def _has(path: Path, suffix: str) -> bool:
    return path.name.endswith(f".{suffix}")


def _caption_file(image: Path) -> str | None:
    path = image.with_suffix(f".{CAPTION.suffix}")
    return path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else None


def _metadata_captions(source: Path, files: list[Path], images: set[Path], report: Report) -> dict[Path, str]:
    """Read the captions of metadata files by image; rows without an image, or with one that had a row, go to the report."""
    captions: dict[Path, str] = {}
    for file in files:
        for line, row in _rows(file):
            where = f"{file.relative_to(source).as_posix()}:{line}"
            name, text = row.get("file_name"), row.get("text")
            if not isinstance(name, str) or not isinstance(text, str | None):
                report.leave_out("metadata without file_name and text", where)
                continue
            image = file.parent / name
            if image not in images:
                report.leave_out("in the metadata but not there", where, name)
            elif image in captions:
                report.leave_out("in the metadata twice", where, name)
            else:
                captions[image] = text or ""
    return captions


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and content of each row of a metadata file; a row that cannot be read is empty."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".csv":
                reader = csv.DictReader(lines)
                missing = {"file_name", "text"} - set(reader.fieldnames or ())
                if missing:
                    raise DataError(f"{file} has no column {' or '.join(sorted(missing))}; its first line names them.")
                for row in reader:
                    yield reader.line_num, row
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _json_object(line)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read ({error}); save it as UTF-8.") from None


def _json_object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _examined(candidates: list[_Candidate], min_size: int, workers: int, report: Report) -> Iterator[_Candidate]:
    """Yield the candidates whose files can be read and whose image is large enough, in the order of their places."""
    from tqdm import tqdm

    candidates = sorted(candidates, key=lambda candidate: candidate.place)
    with (
        ThreadPoolExecutor(max(1, workers)) as pool,
        tqdm(total=len(candidates), desc="examining", unit="image") as bar,
    ):
        for start in range(0, len(candidates), _EXAMINED_AT_ONCE):
            part = candidates[start : start + _EXAMINED_AT_ONCE]
            for candidate, size in zip(part, pool.map(_size, part), strict=True):
                bar.update()
                if isinstance(size, DataError):
                    report.leave_out("unreadable", candidate.name, str(size))
                elif problem := _problem_of_files(candidate, size):
                    report.leave_out("unusable annotation", candidate.name, problem)
                elif min(size) < min_size:
                    report.leave_out(f"smaller than {min_size} pixels", candidate.name, f"{size[0]} x {size[1]}")
                else:
                    yield candidate


def _size(candidate: _Candidate) -> tuple[int, int] | DataError:
    try:
        return decode(candidate.path.read_bytes()).size
    except OSError as error:
        return DataError(f"cannot be opened ({error.strerror})")
    except DataError as error:
        return error


def _problem_of_files(candidate: _Candidate, size: tuple[int, int]) -> str | None:
    """Return what is wrong with the first unusable file of an image of that width and height; None if all are usable."""
    try:
        _members(candidate, size)
    except (DataError, OSError) as error:
        return str(error)
    return None


def _members(candidate: _Candidate, size: tuple[int, int]) -> dict[str, bytes]:
    """Return the members of a shard for the files of an image of that width and height, by the key of their modality."""
    return {
        _FILES[suffix].key: _FILES[suffix].to_member(path.read_bytes(), size)
        for suffix, path in candidate.files.items()
    }


def _write_split(folder: Path, candidates: list[_Candidate], shard_size: int, max_size: int | None) -> None:
    """Write the shards of a split, and remove those of an earlier run that are not overwritten."""
    from tqdm import tqdm

    stale = set(folder.glob("[0-9]*.tar"))
    with tqdm(total=len(candidates), desc=f"writing {folder.name}", unit="image", disable=not candidates) as bar:
        for number, start in enumerate(range(0, len(candidates), shard_size)):
            path = folder / f"{number:06d}.tar"
            part = candidates[start : start + shard_size]
            bar.update(write_shard(path, (_sample(candidate, max_size) for candidate in part)))
            stale.discard(path)
    for path in stale:
        path.unlink()


def _sample(candidate: _Candidate, max_size: int | None) -> Sample:
    data, suffix = candidate.path.read_bytes(), candidate.path.suffix.lower().removeprefix(".")
    image = decode(data)
    if suffix not in IMAGE_SUFFIXES or (max_size is not None and max(image.size) > max_size):
        encoded = io.BytesIO()
        small = image if max_size is None else shrink(image, max_size)
        if suffix in ("jpg", "jpeg"):
            suffix = "jpg"
            small.save(encoded, "JPEG", quality=95, subsampling=0)
        else:
            suffix = "png"
            small.save(encoded, "PNG")
        data = encoded.getvalue()
    return Sample(candidate.key, candidate.text, data, suffix, _members(candidate, image.size))
