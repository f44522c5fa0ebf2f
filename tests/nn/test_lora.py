"""LoRAs of the tiny model: live, merged, stacked, scaled and taken away."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ldm.diffusion import Guidance
from ldm.errors import LdmError, SamplingError
from ldm.pipeline import Pipeline
from tests.nn.loras import PROMPT, assert_equal_states, network
from tests.tiny import tiny_model

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
