"""Captions of the images of a folder, as they are found: in a file next to the image, or in metadata.

For ``x.jpg``, in this order: its row in a ``metadata.csv``, ``metadata.tsv`` or ``metadata.jsonl`` in the same folder or above
(columns ``file_name`` and ``text``, as Hugging Face's imagefolder has them; commas, semicolons or tabs separate those of a
table); ``x.json``, an object with the field ``text``; ``x.txt`` and ``x.caption``, also as ``x.jpg.txt`` and ``x.jpg.caption``.
Suffixes may be in upper case, and so may other letters of a name as long as only one image can be meant.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.data.preparation_report import LeftOut, Report
from ldm.errors import DataError, some
from ldm.modalities.caption import CAPTION

METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
TEXT_SUFFIXES = (f".{CAPTION.suffix}", ".caption")
NO_CAPTION = "no caption"
_NAME = "file_name"


class FileNames:
    """Files by path, where letters may be in another case and the name in another Unicode normal form.

    Args:
        paths: the files.
        images: the images that they belong to. Those whose names differ only in the case of letters need files whose names
            differ likewise.
    """

    def __init__(self, paths: Iterable[Path], images: Iterable[Path] = ()):
        self._exact = set(paths)
        self._loose = {_loose(path): path for path in sorted(self._exact, reverse=True)}
        self._lower_case = _by_lower_case(self._exact)
        names = {name for image in images for name in (image, image.parent / image.stem)}
        self._ambiguous = {name for name, path in _by_lower_case(names).items() if path is None}

    def find(self, path: Path) -> Path | None:
        """Return the file with this name, or else the one whose name differs only so; None if there is none, or several."""
        if path in self._exact:
            return path
        found = self._loose.get(_loose(path))
        if found is None and _lower_case(path.parent / path.stem) not in self._ambiguous:
            found = self._lower_case.get(_lower_case(path))
        return found


def _loose(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path).removesuffix(path.suffix) + path.suffix.lower())


def _lower_case(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path)).casefold()


def _by_lower_case(paths: Iterable[Path]) -> dict[str, Path | None]:
    """Return paths by their names in lower case; None where several have the same."""
    found: dict[str, Path | None] = {}
    for path in paths:
        name = _lower_case(path)
        found[name] = None if name in found else path
    return found


class FolderCaptions:
    """Captions of the images of a folder.

    Args:
        source: the folder, for names in the report.
        files: all files of the folder.
        images: those that are images.
        field: column or field of the metadata, and of ``x.json``, that holds the caption.
        report: gets the rows of metadata that belong to no image.

    Raises:
        DataError: a ``metadata.csv`` whose first line does not name the column ``file_name``.
    """

    def __init__(self, source: Path, files: Sequence[Path], images: Iterable[Path], field: str, report: Report):
        self._field = field
        images = set(images)
        self._files = FileNames(files, images)
        self._rows: dict[Path, Mapping[str, Any]] = {}
        self.read: set[Path] = {path for path in files if path.name.lower() in METADATA}
        by_name = FileNames(images)
        for file in sorted(self.read):
            for line, row in sorted(_rows(file), key=lambda each: file.parent / str(each[1].get(_NAME)) not in images):
                where = f"{file.relative_to(source).as_posix()}:{line}"
                name = row.get(_NAME)
                image = _listed(file.parent, name, by_name) if isinstance(name, str) else None
                if not isinstance(name, str):
                    report.leave_out(f"metadata without {_NAME} and {field}", where)
                elif image is None:
                    report.leave_out("in the metadata but not there", where, name)
                elif image in self._rows:
                    report.leave_out("in the metadata twice", where, name)
                else:
                    self._rows[image] = row

    def of(self, image: Path, *, optional: bool = False) -> str | None:
        """Return the caption of an image, without white space around it; None if it has none and that is allowed.

        Raises:
            LeftOut: it has none, or one that is empty or not text.
        """
        try:
            text = self._found(image)
        except LeftOut as problem:
            if optional and problem.reason == NO_CAPTION:
                return None
            raise
        if not text.strip():
            raise LeftOut("empty caption")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise LeftOut("caption is not UTF-8", f"at character {error.start + 1} of {text!r}") from None
        return text.strip()

    def _found(self, image: Path) -> str:
        row = self._rows.get(image)
        seen: list[Mapping[str, Any]] = []
        for values in itertools.chain([row or {}], map(self._values, self._beside(image))):
            if not _is_blank(values.get(self._field)):
                return _text(values[self._field])
            seen.append(values)
        if any(self._field in values for values in seen):
            return ""
        names = [name for values in seen for name in values if name not in (_NAME, None)]
        detail = f"its metadata has {some(names) or 'no other field'}; choose one with --caption-field"
        if row is None:
            raise LeftOut(NO_CAPTION, detail if names else "")
        raise LeftOut(f"metadata without {self._field}", detail)

    def _beside(self, image: Path) -> Iterator[Path]:
        """Yield the files of an image that may hold its caption."""
        for suffix in (".json", *TEXT_SUFFIXES):
            for name in (f"{image.stem}{suffix}", f"{image.name}{suffix}"):
                path = self._files.find(image.with_name(name))
                if path is not None:
                    yield path

    def _values(self, path: Path) -> Mapping[str, Any]:
        """Return the fields of a file next to an image: those of a JSON file, or the text as the caption."""
        try:
            text = _read_text(path)
        except OSError as error:
            raise LeftOut("unreadable caption", f"{path.name}: {error.strerror}") from None
        if path.suffix.lower() != ".json":
            return {self._field: text}
        values = _json_object(text)
        if self._field in values:
            self.read.add(path)
        return values


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise LeftOut("caption is not text", repr(value))
    return value


def _listed(folder: Path, name: str, images: FileNames) -> Path | None:
    """Return the image that metadata in ``folder`` name, with slashes of either kind; None if it is not there."""
    for each in (name, name.replace("\\", "/").strip()):
        image = images.find(Path(os.path.normpath(folder / each)))
        if image is not None:
            return image
    return None


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield line number and content of each row of a metadata file; a row that cannot be read is empty."""
    try:
        text = _read_text(file)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); make it readable, or move it.") from None
    if file.suffix.lower() in (".csv", ".tsv"):
        yield from _csv_rows(file, text)
        return
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            yield number, _json_object(line)


def _csv_rows(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or ()]
    except csv.Error as error:
        raise DataError(f"the first line of {file} cannot be read ({error}); it names the columns.") from None
    if _NAME not in columns:
        raise DataError(f"{file} has no column {_NAME}; its first line names the columns.")
    while True:
        try:
            row: Mapping[str, Any] = next(reader)
        except StopIteration:
            return
        except csv.Error:
            row = {}
        yield reader.line_num, row


def _json_object(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte order mark; other bytes become surrogates."""
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return data.decode("utf-16")
        except UnicodeDecodeError:
            pass
    return data.decode("utf-8-sig", errors="surrogateescape")
