"""Parquet files with images: finding them, opening local and remote ones, and the columns that hold images, captions and classes.

The columns are found by the features that the package `datasets` describes in the schema, or by their types and names.
"""

from __future__ import annotations

import glob
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.sources import expand_braces
from ldm.data.storage import Location, attempted, download, is_url, matching, name_of, shown
from ldm.errors import DataError, first_line, unknown
from ldm.paths import expanded

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
"""Names of a column that is taken for the captions if none is given."""


@dataclass(frozen=True)
class Columns:
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


def read_schema(location: Location) -> Any:
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
def opened(location: Location) -> Iterator[Any]:
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


def columns_of(location: Location, schema: Any, image: str | None, caption: str | None, label: str | None) -> Columns:
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
    several = isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType)
    if kind is not None and not _is_text(kind.value_type if several else kind):
        raise DataError(f"the column {caption!r} of {shown(location)} holds {kind}, not texts or lists of texts.")
    if label is not None and not pa.types.is_integer(types[label]):
        raise DataError(f"the column {label!r} of {shown(location)} holds {types[label]}, not class numbers.")
    classes = features.get(label or "", {}).get("names") or ()
    return Columns(image, caption, label, tuple(map(str, classes)), several)


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
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    values = kind.value_type if pa.types.is_dictionary(kind) else kind  # as pandas writes categories
    return values in (pa.string(), pa.large_string(), pa.string_view())
