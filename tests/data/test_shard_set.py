"""A prepared set is the old one or the new one, or is refused; it is never a mixture."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ldm.data import ShardsData
from ldm.data.folder import prepare_folder
from ldm.data.set_writer import SetWriter
from ldm.data.shards import SPLITS, Shards, find_shards, write_shard
from ldm.errors import DataError
from tests.data.pictures import encoded, noise_picture, sample

SHARES = (0.5, 0.25, 0.25)


def write_images(folder: Path, count: int, first: int = 0) -> Path:
    """Images whose files and captions have the same lengths whatever ``first`` is."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"{i}.bmp").write_bytes(encoded(noise_picture(first + i), "BMP"))
        (folder / f"{i}.txt").write_text(f"caption {first + i:04d}")
    return folder


def prepare(source: Path, shards: Path, **settings: Any) -> None:
    prepare_folder(source, shards, **{"shares": SHARES, "shard_size": 3, **settings})


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def captions(folder: Path) -> set[str]:
    found: set[str] = set()
    for split in SPLITS:
        shards = Shards(find_shards(str(folder / split), split))
        found |= {shards.text(i) for i in range(len(shards))}
    return found


def no_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    prepare(tmp_path / "empty", tmp_path / "shards")


def no_captions(tmp_path: Path) -> None:
    for path in write_images(tmp_path / "other", 3).glob("*.txt"):
        path.unlink()
    prepare(tmp_path / "other", tmp_path / "shards")


def missing_source(tmp_path: Path) -> None:
    prepare(tmp_path / "mistyped", tmp_path / "shards")


def swapped_arguments(tmp_path: Path) -> None:
    prepare(tmp_path / "shards", tmp_path / "images")


def broken_metadata(tmp_path: Path) -> None:
    (write_images(tmp_path / "other", 3) / "metadata.csv").write_text("name\n0.bmp\n")
    prepare(tmp_path / "other", tmp_path / "shards")


def invalid_setting(tmp_path: Path) -> None:
    prepare(tmp_path / "images", tmp_path / "shards", max_size=0)


@pytest.mark.parametrize(
    "mistake", [no_images, no_captions, missing_source, swapped_arguments, broken_metadata, invalid_setting]
)
def test_a_mistake_leaves_the_set_of_before(tmp_path: Path, mistake: Callable[[Path], None]) -> None:
    prepare(write_images(tmp_path / "images", 24), tmp_path / "shards")
    images, shards = content(tmp_path / "images"), content(tmp_path / "shards")
    with pytest.raises(DataError):
        mistake(tmp_path)
    assert shards.items() <= content(tmp_path / "shards").items()
    assert images.items() <= content(tmp_path / "images").items()
    assert len(captions(tmp_path / "shards")) == 24
    prepare(tmp_path / "images", tmp_path / "shards")
    after = content(tmp_path / "shards")
    assert {name: after[name] for name in after if name.endswith(".tar")} == {
        name: shards[name] for name in shards if name.endswith(".tar")
    }


def fail_after(function: Callable[..., Any], calls: int, error: BaseException) -> Callable[..., Any]:
    done = []

    def failing(*arguments: Any, **options: Any) -> Any:
        done.append(1)
        if len(done) > calls:
            raise error
        return function(*arguments, **options)

    return failing


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("calls", [0, 2, 7])
@pytest.mark.parametrize("place", ["writing", "replacing"])
def test_an_interruption_at_any_place_leaves_the_set_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, calls: int, error: BaseException
) -> None:
    prepare(write_images(tmp_path / "images", 24), tmp_path / "shards")
    before = content(tmp_path / "shards")
    write_images(tmp_path / "images", 24, first=100)
    with monkeypatch.context() as patch:
        if place == "writing":
            patch.setattr(SetWriter, "add", fail_after(SetWriter.add, 3 * calls, error))
        else:
            replace, done = Path.replace, []

            def failing(path: Path, target: Path) -> Path:
                moved = ".preparing" in str(path) and ".preparing" not in str(target)
                done.extend([1] * moved)
                if moved and len(done) == calls + 1:
                    raise error
                return replace(path, target)

            patch.setattr(Path, "replace", failing)
        with pytest.raises((KeyboardInterrupt, DataError)) as raised:
            prepare(tmp_path / "images", tmp_path / "shards")
    if isinstance(error, OSError):
        assert "No space left on device" in str(raised.value)
    assert content(tmp_path / "shards") == before
    assert [path.name for path in (tmp_path / "shards").iterdir() if path.name.startswith(".")] == []
    prepare(tmp_path / "images", tmp_path / "shards")
    assert captions(tmp_path / "shards") == {f"caption {i:04d}" for i in range(100, 124)}


WRITTEN = 21
"""Shards, indices and their parts that are written, each by a call of Path.replace, before those of the old set are replaced."""


@pytest.mark.parametrize("calls", [4, 21, 27, 33, 40, 46])
def test_a_preparation_that_is_killed_leaves_one_set_or_is_refused(tmp_path: Path, calls: int) -> None:
    """The images of both sets have the same names, and their files the same lengths."""
    prepare(write_images(tmp_path / "images", 24), tmp_path / "shards")
    old = captions(tmp_path / "shards")
    write_images(tmp_path / "images", 24, first=100)
    process = os.fork()
    if process == 0:
        done, replace = [], Path.replace

        def killed(path: Path, target: Path) -> Path:
            if len(done) == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(path)
            return replace(path, target)

        Path.replace = killed  # type: ignore[method-assign]
        prepare(tmp_path / "images", tmp_path / "shards")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    if calls < WRITTEN:
        assert captions(tmp_path / "shards") == old
    else:
        with pytest.raises(DataError, match=r"tools/prepare\.py was stopped while it replaced them; run it again"):
            captions(tmp_path / "shards")
    prepare(tmp_path / "images", tmp_path / "shards")
    assert captions(tmp_path / "shards") == {f"caption {i:04d}" for i in range(100, 124)}
    assert [path.name for path in (tmp_path / "shards").iterdir() if path.name.startswith(".")] == []


def exchanged(one: Path, other: Path) -> None:
    (one / "train" / "000000.tar").write_bytes((other / "train" / "000000.tar").read_bytes())


def without_a_shard(one: Path, other: Path) -> None:
    (one / "train" / "000001.tar").unlink()


def with_one_more(one: Path, other: Path) -> None:
    (one / "train" / "000099.tar").write_bytes((other / "train" / "000000.tar").read_bytes())


def with_the_report_of_another(one: Path, other: Path) -> None:
    (one / "report.json").write_bytes((other / "report.json").read_bytes())


@pytest.mark.parametrize("change", [exchanged, without_a_shard, with_one_more, with_the_report_of_another])
def test_shards_that_are_not_those_of_the_report_are_refused(
    tmp_path: Path, change: Callable[[Path, Path], None]
) -> None:
    for name, first in {"one": 0, "other": 100}.items():
        prepare(write_images(tmp_path / f"{name} images", 24, first), tmp_path / name)
    change(tmp_path / "one", tmp_path / "other")
    data = ShardsData(str(tmp_path / "one" / "train"), workers=0)
    with pytest.raises(DataError, match=r"that the (report|index) .* lists.* tools/prepare\.py") as error:
        data.open("train")
    assert "\n" not in str(error.value)
    (tmp_path / "one" / "report.json").unlink()
    (tmp_path / "one" / "train" / "index.parquet").unlink()
    if change is not with_one_more:  # which has keys twice
        assert len(data.open("train"))


def test_shards_of_another_origin_are_not_replaced(tmp_path: Path) -> None:
    source, shards = write_images(tmp_path / "images", 24), tmp_path / "shards"
    (shards / "train").mkdir(parents=True)
    write_shard(shards / "train" / "000000.tar", [sample(0)])
    before = content(shards)
    with pytest.raises(DataError, match=r"contains shards that no report of tools/prepare\.py lists .*000000\.tar"):
        prepare(source, shards)
    assert content(shards) == before


def test_a_set_of_an_earlier_version_is_read_and_replaced(tmp_path: Path) -> None:
    source, shards = write_images(tmp_path / "images", 24), tmp_path / "shards"
    prepare(source, shards)
    report = json.loads((shards / "report.json").read_text())
    del report["shards"]
    (shards / "report.json").write_text(json.dumps(report))
    assert len(captions(shards)) == 24
    prepare(write_images(source, 9), shards)
    assert len(captions(shards)) == 24


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    source, shards = write_images(tmp_path / "images", 24), tmp_path / "shards"
    (shards / "train").mkdir(parents=True)
    (shards / "train" / "notes.md").write_text("by hand")
    for _ in range(2):
        prepare(source, shards)
    assert (shards / "train" / "notes.md").read_text() == "by hand"


def test_a_set_that_is_replaced_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    prepare(write_images(tmp_path / "images", 24), tmp_path / "shards")
    shards = Shards(find_shards(str(tmp_path / "shards" / "train"), "train"))
    prepare(write_images(tmp_path / "images", 24, first=100), tmp_path / "shards")
    for path in shards.paths:
        os.utime(path, (0, 0))  # clocks are coarse
    with pytest.raises(DataError, match="was replaced since it was opened"):
        shards.text(0)
