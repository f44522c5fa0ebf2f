from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.errors import CheckpointError
from ldm.formats.native import (
    CLIP,
    MODEL,
    fingerprint,
    load_model,
    load_strictly,
    read_header,
    read_metadata,
    read_tensors,
    save_model,
    write_atomically,
    write_tensors,
)
from ldm.model import ModelConfig
from tests.tiny import TOKENIZER, tiny_model


def test_a_model_comes_back_bitwise(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "model.safetensors"
    mark = save_model(path, model, {"steps": 3})
    loaded = load_model(path)
    assert loaded.config == model.config
    assert (loaded.fingerprint, loaded.provenance) == (mark, {"steps": 3})
    assert loaded.tokenizer is not None
    assert torch.equal(loaded.tokenizer(["a red car"]), TOKENIZER(["a red car"]))
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_statistics_of_the_latents_stay_in_fp32(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, tiny_model(), {}, torch.float16)
    dtypes = {name: tensor.dtype for name, tensor in load_file(path).items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {
        "first_stage.latent_mean",
        "first_stage.latent_std",
    }


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


def test_loading_is_strict_and_lists_names() -> None:
    layer = nn.Linear(2, 3)
    with pytest.raises(CheckpointError, match=r"^f does not fit its config: 1 missing \(bias\); 1 unexpected \(extra\); "
                       r"1 of another shape \(weight\)\.$"):  # fmt: skip
        load_strictly(layer, {"weight": torch.zeros(3, 3), "extra": torch.zeros(1)}, "f")
    five = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(5))
    with pytest.raises(CheckpointError, match=r"5 missing \(0\.weight, 1\.weight, 2\.weight, \.\.\.\)"):
        load_strictly(five, {}, "f")


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="there is no file"):
        read_metadata(path)
    save_model(path, tiny_model(), {})
    with pytest.raises(
        CheckpointError, match=r"does not hold what is wanted, ldm\.clip\.1; its metadata says 'ldm\.model\.1'"
    ):
        read_header(path, CLIP, ModelConfig)
    tensors, metadata = load_file(path), read_metadata(path)
    config = json.loads(metadata["config"])
    for wrong, message in [
        ({"config": "{"}, "cannot be read"),
        ({"config": json.dumps(config | {"sizes": 1})}, r"cannot be read: .*unknown key 'sizes'; did you mean 'size'"),
        ({"format": "ldm.model.9"}, "its metadata says 'ldm.model.9'"),
        ({"tokenizer": "{}"}, "cannot be read: the tokenizer is not in the format"),
    ]:
        save_file(tensors, path, metadata | wrong)
        with pytest.raises(CheckpointError, match=message):
            load_model(path)
    del metadata["fingerprint"]
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(path, MODEL, ModelConfig)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        load_model(path)
