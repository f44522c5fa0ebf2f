"""Conversion of a folder of images with captions to shards of train, val and test.

Captions are found by :mod:`ldm.data.captions`. Files of further modalities, such as ``x.cls`` or ``x.boxes.json``, have the
image's name too; if one image has such a file, all need one. Images that cannot be used are left out and listed in
``report.json``.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ldm.data.captions import TEXT_SUFFIXES, FileNames, FolderCaptions
from ldm.data.file_tree import find_files
from ldm.data.indexing import index_shards
from ldm.data.measures import IndexOptions, language_identifier
from ldm.data.preparation_report import LeftOut, Report, printable
from ldm.data.shard_set import INDEX, REPORT, has_set, replacement
from ldm.data.shards import IMAGE_SUFFIXES, MEMBERS, SPLITS, Sample, checksum_of, write_shard
from ldm.data.transforms import decode, shrink
from ldm.errors import DataError
from ldm.formats.tensors import write_atomically
from ldm.image_files import open_image
from ldm.image_io import rgb_or_rgba
from ldm.modalities.caption import CAPTION

READABLE = {f".{suffix}" for suffix in IMAGE_SUFFIXES}
COPIED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif"}
"""Suffixes of the formats of which shards get the files as they are; others are converted to PNG."""
FAILED = f"failed_{REPORT}"  # written instead, if no image can be used and the set of an earlier run stays
_EXAMINED_AT_ONCE = 1024
_INDEXED_HERE = 16  # shards up to which the index is made without further processes
_FILES = {suffix: modality for suffix, modality in MEMBERS.items() if modality != CAPTION}
"""Modalities with a file of their own next to an image; captions may also come from metadata."""


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
    caption_field: str = "text",
    languages: tuple[str, ...] = (),
) -> Report:
    """Write ``<split>/000000.tar``, ..., ``<split>/index.parquet`` and ``report.json`` under ``destination``.

    A second run writes the same bytes.

    The set of an earlier run is replaced once the new one is complete; an error or an interruption leaves it as it was.

    Args:
        source: folder of images and captions, searched recursively.
        destination: folder of the shards.
        shard_size: images per shard.
        min_size: shorter side, in pixels, under which an image is left out.
        max_size: longer side, in pixels, above which an image is scaled down and encoded again (JPEG as JPEG
            of quality 95, others as PNG). None copies the files' bytes; formats that shards do not
            support are always converted to PNG.
        shares: fractions of train, val and test; they add up to 1.
        workers: number of decoding threads.
        caption_field: column or field of metadata that holds the caption.
        languages: languages of the captions, of which the index names one; see :class:`ldm.data.measures.IndexOptions`.

    Raises:
        DataError: an invalid setting, a missing folder, unreadable metadata, no usable image, or a file that cannot be written.
    """
    if len(shares) != len(SPLITS) or min(shares) < 0 or not abs(sum(shares) - 1) <= 1e-6:
        raise DataError(
            f"the shares {', '.join(map(str, shares))} are not three non-negative numbers that add up to 1."
        )
    if shard_size < 1:
        raise DataError(f"the shard size is {shard_size}; a shard needs at least one image.")
    for name, size in {"smallest": min_size, "largest": max_size}.items():
        if size is not None and size < 1:
            raise DataError(f"the {name} size of an image is {size} pixels; give at least 1.")
    if not source.is_dir():
        raise DataError(f"the folder {source} does not exist; give the folder of your images.")
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create the folder {destination}: {error.strerror}; give another.") from None
    if languages:
        language_identifier(languages)  # a mistake ends here, before any image is read
    report = Report()
    splits: dict[str, list[_Candidate]] = {split: [] for split in SPLITS}
    try:
        with replacement(destination, SPLITS) as temporary:
            candidates = _candidates(source, destination, caption_field, report)
            for candidate in _examined(candidates, min_size, workers, report):
                splits[split_of(candidate.place, shares)].append(candidate)
            report.images = {split: len(usable) for split, usable in splits.items()}
            if not splits["train"]:
                path = destination / (FAILED if has_set(destination) else REPORT)
                write_atomically(path, lambda file: file.write_text(report.as_json(), encoding="utf-8"))
                raise DataError(f"no image of {source} is left to train on; see the reasons in {path}.")
            for split, usable in splits.items():
                report.shards[split] = _write_split(temporary / split, usable, shard_size, max_size)
                if usable:
                    _write_index(temporary / split, workers, IndexOptions(languages=languages))
            (temporary / REPORT).write_text(report.as_json(), encoding="utf-8")
        (destination / FAILED).unlink(missing_ok=True)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise DataError(
            f"cannot prepare {destination}: {error.strerror or error}{where}; the shards in it are unchanged."
        ) from None
    return report


def _candidates(source: Path, destination: Path, caption_field: str, report: Report) -> list[_Candidate]:
    """List the images that have a caption, a unique key and all files, in the order of their names."""
    source = source.resolve()

    def unreadable(path: Path, problem: str) -> None:
        report.leave_out("unreadable", path.relative_to(source).as_posix(), problem)

    files = find_files(source, destination.resolve(), unreadable)
    suffixes = {path: next((suffix for suffix in _FILES if _has(path, suffix)), None) for path in files}
    annotations = {
        suffix: FileNames(path for path, found in suffixes.items() if found == suffix)
        for suffix in _FILES
        if suffix in suffixes.values()
    }
    files = [path for path, suffix in suffixes.items() if suffix is None]
    images = [path for path in files if path.suffix.lower() in READABLE]
    captions = FolderCaptions(source, files, images, caption_field, report)
    candidates: dict[str, _Candidate] = {}
    for path in images:
        name = path.relative_to(source).as_posix()
        # A key ends at the first dot of a shard's file name.
        key = path.relative_to(source).with_name(path.stem.replace(".", "_")).as_posix()
        try:
            _check_name(name)
            text = captions.of(path)
            if key in candidates:
                raise LeftOut("same name but for suffix or dots", candidates[key].name)
            candidates[key] = _Candidate(path, name, key, text, _annotation_files(path, annotations))
        except LeftOut as problem:
            report.leave_out(problem.reason, name, problem.detail)
    for path in set(files) - set(images) - captions.read:
        if path.suffix.lower() not in TEXT_SUFFIXES:
            report.ignored[printable(path.suffix.lower())] += 1
    return list(candidates.values())


def _check_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise LeftOut("name is not UTF-8", "rename the file") from None


def _annotation_files(image: Path, annotations: Mapping[str, FileNames]) -> dict[str, Path]:
    """Return the files of further modalities of an image, by suffix; each modality that one image has must be there."""
    found = {}
    for suffix, names in annotations.items():
        path = names.find(image.with_suffix(f".{suffix}"))
        if path is None:
            raise LeftOut(f"no {_FILES[suffix].noun} (.{suffix})")
        found[suffix] = path
    return found


def _has(path: Path, suffix: str) -> bool:
    return path.name.lower().endswith(f".{suffix}")


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
                    report.aspect_ratios.append(size[0] / size[1])
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


def _write_split(
    folder: Path, candidates: list[_Candidate], shard_size: int, max_size: int | None
) -> dict[str, str | None]:
    """Write the shards of a split; return the checksum of each by file name."""
    from tqdm import tqdm

    checksums: dict[str, str | None] = {}
    with tqdm(total=len(candidates), desc=f"writing {folder.name}", unit="image", disable=not candidates) as bar:
        for number, start in enumerate(range(0, len(candidates), shard_size)):
            path = folder / f"{number:06d}.tar"
            part = candidates[start : start + shard_size]
            bar.update(write_shard(path, (_sample(candidate, max_size) for candidate in part)))
            checksums[path.name] = checksum_of(path)
    return checksums


def _write_index(folder: Path, workers: int, options: IndexOptions) -> None:
    paths = sorted(folder.glob("*.tar"))
    # A process starts slower than a few shards are read.
    processes = workers if len(paths) > _INDEXED_HERE else 1
    index_shards(paths, folder / INDEX, workers=processes, work=folder / ".indexing", options=options)


def _sample(candidate: _Candidate, max_size: int | None) -> Sample:
    data = candidate.path.read_bytes()
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
    return Sample(candidate.key, candidate.text, data, suffix, _members(candidate, image.size))
