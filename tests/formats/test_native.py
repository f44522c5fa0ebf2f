from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.errors import CheckpointError
from ldm.formats import load
from ldm.formats.native import (
    CLIP,
    MODEL,
    load_strictly,
    read_header,
    save_model,
)
from ldm.formats.tensors import read_metadata
from ldm.model import ModelConfig
from tests.tiny import TOKENIZER, tiny_model


def test_a_model_comes_back_bitwise(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "model.safetensors"
    mark = save_model(path, model, {"steps": 3})
    loaded = load(path)
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
        CheckpointError, match=r"does not hold the format ldm\.clip\.1; its metadata says 'ldm\.model\.1'"
    ):
        read_header(path, CLIP, ModelConfig)
    tensors, metadata = load_file(path), read_metadata(path)
    config = json.loads(metadata["config"])
    for wrong, message in [
        ({"config": "{"}, "cannot be read"),
        ({"config": json.dumps(config | {"sizes": 1})}, r"cannot be read: .*unknown key 'sizes'; did you mean 'size'"),
        ({"format": "ldm.model.9"}, "its metadata has the format 'ldm.model.9'"),
        ({"tokenizer": "{}"}, "cannot be read: the tokenizer is not in the format"),
    ]:
        save_file(tensors, path, metadata | wrong)
        with pytest.raises(CheckpointError, match=message):
            load(path)
    del metadata["fingerprint"]
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(path, MODEL, ModelConfig)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        load(path)
