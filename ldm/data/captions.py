"""Captions of the images of a folder, as they are found: in a file next to the image, or in metadata.

For ``x.jpg``, in this order: its row in a ``metadata.csv`` or ``metadata.jsonl`` in the same folder or above (columns
``file_name`` and ``text``, as Hugging Face's imagefolder has them); ``x.json``, an object with the field ``text``; ``x.txt`` and
``x.caption``, also as ``x.jpg.txt`` and ``x.jpg.caption``. Suffixes may be in upper case.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.data.preparation_report import LeftOut, Report
from ldm.errors import DataError, some
from ldm.modalities.caption import CAPTION

METADATA = ("metadata.csv", "metadata.jsonl")
TEXT_SUFFIXES = (f".{CAPTION.suffix}", ".caption")
NO_CAPTION = "no caption"
_NAME = "file_name"


class FileNames:
    """Files by path, where the suffix may be in another case and the name in another Unicode normal form."""

    def __init__(self, paths: Iterable[Path]):
        self._exact = set(paths)
        self._loose = {_loose(path): path for path in sorted(self._exact, reverse=True)}

    def find(self, path: Path) -> Path | None:
        """Return the file with this name, or else one whose name differs only so; None if there is none."""
        return path if path in self._exact else self._loose.get(_loose(path))


def _loose(path: Path) -> str:
    return unicodedata.normalize("NFC", str(path).removesuffix(path.suffix) + path.suffix.lower())


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
        self._files = FileNames(files)
        self._rows: dict[Path, Mapping[str, Any]] = {}
        self.read: set[Path] = {path for path in files if path.name.lower() in METADATA}
        by_name = FileNames(images)
        for file in sorted(self.read):
            for line, row in _rows(file):
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
        blank = row is not None and self._field in row
        if row is not None and not _is_blank(row.get(self._field)):
            return _text(row[self._field])
        for path in self._beside(image):
            text = self._text_of(path)
            if not _is_blank(text):
                return _text(text)
            blank = blank or text is not None
        if blank:
            return ""
        if row is not None:
            fields = some([name for name in row if name not in (_NAME, None)]) or "no other field"
            raise LeftOut(f"metadata without {self._field}", f"it has {fields}; choose one with --caption-field")
        raise LeftOut(NO_CAPTION)

    def _beside(self, image: Path) -> Iterator[Path]:
        """Yield the files of an image that may hold its caption."""
        for suffix in (".json", *TEXT_SUFFIXES):
            for name in (f"{image.stem}{suffix}", f"{image.name}{suffix}"):
                path = self._files.find(image.with_name(name))
                if path is not None:
                    yield path

    def _text_of(self, path: Path) -> Any:
        """Return the caption in a file next to an image; None if a JSON file has none."""
        try:
            text = _read_text(path)
        except OSError as error:
            raise LeftOut("unreadable caption", f"{path.name}: {error.strerror}") from None
        if path.suffix.lower() != ".json":
            return text
        values = _json_object(text)
        if self._field in values:
            self.read.add(path)
        return values.get(self._field)


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise LeftOut("caption is not text", repr(value))
    return value


def _listed(folder: Path, name: str, images: FileNames) -> Path | None:
    """Return the image that metadata in ``folder`` name, with slashes of either kind; None if it is not there."""
    for each in (name, name.replace("\\", "/")):
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
    if file.suffix.lower() == ".csv":
        yield from _csv_rows(file, text)
        return
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            yield number, _json_object(line)


def _csv_rows(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = reader.fieldnames or ()
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
