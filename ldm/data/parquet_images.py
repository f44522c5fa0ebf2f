"""Conversion of parquet files with images, as Hugging Face's data sets have them, to shards of train, val and test.

An image column is a struct of ``bytes`` and ``path``, or holds the bytes themselves; a caption is a text or a list of texts. Of a
file, one row group is in memory at a time; remote files are read from a temporary copy.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ldm.data.measures import IndexOptions
from ldm.data.near_duplicates import BACKGROUND, Look, check_distance, look_of, originals
from ldm.data.parquet_files import Columns, columns_of, find_parquet, opened, read_schema
from ldm.data.preparation_report import LeftOut, Report
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
from ldm.data.shard_format import Sample
from ldm.data.shard_parts import check_distinct, names_of
from ldm.data.storage import Location, folder_of, name_of, shown
from ldm.data.transforms import decode
from ldm.errors import DataError
from ldm.modalities.label import LABEL

_ROWS = 64  # that are read and decoded at a time


class _Image(NamedTuple):
    """An image that can be decoded: its file, width and height, and appearance if near duplicates are dropped."""

    data: bytes
    size: tuple[int, int]
    look: Look | None


class _Row(NamedTuple):
    """Content of a row that can be used."""

    image: bytes
    look: Look | None
    text: str | None
    label: int | None


def prepare_parquet(
    sources: Sequence[str],
    destination: Path,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    caption_template: str | None = None,
    shard_size: int = 1000,
    min_size: int = 1,
    max_size: int | None = None,
    shares: Sequence[float] | None = None,
    workers: int = 4,
    languages: tuple[str, ...] = (),
    drop_duplicates: int | None = None,
) -> Report:
    """Write a set of shards with the images of parquet files; see :func:`ldm.data.set_writer.write_set`.

    Samples keep the order of the files. Their keys are the name of the file and the number of the row.

    Args:
        sources: files, folders or patterns, local or as URLs.
        destination: folder of the shards.
        image_column: column of the images; None: the only one that holds images, or ``image``.
        caption_column: column of the captions; None: the first of ``parquet_files.CAPTION_COLUMNS`` that there is.
        label_column: column of class numbers; None: no classes.
        caption_template: caption of images without one, in which the name of the class replaces ``{}``.
        shares: fractions of train, val and test, which a hash of the key chooses. None: the splits that the files are named
            after, as in ``train-00000-of-00002.parquet``, if all have such names and not all the same; else 0.98, 0.01, 0.01.
        shard_size, min_size, max_size, workers, languages: see :func:`ldm.data.folder.prepare_folder`.
        drop_duplicates: see there; the files are then read twice.

    Raises:
        DataError: an invalid setting, a file that is missing or cannot be read, a column that is missing or of another type, no
            usable image.
    """
    check_shares(shares or DEFAULT_SHARES)
    check_sizes(min_size, max_size)
    check_distance(drop_duplicates)
    paths = [path for source in sources for path in find_parquet(source, destination)]
    check_distinct(paths)
    names = [name.replace(".", "_") for name in names_of(paths)]  # a key ends at the first dot of a shard's file name
    for name, times in Counter(names).items():
        if times > 1:
            raise DataError(
                f"{times} parquet files have the name {name} apart from suffix and dots, so keys would not be unique; "
                "rename them."
            )
    report = Report()
    by_name = [split_named(name_of(path)) or split_named(name_of(folder_of(path))) for path in paths]
    report.named_splits = shares is None and named_splits(by_name)
    first = columns_of(paths[0], read_schema(paths[0]), image_column, caption_column, label_column)
    if caption_template is not None and not (first.classes and "{}" in caption_template):
        raise DataError(
            f"the caption template {caption_template!r} needs {{}}, and a label column of which the files name the classes."
        )
    report.classes, report.caption_format = list(first.classes), "json" if first.several else "text"

    given = image_column, caption_column, label_column

    def usable(
        pool: ThreadPoolExecutor, task: str, looks: bool, leave_out: Callable[[str, str, str], None]
    ) -> Iterator[tuple[str, str | None, _Row]]:
        """Yield key, split by name, and content of the rows that can be used."""
        from tqdm import tqdm

        with tqdm(desc=task, unit="image") as bar:
            for number, path in enumerate(paths):
                bar.set_postfix_str(f"file {number + 1} of {len(paths)}")
                for i, (row, found) in enumerate(_rows(path, first, given, pool, looks)):
                    bar.update()
                    key = f"{names[number]}/{i:08d}"
                    try:
                        content = _content(row, found, first, caption_template, min_size)
                    except LeftOut as problem:
                        leave_out(problem.reason, key, problem.detail)
                        continue
                    yield key, by_name[number] if report.named_splits else None, content

    def fill(writer: SetWriter) -> None:
        with ThreadPoolExecutor(max(1, workers)) as pool:
            duplicates: dict[str, str] = {}
            if drop_duplicates is not None:
                keys, looks = [], []
                for key, _, row in usable(pool, "comparing", True, lambda *_: None):
                    keys.append(key)
                    looks.append(row.look)
                found = enumerate(originals([look for look in looks if look is not None], drop_duplicates).tolist())
                duplicates = {keys[i]: keys[original] for i, original in found if i != original}
            for key, named, row in usable(pool, "converting", False, report.leave_out):
                if key in duplicates:
                    report.leave_out("near duplicate", key, f"of {duplicates[key]}")
                    continue
                image, suffix, size = image_member(row.image, max_size)
                report.aspect_ratios.append(size[0] / size[1])
                label = {} if row.label is None else {LABEL.key: row.label}
                split = named or split_of(place_of(key), shares or DEFAULT_SHARES)
                writer.add(split, Sample(key, row.text, image, suffix, label))

    options = IndexOptions(caption_format=report.caption_format, languages=languages)
    write_set(", ".join(sources), destination, fill, report, shard_size=shard_size, workers=workers, options=options)
    return report


def _rows(
    location: Location, columns: Columns, given: Sequence[str | None], pool: ThreadPoolExecutor, looks: bool
) -> Iterator[tuple[dict[str, Any], _Image | LeftOut]]:
    """Yield the values of each row of a file, and its image, or why it is left out."""
    with opened(location) as file:
        found = columns_of(location, file.schema_arrow, *given)
        if found != columns:
            raise DataError(
                f"the columns of {shown(location)} are not those of the files before it; convert it by itself."
            )
        used = [name for name in (columns.image, columns.caption, columns.label) if name is not None]
        for batch in file.iter_batches(_ROWS, columns=used):
            rows = batch.to_pylist()
            yield from zip(rows, pool.map(lambda row: _examine(row[columns.image], looks), rows), strict=True)


def _examine(value: Any, looks: bool) -> _Image | LeftOut:
    data = value["bytes"] if isinstance(value, dict) else value
    if not data:
        return LeftOut("image is not embedded")
    try:
        image = decode(data, background=BACKGROUND)
    except DataError as error:
        return LeftOut("unreadable", str(error))
    return _Image(data, image.size, look_of(image) if looks else None)


def _content(
    row: Mapping[str, Any], image: _Image | LeftOut, columns: Columns, template: str | None, min_size: int
) -> _Row:
    """Return the content of a row.

    Raises:
        LeftOut: it cannot be used.
    """
    if isinstance(image, LeftOut):
        raise image
    if min(image.size) < min_size:
        raise LeftOut(f"smaller than {min_size} pixels", f"{image.size[0]} x {image.size[1]}")
    label = None if columns.label is None else row[columns.label]
    if columns.label is not None and (label is None or not 0 <= label < (len(columns.classes) or math.inf)):
        raise LeftOut("no class", "" if label is None else str(label))
    text = None if columns.caption is None else _caption(row[columns.caption])
    if text is None and template is not None and label is not None:
        text = template.replace("{}", columns.classes[label].replace("_", " "))
    if text is None and (columns.caption is not None or label is None):
        raise LeftOut("no caption")
    return _Row(image.data, image.look, text, label)


def _caption(value: str | Sequence[str | None] | None) -> str | None:
    """Return a caption as shards hold it, a list of several as JSON; None if there is none."""
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    texts = [text.strip() for text in value if text and text.strip()]
    return json.dumps(texts, ensure_ascii=False) if texts else None
