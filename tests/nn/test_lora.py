"""LoRAs of the tiny model: live, merged, stacked, scaled and taken away."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ldm.diffusion import Guidance
from ldm.errors import ConfigError, LdmError, SamplingError
from ldm.formats.lora import read_lora, write_lora
from ldm.model import LatentDiffusion
from ldm.nn.adapters import Adapter, AdapterLayer
from ldm.nn.conditioning import Conditioning
from ldm.nn.lora import new_lora
from ldm.pipeline import Pipeline
from tests.tiny import LORA_LAYERS, tiny_lora, tiny_model

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files for the tiny model: overlapping, but not of the same layers."""
    files, layers = [], list(LORA_LAYERS.items())
    for index, some in enumerate((layers[:4], layers[1:], layers[2:3])):
        files.append(tmp_path_factory.mktemp("loras") / f"{index}.safetensors")
        save_file(tiny_lora(index, dict(some)), files[-1])
    return files


def network(pipe: Pipeline) -> Tensor:
    """What the model says of something noisy."""
    with torch.inference_mode():
        cond = pipe.model.conditioner({"text": [PROMPT]})
        x = torch.linspace(-2, 2, 256).view(1, 4, 8, 8)
        return pipe.model.denoise(x, torch.tensor([1.0]), cond)


SCALES = st.sampled_from([-0.5, 0.0, 0.7, 1.0])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("load"), st.integers(0, 2), SCALES, st.booleans()),
        st.tuples(st.just("scale"), st.integers(0, 2), SCALES),
        st.tuples(st.just("unload"), st.integers(0, 2)),
        st.tuples(st.just("to"), st.sampled_from([torch.float32, torch.bfloat16])),
    ),
    min_size=2,
    max_size=9,
)


@given(steps=STEPS)
def test_what_was_loaded_before_leaves_no_trace(three: list[Path], steps: list[tuple[Any, ...]]) -> None:
    """Weights are bit for bit a function of the original ones and of what is merged, the outputs of what is loaded."""
    pipe, plain = Pipeline(tiny_model()), Pipeline(tiny_model())
    loaded: dict[str, tuple[float, bool]] = {}
    for what, which, *rest in steps:
        if what == "to":
            pipe.to(dtype=which)
            plain.to(dtype=which)
        elif (what == "load") == (str(which) in loaded):
            continue
        elif what == "load":
            pipe.load_lora(three[which], rest[0], merge=rest[1])
            loaded[str(which)] = (rest[0], rest[1])
        elif what == "scale":
            pipe.set_lora_scale(str(which), rest[0])
            loaded[str(which)] = (rest[0], loaded[str(which)][1])
        else:
            pipe.unload_lora(str(which))
            del loaded[str(which)]

    anew = Pipeline(copy.deepcopy(plain.model))
    for name in sorted(loaded, reverse=True):
        scale, merge = loaded[name]
        anew.load_lora(three[int(name)], scale, merge=merge)
    assert_equal_states(pipe, anew)
    tolerance = 1e-5 if pipe.dtype == torch.float32 else 0.1
    torch.testing.assert_close(network(pipe), network(anew), atol=tolerance, rtol=tolerance)
    pipe.unload_lora()
    assert_equal_states(pipe, plain)
    assert torch.equal(network(pipe), network(plain))


def assert_equal_states(pipe: Pipeline, other: Pipeline) -> None:
    """Names, dtypes and bits."""
    mine, theirs = pipe.model.state_dict(), other.model.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        mine_bits, their_bits = (each.flatten().view(torch.uint8) for each in (tensor, theirs[name]))
        assert torch.equal(mine_bits, their_bits), name


def test_live_and_merged_are_the_same_picture(three: list[Path]) -> None:
    """With perturbed guidance and in any batch; and two that stack are the sum of both."""
    live, fixed = Pipeline(tiny_model()), Pipeline(tiny_model())
    for file in three[:2]:
        live.load_lora(file, 0.5)
        fixed.load_lora(file, 0.5, merge=True)
    settings: dict[str, Any] = {"seed": [3, 4], "guidance": Guidance(2.0, perturbed=2.0), "output_type": "pt"}
    expected = fixed([PROMPT, "a blue car"], progress=False, **settings)
    actual = live(["a blue car", PROMPT], progress=False, **settings | {"seed": [4, 3]}).flip(0)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    plain = Pipeline(tiny_model())([PROMPT, "a blue car"], progress=False, **settings)
    assert (expected - plain).abs().max() > 0.01


def test_a_scale_counts_at_once(three: list[Path]) -> None:
    for merge in (False, True):
        pipe, half = Pipeline(tiny_model()), Pipeline(tiny_model())
        whole = network(pipe)
        pipe.load_lora(three[0], merge=merge)
        assert (network(pipe) - whole).abs().max() > 0.01
        half.load_lora(three[0], 0.5, merge=merge)
        pipe.set_lora_scale("0", 0.5)
        assert torch.equal(network(pipe), network(half))
        pipe.set_lora_scale("0", 0)
        torch.testing.assert_close(network(pipe), whole)


def test_in_bf16_merging_rounds_once(three: list[Path]) -> None:
    pipe = Pipeline(tiny_model()).to(dtype=torch.bfloat16)
    weight = pipe.model.get_submodule("denoiser.down.0.residual.conv1").get_parameter("weight")
    exact = weight.detach().double()
    for file in three:
        tensors = load_file(file)
        down, up = (tensors[f"lora_unet_down_blocks_0_resnets_0_conv1.lora_{each}.weight"] for each in ("down", "up"))
        exact += 0.5 * torch.einsum("or,rikl->oikl", up.double(), down.double())
        pipe.load_lora(file, merge=True)
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.double(), exact, atol=1e-6, rtol=2**-8)


def test_a_file_holds_what_is_merged_and_not_what_is_live(three: list[Path], tmp_path: Path) -> None:
    pipe = Pipeline(tiny_model()).to()
    pipe.load_lora(three[0])
    live = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "live"), dtype=torch.float32)
    assert_equal_states(live, Pipeline(tiny_model()).to())
    pipe.unload_lora()
    pipe.load_lora(three[0], merge=True)
    fixed = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "merged"), dtype=torch.float32)
    assert_equal_states(fixed, pipe)
    assert not fixed.model.adapters.loaded
    torch.testing.assert_close(network(fixed), network(pipe))


def test_pictures_say_which_loras_made_them(three: list[Path]) -> None:
    pipe = Pipeline(tiny_model())

    def settings() -> dict[str, Any]:
        said: dict[str, Any] = json.loads(
            pipe(PROMPT, seed=1, num_inference_steps=1, progress=False)[0].info["settings"]
        )
        return said

    assert "loras" not in settings()
    pipe.load_lora(three[0], 0.5, name="style")
    pipe.load_lora(three[1], merge=True)
    first, second = settings()["loras"]
    assert (first["name"], first["scale"], second["name"], second["scale"]) == ("1", 1.0, "style", 0.5)
    assert first["file"] != second["file"]
    assert Pipeline(pipe.model).model.adapters.record()["loras"] == [first, second]


def test_a_live_one_is_trained_through(three: list[Path]) -> None:
    """Gradients reach the weights beneath a LoRA that was used in inference before."""
    pipe = Pipeline(tiny_model())
    pipe.load_lora(three[0])
    pipe.to(dtype=torch.bfloat16)
    network(pipe)
    layer = pipe.model.get_submodule("denoiser.down.0.residual.conv1")
    layer(torch.randn(1, 16, 4, 4, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert layer.get_parameter("weight").grad is not None


def test_requests_that_cannot_be_met_are_told(three: list[Path], tmp_path: Path) -> None:
    pipe = Pipeline(tiny_model())
    pipe.load_lora(three[0], name="style")
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: pipe.load_lora(three[1], name="style"), "'style' is loaded; unload it"),
        (lambda: pipe.load_lora(three[1], float("nan")), "scale of a LoRA is nan"),
        (lambda: pipe.set_lora_scale("style", "much"), "scale of a LoRA is 'much'"),  # type: ignore[arg-type]
        (lambda: pipe.set_lora_scale("stile", 1), "did you mean 'style'"),
        (lambda: pipe.unload_lora("other"), "unknown LoRA 'other'"),
    ]
    for call, said in refused:
        with pytest.raises(SamplingError, match=said):
            call()
    with pytest.raises(LdmError, match="there is no file"):
        pipe.load_lora(tmp_path / "none.safetensors")
    assert list(pipe.model.adapters.loaded) == ["style"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in place", "wrapped", "wrapped first"])
def test_live_ones_act_in_a_compiled_network(three: list[Path], how: str) -> None:
    """Loaded, scaled and unloaded before and after compiling, and stacked, as in the network that is not compiled."""
    pipe, plain = Pipeline(tiny_model()), Pipeline(tiny_model())
    without = network(plain)

    def both(change: Callable[[Pipeline], object]) -> Tensor:
        for each in (pipe, plain):
            change(each)
        expected = network(plain)
        torch.testing.assert_close(network(pipe), expected, atol=1e-6, rtol=1e-5)
        return expected

    torch._dynamo.reset()
    if how != "wrapped first":
        both(lambda each: each.load_lora(three[0]))
    if how == "in place":
        pipe.model.denoiser.compile(backend="eager")
    else:
        pipe.model.denoiser = torch.compile(pipe.model.denoiser, backend="eager")
    if how == "wrapped first":
        both(lambda each: each.load_lora(three[0]))
    seen = [without, both(lambda each: None)]
    seen += [both(partial(Pipeline.set_lora_scale, name="0", scale=scale)) for scale in (0.5, -1.0, 0.7)]
    seen.append(both(lambda each: each.load_lora(three[1])))
    seen.append(both(lambda each: each.load_lora(three[2], merge=True)))
    for one, other in itertools.pairwise(seen):
        assert (one - other).abs().max() > 1e-3
    both(lambda each: each.unload_lora())
    assert torch.equal(network(pipe), without)


@pytest.mark.parametrize("wrap", [nn.DataParallel, checkpoint_wrapper, partial(torch.compile, backend="eager")])
@pytest.mark.parametrize("merge", [False, True], ids=["live", "merged"])
def test_adapters_act_in_wrapped_networks(
    three: list[Path], wrap: Callable[[nn.Module], nn.Module], merge: bool
) -> None:
    pipe, plain = Pipeline(tiny_model()), Pipeline(tiny_model())
    without = network(plain)
    plain.load_lora(three[0], 0.5, merge=merge)
    pipe.model.denoiser = wrap(pipe.model.denoiser)
    pipe.load_lora(three[0], merge=merge)
    pipe.set_lora_scale("0", 0.5)
    torch.testing.assert_close(network(pipe), network(plain), atol=1e-6, rtol=1e-5)
    pipe.unload_lora()
    assert torch.equal(network(pipe), without)


def test_a_new_one_is_trained_written_and_loaded(tmp_path: Path) -> None:
    """Only its weights change; what is learnt is in the file."""
    model = tiny_model(sampling={"num_inference_steps": 2})
    before = copy.deepcopy(model.state_dict())
    x, level, target = torch.randn(4, 4, 8, 8), torch.full((4,), 3.0), torch.randn(4, 4, 8, 8)
    cond = Conditioning(context=torch.randn(4, 5, 16))
    lora = new_lora(model, rank=4, alpha=8, generator=torch.Generator().manual_seed(0))
    plain = model.denoiser(x, level, cond)
    model.adapters.add(model, lora)
    assert torch.equal(model.denoiser(x, level, cond), plain)
    optimizer = torch.optim.Adam(model.adapters.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = (model.denoiser(x, level, cond) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad is not None for parameter in lora.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())

    file, other = write_lora(tmp_path / "mine.safetensors", lora, model), tiny_model()
    other.adapters.add(other, read_lora(file, other))
    assert torch.equal(other.denoiser(x, level, cond), model.denoiser(x, level, cond))


def test_layers_of_a_new_one_are_named_by_a_pattern() -> None:
    model = tiny_model()
    lora = new_lora(model, layers=r"denoiser\.down\..*(conv1|to_q)")
    assert set(lora.layers) == {
        "denoiser.down.0.residual.conv1",
        "denoiser.down.0.transformer.blocks.0.attn1.to_q",
        "denoiser.down.0.transformer.blocks.0.attn2.to_q",
    }
    with pytest.raises(ConfigError, match="'nothing' matches no linear layer"):
        new_lora(model, layers="nothing")


@pytest.mark.parametrize("merged", [False, True], ids=["live", "merged"])
def test_a_kind_of_adapter_is_the_change_of_a_weight(merged: bool) -> None:
    """LoHa, the product of two low-rank matrices, entry by entry, acts on any layer by its ``delta`` alone."""

    class LoHaLayer(AdapterLayer):
        def __init__(self, shape: torch.Size, r: int = 2):
            super().__init__()
            self.pairs = nn.ParameterList(
                nn.Parameter(torch.randn(*sides)) for _ in range(2) for sides in ((shape[0], r), (r, shape[1:].numel()))
            )

        def delta(self, weight: Tensor) -> Tensor:
            a, b, c, d = (each.to(weight) for each in self.pairs)
            return ((a @ b) * (c @ d)).view_as(weight)

    model = tiny_model()
    paths = ["denoiser.down.0.residual.conv1", "denoiser.down.0.transformer.blocks.0.ff.0.proj"]
    layers = [model.get_submodule(path) for path in paths]
    inputs = [torch.randn(2, 16, 5, 3), torch.randn(2, 16)]
    plain = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    loha = Adapter("loha", {path: LoHaLayer(model.get_parameter(f"{path}.weight").shape) for path in paths})
    expected = []
    for path, x in zip(paths, inputs, strict=True):
        changed = copy.deepcopy(model.get_submodule(path))
        changed.get_parameter("weight").data += 0.5 * loha.layers[path].delta(changed.get_parameter("weight"))
        expected.append(changed(x))
    loha.scale, loha.merged = 0.5, merged
    model.adapters.add(model, loha)
    for layer, x, y, without in zip(layers, inputs, expected, plain, strict=True):
        torch.testing.assert_close(layer(x), y, atol=1e-4, rtol=1e-4)
        assert (y - without).abs().max() > 0.01
    model.adapters.remove(model)
    assert all(torch.equal(layer(x), y) for layer, x, y in zip(layers, inputs, plain, strict=True))


def test_copies_and_pickles_of_a_model_have_adapters_of_their_own(three: list[Path]) -> None:
    pipe = Pipeline(tiny_model())
    pipe.load_lora(three[0])
    pipe.load_lora(three[1], merge=True)
    expected = network(pipe)
    for twin in (copy.deepcopy(pipe.model), pickle.loads(pickle.dumps(pipe.model))):
        other = Pipeline(twin)
        assert torch.equal(network(other), expected)
        other.model.load_state_dict(other.model.state_dict())
        other.set_lora_scale("0", 0.5)
        assert not torch.equal(network(other), expected)
        other.unload_lora()
        assert_equal_states(other, Pipeline(tiny_model()))
    assert torch.equal(network(pipe), expected)


@pytest.mark.parametrize("how", ["as a whole", "by network", "assigned", "in a deep copy", "in a pickle"])
def test_weights_loaded_while_loras_are_merged_stay_after_unloading(three: list[Path], how: str) -> None:
    """The LoRAs are merged into the new weights; the state of the model itself changes nothing."""
    pipe, fresh = Pipeline(tiny_model()), Pipeline(other_model())
    for each in (pipe, fresh):
        each.load_lora(three[0], merge=True)
        each.load_lora(three[1], 0.5, merge=True)
    pipe = {"in a deep copy": copy.deepcopy, "in a pickle": COPIES["pickle"]}.get(how, copy.copy)(pipe)
    before = copy.deepcopy(pipe)
    pipe.model.load_state_dict(pipe.model.state_dict())
    assert_equal_states(pipe, before)
    state = other_model().state_dict()
    if how == "by network":
        for name, child in pipe.model.named_children():
            own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            child.load_state_dict(own)
    else:
        pipe.model.load_state_dict(state, assign=how == "assigned")
    assert_equal_states(pipe, fresh)
    pipe.set_lora_scale("0", 0.3)
    fresh.set_lora_scale("0", 0.3)
    assert_equal_states(pipe, fresh)
    pipe.unload_lora()
    assert_equal_states(pipe, Pipeline(other_model()))


def other_model() -> LatentDiffusion:
    """The tiny model with other weights."""
    model, generator = tiny_model(), torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


CHANGES: dict[str, Callable[[Pipeline, list[Path]], object]] = {
    "load": lambda pipe, files: pipe.load_lora(files[1]),
    "merge": lambda pipe, files: pipe.load_lora(files[1], merge=True),
    "scale": lambda pipe, _: pipe.set_lora_scale("0", 0.5),
    "unload": lambda pipe, _: pipe.unload_lora(),
}


@pytest.mark.parametrize(("change", "steps"), [("load", 0), ("merge", 1), ("scale", 2), ("unload", 1)])
def test_loras_cannot_change_during_a_sampling(three: list[Path], change: str, steps: int) -> None:
    pipe = Pipeline(tiny_model())
    pipe.load_lora(three[0])
    settings: dict[str, Any] = {"num_inference_steps": 2, "progress": False}
    stream = pipe.stream([PROMPT] * 2, **settings)
    for _ in range(steps):
        next(stream)
    CHANGES[change](pipe, three)
    with pytest.raises(
        SamplingError, match="the LoRAs or textual inversions of the model were changed during the sampl"
    ):
        stream.result()
    stream = pipe.stream(PROMPT, **settings)
    image = stream.result()[0]
    pipe.unload_lora()
    assert stream.result()[0] is image


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda each: pickle.loads(pickle.dumps(each)),
    "copy of a pickle": lambda each: copy.deepcopy(pickle.loads(pickle.dumps(each))),
}


@pytest.mark.parametrize(
    "state",
    [
        *("new", "sampled", "with a compiled denoiser"),
        *(pytest.param(state, marks=pytest.mark.slow) for state in ("compiled in place", "wrapped")),
    ],
)
@pytest.mark.parametrize("how", COPIES)
def test_pipelines_are_copied_and_pickled(three: list[Path], how: str, state: str) -> None:
    """With their adapters, before and after sampling; a deep copy shares nothing with the original."""
    pipe = Pipeline(tiny_model())
    pipe.load_lora(three[0], 0.5)
    pipe.load_lora(three[1], merge=True)
    if state == "compiled in place":
        pipe.model.denoiser.compile(backend="eager")
    if state == "with a compiled denoiser":
        pipe.model.denoiser = torch.compile(pipe.model.denoiser, backend="eager")
    if state == "wrapped":
        pipe.model = torch.compile(pipe.model, backend="eager")
    settings: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "progress": False, "output_type": "pt"}
    expected = pipe(PROMPT, **settings)
    twin = COPIES[how](pipe if state != "new" else Pipeline(pipe.model))
    assert type(twin) is Pipeline
    assert torch.equal(twin(PROMPT, **settings), expected)
    assert (twin.model is pipe.model) == (how == "copy.copy")
    if how != "copy.copy":
        twin.unload_lora()
        assert_equal_states(twin, Pipeline(tiny_model())) if state not in (
            "with a compiled denoiser",
            "wrapped",
        ) else None
        assert list(pipe.model.adapters.loaded) == ["0", "1"]
        assert torch.equal(pipe(PROMPT, **settings), expected)


REPLACED: dict[str, Callable[[Any], object]] = {
    "forward of a network": lambda model: compile_method(model.denoiser, "forward"),
    "decode": lambda model: compile_method(model.first_stage, "decode"),
    "denoise of the model": lambda model: compile_method(model, "denoise"),
    "forward of the conditioner": lambda model: compile_method(model.conditioner, "forward"),
    "forward of each block": lambda model: [compile_method(each, "forward") for each in model.denoiser.children()],
    "forward in a wrapper": lambda model: (
        compile_method(model.denoiser, "forward"),
        setattr(model, "denoiser", nn.DataParallel(model.denoiser)),
    ),
}


def compile_method(module: nn.Module, name: str) -> None:
    setattr(module, name, torch.compile(getattr(module, name), backend="eager"))


@pytest.mark.parametrize("replaced", REPLACED)
def test_copies_use_their_own_weights_where_methods_are_compiled(three: list[Path], replaced: str) -> None:
    pipe = Pipeline(tiny_model())
    pipe.load_lora(three[0], merge=True)
    settings: dict[str, Any] = {"seed": 1, "num_inference_steps": 1, "progress": False, "output_type": "pt"}
    expected = pipe(PROMPT, **settings)
    REPLACED[replaced](pipe.model)
    twins = [COPIES[how](pipe) for how in ("copy.deepcopy", "pickle")]
    for parameter in pipe.model.parameters():
        parameter.data *= 0.5
    for twin in twins:
        torch.testing.assert_close(twin(PROMPT, **settings), expected)
        twin.model.load_state_dict(twin.model.state_dict())
        twin.unload_lora()


def test_a_lora_of_a_prompt_acts_in_networks_whose_methods_are_compiled(three: list[Path]) -> None:
    pipe, settings = (
        Pipeline(tiny_model()),
        {"seed": 1, "num_inference_steps": 2, "progress": False, "output_type": "pt"},
    )
    settings |= {"prompt_syntax": "weighted", "lora_folder": three[0].parent}
    expected = pipe(f"{PROMPT} <lora:{three[0].stem}:1>", **settings)
    model: Any = pipe.model
    model.denoise = torch.compile(model.denoise, backend="eager")
    model.denoiser.forward = torch.compile(model.denoiser.forward, backend="eager")
    plain = pipe(PROMPT, **settings)
    torch.testing.assert_close(pipe(f"{PROMPT} <lora:{three[0].stem}:1>", **settings), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(pipe(PROMPT, **settings), plain)


def test_names_of_loras_are_strings(three: list[Path]) -> None:
    pipe = Pipeline(tiny_model())
    pipe.load_lora(three[0])
    with pytest.raises(SamplingError, match="the name of a LoRA is 5; give a string"):
        pipe.load_lora(three[1], name=cast(Any, 5))
    with pytest.raises(SamplingError, match="unknown LoRA 'x'; Known: 0"):
        pipe.unload_lora("x")
    pipe.unload_lora()
    with pytest.raises(SamplingError, match="unknown LoRA 'x'; Known: none"):
        pipe.unload_lora("x")
