from __future__ import annotations

import json
import math
import sys
import threading
from pathlib import Path

import pytest
import torch

from ldm.errors import CheckpointError
from ldm.formats.tensors import (
    channels_last,
    check_finite,
    fingerprint,
    read_metadata,
    read_tensors,
    read_weights,
    to_dtype,
    write_atomically,
    write_tensors,
)


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


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 MB of weights."""
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    write_tensors(path, {f"w{i}": torch.randn(1024, 1024) for i in range(16)}, {})
    return path


def resident() -> float:
    """MB of memory of this process, pages of mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_reading_costs_no_memory_and_another_dtype_the_result_alone(large: Path, ending: str) -> None:
    path = large.with_suffix(ending)
    if ending == ".ckpt":
        torch.save({"state_dict": read_tensors(large)}, path)
    read_tensors(path)["w0"].sum().item()
    before = resident()
    tensors = read_tensors(path)
    assert resident() - before < 4
    check_finite(tensors, path)
    fingerprint(tensors, {})
    assert resident() - before < 16  # 64 would be all
    half = {name: to_dtype(tensor, torch.bfloat16) for name, tensor in tensors.items()}
    assert resident() - before < 32 + 16  # 96 would be both
    assert all(torch.equal(half[name], tensor.to(torch.bfloat16)) for name, tensor in tensors.items())


def test_what_was_written_to_a_mapped_tensor_stays(large: Path) -> None:
    tensor, memory = read_tensors(large)["w1"], torch.randn(1024, 1024)
    kept = memory.clone()
    tensor[3, 5] = 7.0
    mark = fingerprint({"a": tensor, "b": memory}, {})
    for values in (tensor, memory):
        to_dtype(values, torch.bfloat16)
    assert tensor[3, 5] == 7.0
    assert torch.equal(memory, kept)
    assert fingerprint({"a": tensor, "b": memory}, {}) == mark
    assert read_tensors(large)["w1"][3, 5] != 7.0


def test_another_dtype_and_layout_are_those_of_torch() -> None:
    weight, steps = torch.randn(4, 3, 2, 2), torch.arange(3)
    last = channels_last(weight)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, weight)
    assert channels_last(last) is last
    assert channels_last(weight[0]).data_ptr() == weight.data_ptr()
    assert torch.equal(to_dtype(weight, torch.bfloat16), weight.bfloat16())
    assert to_dtype(weight, None) is weight
    assert to_dtype(steps, torch.bfloat16) is steps


def test_tensors_that_share_memory_are_each_written(tmp_path: Path) -> None:
    tied = torch.randn(3, 4)
    tensors = {"a": tied, "b": tied, "first row": tied[0], "turned": tied.t(), "wide": tied[:, :1].expand(3, 5)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"x": "y"})
    read = read_tensors(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert read_metadata(tmp_path / "a.safetensors") == {"x": "y"}
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_that_are_no_numbers_are_named(dtype: torch.dtype) -> None:
    largest = torch.full((3, 1000), torch.finfo(dtype).max, dtype=torch.float64).to(
        dtype
    )  # finite, but no sum of it is
    check_finite({"large": largest, "steps": torch.arange(3), "nothing": torch.zeros(0, dtype=dtype)}, "f")
    for value in (math.nan, math.inf, -math.inf):
        broken = torch.full((2, 3), value).to(dtype)
        if broken.float().isfinite().all():  # fp8 has no infinity, and takes its largest number for it
            continue
        with pytest.raises(
            CheckpointError, match=r"^f: the weight b holds NaN or infinite values; download the file again\.$"
        ):
            check_finite({"a": torch.ones(2, dtype=dtype), "b": broken}, "f")


def test_a_folder_is_read_from_the_best_of_its_files(tmp_path: Path) -> None:
    def write(name: str, value: float) -> None:
        path = tmp_path / name
        if "index" in name:
            shard = f"{value}.safetensors" if "safetensors" in name else f"{value}.bin"
            path.write_text(json.dumps({"weight_map": {"w": shard}}))
            path = tmp_path / shard
        tensors = {"w": torch.tensor([value])}
        torch.save(tensors, path) if path.suffix == ".bin" else write_tensors(path, tensors, {})

    worst_first = [
        "pytorch_model.fp16.bin",
        "pytorch_model.bin.index.json",
        "pytorch_model.bin",
        "model.safetensors.index.fp16.json",
        "model.fp16.safetensors",
        "model.safetensors.index.json",
        "model.safetensors",
    ]
    for value, name in enumerate(worst_first):
        with pytest.raises(CheckpointError, match=r"holds no weights, such as diffusion_pytorch_model\.safetensors"):
            read_weights(tmp_path)
        write(name, float(value))
        tensors, files = read_weights(tmp_path, ("model", "pytorch_model"))
        assert tensors["w"].item() == value, name
        assert all(file.is_file() for file in files)
