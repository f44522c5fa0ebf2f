from __future__ import annotations

import os
import pickle
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ldm.formats.sharded_checkpoint import (
    damaged_tensor,
    is_sharded,
    load_sharded,
    map_tensors,
    replace_checkpoint,
    save_sharded,
)
from tests.processes import run_on_ranks

CHECKPOINT: dict[str, Any] = {
    "state_dict": {"a.weight": torch.arange(35.0).view(7, 5), "count": torch.tensor(3)},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]}],
    "completed_steps": 4,
    "best": None,
    "record": {"text": "words"},
}
SHARDED = "state_dict/a.weight"  # seven rows: uneven parts


def sharded(tensor: Tensor) -> DTensor:
    return distribute_tensor(tensor, init_device_mesh("cpu", (torch.distributed.get_world_size(),)), [Shard(0)])


def assert_is_checkpoint(found: dict[str, Any]) -> None:
    tensors = found["state_dict"]
    assert torch.equal(tensors["a.weight"], CHECKPOINT["state_dict"]["a.weight"])
    assert torch.equal(tensors["count"], CHECKPOINT["state_dict"]["count"])
    assert found["optimizer_states"][0]["param_groups"] == [{"betas": (0.9, 0.99)}]
    assert found["optimizer_states"][0]["state"] == {0: {"step": 1.0}}
    assert {name: found[name] for name in ("completed_steps", "best", "record")} == {
        name: CHECKPOINT[name] for name in ("completed_steps", "best", "record")
    }


def save(folder: Path) -> None:
    save_sharded(map_tensors(CHECKPOINT, lambda name, each: sharded(each) if name == SHARDED else each), folder)


def resave(folder: Path, other: Path) -> None:
    """Read on another number of ranks, with the weight sharded over them, and write again."""
    like = sharded(torch.empty(7, 5))
    found = load_sharded(folder, lambda name, shape: like if name == SHARDED else None)
    weight = found["state_dict"]["a.weight"]
    assert weight.to_local().shape == like.to_local().shape
    assert_is_checkpoint({**found, "state_dict": found["state_dict"] | {"a.weight": weight.full_tensor()}})
    save_sharded(found, other)


@pytest.mark.slow
def test_any_number_of_ranks_can_read_what_others_wrote(tmp_path: Path) -> None:
    """Two write, three read and write, one reads."""
    first, second = tmp_path / "last.ckpt", tmp_path / "again.ckpt"
    run_on_ranks(partial(save, first), tmp_path)
    assert_is_checkpoint(load_sharded(first))
    (tmp_path / "rendezvous").unlink(missing_ok=True)
    run_on_ranks(partial(resave, first, second), tmp_path, 3)
    assert len(list(second.glob("*.distcp"))) == 3
    assert_is_checkpoint(load_sharded(second))


def test_one_process_writes_and_reads_without_a_process_group(tmp_path: Path) -> None:
    save_sharded(CHECKPOINT, tmp_path / "last.ckpt")
    assert is_sharded(tmp_path / "last.ckpt")
    assert_is_checkpoint(load_sharded(tmp_path / "last.ckpt"))


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "last.ckpt"
    save_sharded({"state_dict": {"a": torch.zeros(9), "b": torch.arange(4000.0)}}, folder)
    (file,) = folder.glob("*.distcp")
    content = file.read_bytes()
    assert damaged_tensor(folder) is None
    at = content.index(torch.arange(2000.0, 2010.0).numpy().tobytes())
    file.write_bytes(content[:at] + b"\1" + content[at + 1 :])
    assert damaged_tensor(folder) == "state_dict/b"
    file.write_bytes(content[:at])
    with pytest.raises(zipfile.BadZipFile):
        damaged_tensor(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        damaged_tensor(folder)


def test_metadata_that_would_run_code_are_refused(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return os.system, ("touch " + str(tmp_path / "ran"),)

    save_sharded(CHECKPOINT, tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt" / ".metadata").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(pickle.UnpicklingError, match="which could run code"):
        load_sharded(tmp_path / "last.ckpt")
    through_torch = b"\x80\x04ctorch.distributed.checkpoint.filesystem\nos.system\n(S'true'\ntR."
    (tmp_path / "last.ckpt" / ".metadata").write_bytes(through_torch)
    with pytest.raises(pickle.UnpicklingError, match="which could run code"):
        load_sharded(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


def test_files_and_folders_replace_each_other(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    for folder in (False, True, True, False):
        part = tmp_path / "last.part"
        if folder:
            save_sharded(CHECKPOINT, part)
        else:
            part.write_text("file")
        replace_checkpoint(part, last)
        assert is_sharded(last) == folder
        assert not part.exists()
