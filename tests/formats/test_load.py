from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm import load
from ldm.errors import CheckpointError
from ldm.formats import MODEL_FILE
from ldm.formats.native import save_model
from ldm.load_options import LoadOptions
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_model(folder / MODEL_FILE, tiny_model(seed=3), {"steps": 7}, torch.float16)
    return folder


@pytest.mark.parametrize("name", ["", MODEL_FILE])
def test_a_folder_and_its_file_are_one_model(run: Path, name: str) -> None:
    expected, loaded = tiny_model(seed=3), load(run / name)
    assert loaded.config == expected.config
    assert loaded.provenance == {"steps": 7}
    assert not loaded.training
    for part, tensor in expected.state_dict().items():
        actual = loaded.state_dict()[part]
        stored = tensor if "latent_" in part else tensor.half().float()
        assert torch.equal(actual, stored), part


def test_the_shipped_model_goes_by_its_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.formats.ASSETS", run)
    assert load().fingerprint == load("emoji").fingerprint == load(run).fingerprint
    monkeypatch.setattr("ldm.formats.ASSETS", run / "elsewhere")
    with pytest.raises(CheckpointError, match="lacks the shipped model"):
        load("emoji")


def test_what_cannot_be_read_is_told_in_a_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no model .*nowhere; name a run folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="a run has one after its last stage"):
        load(tmp_path)
    (tmp_path / "part" / "unet").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"part holds no model_index\.json"):
        load(tmp_path / "part")
    (tmp_path / "sd.ckpt").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"sd\.ckpt is not a complete file of torch\.save"):
        load(tmp_path / "sd.ckpt")
    (tmp_path / "half.safetensors").write_bytes((run / MODEL_FILE).read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"half\.safetensors is not a complete"):
        load(tmp_path / "half.safetensors")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a folder of no pipeline, of which ldm reads no part"):
        load(tmp_path)


def test_options_may_be_given_as_a_record_or_by_name(run: Path) -> None:
    other = tiny_model(seed=4)
    save_model(run / "other.safetensors", other, {})
    record = load(run, LoadOptions(denoiser=run / "other.safetensors"))
    named = load(run, denoiser=run / "other.safetensors")
    assert record.fingerprint == named.fingerprint != load(run).fingerprint
    assert torch.equal(named.denoiser.conv_in.weight, other.denoiser.conv_in.weight)
    both = LoadOptions(vae=run / "other.safetensors")
    assert torch.equal(load(run, both, denoiser=run).first_stage.decoder.conv_in.weight,
                       other.first_stage.decoder.conv_in.weight)  # fmt: skip


def test_the_former_name_of_an_option_is_read_with_a_warning(run: Path) -> None:
    save_model(run / "other.safetensors", tiny_model(seed=4), {})
    with pytest.warns(FutureWarning, match=r"^the option 'unet' is now called 'denoiser'; rename it\.$") as warned:
        former = load(run, unet=run / "other.safetensors")
    assert warned[0].filename == __file__
    assert former.fingerprint == load(run, denoiser=run / "other.safetensors").fingerprint
    with pytest.raises(TypeError, match="unknown option 'denoisr'; did you mean 'denoiser'"):
        load(run, denoisr=run)
