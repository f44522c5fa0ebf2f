"""Conversion of parquet files with images, as Hugging Face's data sets have them, to shards of train, val and test.

An image column is a struct of ``bytes`` and ``path``, or holds the bytes themselves; a caption is a text or a list of texts. The
columns are found by the features that the package `datasets` describes in the schema, or by their types and names. Of a
file, one row group is in memory at a time; remote files are read from a temporary copy.
"""

from __future__ import annotations

import glob
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.measures import IndexOptions
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
from ldm.data.sources import expand_braces
from ldm.data.storage import Location, attempted, download, folder_of, is_url, matching, name_of, shown
from ldm.data.transforms import decode
from ldm.errors import DataError, first_line, unknown
from ldm.modalities.label import LABEL
from ldm.paths import expanded

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
"""Names of a column that is taken for the captions if none is given."""

_ROWS = 64  # that are read and decoded at a time


@dataclass(frozen=True)
class _Columns:
    """Columns of a file, by what they hold.

    Attributes:
        classes: names of the classes, if the file has them.
        several: whether a caption is a list of texts.
    """

    image: str
    caption: str | None
    label: str | None
    classes: tuple[str, ...]
    several: bool


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
) -> Report:
    """Write a set of shards with the images of parquet files; see :func:`ldm.data.set_writer.write_set`.

    Samples keep the order of the files. Their keys are the name of the file and the number of the row.

    Args:
        sources: files, folders or patterns, local or as URLs.
        destination: folder of the shards.
        image_column: column of the images; None: the only one that holds images, or ``image``.
        caption_column: column of the captions; None: the first of ``CAPTION_COLUMNS`` that there is.
        label_column: column of class numbers; None: no classes.
        caption_template: caption of images without one, in which the name of the class replaces ``{}``.
        shares: fractions of train, val and test, which a hash of the key chooses. None: the splits that the files are named
            after, as in ``train-00000-of-00002.parquet``, if all have such names and not all the same; else 0.98, 0.01, 0.01.
        shard_size, min_size, max_size, workers, languages: see :func:`ldm.data.folder.prepare_folder`.

    Raises:
        DataError: an invalid setting, a file that is missing or cannot be read, a column that is missing or of another type, no
            usable image.
    """
    check_shares(shares or DEFAULT_SHARES)
    check_sizes(min_size, max_size)
    paths = [path for source in sources for path in find_parquet(source, destination)]
    check_distinct(paths)
    report = Report()
    by_name = [split_named(name_of(path)) or split_named(name_of(folder_of(path))) for path in paths]
    report.named_splits = shares is None and named_splits(by_name)
    first = _columns_of(paths[0], _schema(paths[0]), image_column, caption_column, label_column)
    if caption_template is not None and not (first.classes and "{}" in caption_template):
        raise DataError(
            f"the caption template {caption_template!r} needs {{}}, and a label column of which the files name the classes."
        )
    report.classes, report.caption_format = list(first.classes), "json" if first.several else "text"

    def fill(writer: SetWriter) -> None:
        from tqdm import tqdm

        names = [name.replace(".", "_") for name in names_of(paths)]
        with tqdm(desc="converting", unit="image") as bar, ThreadPoolExecutor(max(1, workers)) as pool:
            for number, path in enumerate(paths):
                bar.set_postfix_str(f"file {number + 1} of {len(paths)}")
                given = image_column, caption_column, label_column
                for i, (row, size) in enumerate(_rows(path, first, given, pool)):
                    bar.update()
                    key = f"{names[number]}/{i:08d}"
                    try:
                        sample = _sample(key, row, size, first, caption_template, min_size, max_size)
                    except LeftOut as problem:
                        report.leave_out(problem.reason, key, problem.detail)
                        continue
                    assert not isinstance(size, LeftOut)
                    report.aspect_ratios.append(size[0] / size[1])
                    named = by_name[number] if report.named_splits else None
                    writer.add(named or split_of(place_of(key), shares or DEFAULT_SHARES), sample)

    options = IndexOptions(caption_format=report.caption_format, languages=languages)
    write_set(", ".join(sources), destination, fill, report, shard_size=shard_size, workers=workers, options=options)
    return report


def find_parquet(source: str, skip: Path) -> list[Location]:
    """Return the parquet files of a source, in order, without those in the folder ``skip``.

    Raises:
        DataError: there are none.
    """
    found: list[Location] = []
    for pattern in expand_braces(expanded(source)):
        local = Path(pattern.removeprefix("file://"))
        if is_url(pattern) and pattern.startswith("http"):
            found.append(pattern)  # which cannot be listed, and where ? has another meaning
        elif is_url(pattern):
            files = pattern if name_of(pattern).endswith(".parquet") else f"{pattern.rstrip('/')}/**/*.parquet"
            found += matching(files) if glob.has_magic(files) else [files]
        elif local.is_dir():
            found += sorted(path for path in local.rglob("*.parquet") if skip.resolve() not in path.resolve().parents)
        elif local.is_file():
            found.append(local)
        else:
            found += sorted(Path(name) for name in glob.glob(str(local), recursive=True))  # noqa: PTH207 (may be absolute)
    if not found:
        raise DataError(
            f"there is no parquet file in {shown(source) if is_url(source) else source}; give files, a folder or a pattern."
        )
    return found


def _schema(location: Location) -> Any:
    """Return the Arrow schema of a file.

    Raises:
        DataError: it is missing or cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if isinstance(location, Path):
            return pq.read_schema(location)
        return attempted(location, _schema_of)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{shown(location)} cannot be read ({first_line(error)}); copy it again.") from None


def _schema_of(fs: Any, path: str) -> Any:
    import pyarrow.parquet as pq

    with fs.open(path, "rb") as file:
        return pq.read_schema(file)


@contextmanager
def _opened(location: Location) -> Iterator[Any]:
    """Yield the ``pyarrow.parquet.ParquetFile`` of a file, or of a temporary copy of a remote one.

    Raises:
        DataError: it is missing or cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as temporary:
        path = location
        if not isinstance(path, Path):
            path = Path(temporary) / "copy.parquet"
            download(str(location), path)
        try:
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{shown(location)} cannot be read ({first_line(error)}); copy it again.") from None


def _columns_of(location: Location, schema: Any, image: str | None, caption: str | None, label: str | None) -> _Columns:
    """Return the columns of a file by its Arrow schema.

    Raises:
        DataError: one is missing or of another type.
    """
    import pyarrow as pa

    types: dict[str, Any] = {field.name: field.type for field in schema}
    features = _features(schema)
    for name in (image, caption, label):
        if name is not None and name not in types:
            raise DataError(f"{shown(location)}: {unknown('column', name, types)}")
    if image is None:
        images = [name for name in types if features.get(name, {}).get("_type") == "Image"]
        images = images or [name for name, kind in types.items() if _is_image(kind)]
        image = "image" if "image" in images else images[0] if len(images) == 1 else None
        if image is None:
            raise DataError(
                f"{shown(location)} has {len(images) or 'no'} columns that hold images, of {', '.join(types)}; choose one with "
                "--image-column."
            )
    if not _is_image(types[image]):
        raise DataError(f"the column {image!r} of {shown(location)} holds {types[image]}, not the bytes of images.")
    caption = caption or next((name for name in CAPTION_COLUMNS if name in types), None)
    if caption is None and label is None:
        raise DataError(
            f"{shown(location)} has no column of captions among {', '.join(types)}; choose one with --caption-column, or classes "
            "with --label-column."
        )
    kind: Any = types.get(caption or "")
    several = kind is not None and (pa.types.is_list(kind) or pa.types.is_large_list(kind))
    text = kind.value_type if several else kind
    if kind is not None and not (pa.types.is_string(text) or pa.types.is_large_string(text)):
        raise DataError(f"the column {caption!r} of {shown(location)} holds {kind}, not texts or lists of texts.")
    if label is not None and not pa.types.is_integer(types[label]):
        raise DataError(f"the column {label!r} of {shown(location)} holds {types[label]}, not class numbers.")
    classes = features.get(label or "", {}).get("names") or ()
    return _Columns(image, caption, label, tuple(map(str, classes)), several)


def _features(schema: Any) -> Mapping[str, Any]:
    """Return the features by column that the package ``datasets`` writes into a schema; empty if there are none."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (TypeError, KeyError, ValueError):
        return {}
    return {name: each for name, each in features.items() if isinstance(each, dict)}


def _is_image(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _rows(
    location: Location, columns: _Columns, given: Sequence[str | None], pool: ThreadPoolExecutor
) -> Iterator[tuple[dict[str, Any], tuple[int, int] | LeftOut]]:
    """Yield the values of each row of a file; and width and height of the image, or why it is left out."""
    with _opened(location) as file:
        found = _columns_of(location, file.schema_arrow, *given)
        if found != columns:
            raise DataError(
                f"the columns of {shown(location)} are not those of the files before it; convert it by itself."
            )
        used = [name for name in (columns.image, columns.caption, columns.label) if name is not None]
        for batch in file.iter_batches(_ROWS, columns=used):
            rows = batch.to_pylist()
            for row in rows:
                image = row[columns.image]
                row[columns.image] = image["bytes"] if isinstance(image, dict) else image
            yield from zip(rows, pool.map(_size, [row[columns.image] for row in rows]), strict=True)


def _size(data: bytes | None) -> tuple[int, int] | LeftOut:
    if not data:
        return LeftOut("image is not embedded")
    try:
        return decode(data).size
    except DataError as error:
        return LeftOut("unreadable", str(error))


def _sample(
    key: str,
    row: Mapping[str, Any],
    size: tuple[int, int] | LeftOut,
    columns: _Columns,
    template: str | None,
    min_size: int,
    max_size: int | None,
) -> Sample:
    """Return the sample of a row.

    Raises:
        LeftOut: it cannot be used.
    """
    if isinstance(size, LeftOut):
        raise size
    if min(size) < min_size:
        raise LeftOut(f"smaller than {min_size} pixels", f"{size[0]} x {size[1]}")
    label = None if columns.label is None else row[columns.label]
    if columns.label is not None and (label is None or not 0 <= label < (len(columns.classes) or math.inf)):
        raise LeftOut("no class", "" if label is None else str(label))
    text = None if columns.caption is None else _caption(row[columns.caption])
    if text is None and template is not None and label is not None:
        text = template.replace("{}", columns.classes[label].replace("_", " "))
    if text is None and (columns.caption is not None or label is None):
        raise LeftOut("no caption")
    image, suffix, _ = image_member(row[columns.image], max_size)
    return Sample(key, text, image, suffix, {} if label is None else {LABEL.key: label})


def _caption(value: str | Sequence[str | None] | None) -> str | None:
    """Return a caption as shards hold it, a list of several as JSON; None if there is none."""
    if value is None or isinstance(value, str):
        return (value or "").strip() or None
    texts = [text.strip() for text in value if text and text.strip()]
    return json.dumps(texts, ensure_ascii=False) if texts else None
