"""Variants of names are known to every container: single files, single networks, folders and pickles."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.clip.text import TextTowerConfig
from ldm.clip.text_formats import OpenAITextSingleFile
from ldm.denoiser.unet import LevelSpec, UNetConfig
from ldm.denoiser.unet_formats import UNetSingleFile
from ldm.errors import CheckpointError
from ldm.formats import read, save
from ldm.formats.checkpoint import Checkpoint
from ldm.formats.families import SD_2, family_of
from ldm.formats.single_network import save_single_network
from ldm.formats.tensors import read_file, read_tensors
from ldm.vae.autoencoder import AutoencoderKLConfig
from ldm.vae.autoencoder_formats import AutoencoderSingleFile
from tests.formats.test_single_file import OPENAI, UNET, VAE, model_of

Names = Callable[[str], str]


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """An LDM file of SD 1, without metadata."""
    return load_file(save(model_of("SD 1"), tmp_path_factory.mktemp("file") / "model.safetensors", "ldm"))


@pytest.fixture(scope="module")
def folders(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the single networks, by the prefix that they have in the file."""
    root, found = tmp_path_factory.mktemp("folders"), {}
    for prefix, to in ((VAE, "diffusers"), (UNET, "diffusers"), (OPENAI, "transformers")):
        save_file(of_network(tensors, prefix), root / "one.safetensors")
        found[prefix] = save_single_network(read(root / "one.safetensors"), root / to / prefix, to)
    return found


def of_network(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def assert_same(path: Path, prefix: str, expected: Path | dict[str, Tensor], tmp_path: Path) -> None:
    """Compare the network that ``prefix`` has in LDM files."""
    part = {VAE: "first_stage", UNET: "denoiser", OPENAI: "text_encoder"}[prefix]
    if isinstance(expected, dict):
        save_file(expected, tmp_path / "expected.safetensors")
        expected = tmp_path / "expected.safetensors"
    state, own = (read(source).parts[part].weights for source in (path, expected))
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], own[name]) for name in own)


def attention(**names: str) -> Names:
    """Rename the projections of the VAE's attention layer, in an LDM file and in a folder."""
    known = {
        "q": ("q", "to_q"),
        "k": ("k", "to_k"),
        "v": ("v", "to_v"),
        "out": ("proj_out", r"to_out.0"),
        "norm": ("norm", "group_norm"),
    }

    def rename(name: str) -> str:
        for part, spellings in known.items():
            for layer in ("mid.attn_1", "mid_block.attentions.0"):
                for spelling in spellings:
                    name = name.replace(f"{layer}.{spelling}.", f"{layer}.{names.get(part, spelling)}.")
        return name

    return rename


ATTENTION = {
    "before 0.15": attention(q="query", k="key", v="value", out="proj_attn", norm="group_norm"),
    "since 0.15": attention(q="to_q", k="to_k", v="to_v", out="to_out.0", norm="group_norm"),
    "of LDM": attention(q="q", k="k", v="v", out="proj_out", norm="norm"),
    "mixed": attention(q="query", k="to_k", v="v", out="to_out"),
}


@pytest.mark.parametrize("as_matrix", [False, True])
@pytest.mark.parametrize("spelling", ATTENTION)
def test_the_attention_of_a_vae_is_known_in_every_container(
    spelling: str, as_matrix: bool, tensors: dict[str, Tensor], folders: dict[str, Path], tmp_path: Path
) -> None:
    def varied(of: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {ATTENTION[spelling](name): tensor for name, tensor in of.items()}
        for name, tensor in found.items():
            if ("attn_1" in name or "attentions" in name) and name.endswith(".weight") and "norm" not in name:
                found[name] = tensor.flatten(1) if as_matrix else tensor.reshape(*tensor.shape[:2], 1, 1)
        return found

    file = tmp_path / "varied.safetensors"
    for content in (
        tensors,
        {VAE + name: each for name, each in of_network(tensors, VAE).items()},
        of_network(tensors, VAE),
    ):
        save_file(varied(content), file)
        assert_same(file, VAE, of_network(tensors, VAE), tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text((folders[VAE] / "config.json").read_text())
    for content in (load_file(folders[VAE] / "diffusion_pytorch_model.safetensors"),):
        save_file(varied(content), folder / "diffusion_pytorch_model.safetensors")
        assert_same(folder, VAE, folders[VAE], tmp_path)


OUTER = ("module.", "_orig_mod.", "model.", "module.model.", "state_dict.", "net._orig_mod.")


@pytest.mark.parametrize(
    ("prefix", "outer"), [*((VAE, outer) for outer in OUTER), (UNET, "model."), (UNET, OUTER[-1]), (OPENAI, OUTER[3])]
)
def test_a_prefix_of_all_names_is_known_in_every_container(
    prefix: str, outer: str, tensors: dict[str, Tensor], folders: dict[str, Path], tmp_path: Path
) -> None:
    own, file = of_network(tensors, prefix), tmp_path / "varied.safetensors"
    whole = {prefix + name: tensor for name, tensor in own.items()}
    for content in (own, whole):
        save_file({outer + name: tensor for name, tensor in content.items()}, file)
        assert_same(file, prefix, own, tmp_path)
    weights = next(folders[prefix].glob("*.safetensors"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text((folders[prefix] / "config.json").read_text())
    save_file({outer + name: tensor for name, tensor in load_file(weights).items()}, folder / weights.name)
    assert_same(folder, prefix, folders[prefix], tmp_path)


def test_a_prefix_of_all_names_of_a_model_is_known(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "plain.safetensors")
    expected = read(tmp_path / "plain.safetensors")
    for outer in ("module.", "model.model."):
        save_file({outer + name: tensor for name, tensor in tensors.items()}, tmp_path / "varied.safetensors")
        found = read(tmp_path / "varied.safetensors")
        assert found.config() == expected.config()
        assert not found.unused


@pytest.mark.parametrize(
    "aliases",
    [
        {UNET: "diffusion_model."},
        {UNET: "unet."},
        {VAE: "vae."},
        {OPENAI: "text_encoder."},
        {OPENAI: "text_encoders.clip_l.transformer."},
        {UNET: "unet.", VAE: "vae.", OPENAI: "text_encoder."},
        {UNET: "model.unet.", VAE: "model.vae.", OPENAI: "model.text_encoder."},
    ],
)
def test_networks_of_a_model_are_known_by_the_prefixes_of_other_programs(
    aliases: dict[str, str], tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    def varied(name: str) -> str:
        prefix = next((each for each in aliases if name.startswith(each)), "")
        return aliases.get(prefix, "") + name.removeprefix(prefix)

    save_file(tensors, tmp_path / "plain.safetensors")
    save_file({varied(name): tensor for name, tensor in tensors.items()}, tmp_path / "varied.safetensors")
    expected, found = (read(tmp_path / f"{name}.safetensors") for name in ("plain", "varied"))
    assert found.config() == expected.config()
    assert not found.unused
    for prefix in (VAE, UNET, OPENAI):
        assert_same(tmp_path / "varied.safetensors", prefix, of_network(tensors, prefix), tmp_path)


DIFFUSERS = {
    "first_stage": "vae",
    "denoiser": "unet",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_2",
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, dict[str, Tensor]]]]:
    """A diffusers folder of each family, and the tensors of its networks by component."""

    @functools.cache
    def made(kind: str) -> tuple[Path, dict[str, dict[str, Tensor]]]:
        folder = save(model_of(kind), tmp_path_factory.mktemp("pipeline"), "diffusers")
        found = {name: [*(folder / each).glob("*.safetensors")] for name, each in DIFFUSERS.items()}
        return folder, {name: load_file(files[0]) for name, files in found.items() if files}

    return made


def assert_same_parts(actual: Checkpoint, expected: Checkpoint) -> None:
    assert actual.parts
    for name, part in actual.parts.items():
        theirs = expected.parts[name].weights
        assert part.weights.keys() == theirs.keys(), name
        assert all(torch.equal(part.weights[key], theirs[key]) for key in theirs), name


@pytest.mark.parametrize("component", DIFFUSERS)
@pytest.mark.parametrize("wrapper", ["", "state_dict.model."])
def test_a_single_network_with_names_of_diffusers_is_read(
    component: str, wrapper: str, pipelines: Any, tmp_path: Path
) -> None:
    folder, tensors = pipelines("SDXL")
    own = tensors[component]
    for prefix in ("", f"{DIFFUSERS[component]}."):
        if component == "text_encoder_2" and not prefix:
            continue  # without its prefix it is the only text encoder
        save_file({wrapper + prefix + name: each for name, each in own.items()}, tmp_path / "a.safetensors")
        found = read(tmp_path / "a.safetensors")
        assert [*found.parts] == [component]
        assert not found.unused
        assert_same_parts(found, read(folder))
        if component == "denoiser":
            assert found.kind == "SDXL"
            assert found.parts["denoiser"].config == model_of("SDXL").config.denoiser


@pytest.mark.parametrize(
    ("kind", "comfy", "wrapper"),
    [("SD 1", False, ""), ("SD 1", True, "model."), ("SDXL", False, "module.")],
)
def test_a_model_in_one_file_with_names_of_diffusers_is_the_model_of_the_folder(
    kind: str, comfy: bool, wrapper: str, pipelines: Any, tmp_path: Path
) -> None:
    folder, tensors = pipelines(kind)
    names = dict(DIFFUSERS)
    if comfy:
        names |= {
            "text_encoder": "text_encoders.clip_l.transformer",
            "text_encoder_2": "text_encoders.clip_g.transformer",
        }
    whole = {f"{names[part]}.{name}": each for part, own in tensors.items() for name, each in own.items()}
    save_file({wrapper + name: each for name, each in whole.items()}, tmp_path / "a.safetensors")
    found, expected = read(tmp_path / "a.safetensors"), read(folder)
    assert found.kind == kind
    assert not found.unused
    assert_same_parts(found, expected)
    assert found.config().conditioner == expected.config().conditioner
    assert found.config().denoiser == model_of(kind).config.denoiser
    assert found.tokenizer is not None
    assert torch.equal(found.tokenizer("a red apple"), expected.tokenizer("a red apple"))


def test_a_pickle_of_several_state_dicts_is_one_model(pipelines: Any, tmp_path: Path) -> None:
    folder, tensors = pipelines("SD 1")
    content = {DIFFUSERS[part]: own for part, own in tensors.items()}
    for whole in (
        content,
        {"model": content, "step": 3},
        content | {"optimizer": {"state": {0: {"m": torch.ones(1)}}}},
    ):
        torch.save(whole, tmp_path / "a.pt")
        found = read(tmp_path / "a.pt")
        assert_same_parts(found, read(folder))
        assert found.parts.keys() == {*DIFFUSERS} - {"text_encoder_2"}


def test_the_text_encoder_of_sd_2_is_known_by_its_width(tmp_path: Path) -> None:
    """diffusers leaves out the last block, of which only the input is used."""
    tower = TextTowerConfig(8, 77, width=1024, layers=1, heads=16, mlp_ratio=1 / 64)
    with torch.device("meta"):
        state = tower.build().state_dict()
    table = OpenAITextSingleFile().key_table(tower, state, {})
    tensors = {f"text_encoder.{table[name].name}": torch.zeros(each.shape) for name, each in state.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    found = read(tmp_path / "a.safetensors")
    assert found.kind == "SD 2"
    assert found.parts["text_encoder"].config == replace(tower, activation="gelu")
    assert family_of(["cond_stage_model.transformer.x"], replace(tower, layers=24)) == SD_2


@pytest.mark.parametrize(
    ("component", "prefix"),
    [("vae", ""), ("vae", VAE), ("unet", UNET), ("unet", "module."), ("text_encoder", "model.")],
)
def test_names_of_ldm_files_are_known_in_a_folder(
    component: str, prefix: str, tensors: dict[str, Tensor], pipelines: Any, tmp_path: Path
) -> None:
    """Also OpenCLIP's, in the folder of a text encoder."""
    folder, own = pipelines("SD 2" if component == "text_encoder" else "SD 1")[0], tensors
    if component == "text_encoder":
        own = load_file(save(model_of("SD 2"), tmp_path / "model.safetensors", "ldm"))
    full = {"vae": VAE, "unet": UNET, "text_encoder": "cond_stage_model.model."}[component]
    shutil.copytree(folder / component, tmp_path / component)
    weights = next((tmp_path / component).glob("*.safetensors"))
    # the last block of the text encoder is not in the folder
    own = {name: each for name, each in of_network(own, full).items() if "resblocks.1." not in name}
    save_file({prefix + name: each for name, each in own.items()}, weights)
    assert_same_parts(read(tmp_path / component), read(folder / component))


def test_a_name_that_occurs_twice_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    twice = {VAE + name: tensor for name, tensor in of_network(tensors, VAE).items()}
    query = f"{VAE}encoder.mid.attn_1.to_q.weight"
    save_file(twice | {query: torch.zeros(64, 64)}, tmp_path / "twice.safetensors")
    with pytest.raises(CheckpointError, match=r"encoder\.mid\.attn_1\.q\.weight occur twice"):
        read(tmp_path / "twice.safetensors")
    save_file({"a": torch.zeros(1), "module.a": torch.ones(1)}, tmp_path / "twice.safetensors")
    with pytest.raises(CheckpointError, match=r"twice\.safetensors holds a twice, once as module\.a"):
        read(tmp_path / "twice.safetensors")


IGNORED = ("model_ema.decay", "model_ema.num_updates", "decay", "num_updates", "embeddings.position_ids")


@pytest.mark.parametrize("place", ["", "model.", VAE, UNET])
def test_counters_and_buffers_are_known_under_any_prefix(
    place: str, tensors: dict[str, Tensor], folders: dict[str, Path], tmp_path: Path
) -> None:
    extra = {place + name: torch.tensor([5]) for name in IGNORED}
    file = tmp_path / "varied.safetensors"
    for prefix in (VAE, UNET):
        own = of_network(tensors, prefix)
        for content in (own, {prefix + name: tensor for name, tensor in own.items()}):
            save_file(content | extra, file)
            assert_same(file, prefix, own, tmp_path)
        weights = folders[prefix] / "diffusion_pytorch_model.safetensors"
        folder = tmp_path / prefix
        folder.mkdir()
        (folder / "config.json").write_text((folders[prefix] / "config.json").read_text())
        save_file(load_file(weights) | extra, folder / weights.name)
        assert_same(folder, prefix, folders[prefix], tmp_path)


def averages_of(tensors: Mapping[str, Tensor], prefix: str, dots: bool) -> dict[str, Tensor]:
    """EMA weights of a network, as LitEma names them within the model, or with the dots that others keep."""
    within = prefix.removeprefix("model.")
    names = {name: within + name for name in of_network(tensors, prefix)}
    own = of_network(tensors, prefix)
    return {"model_ema." + (each if dots else each.replace(".", "")): own[name] + 1 for name, each in names.items()}


@pytest.mark.parametrize("dots", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_file_of_averaged_weights_alone_is_read(
    whole: bool, dots: bool, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    averages = averages_of(tensors, UNET, dots) | {"model_ema.decay": torch.tensor(0.9)}
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(UNET)} if whole else {}
    file, expected = tmp_path / "ema.safetensors", {n: t + 1 for n, t in of_network(tensors, UNET).items()}
    save_file(others | averages, file)
    assert_same(file, UNET, expected, tmp_path)
    assert torch.equal(
        read(file, ema=False).parts["denoiser"].state["conv_in.weight"], expected["input_blocks.0.0.weight"]
    )
    assert any("EMA weights" in note for note in read(file).notes)


@pytest.mark.parametrize("place", ["", VAE])
@pytest.mark.parametrize("alone", [False, True])
def test_averages_of_a_vae_are_read(place: str, alone: bool, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    own, file = of_network(tensors, VAE), tmp_path / "vae.safetensors"
    averages = {f"{place}model_ema.{name.replace('.', '')}": tensor + 1 for name, tensor in own.items()}
    plain = {} if alone else {place + name: tensor for name, tensor in own.items()}
    save_file(plain | averages | {f"{place}model_ema.num_updates": torch.tensor(3)}, file)
    assert_same(file, VAE, {name: tensor + 1 for name, tensor in own.items()}, tmp_path)


UNETS = [
    UNetConfig(
        levels=(LevelSpec(32, 2, 1), LevelSpec(32, 2, 11), LevelSpec(32, 2, 0)),
        context_width=8,
        middle_depth=1,
        head_width=8,
    ),
    UNetConfig(
        levels=tuple(LevelSpec(32, 3, 1) for _ in range(4)), context_width=8, vector_width=8, middle_depth=0, heads=4
    ),
]
VAES = [
    AutoencoderKLConfig(widths=(32,) * 12, blocks=2),
    AutoencoderKLConfig(widths=(32, 32), blocks=12, quant_conv=False),
]


@pytest.mark.parametrize(
    ("config", "form"),
    [(each, UNetSingleFile()) for each in UNETS] + [(each, AutoencoderSingleFile()) for each in VAES],
)
def test_dots_of_names_are_restored(config: Any, form: Any) -> None:
    with torch.device("meta"):
        names = config.build().state_dict()
    names = [name for name in names if not name.startswith("latent_")]
    theirs = {mapping.name for mapping in form.key_table(config, names, {}).values()}
    assert len(theirs) == len(names)
    for name in theirs:
        assert form.canonical_name(name.replace(".", "")) == name
        assert form.canonical_name(name) == name


@pytest.mark.parametrize(
    "nest",
    [
        ("state_dict",),
        ("state_dict", "state_dict"),
        ("module",),
        ("ema",),
        ("module", "state_dict"),
        ("model",),
        ("model", "state_dict"),
        ("params_ema",),
        ("weights",),
        ("net",),
    ],
)
def test_nested_state_dicts_are_read(nest: tuple[str, ...], tmp_path: Path) -> None:
    content: Any = {"a": torch.ones(2), "module.b": torch.zeros(2)}
    for key in reversed(nest):
        content = {key: content, "epoch": 3, "loss": torch.ones(1), "optimizer": {"state": {}, "param_groups": []}}
    torch.save(content, tmp_path / "model.pt")
    assert read_tensors(tmp_path / "model.pt").keys() == {"a", "b"}


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("keys", [("model", "ema"), ("state_dict", "ema_state_dict"), ("params", "params_ema")])
def test_averages_beside_weights_are_used_unless_they_are_declined(
    keys: tuple[str, str], ema: bool, tmp_path: Path
) -> None:
    plain, averaged = keys
    torch.save(
        {plain: {"a": torch.zeros(1)}, averaged: {"a": torch.ones(1)}, "model_config": {}}, tmp_path / "model.pt"
    )
    assert read_file(tmp_path / "model.pt", ema)[0]["a"].item() == ema
    torch.save({plain: {"a": torch.zeros(1)}, averaged: {"decay": 0.9, "shadow": []}}, tmp_path / "model.pt")
    assert read_file(tmp_path / "model.pt", ema)[0]["a"].item() == 0


@pytest.mark.parametrize(
    "name", ["scaled_fp8", "w.scale_weight", "w.weight.quant_state.bitsandbytes__nf4", "w.qweight", "w.comfy_quant"]
)
def test_quantized_weights_are_named(name: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors holds quantized weights \(.*\), which ldm does not read"
    ):
        read(tmp_path / "model.safetensors")
