from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from ldm import Pipeline, load
from ldm.errors import CheckpointError
from ldm.formats import MODEL_FILE, read, save
from ldm.formats.hub import fetch, is_hub_id
from ldm.formats.native import save_model
from tests.formats.hub_server import Hub
from tests.tiny import tiny_model


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the library in this process speaks with, with an empty cache; the library read its environment before."""
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("run") for _ in range(2)]
    for seed, folder in enumerate(folders):
        save_model(folder / MODEL_FILE, tiny_model(seed=seed), {"seed": seed})
    return folders


def repository(folder: Path, *files: str) -> Path:
    """A folder with such files, each of which holds its name."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)
    return folder


def held(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("source", "is_id"),
    [
        ("owner/name", True),
        ("runs/emoji_64", True),
        ("CompVis/stable-diffusion-v1-4", True),
        ("owner/name/v1.5/sd.ckpt", True),
        ("owner/name/a b--[1].safetensors", True),
        ("emoji", False),
        ("./owner/name", False),
        ("../name", False),
        ("/owner/name", False),
        ("~/name", False),
        ("owner/name/", False),
        ("owner/na--me", False),
        ("owner/na..me", False),
        ("owner/na me", False),
        ("owner/name/vae", False),
        ("owner/name/../sd.ckpt", False),
        ("owner/../sd.ckpt", False),
        ("runs/model.safetensors", False),
        ("C:\\owner/name", False),
        ("https://huggingface.co/owner/name", False),
    ],
)
def test_an_id_is_told_from_a_path(source: str, is_id: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(source) == is_id


def test_what_is_here_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository(tmp_path, "owner/name/sd.ckpt"))
    assert not is_hub_id("owner/name")
    assert not is_hub_id("owner/name/sd.ckpt")


def test_a_model_loads_by_its_id_and_revision(hub: Hub, runs: list[Path]) -> None:
    first, second = [hub.commit("owner/run", run) for run in runs]
    assert load("owner/run").provenance == {"seed": 1}
    assert load("owner/run", revision=first).provenance == {"seed": 0}
    assert (
        load("owner/run", revision="main").fingerprint
        == load("owner/run/model.safetensors", revision=second).fingerprint
    )
    pipe = Pipeline.from_pretrained("owner/run", revision=first)
    assert pipe.model.fingerprint == load(runs[0]).fingerprint
    assert len(hub.fetched) == 2


def test_a_newer_commit_replaces_the_older(hub: Hub, runs: list[Path]) -> None:
    hub.commit("owner/run", runs[0])
    assert load("owner/run").provenance == {"seed": 0}
    hub.commit("owner/run", runs[1])
    assert load("owner/run").provenance == {"seed": 1}


def test_a_revision_of_what_is_here_is_refused(runs: list[Path]) -> None:
    with pytest.raises(CheckpointError, match="is not a model on the hub, so it has no revision 'v2'"):
        load(runs[0], revision="v2")


FOLDER = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}
UNREAD = {
    ".gitattributes",
    "README.md",
    "v1-5.ckpt",
    "v1-5.safetensors",
    "feature_extractor/preprocessor_config.json",
    "image_encoder/model.safetensors",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "text_encoder/flax_model.msgpack",
    "text_encoder/pytorch_model.bin",
    "text_encoder/pytorch_model.bin.index.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    "unet/model.onnx",
    "unet/previews/sample.json",
    "vae/diffusion_pytorch_model-00001-of-00001.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.safetensors.index.json",
    "vae_encoder/config.json",
    "vae_encoder/model.onnx",
}


def test_only_what_is_read_of_a_folder_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.commit("owner/sd", repository(tmp_path / "sd", *FOLDER, *UNREAD))
    folder = fetch("owner/sd")
    assert set(hub.fetched) == held(folder) == FOLDER
    assert all((folder / file).read_text() == file for file in FOLDER)
    assert fetch("owner/sd/v1-5.ckpt").read_text() == "v1-5.ckpt"


VAE, CLIP = "diffusion_pytorch_model", "pytorch_model"


@pytest.mark.parametrize(
    ("expected", "others"),
    [
        ({"model.safetensors"}, {"README.md", "config.yaml", "vae/last.ckpt"}),  # a run
        ({"config.json", f"{VAE}.safetensors"}, {f"{VAE}.bin", f"{VAE}.fp16.safetensors"}),
        ({"config.json", "merges.txt", "model.safetensors"}, {"pytorch_model.bin", "tf_model.h5", "LICENSE.txt"}),
        ({"config.json", f"{CLIP}.bin"}, {"flax_model.msgpack"}),
        ({"config.json", f"{CLIP}.bin.index.json", f"{CLIP}-00001-of-00001.bin"}, {"model.onnx"}),
        ({"open_clip_model.safetensors"}, {"open_clip_config.json"}),
        ({"sd_xl_base_1.0.safetensors"}, {"lora/a.safetensors", "config.json"}),
        ({"model[1].ckpt"}, {"model1.txt"}),
    ],
)
def test_without_an_index_the_usual_or_the_only_weights_are_fetched(
    hub: Hub, tmp_path: Path, expected: set[str], others: set[str]
) -> None:
    hub.commit("owner/it", repository(tmp_path / "it", *expected, *others))
    path = fetch("owner/it")
    assert set(hub.fetched) == expected
    assert held(path) == expected if path.is_dir() else {path.name} == expected


def test_what_is_not_clear_is_asked(hub: Hub, tmp_path: Path) -> None:
    hub.commit("owner/several", repository(tmp_path / "several", "a.ckpt", "b.safetensors", "c/d.ckpt"))
    with pytest.raises(CheckpointError, match=r'several models, .*\bb\.safetensors.*"owner/several/(a|b)\.'):
        fetch("owner/several")
    with pytest.raises(CheckpointError, match=r"no file owner/several/e\.ckpt, neither locally nor .* at its root"):
        fetch("owner/several/e.ckpt")
    hub.commit("owner/inside", repository(tmp_path / "inside", "c/d.ckpt"))
    with pytest.raises(CheckpointError, match=r"neither a model_index\.json nor"):
        fetch("owner/inside")
    hub.commit("owner/flux", repository(tmp_path / "flux", "model_index.json", "transformer/model.safetensors"))
    with pytest.raises(CheckpointError, match="no weights of a U-Net"):
        fetch("owner/flux")
    assert not hub.fetched


@pytest.mark.parametrize("offline", [False, True])
def test_without_the_hub_the_cache_serves(
    tmp_path: Path, hub: Hub, runs: list[Path], monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    sources = ("owner/sd", "owner/run", "owner/run/model.safetensors")
    hub.commit("owner/sd", repository(tmp_path / "sd", *FOLDER, *UNREAD))
    old, _ = [hub.commit("owner/run", run) for run in runs]
    fetched = [fetch(source, revision) for source in sources for revision in (None, old if "run" in source else "main")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    hub.stop()
    again = [fetch(source, revision) for source in sources for revision in (None, old if "run" in source else "main")]
    assert again == fetched
    for absent in ("owner/other", "owner/run/other.ckpt"):
        with pytest.raises(
            CheckpointError, match=f"no local folder or file {absent}, and it cannot be downloaded from"
        ):
            fetch(absent)
    with pytest.raises(CheckpointError, match=r"cannot be downloaded from the hub .*: .*(refused|offline)"):
        fetch("owner/run", "v2")


def test_what_the_hub_no_longer_has_is_read_from_the_cache(hub: Hub, runs: list[Path]) -> None:
    hub.commit("owner/run", runs[0])
    fetched = fetch("owner/run")
    hub.private.add("owner/run")
    assert fetch("owner/run") == fetched


def test_an_id_that_the_hub_lacks_may_be_a_path_that_was_meant(hub: Hub) -> None:
    with pytest.raises(
        CheckpointError, match=r"^there is no local folder or file runs/emoji_64, and no such model on the hub \("
    ):
        load("runs/emoji_64")


def test_a_revision_that_is_missing_is_named(hub: Hub, runs: list[Path]) -> None:
    hub.commit("owner/run", runs[0])
    for source in ("owner/run", "owner/run/model.safetensors"):
        with pytest.raises(CheckpointError, match=r"^owner/run.* has no revision 'v9' on the hub"):
            fetch(source, "v9")


def test_a_model_that_needs_a_token_says_so(hub: Hub, runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for model in ("owner/gated", "owner/private"):
        hub.commit(model, runs[0])
    hub.gated, hub.private, hub.token = {"owner/gated"}, {"owner/private"}, "hf_secret"
    with pytest.raises(CheckpointError, match=r"^owner/gated is gated .* `hf auth login` or set HF_TOKEN\.$"):
        fetch("owner/gated")
    with pytest.raises(CheckpointError, match=r"no such model .* `hf auth login` or set HF_TOKEN if it is private\.$"):
        fetch("owner/private")
    assert not hub.fetched
    monkeypatch.setenv("HF_TOKEN", hub.token)
    for model in ("owner/gated", "owner/private"):
        assert fetch(model).read_bytes() == (runs[0] / MODEL_FILE).read_bytes()


def test_a_truncated_download_is_no_file(hub: Hub, runs: list[Path], tmp_path: Path) -> None:
    hub.commit("owner/run", runs[0])
    hub.cut = 1000
    with pytest.raises(CheckpointError, match=r"cannot be downloaded from the hub \(.*\): [^\n]*size[^\n]*$"):
        fetch("owner/run")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    hub.cut = 0
    assert fetch("owner/run").read_bytes() == (runs[0] / MODEL_FILE).read_bytes()


def test_a_download_that_broke_off_can_be_finished(hub: Hub, runs: list[Path]) -> None:
    hub.commit("owner/run", runs[0])
    hub.breaks = 1
    with suppress(CheckpointError):  # not every version of the library takes it up by itself
        fetch("owner/run")
    assert fetch("owner/run").read_bytes() == (runs[0] / MODEL_FILE).read_bytes()
    assert hub.fetched == [MODEL_FILE, MODEL_FILE]


CALL = """
import sys
from ldm.formats.hub import fetch
assert "huggingface_hub" not in sys.modules
print(fetch("owner/run"))
"""


def test_the_environment_of_the_library_holds(hub: Hub, runs: list[Path], tmp_path: Path) -> None:
    hub.commit("owner/run", runs[0])
    hub.private, hub.token = {"owner/run"}, "hf_secret"
    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": hub.token,
        "HF_HUB_OFFLINE": "0",
    }
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", CALL], env=os.environ | variables | path, stdout=subprocess.PIPE, text=True, check=True
    )
    fetched = Path(done.stdout.strip())
    assert fetched.is_relative_to(tmp_path / "home")
    assert fetched.read_bytes() == (runs[0] / MODEL_FILE).read_bytes()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder whose U-Net and VAE also have the variant fp16, and whose VAE has bf16."""
    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    save(tiny_model(), folder, "diffusers")
    for part, variant, dtype in (("unet", "fp16", "float16"), ("vae", "fp16", "float16"), ("vae", "bf16", "bfloat16")):
        name = f"{part}/diffusion_pytorch_model"
        tensors = {
            key: each.to(getattr(torch, dtype)) for key, each in load_file(folder / f"{name}.safetensors").items()
        }
        save_file(tensors, folder / f"{name}.{variant}.safetensors")
    return folder


@pytest.mark.parametrize("on_hub", [False, True])
def test_a_variant_is_read_where_it_exists(hub: Hub, pipeline: Path, on_hub: bool) -> None:
    hub.commit("owner/sd", pipeline)
    source: Any = "owner/sd" if on_hub else pipeline
    for variant, expected in (("fp16", ("float16", "float16")), ("bf16", ("float32", "bfloat16"))):
        found = Pipeline.from_pretrained(source, "cpu", torch.float32, variant=variant).model
        dtypes = {name: part.weights.popitem()[1].dtype for name, part in read(source, variant=variant).parts.items()}
        assert (str(dtypes["denoiser"]), str(dtypes["first_stage"])) == tuple(f"torch.{each}" for each in expected)
        assert dtypes["text_encoder"] == torch.float32
        assert found.config == load(pipeline).config
    assert "vae/diffusion_pytorch_model.safetensors" not in hub.fetched
    with pytest.raises(CheckpointError, match=r"has no weights of the variant 'int8'; omit the variant"):
        read(source, variant="int8")


@pytest.mark.parametrize("on_hub", [False, True])
def test_a_subfolder_is_a_source(hub: Hub, pipeline: Path, tmp_path: Path, on_hub: bool) -> None:
    shutil.copytree(pipeline, tmp_path / "all" / "models" / "sd")
    hub.commit("owner/all", tmp_path / "all")
    source: Any = "owner/all" if on_hub else tmp_path / "all"
    assert load(source, subfolder="models/sd").fingerprint == load(pipeline).fingerprint
    hub.fetched.clear()
    text = read(source, subfolder="models/sd/text_encoder")
    assert [*text.parts] == ["text_encoder"]
    assert text.tokenizer is not None
    assert not any("unet" in file for file in hub.fetched)
    part = read(source, subfolder="models/sd/vae", variant="bf16").parts["first_stage"]
    assert part.weights["encoder.conv_in.weight"].dtype == torch.bfloat16
    for subfolder, message in (("other", "has no folder 'other'"), ("../x", "is not within"), ("/x", "is not within")):
        with pytest.raises(CheckpointError, match=message):
            read(source, subfolder=subfolder)


def test_a_file_has_no_variants(runs: list[Path]) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors has no weights of the variant 'fp16'"):
        load(runs[0], variant="fp16")
    with pytest.raises(CheckpointError, match="has no folder 'unet'"):
        load(runs[0], subfolder="unet")
