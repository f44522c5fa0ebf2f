"""Conversion of a folder of images with captions to shards of train, val and test.

Captions are found by :mod:`ldm.data.captions`. Files of further modalities, such as ``x.cls`` or ``x.boxes.json``, have the
image's name too; if one image has such a file, all need one. Images that cannot be used are left out and listed in
``report.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.data.captions import NO_CAPTION, TEXT_SUFFIXES, FileNames, FolderCaptions
from ldm.data.file_tree import find_files
from ldm.data.measures import IndexOptions
from ldm.data.near_duplicates import BACKGROUND, Look, check_distance, look_of, originals
from ldm.data.preparation_report import LeftOut, Report, printable
from ldm.data.set_writer import (
    DEFAULT_SHARES,
    SetWriter,
    check_shares,
    check_sizes,
    image_member,
    named_splits,
    place_of,
    split_named,
    split_of,
    write_set,
)
from ldm.data.shards import IMAGE_SUFFIXES, MEMBERS, Sample
from ldm.data.transforms import decode
from ldm.errors import DataError
from ldm.modalities.caption import CAPTION
from ldm.modalities.label import LABEL

READABLE = {f".{suffix}" for suffix in IMAGE_SUFFIXES}
CaptionSource = Callable[[Path, Sequence[Path], Sequence[Path], Report], FolderCaptions]
"""Function that makes the captions of a folder, from the folder, all its files, those that are images, and the report."""

_EXAMINED_AT_ONCE = 1024
_FILES = {suffix: modality for suffix, modality in MEMBERS.items() if modality != CAPTION}
"""Modalities with a file of their own next to an image; captions may also come from metadata."""


@dataclass(frozen=True)
class _Candidate:
    path: Path
    name: str
    key: str
    text: str | None
    files: Mapping[str, Path]  # of further modalities, by suffix
    label: int | None = None  # of its folder

    @property
    def place(self) -> int:
        return place_of(self.key)


def prepare_folder(
    source: Path,
    destination: Path,
    *,
    shard_size: int = 1000,
    min_size: int = 1,
    max_size: int | None = None,
    shares: Sequence[float] | None = None,
    workers: int = 4,
    caption_field: str = "text",
    languages: tuple[str, ...] = (),
    drop_duplicates: int | None = None,
    class_folders: bool = False,
    caption_template: str | None = None,
    captions: CaptionSource | None = None,
) -> Report:
    """Write a set of shards with the images of a folder; see :func:`ldm.data.set_writer.write_set`.

    A second run writes the same bytes.

    Args:
        source: folder of images and captions, searched recursively.
        destination: folder of the shards.
        shard_size: images per shard.
        min_size: shorter side, in pixels, under which an image is left out.
        max_size: longer side, in pixels, above which an image is scaled down and encoded again (JPEG as JPEG
            of quality 95, others as PNG). None copies the files' bytes; formats that shards do not
            support are always converted to PNG.
        shares: fractions of train, val and test; they add up to 1. None: the splits are the folders ``train``, ``validation``
            and ``test`` of ``source``, as in Hugging Face's imagefolder, if all images are in them; else 0.98, 0.01, 0.01.
        workers: number of decoding threads.
        caption_field: column or field of metadata that holds the caption.
        languages: languages of the captions, of which the index names one; see :class:`ldm.data.measures.IndexOptions`.
        drop_duplicates: number of bits up to which the perceptual hashes of near duplicates differ, of which only the largest is
            used, over all splits; None: all are used. See :mod:`ldm.data.near_duplicates`.
        class_folders: whether the folder of an image is the name of its class; the class numbers are those of the sorted names.
        caption_template: caption of an image without one, in which the name of the class replaces ``{}``. None: with
            ``class_folders``, the images may have no captions.
        captions: function that makes the captions of the images, for folders in which they are stored in a way of their own;
            None: :class:`ldm.data.captions.FolderCaptions` with ``caption_field``.

    Raises:
        DataError: an invalid setting, a missing folder, unreadable metadata, no usable image, or a file that cannot be written.
    """
    check_shares(shares or DEFAULT_SHARES)
    check_sizes(min_size, max_size)
    check_distance(drop_duplicates)
    if caption_template is not None and (not class_folders or "{}" not in caption_template):
        raise DataError(
            f"the caption template {caption_template!r} needs class folders, and {{}} for the name of the class."
        )
    if not source.is_dir():
        raise DataError(f"the folder {source} does not exist; give the folder of your images.")
    report = Report()
    if captions is None:

        def captions(folder: Path, files: Sequence[Path], images: Sequence[Path], report: Report) -> FolderCaptions:
            return FolderCaptions(folder, files, images, caption_field, report)

    def fill(writer: SetWriter) -> None:
        from tqdm import tqdm

        candidates = _candidates(source, destination, captions, class_folders, report)
        by_name = {candidate.key: _split_folder(candidate.name) for candidate in candidates}
        in_split_folders = named_splits([*by_name.values()])
        if class_folders:
            candidates = _with_classes(candidates, caption_template, in_split_folders, report)
        report.named_splits = shares is None and in_split_folders
        usable = list(_examined(candidates, min_size, workers, drop_duplicates is not None, report))
        if drop_duplicates is not None:
            usable = _without_duplicates(usable, drop_duplicates, report)
        report.aspect_ratios = [each.size[0] / each.size[1] for each in usable]
        for each in tqdm(usable, "writing", unit="image"):
            split = by_name[each.candidate.key] if report.named_splits else None
            split = split or split_of(each.candidate.place, shares or DEFAULT_SHARES)
            writer.add(split, _sample(each.candidate, max_size))

    options = IndexOptions(languages=languages)
    write_set(str(source), destination, fill, report, shard_size=shard_size, workers=workers, options=options)
    return report


@dataclass(frozen=True)
class _Usable:
    candidate: _Candidate
    size: tuple[int, int]  # width and height
    look: Look | None  # if near duplicates are dropped


def _candidates(
    source: Path, destination: Path, captions_of: CaptionSource, without_captions: bool, report: Report
) -> list[_Candidate]:
    """List the images that have a caption, a unique key and all files, in the order of their names."""
    source = source.resolve()

    def unreadable(path: Path, problem: str) -> None:
        report.leave_out("unreadable", path.relative_to(source).as_posix(), problem)

    files = find_files(source, destination.resolve(), unreadable)
    suffixes = {path: next((suffix for suffix in _FILES if _has(path, suffix)), None) for path in files}
    files = [path for path, suffix in suffixes.items() if suffix is None]
    images = [path for path in files if path.suffix.lower() in READABLE]
    annotations = {
        suffix: FileNames((path for path, found in suffixes.items() if found == suffix), images)
        for suffix in _FILES
        if suffix in suffixes.values()
    }
    captions = captions_of(source, files, images, report)
    candidates: dict[str, _Candidate] = {}
    for path in images:
        name = path.relative_to(source).as_posix()
        # A key ends at the first dot of a shard's file name.
        key = path.relative_to(source).with_name(path.stem.replace(".", "_")).as_posix()
        try:
            _check_name(name)
            text = captions.of(path, optional=without_captions)
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


def _split_folder(name: str) -> str | None:
    """Return the split that the first folder of a path is named after; None if it is after none."""
    folder, slash, _ = name.partition("/")
    return split_named(folder) if slash and folder.isalpha() else None


def _with_classes(
    candidates: Sequence[_Candidate], template: str | None, in_split_folders: bool, report: Report
) -> list[_Candidate]:
    """Return the images with the classes of their folders; if some have captions, without those that have none."""
    folders = {each.key: PurePosixPath(each.name).parts[int(in_split_folders) : -1] for each in candidates}
    names = {key: parts[-1] if parts else "" for key, parts in folders.items()}
    report.classes = sorted({*names.values()} - {""})
    captioned, found = template is not None or any(each.text is not None for each in candidates), []
    for each in candidates:
        name = names[each.key]
        text = template.replace("{}", name.replace("_", " ")) if template and each.text is None else each.text
        if not name:
            report.leave_out("no class folder", each.name)
        elif captioned and text is None:
            report.leave_out(NO_CAPTION, each.name)
        else:
            found.append(replace(each, text=text, label=report.classes.index(name)))
    return found


def _examined(
    candidates: Sequence[_Candidate], min_size: int, workers: int, looks: bool, report: Report
) -> Iterator[_Usable]:
    """Yield the images that can be read and are large enough, in the order of their places."""
    from tqdm import tqdm

    candidates = sorted(candidates, key=lambda candidate: candidate.place)
    with (
        ThreadPoolExecutor(max(1, workers)) as pool,
        tqdm(total=len(candidates), desc="examining", unit="image") as bar,
    ):
        for start in range(0, len(candidates), _EXAMINED_AT_ONCE):
            part = candidates[start : start + _EXAMINED_AT_ONCE]
            for candidate, found in zip(part, pool.map(lambda each: _examine(each, looks), part), strict=True):
                bar.update()
                if isinstance(found, DataError):
                    report.leave_out("unreadable", candidate.name, str(found))
                elif problem := _problem_of_files(candidate, found.size):
                    report.leave_out("unusable annotation", candidate.name, problem)
                elif min(found.size) < min_size:
                    report.leave_out(
                        f"smaller than {min_size} pixels", candidate.name, f"{found.size[0]} x {found.size[1]}"
                    )
                else:
                    yield found


def _examine(candidate: _Candidate, looks: bool) -> _Usable | DataError:
    try:
        image = decode(candidate.path.read_bytes(), background=BACKGROUND)
    except OSError as error:
        return DataError(f"cannot be opened ({error.strerror})")
    except DataError as error:
        return error
    return _Usable(candidate, image.size, look_of(image) if looks else None)


def _without_duplicates(usable: Sequence[_Usable], distance: int, report: Report) -> list[_Usable]:
    """Return the images without the near duplicates of others that are as large or larger."""
    kept = []
    for i, original in enumerate(originals([each.look for each in usable if each.look is not None], distance).tolist()):
        if i == original:
            kept.append(usable[i])
        else:
            report.leave_out("near duplicate", usable[i].candidate.name, f"of {usable[original].candidate.name}")
    return kept


def _problem_of_files(candidate: _Candidate, size: tuple[int, int]) -> str | None:
    """Return what is wrong with the first unusable file of an image of that width and height; None if all are usable."""
    try:
        _members(candidate, size)
    except (DataError, OSError) as error:
        return str(error)
    return None


def _members(candidate: _Candidate, size: tuple[int, int]) -> dict[str, Any]:
    """Return the members of a shard for the files of an image of that width and height, by the key of their modality."""
    return {
        _FILES[suffix].key: _FILES[suffix].to_member(path.read_bytes(), size)
        for suffix, path in candidate.files.items()
    }


def _sample(candidate: _Candidate, max_size: int | None) -> Sample:
    image, suffix, size = image_member(candidate.path.read_bytes(), max_size)
    label = {} if candidate.label is None else {LABEL.key: candidate.label}
    return Sample(candidate.key, candidate.text, image, suffix, _members(candidate, size) | label)
