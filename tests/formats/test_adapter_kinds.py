"""Kinds of adapters in files: against PEFT's own modules, and against their formulas in LyCORIS's naming."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.errors import CheckpointError, SamplingError
from ldm.formats.lora import layer_names, read_lora, write_lora
from ldm.formats.peft import scaling_of
from ldm.pipeline import Pipeline
from tests.formats import world
from tests.tiny import tiny_model

LINEAR, CONVOLUTION = (
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
    "lora_unet_down_blocks_0_resnets_0_conv1",
)
PATHS = {
    LINEAR: "denoiser.down.0.transformer.blocks.0.attn2.to_k",
    CONVOLUTION: "denoiser.down.0.residual.conv1",
}


def lora_config(**changes: Any) -> Any:
    return peft.LoraConfig(r=3, lora_alpha=2, init_lora_weights=False, **changes)


TARGETS = [
    r"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "attn2.to_out.0",
    "resnets.0.conv1",
    "conv_in",
]
PEFT: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: lora_config(target_modules=["to_q", "to_k", "conv1", "proj_in"]),
    "LoRA, patterns": lambda: lora_config(
        target_modules=["to_q", "to_k", "to_v", "conv1"],
        rank_pattern={r"attn1\.to_[qk]": 2, "to_q": 4, r"^down_blocks.*conv1": 1},
        alpha_pattern={"attn1.to_q": 8, "to_q": 1, r"up_blocks\.\d.*to_k": 0.5, "to_.": 5},
    ),
    "LoRA, rank-stabilized": lambda: lora_config(target_modules=["to_q", "conv1"], use_rslora=True),
    "DoRA": lambda: lora_config(target_modules=["to_q", "conv1", "proj_in"], use_dora=True),
    "LoRA with biases": lambda: lora_config(target_modules=["conv1", "to_out.0", "proj_in"], lora_bias=True),
    "LoHa": lambda: peft.LoHaConfig(
        r=3, alpha=2, init_weights=False, target_modules=["to_q", "conv1"], alpha_pattern={r"attn1\.to_q": 7}
    ),
    "LoHa, Tucker": lambda: peft.LoHaConfig(
        r=2, alpha=1, init_weights=False, target_modules=["conv1", "conv_shortcut"], use_effective_conv2d=True
    ),
    "LoKr": lambda: peft.LoKrConfig(r=2, alpha=3, init_weights=False, target_modules=["to_q", "conv1"]),
    "LoKr, both factors low-rank": lambda: peft.LoKrConfig(
        r=2, alpha=3, init_weights=False, target_modules=["to_q", "conv2"], decompose_both=True
    ),
    "LoKr, full": lambda: peft.LoKrConfig(
        r=64, alpha=3, init_weights=False, target_modules=["to_q", "conv1"], rank_pattern={"to_q": 128}
    ),
    "LoKr, Tucker": lambda: peft.LoKrConfig(
        r=2, alpha=3, init_weights=False, target_modules=["conv1"], use_effective_conv2d=True
    ),
}


@pytest.fixture(scope="module")
def unet_and_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    peer, folder = world.pipeline("sd1"), tmp_path_factory.mktemp("sd1")
    peer.save_pretrained(folder)
    return peer.unet, folder


@pytest.mark.parametrize("kind", PEFT)
def test_adapters_of_peft_change_weights_as_peft_does(unet_and_folder: Any, tmp_path: Path, kind: str) -> None:
    """Live and merged; from the folder that PEFT writes, and removed again bit for bit."""
    unet, folder = unet_and_folder
    model = peft.get_peft_model(copy.deepcopy(unet), PEFT[kind]())
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    # read again, as PEFT sorts the patterns when it writes them, and the first that matches counts
    expected = peft.PeftModel.from_pretrained(copy.deepcopy(unet), tmp_path / "adapter").merge_and_unload()
    pipe = Pipeline.from_pretrained(folder, "cpu", torch.float32)
    before = copy.deepcopy(pipe.model.state_dict())
    assert pipe.load_lora(tmp_path / "adapter", merge=True) == "adapter"
    names, changed = layer_names(pipe.model), pipe.model.adapters.loaded["adapter"].layers
    assert changed
    for theirs, layer in expected.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            weight = pipe.model.get_submodule(names[f"unet.{theirs}"]).get_parameter("weight")
            torch.testing.assert_close(weight, layer.weight.view_as(weight), atol=1e-5, rtol=1e-4)
            differs = not torch.equal(layer.weight, unet.get_submodule(theirs).weight)
            assert differs == (names[f"unet.{theirs}"] in changed)
    merged = denoised(pipe)
    pipe.unload_lora()
    plain = denoised(pipe)
    pipe.load_lora(tmp_path / "adapter")
    torch.testing.assert_close(denoised(pipe), merged, atol=1e-4, rtol=1e-4)
    assert (merged - plain).abs().max() > 0.01
    pipe.unload_lora()
    assert torch.equal(denoised(pipe), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.model.state_dict().items())


@torch.inference_mode()
def denoised(pipe: Pipeline) -> Tensor:
    cond = pipe.model.conditioner({"text": ["a red apple"]})
    return pipe.model.denoise(torch.linspace(-2, 2, 256).view(1, 4, 8, 8), torch.tensor([1.0]), cond)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("layout", ["folder", "file", "folder of components"])
def test_adapters_of_peft_are_read_for_each_component(
    unet_and_folder: Any, tmp_path: Path, component: str, layout: str
) -> None:
    pipe = Pipeline.from_pretrained(unet_and_folder[1], "cpu", torch.float32)
    peer = diffusers.StableDiffusionPipeline.from_pretrained(unet_and_folder[1], safety_checker=None)
    model = peft.get_peft_model(getattr(peer, component), lora_config(target_modules=["to_q", "q_proj"]))
    model.save_pretrained(tmp_path / component)
    source = {"folder": component, "file": f"{component}/adapter_model.safetensors", "folder of components": ""}[layout]
    adapter = read_lora(tmp_path / source, pipe.model)
    prefix = pipe.model.components[component if component != "unet" else "denoiser"].prefix
    assert adapter.layers
    assert all(layer.startswith(prefix) for layer in adapter.layers)
    assert {layer.factor for layer in adapter.layers.values()} == {2 / 3}


LAYERS = [
    f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn{j}.to_{k}" for i in (0, 1) for j in (1, 2) for k in "qk"
]
PATTERNS = st.sampled_from(
    [
        "to_q",
        "attn1.to_q",
        r"attn1\.to_[qk]",
        "1.to_q",
        ".*to_k",
        r"down_blocks\.1.*",
        "attn.",
        LAYERS[0],
        "_q",
        "to_q|to_k",
    ]
)


@given(st.lists(st.tuples(PATTERNS, st.integers(1, 9)), max_size=4), st.sampled_from(LAYERS))
def test_patterns_of_alphas_match_as_in_peft(patterns: list[tuple[str, int]], layer: str) -> None:
    """In their order: the first one that matches counts."""
    chosen = dict(patterns)
    config = {"unet.lora_alpha": 11, "unet.r": 4, "unet.alpha_pattern": chosen}
    actual = scaling_of(config, f"unet.{layer}", None, Path("a.safetensors"))
    assert actual.for_rank(4) == chosen.get(get_pattern_key(list(chosen), layer), 11)


def test_a_pattern_that_is_no_regular_expression_is_refused(tmp_path: Path) -> None:
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    config = json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": {"to_(": 2}})
    tensors = {f"{key}.lora_A.weight": torch.ones(2, 16), f"{key}.lora_B.weight": torch.ones(16, 2)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": config})
    with pytest.raises(CheckpointError, match=r"a\.safetensors has the pattern 'to_\(' .* not a regular expression"):
        read_lora(tmp_path / "a.safetensors", tiny_model())


def normalized(v: Tensor, magnitude: Tensor, dims: tuple[int, ...]) -> Tensor:
    return magnitude * v / v.square().sum(dims, keepdim=True).sqrt()


def lycoris(kind: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer in a file of LyCORIS, and the weight that they make of ``weight``."""
    out, inputs, kernel = weight.shape[0], weight.shape[1], weight.shape[2:]
    fan_in, r, alpha, rand = weight[0].numel(), 3, torch.tensor(2.0), torch.randn
    a, b, c, d = rand(out, r), rand(r, fan_in), rand(out, r), rand(r, fan_in)
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": alpha}
    if kind == "LoHa":
        return loha, weight + 2 / 3 * ((a @ b) * (c @ d)).view_as(weight)
    if kind == "LoHa, Tucker":
        t1, t2, b, d = rand(r, r, *kernel), rand(r, r, *kernel), rand(r, inputs), rand(r, inputs)
        pairs = [(i, j) for i in range(r) for j in range(r)]
        first, second = (
            sum(p[:, i, None, None, None] * q[None, j, :, None, None] * t[i, j] for i, j in pairs)
            for t, p, q in ((t1, a, b), (t2, c, d))
        )
        tensors = {"hada_t1": t1, "hada_w1_a": a.T, "hada_w1_b": b, "hada_t2": t2, "hada_w2_a": c.T, "hada_w2_b": d}
        return tensors | {"alpha": alpha}, weight + 2 / 3 * first * second
    if kind.startswith("LoKr"):
        w1, w2 = rand(4, 2), rand(out // 4, inputs // 2, *kernel)
        if kind == "LoKr":  # both factors are complete: alpha is ignored
            return {"lokr_w1": w1, "lokr_w2": w2, "alpha": alpha}, weight + torch.kron(
                w1.view(4, 2, *[1 for _ in kernel]), w2
            )
        p, q = rand(out // 4, r), rand(r, w2[0].numel())
        w2 = (p @ q).view_as(w2)
        tensors = {"lokr_w1": w1, "lokr_w2_a": p, "lokr_w2_b": q, "alpha": alpha}
        return tensors, weight + 2 / 3 * torch.kron(w1.view(4, 2, *[1 for _ in kernel]), w2)
    if kind == "difference":
        return {"diff": (difference := rand(weight.shape))}, weight + difference
    lora = {"lora_down.weight": b.view(r, *weight.shape[1:]), "lora_up.weight": a, "alpha": alpha}
    v, last = weight + 2 / 3 * (a @ b).view_as(weight), tuple(range(1, weight.ndim))
    if kind == "LoRA":
        return lora, v
    if kind == "DoRA of outputs":
        magnitude = 1 + torch.rand(out, *[1 for _ in last])
        return lora | {"dora_scale": magnitude}, normalized(v, magnitude, last)
    if kind == "DoRA of inputs":
        magnitude = 1 + torch.rand(1, inputs, *[1 for _ in kernel])
        return lora | {"dora_scale": magnitude}, normalized(v, magnitude, (0, *last[1:]))
    assert kind == "DoRA of LoHa"
    magnitude = 1 + torch.rand(out, *[1 for _ in last])
    return loha | {"dora_scale": magnitude}, normalized(
        weight + 2 / 3 * ((a @ b) * (c @ d)).view_as(weight), magnitude, last
    )


KINDS = ["LoRA", "LoHa", "LoKr", "LoKr, low rank", "difference", "DoRA of outputs", "DoRA of inputs", "DoRA of LoHa"]


@pytest.mark.parametrize(
    ("kind", "layer"),
    [*((kind, layer) for kind in KINDS for layer in (LINEAR, CONVOLUTION)), ("LoHa, Tucker", CONVOLUTION)],
)
def test_adapters_of_lycoris_follow_their_formulas(tmp_path: Path, kind: str, layer: str) -> None:
    """Live, merged, at half scale, trained, removed, and written and read again."""
    model = tiny_model()
    path = PATHS[layer]
    network: Any = model.get_submodule(path)
    weight = network.weight.detach().clone()
    tensors, expected = lycoris(kind, weight)
    file = tmp_path / "a.safetensors"
    save_file({f"{layer}.{name}": tensor.contiguous() for name, tensor in tensors.items()}, file)
    pipe, x = Pipeline(model), torch.randn(2, 16, *[5 for _ in weight.shape[2:]])
    for scale in (1.0, 0.5):
        pipe.load_lora(file, scale, merge=True)
        torch.testing.assert_close(network.weight, weight + scale * (expected - weight), atol=1e-4, rtol=1e-4)
        y = network(x)
        pipe.unload_lora()
        assert torch.equal(network.weight, weight)
        pipe.load_lora(file, scale)
        torch.testing.assert_close(network(x), y, atol=1e-3, rtol=1e-4)
        pipe.unload_lora()
    pipe.load_lora(file)
    network(x).square().sum().backward()
    adapter = model.adapters.loaded["a"]
    assert all(each.grad is not None and each.grad.any() for each in adapter.parameters())
    again = read_lora(write_lora(tmp_path / "b.safetensors", adapter, model, "kohya"), model)
    assert torch.equal(again.layers[path].delta(weight), adapter.layers[path].delta(weight))
    own = load_file(tmp_path / "b.safetensors").keys() | ({f"{layer}.alpha"} if kind == "LoKr" else set())
    assert own == load_file(file).keys()
    if not kind.startswith("LoRA"):
        with pytest.raises(CheckpointError, match="diffusers's LoRA files have no name"):
            write_lora(tmp_path / "c.safetensors", adapter, model)


@pytest.mark.parametrize("kind", KINDS[:5])
def test_a_trained_scalar_multiplies_the_change(tmp_path: Path, kind: str) -> None:
    model = tiny_model()
    weight = model.get_submodule(PATHS[CONVOLUTION]).get_parameter("weight")
    tensors, expected = lycoris(kind, weight)
    tensors |= {"scalar": torch.tensor([-0.7])}
    save_file(
        {f"{CONVOLUTION}.{name}": tensor.detach().contiguous() for name, tensor in tensors.items()},
        tmp_path / "a.safetensors",
    )
    delta = read_lora(tmp_path / "a.safetensors", model).layers[PATHS[CONVOLUTION]].delta(weight)
    torch.testing.assert_close(delta, -0.7 * (expected - weight), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", [LINEAR, CONVOLUTION])
@pytest.mark.parametrize("names", ["lora_down, lora_up", "lora_A, lora_B"])
def test_the_bias_of_a_lora_is_scaled_like_its_change(tmp_path: Path, names: str, layer: str) -> None:
    """LINEAR has no bias of its own: there the LoRA acts live, and is not merged."""
    pipe = Pipeline(tiny_model())
    network: Any = pipe.model.get_submodule(PATHS[layer])
    out, *inputs = network.weight.shape
    (a, b), x = names.split(", "), torch.randn(2, 16, *[5 for _ in inputs[1:]])
    tensors = {f"{a}.weight": torch.randn(3, *inputs), f"{b}.weight": torch.randn(out, 3), "alpha": torch.tensor(2.0)}
    for end, extra in {"plain": {}, "biased": {f"{b}.bias": torch.randn(out)}}.items():
        save_file(
            {f"{layer}.{name}": each for name, each in (tensors | extra).items()}, tmp_path / f"{end}.safetensors"
        )
    outputs = []
    for file in ("plain", "biased"):
        pipe.load_lora(tmp_path / f"{file}.safetensors", 0.5)
        outputs.append(network(x))
        write_lora(tmp_path / "again.safetensors", pipe.model.adapters.loaded[file], pipe.model, "kohya")
        pipe.unload_lora()
    bias = 0.5 * 2 / 3 * extra[f"{b}.bias"]
    bias = bias if layer == LINEAR else bias[:, None, None]
    torch.testing.assert_close(outputs[1] - outputs[0], bias.expand_as(outputs[0]), atol=1e-4, rtol=1e-4)
    pipe.load_lora(tmp_path / "again.safetensors", 0.5)
    assert torch.equal(network(x), outputs[1])
    pipe.unload_lora()
    if layer == CONVOLUTION:
        pipe.load_lora(tmp_path / "biased.safetensors", 0.5, merge=True)
        torch.testing.assert_close(network(x), outputs[1], atol=1e-4, rtol=1e-4)
    else:
        with pytest.raises(SamplingError, match=r"adds a bias to denoiser\..*, which has none to merge it into"):
            pipe.load_lora(tmp_path / "biased.safetensors", merge=True)
        assert not pipe.model.adapters.loaded


@pytest.mark.parametrize("merge", [False, True], ids=["live", "merged"])
def test_differences_of_biases_and_norms_are_added(tmp_path: Path, merge: bool) -> None:
    model = tiny_model()
    places: dict[str, tuple[str, tuple[str, str]]] = {
        "lora_unet_down_blocks_0_resnets_0_norm1": ("denoiser.down.0.residual.norm1", ("w_norm", "b_norm")),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1": (
            "denoiser.down.0.transformer.blocks.0.norm1", ("w_norm", "b_norm"),
        ),
        "lora_unet_down_blocks_0_resnets_0_conv2": ("denoiser.down.0.residual.conv2", ("diff", "diff_b")),
    }  # fmt: skip
    tensors, expected = dict[str, Tensor](), copy.deepcopy(model)
    for key, (path, ends) in places.items():
        for end, name in zip(ends, ("weight", "bias"), strict=True):
            parameter = expected.get_submodule(path).get_parameter(name)
            tensors[f"{key}.{end}"] = torch.randn(parameter.shape)
            parameter.data += 0.5 * tensors[f"{key}.{end}"]
    save_file(tensors, tmp_path / "a.safetensors")
    pipe, plain = Pipeline(model), denoised(Pipeline(copy.deepcopy(model)))
    before = copy.deepcopy(model.state_dict())
    pipe.load_lora(tmp_path / "a.safetensors", 0.5, merge=merge)
    torch.testing.assert_close(denoised(pipe), denoised(Pipeline(expected)), atol=1e-4, rtol=1e-4)
    assert (denoised(pipe) - plain).abs().max() > 0.01
    pipe.unload_lora()
    assert torch.equal(denoised(pipe), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
