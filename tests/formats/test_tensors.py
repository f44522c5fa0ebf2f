from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from ldm.formats.tensors import fingerprint, read_tensors, write_atomically, write_tensors


def test_the_fingerprint_changes_with_weights_and_with_what_they_mean() -> None:
    tensors, meaning = {"a": torch.zeros(2, 3), "b": torch.ones(4)}, {"config": "x"}
    mark = fingerprint(tensors, meaning)
    assert mark == fingerprint(dict(reversed(tensors.items())), meaning)
    others = [
        fingerprint(tensors | {"b": torch.ones(4).index_fill(0, torch.tensor(2), 1 + 1e-6)}, meaning),
        fingerprint(tensors | {"a": torch.zeros(3, 2)}, meaning),
        fingerprint({"c" if name == "b" else name: tensor for name, tensor in tensors.items()}, meaning),
        fingerprint(tensors, {"config": "y"}),
    ]
    assert len({mark, *others}) == 5
    assert len(mark) == 16


def test_layout_in_memory_does_not_matter(tmp_path: Path) -> None:
    tensor = torch.randn(2, 3, 4, 5)
    last = tensor.to(memory_format=torch.channels_last)
    assert fingerprint({"a": tensor}, {}) == fingerprint({"a": last}, {})
    write_tensors(tmp_path / "a.safetensors", {"a": last, "view": tensor[:, 1]}, {})
    read = read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(read["a"], tensor)
    assert torch.equal(read["view"], tensor[:, 1])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path, sizes, done = tmp_path / "file", set(), threading.Event()
    write_atomically(path, lambda temporary: temporary.write_bytes(b"x" * 100_000))

    def read() -> None:
        while not done.is_set():
            sizes.add(len(path.read_bytes()))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        write_atomically(path, lambda temporary: temporary.write_bytes(b"x" * 100_000))
    done.set()
    reader.join()
    assert sizes <= {100_000}
