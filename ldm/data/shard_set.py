"""Prepared sets: the shards of all splits and their report in one folder, replaced together and checked when they are opened.

``report.json`` lists the shards of each split with the checksum of each, which the shard itself repeats (see
:func:`ldm.data.shards.write_shard`), so that a shard of another set is noticed without reading all of its content.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.errors import DataError, some
from ldm.processes import is_running

REPORT = "report.json"
INDEX = "index.parquet"
_PREPARING = ".preparing-"  # and the number of the process that writes there
_REPLACING = ".replacing"  # exists while the files of a set are exchanged
_SHARD = re.compile(r"\d{6}\.tar")


@contextmanager
def replacement(folder: Path, splits: Sequence[str]) -> Iterator[Path]:
    """Yield a temporary folder for a new set, which replaces the set in ``folder`` if the block ends without an error.

    An error or an interruption leaves the old set as it was. Only the exchange at the end, which renames files, can leave an
    incomplete set, if the process is killed meanwhile; it is refused when it is opened.

    Args:
        folder: folder of the set.
        splits: names of its subfolders.

    Raises:
        DataError: ``folder`` has shards that are not of a prepared set.
    """
    replaced = _files(folder, splits)
    for path in folder.glob(f"{_PREPARING}*"):
        process = int(path.name.removeprefix(_PREPARING))
        if process == os.getpid() or not is_running(process):
            shutil.rmtree(path)
    temporary = folder / f"{_PREPARING}{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        _exchange(folder, replaced, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def has_set(folder: Path) -> bool:
    """Return True if the folder has the report of a prepared set with shards."""
    report = _report(folder)
    return report is not None and report.get("shards") != {}


def listed_shards(folder: Path) -> dict[str, str | None] | None:
    """Return the checksums of the shards of a split by file name, as the report next to its folder lists them.

    None if there is no such report.

    Raises:
        DataError: a preparation was stopped while it replaced the set.
    """
    check_replaced(folder.parent)
    listed: dict[str, str | None] | None = (_report(folder.parent) or {}).get("shards", {}).get(folder.name)
    return listed


def check_complete(folder: Path, shards: Sequence[Path]) -> None:
    """Raise a DataError if the shards in the folder of a split are not those that the report next to it lists."""
    listed, names = listed_shards(folder), {shard.name for shard in shards}
    if listed is not None and names != listed.keys():
        differing = some(sorted(names ^ listed.keys()))
        raise DataError(
            f"the shards in {folder} are not those that the report next to it lists ({differing}); {_remedy(folder)}."
        )


def check_shards(checksums: Mapping[Path, str | None]) -> None:
    """Raise a DataError if the checksum of a shard is not that of the report next to its folder."""
    listed = {folder: listed_shards(folder) or {} for folder in {path.parent for path in checksums}}
    for path, checksum in checksums.items():
        if checksum != listed[path.parent].get(path.name, checksum):
            raise DataError(
                f"the shard {path} is not the one that the report next to its folder lists; {_remedy(path.parent)}."
            )


def _remedy(folder: Path) -> str:
    return f"run tools/prepare.py again, or delete {folder.parent / REPORT} to use the shards as they are"


def check_replaced(folder: Path) -> None:
    """Raise a DataError if a preparation was stopped while it replaced the set in the folder."""
    if (folder / _REPLACING).is_dir():
        raise DataError(
            f"the shards in {folder} are incomplete, since tools/prepare.py was stopped while it replaced them; run it again."
        )


def _report(folder: Path) -> dict[str, Any] | None:
    """Return the report of a prepared set; None if there is none, or if the file is something else."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and "pictures" in report else None


def _files(folder: Path, splits: Sequence[str]) -> list[Path]:
    """Return the report, the shards and their indices of the set in a folder.

    Raises:
        DataError: it has shards that the report does not list.
    """
    report = _report(folder)
    found = [path for split in splits for path in sorted((folder / split).glob("*.tar"))]
    if report is None:
        own = []
    elif "shards" in report:
        own = [path for path in found if path.name in report["shards"].get(path.parent.name, ())]
    else:  # of an earlier version, which listed no shards
        own = [path for path in found if _SHARD.fullmatch(path.name)]
    foreign = [str(path) for path in found if path not in own]
    if foreign and not (folder / _REPLACING).is_dir():
        raise DataError(
            f"{folder} contains shards that no report of tools/prepare.py lists ({some(foreign)}); move them, or choose "
            "another folder."
        )
    indices = [path for split in splits if (path := folder / split / INDEX).is_file()]
    return [*found, *indices, *([folder / REPORT] if report is not None else [])]


def _exchange(folder: Path, replaced: Sequence[Path], temporary: Path) -> None:
    """Move the files ``replaced`` out of ``folder`` and those of ``temporary`` into it; on an error, move them back."""
    replacing = folder / _REPLACING
    replacing.mkdir(exist_ok=True)
    new = sorted(path for path in temporary.rglob("*") if path.is_file())
    moves = [(path, replacing / path.relative_to(folder)) for path in replaced]
    moves += [(path, folder / path.relative_to(temporary)) for path in new]
    try:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
    except BaseException:
        for source, target in reversed(moves):
            if target.exists() and not source.exists():
                target.replace(source)
        shutil.rmtree(replacing)
        raise
    for split in {path.parent for path in replaced} - {folder}:
        if not any(split.iterdir()):
            split.rmdir()
    shutil.rmtree(replacing)
