"""LoRA files in every naming, made from the modules of diffusers' own pipelines and merged into them by hand."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.config import from_dict
from ldm.errors import CheckpointError
from ldm.formats.lora import FILE, layer_names, read_lora, write_lora
from ldm.formats.native import WithoutInit
from ldm.model import LatentDiffusion, ModelConfig
from ldm.pipeline import Pipeline
from tests.formats import world
from tests.tiny import TOKENIZER, tiny_lora, tiny_model

PROMPT, NEGATIVE = "a red apple", "blurry"
ALPHA, SCALE = 1.0, 0.6
COMPONENTS = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}

Updates = dict[tuple[str, str], tuple[Tensor, Tensor]]
"""By component and module of diffusers: down ``[r in]`` or ``[r in k k]``, and up ``[out r]``."""


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Pipeline]]:
    """diffusers' pipeline of a kind, and ours of the folder that it wrote."""

    @functools.cache
    def both(kind: str) -> tuple[Any, Pipeline]:
        peer, folder = world.pipeline(kind), tmp_path_factory.mktemp(kind)
        peer.save_pretrained(folder)
        return peer, Pipeline.from_pretrained(folder, dtype=torch.float32, device="cpu")

    return both


def updates_of(peer: Any, wanted: str = "") -> Updates:
    """An update of every linear layer and convolution, of ranks 1 to 3."""
    updates: Updates = {}
    for component in COMPONENTS:
        network = getattr(peer, component, None)
        for name, layer in network.named_modules() if network else ():
            if isinstance(layer, nn.Linear | nn.Conv2d) and re.search(wanted, name):
                r, shape = 1 + len(updates) % 3, layer.weight.shape
                fan_in = layer.weight[0].numel()
                updates[component, name] = torch.randn(r, *shape[1:]) / fan_in**0.5, 0.3 * torch.randn(shape[0], r)
    return updates


@contextmanager
def merged(peer: Any, updates: Updates, factor: Callable[[int], float]) -> Iterator[None]:
    """The peer's weights are changed meanwhile; ``factor`` gives that of an update from its rank."""
    networks = {component: getattr(peer, component) for component in {component for component, _ in updates}}
    before = {component: copy.deepcopy(network.state_dict()) for component, network in networks.items()}
    for (component, name), (down, up) in updates.items():
        weight = networks[component].get_submodule(name).weight
        weight.data += factor(len(down)) * (up @ down.flatten(1)).reshape(weight.shape)
    yield
    for component, network in networks.items():
        network.load_state_dict(before[component])


def underscored(name: str) -> str:
    return name.replace(".", "_")


def kohya(updates: Updates, two: bool, rename: Callable[[str], str] = lambda name: name) -> dict[str, Tensor]:
    """As kohya's scripts have it: up like down, a matrix or a convolution, and an alpha for each layer."""
    prefixes = COMPONENTS | ({"text_encoder": "lora_te1"} if two else {})
    tensors = {}
    for (component, name), (down, up) in updates.items():
        name = rename(name) if component == "unet" else with_infix(name)
        key = f"{prefixes[component]}_{underscored(name)}"
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = up[:, :, None, None] if down.ndim == 4 else up
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    return tensors


def with_infix(name: str) -> str:
    """Versions of transformers differ in whether modules have it, kohya's files always do."""
    return name if name.startswith(("text_model", "text_projection")) else f"text_model.{name}"


BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
INSIDE = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_name(name: str) -> str:
    """What the layer of the world's SDXL is called in an LDM file."""
    block = next(block for block in BLOCKS if name == block or name.startswith(f"{block}."))
    rest = name.removeprefix(block)
    return BLOCKS[block] + (f".{INSIDE[rest[1:]]}" if rest[1:] in INSIDE else rest)


def diffusers(updates: Updates, ends: tuple[str, str] = ("lora_A", "lora_B")) -> dict[str, Tensor]:
    tensors = {}
    for (component, name), (down, up) in updates.items():
        tensors[f"{component}.{name}.{ends[0]}.weight"] = down
        tensors[f"{component}.{name}.{ends[1]}.weight"] = up[:, :, None, None] if down.ndim == 4 else up
    return tensors


def old(updates: Updates) -> dict[str, Tensor]:
    """The attention alone, as processors of the U-Net; no prefix, and so no text encoder."""
    tensors = {}
    for (_, name), (down, up) in updates.items():
        attention, layer = name.removesuffix(".0").rsplit(".", 1)
        tensors[f"{attention}.processor.{layer}_lora.down.weight"] = down
        tensors[f"{attention}.processor.{layer}_lora.up.weight"] = up
    return tensors


def metadata(updates: Updates) -> dict[str, str]:
    """What diffusers writes beside updates of its own: an alpha for all layers, another one for some."""
    config: dict[str, Any] = {}
    for component in {component for component, _ in updates}:
        names = [name for each, name in updates if each == component]
        config[f"{component}.r"] = 2
        config[f"{component}.lora_alpha"] = 7 * ALPHA
        config[f"{component}.alpha_pattern"] = dict.fromkeys(names, ALPHA)
    return {"format": "pt", "lora_adapter_metadata": json.dumps(config)}


def write(path: Path, tensors: Mapping[str, Tensor], meta: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, meta)
    return path


def picture_of_peer(peer: Any) -> Any:
    torch.manual_seed(5)
    latents = torch.randn(1, 4, 16, 16)
    options = {"guidance_scale": 3.0, "num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    return peer(PROMPT, negative_prompt=NEGATIVE, latents=latents, **options).images


def picture(pipe: Pipeline, **settings: Any) -> Any:
    torch.manual_seed(5)
    options: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 2, "height": 32, "width": 32}
    latents = torch.randn(1, 4, 16, 16)
    return pipe(PROMPT, NEGATIVE, latents=latents, output_type="np", progress=False, **options | settings)


ATTENTION = r"attn[12]\.to_"
NAMINGS: dict[str, Callable[[Updates], dict[str, Tensor]]] = {
    "kohya": lambda updates: kohya(updates, two=any("text_encoder_2" in key for key in updates)),
    "kohya in LDM names": lambda updates: kohya(updates, two=True, rename=ldm_name),
    "diffusers": diffusers,
    "diffusers of several": lambda updates: diffusers(updates, ("lora_A.default", "lora_B.default")),
    "diffusers 0.20": lambda updates: diffusers(updates, ("lora_linear_layer.down", "lora_linear_layer.up")),
    "diffusers 0.25": lambda updates: diffusers(updates, ("lora.down", "lora.up")),
    "diffusers, processors": old,
}


@pytest.mark.parametrize(
    ("kind", "naming"),
    [
        ("sd1", "kohya"),
        ("sd1", "diffusers"),
        ("sd1", "diffusers of several"),
        ("sd1", "diffusers 0.20"),
        ("sd1", "diffusers 0.25"),
        ("sd1", "diffusers, processors"),
        ("sd2", "kohya"),
        ("sd2", "diffusers"),
        ("sdxl", "kohya"),
        ("sdxl", "kohya in LDM names"),
        ("sdxl", "diffusers"),
    ],
)
def test_pictures_are_those_of_the_peer_with_the_update_in_its_weights(
    pipelines: Any, tmp_path: Path, kind: str, naming: str
) -> None:
    """Of every layer that a file can name, each with a rank of its own, live and merged."""
    peer, pipe = pipelines(kind)
    updates = updates_of(peer, ATTENTION if naming == "diffusers, processors" else "")
    says_alpha = naming.startswith("kohya") or naming == "diffusers"
    meta = metadata(updates) if naming == "diffusers" else None
    file = write(tmp_path / "style.safetensors", NAMINGS[naming](updates), meta)
    without = picture(pipe)
    with merged(peer, updates, lambda r: SCALE * (ALPHA / r if says_alpha else 1)):
        expected = picture_of_peer(peer)
    assert abs(expected - without).max() > 0.01
    for merge in (False, True):
        assert pipe.load_lora(file, SCALE, merge=merge) == "style"
        assert len(pipe.model.adapters.loaded["style"].layers) == len(updates)
        np.testing.assert_allclose(picture(pipe), expected, atol=1e-4)
        pipe.unload_lora("style")
        assert np.array_equal(picture(pipe), without)


SD1: dict[str, Any] = {
    "conditioner": {"kind": "text", "tower": {"width": 768, "layers": 12, "heads": 12}},
    "denoiser": {
        "levels": [
            {"width": 320, "depth": 1},
            {"width": 640, "depth": 1},
            {"width": 1280, "depth": 1},
            {"width": 1280},
        ],
        "heads": 8,
        "context_width": 768,
    },
}
SDXL: dict[str, Any] = {
    "conditioner": {
        "kind": "sdxl",
        "first": {"width": 768, "layers": 12, "heads": 12},
        "second": {"width": 1280, "layers": 32, "heads": 20, "embed_dim": 1280},
    },
    "denoiser": {
        "levels": [{"width": 320}, {"width": 640, "depth": 2}, {"width": 1280, "depth": 10}],
        "middle_depth": 10,
        "head_width": 64,
        "projection": "linear",
        "context_width": 2048,
        "vector_width": 2816,
    },
}
BLOCK = "transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("config", "counts", "known"),
    [
        (
            SD1,
            {"te": 72, "unet": 192},
            [f"unet_up_blocks_3_attentions_2_{BLOCK}", "te_text_model_encoder_layers_11_mlp_fc1"],
        ),
        (
            SDXL,
            {"te1": 72, "te2": 192, "unet": 722},
            [
                *(f"unet_input_blocks_{n}_1_{BLOCK}" for n in (4, 5, 7, 8)),
                *(f"unet_output_blocks_{n}_1_{BLOCK}" for n in range(6)),
                *(f"unet_middle_block_1_transformer_blocks_9_{end}" for end in ("attn1_to_out_0", "ff_net_0_proj")),
                *(f"unet_{name}" for name in ("label_emb_0_0", "output_blocks_5_2_conv", "time_embed_2", "out_2")),
                f"unet_down_blocks_1_attentions_0_{BLOCK}",
                "te2_text_model_encoder_layers_31_self_attn_out_proj",
            ],
        ),
    ],
    ids=["SD 1", "SDXL"],
)
def test_full_sizes_have_as_many_layers_as_kohya_counts(config: Any, counts: dict[str, int], known: list[str]) -> None:
    """The counts that its scripts print: linear layers and 1 x 1 convolutions of the transformers."""
    whole = {"first_stage": {"kind": "autoencoder_kl"}, "diffusion": {}, "size": [512, 512]}
    whole |= config | {"denoiser": {"kind": "unet"} | config["denoiser"]}
    with torch.device("meta"), WithoutInit():
        model = LatentDiffusion(from_dict(ModelConfig, whole), TOKENIZER)
    names = layer_names(model)
    wanted = r"lora_(?:te\d?)_.*(?:self_attn|mlp)|lora_(?:unet)_(?:down|mid|up)_.*attentions_"
    spelled = [name.replace("_text_model", "") for name in names if re.match(wanted, name)]
    assert Counter(name.split("_")[1] for name in dict.fromkeys(spelled)) == counts
    assert not [name for name in known if f"lora_{name}" not in names]


def test_names_of_the_text_encoder_go_with_and_without_their_infix(pipelines: Any, tmp_path: Path) -> None:
    peer, pipe = pipelines("sd1")
    updates = {(component, with_infix(name)): each for (component, name), each in updates_of(peer, "self_attn").items()}
    long = write(tmp_path / "long.safetensors", diffusers(updates))
    bare = {key.replace("text_model.", ""): tensor for key, tensor in diffusers(updates).items()}
    processors = {
        re.sub(r"(\w+)(_proj)\.lora_linear_layer", lambda found: f"to_{found[1]}_lora", key): tensor
        for key, tensor in diffusers(updates, ("lora_linear_layer.down", "lora_linear_layer.up")).items()
    }
    assert any("to_out_lora" in key for key in processors)
    model = pipe.model
    expected = read_lora(long, model)
    for tensors in (bare, processors):
        found = read_lora(write(tmp_path / "short.safetensors", tensors), model)
        assert found.layers.keys() == expected.layers.keys()
        for layer, update in expected.layers.items():
            assert torch.equal(found.layers[layer].down, update.down)


PREFIXES = [
    "",
    "unet.",
    "base_model.model.",
    "unet.base_model.model.",
    "diffusion_model.",
    "model.diffusion_model.",
    "lycoris_",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_other_programs_lead_to_the_same_layers(prefix: str, tmp_path: Path) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    given = "input_blocks.1.1.transformer_blocks.0.attn2.to_k" if "diffusion_model" in prefix else layer
    given = given.replace(".", "_") if prefix.endswith("_") else given
    save_file(
        {f"{prefix}{given}.lora_A.weight": torch.ones(2, 16), f"{prefix}{given}.lora_B.weight": torch.ones(16, 2)},
        tmp_path / "a.safetensors",
    )
    adapter = read_lora(tmp_path / "a.safetensors", tiny_model())
    assert list(adapter.layers) == ["denoiser.down.0.transformer.blocks.0.attn2.to_k"]


def test_alpha_is_r_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    model, key = tiny_model(), "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{key}.lora_A.weight": torch.randn(4, 16), f"{key}.lora_B.weight": torch.randn(16, 4)}

    def factor(more: dict[str, Tensor], **config: Any) -> float:
        said = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in config.items()})}
        lora = read_lora(write(tmp_path / "a.safetensors", tensors | more, said if config else None), model)
        return next(iter(lora.layers.values())).factor

    assert factor({}) == 1
    assert factor({f"{key}.alpha": torch.tensor(2.0)}) == 0.5
    assert factor({}, r=4, lora_alpha=8) == 2
    assert factor({}, r=4, lora_alpha=8, use_rslora=True) == 4
    assert factor({}, r=4, lora_alpha=8, alpha_pattern={"attn1.to_q": 1, "attn1.to_k": 2}) == 0.25
    assert factor({}, r=4, lora_alpha=8, alpha_pattern={"1.to_q": 1}) == 2
    assert factor({f"{key}.alpha": torch.tensor(2.0)}, r=4, lora_alpha=8) == 0.5


@pytest.mark.parametrize("merge", [False, True], ids=["live", "merged"])
def test_a_convolution_in_three_steps_is_their_product(tmp_path: Path, merge: bool) -> None:
    """LoCon's ``lora_mid``: 1 x 1 down, 3 x 3, 1 x 1 up."""
    key = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, mid, up = torch.randn(2, 16, 1, 1), torch.randn(3, 2, 3, 3), torch.randn(16, 3, 1, 1)
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}
    pipe = Pipeline(tiny_model())
    layer = pipe.model.get_submodule("denoiser.down.0.residual.conv1")
    x = torch.randn(2, 16, 7, 5)
    with torch.no_grad():
        expected = layer(x) + F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up)
        pipe.load_lora(write(tmp_path / "mid.safetensors", tensors), merge=merge)
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_a_folder_that_diffusers_wrote_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "style").mkdir()
    write(tmp_path / "style" / FILE, tiny_lora())
    assert Pipeline(tiny_model()).load_lora(tmp_path / "style") == "style"


KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
GOOD = {f"{KEY}.lora_down.weight": torch.ones(2, 16), f"{KEY}.lora_up.weight": torch.ones(16, 2)}
BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "OFT": ({f"{KEY}.oft_blocks": torch.ones(2, 2)}, rf"holds OFT \({KEY}\.oft_blocks\)"),
    "part of LoHa": ({f"{KEY}.hada_w1_a": torch.ones(16, 2)}, "but no hada_w1_b of the same layer"),
    "part of LoKr": ({f"{KEY}.lokr_w1": torch.ones(2, 2)}, "but no lokr_w2_a of the same layer"),
    "LoKr": ({f"{KEY}.lokr_w{n}": torch.ones(2, 2) for n in (1, 2)}, r"lokr_w1 has the shape \[2, 2\]"),
    "DoRA": (GOOD | {f"{KEY}.dora_scale": torch.ones(2, 2)}, r"dora_scale has the shape \[2, 2\]"),
    "DoRA alone": ({"unet.conv_in.lora_magnitude_vector": torch.ones(16)}, "but no down of the same layer"),
    "difference": ({f"{KEY}.diff": torch.ones(16, 17)}, r"diff has the shape \[16, 17\]"),
    "two kinds": (GOOD | {f"{KEY}.lokr_w1": torch.ones(4, 4)}, "holds tensors of several kinds of adapter"),
    "a model": ({"model.diffusion_model.out.2.weight": torch.ones(2)}, r"out\.2\.weight, which is not a LoRA tensor"),
    "nothing": ({}, "holds no LoRA"),
    "bias": (GOOD | {"unet.conv_in.lora_B.bias": torch.ones(2)}, r"lora_B\.bias, but no down of the same layer"),
    "bias of a wrong shape": (GOOD | {f"{KEY}.lora_up.bias": torch.ones(2)}, r"lora_up\.bias has the shape \[2\]"),
    "bias of the first product": (
        GOOD | {f"{KEY}.lora_down.bias": torch.ones(2)},
        r"lora_down\.bias, which is not a LoRA",
    ),
    "long scalar": (GOOD | {f"{KEY}.scalar": torch.ones(2)}, r"scalar holds 2 numbers; it must be a single one"),
    "no such layer": ({"lora_unet_nowhere.lora_up.weight": torch.ones(2, 2)}, "nowhere.* fits no layer of this model;"),
    "SDXL": ({"lora_te2_text_projection.alpha": torch.ones(1)}, r"\(it looks like a LoRA of SDXL\)"),
    "FLUX": ({"transformer.single_transformer_blocks.0.proj.lora_A.weight": torch.ones(1)}, "LoRA of FLUX or SD 3"),
    "SD 2": (GOOD | {f"{KEY}.lora_down.weight": torch.ones(2, 1024)}, r"\[2, 1024\], .* of SD 2\)"),
    "down": (GOOD | {f"{KEY}.lora_down.weight": torch.ones(2, 17)}, r"lora_down\.weight has the shape \[2, 17\]"),
    "up": (GOOD | {f"{KEY}.lora_up.weight": torch.ones(16, 3)}, r"lora_up\.weight has the shape \[16, 3\]"),
    "rank 0": (GOOD | {f"{KEY}.lora_down.weight": torch.ones(0, 16)}, r"has the shape \[0, 16\]"),
    "scalar": (GOOD | {f"{KEY}.lora_down.weight": torch.tensor(1.0)}, r"has the shape \[\]"),
    "mid": (GOOD | {f"{KEY}.lora_mid.weight": torch.ones(3, 3, 3, 3)}, r"lora_mid\.weight has the shape"),
    "mid of a scalar": (
        {f"{KEY}.lora_{each}.weight": torch.tensor(1.0) for each in ("down", "mid", "up")},
        r"lora_mid\.weight has the shape \[\]",
    ),
    "integers": (GOOD | {f"{KEY}.lora_up.weight": torch.ones(16, 2, dtype=torch.int32)}, "holds torch.int32"),
    "no up": ({f"{KEY}.lora_down.weight": torch.ones(2, 16)}, "lora_down.weight, but no up of the same layer"),
    "alpha alone": ({f"{KEY}.alpha": torch.ones(1)}, "alpha, but no down of the same layer"),
    "long alpha": (GOOD | {f"{KEY}.alpha": torch.ones(3)}, "alpha holds 3 numbers"),
    "twice": (GOOD | {f"{KEY}.lora_A.weight": torch.ones(2, 16)}, "holds both .* of one layer"),
    "NaN": (GOOD | {f"{KEY}.lora_up.weight": torch.full((16, 2), torch.nan)}, "NaN or infinite"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_lora_for_the_model_is_told_in_a_sentence(case: str, tmp_path: Path) -> None:
    tensors, said = BAD[case]
    file, pipe = write(tmp_path / "bad.safetensors", tensors), Pipeline(tiny_model())
    with pytest.raises(CheckpointError, match=said) as caught:
        pipe.load_lora(file, merge=True)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not pipe.model.adapters.loaded
    assert not pipe.model.adapters.originals


@pytest.mark.parametrize(
    "said",
    ["[", "[]", '{"unet.lora_alpha": "much"}', '{"unet.lora_alpha": NaN}', '{"unet.alpha_pattern": {"to_k": []}}'],
)
def test_metadata_that_say_nothing_are_told(said: str, tmp_path: Path) -> None:
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 16), f"{key}.lora_B.weight": torch.ones(16, 2)}
    file = write(tmp_path / "bad.safetensors", tensors, {"lora_adapter_metadata": said})
    with pytest.raises(CheckpointError, match=r"bad\.safetensors.*download (it|the file) again"):
        read_lora(file, tiny_model())


def test_a_lora_of_sdxl_is_told_from_one_of_sd1(pipelines: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "xl.safetensors", kohya(updates_of(pipelines("sdxl")[0]), two=True, rename=ldm_name))
    with pytest.raises(CheckpointError, match=r"it looks like a LoRA of SDXL\); use one"):
        pipelines("sd1")[1].load_lora(file)


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_written_loras_are_read_again(pipelines: Any, tmp_path: Path, kind: str, naming: str) -> None:
    """Bit for bit by us; under the same names, and with the same alphas, by diffusers' own reader."""
    peer, pipe = pipelines(kind)
    model, updates = pipe.model, updates_of(peer)
    expected = read_lora(write(tmp_path / "a.safetensors", kohya(updates, two=kind == "sdxl")), model)
    for number, layer in enumerate(expected.layers.values()):
        layer.alpha = 1.0 + number % 3
    file = write_lora(tmp_path / "b.safetensors", expected, model, naming)
    actual = read_lora(file, model)
    assert actual.layers.keys() == expected.layers.keys()
    for path, layer in expected.layers.items():
        assert actual.layers[path].alpha == layer.alpha
        assert torch.equal(actual.layers[path].down, layer.down)
        assert torch.equal(actual.layers[path].up, layer.up)
    if naming == "kohya":
        assert load_file(file).keys() == load_file(tmp_path / "a.safetensors").keys()
        return
    state, _, metadata = type(peer).lora_state_dict(file, return_lora_metadata=True)
    assert {key: tensor.shape for key, tensor in state.items()} == {
        re.sub(r"^(text_encoder(_2)?)\.(?!text_)", r"\1.text_model.", key): tensor.shape
        for key, tensor in diffusers(updates).items()
    }
    names = layer_names(model)
    for component in {component for component, _ in updates}:
        config = {key.removeprefix(f"{component}."): value for key, value in metadata.items()}
        for name in config["target_modules"]:
            layer = expected.layers[names[f"{component}.{name}"]]
            assert config["alpha_pattern"].get(name, config["lora_alpha"]) == layer.alpha
            assert config["rank_pattern"].get(name, config["r"]) == len(layer.down)


def test_layers_without_a_name_in_the_file_are_not_written(tmp_path: Path) -> None:
    model = tiny_model()
    lora = read_lora(write(tmp_path / "a.safetensors", tiny_lora()), model)
    lora.layers["conditioner.nowhere"] = next(iter(lora.layers.values()))
    for adapter, naming, message in (
        (lora, "kohya", "no name for conditioner.nowhere"),
        (lora, "peft", "unknown naming"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write_lora(tmp_path / "b.safetensors", adapter, model, naming)
    assert not (tmp_path / "b.safetensors").exists()
