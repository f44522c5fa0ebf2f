"""Copies and pickles of models with LoRAs, and weights that are loaded into such models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.model import LatentDiffusion
from ldm.pipeline import Pipeline
from tests.nn.loras import PROMPT, assert_equal_states, network
from tests.tiny import tiny_model

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda each: pickle.loads(pickle.dumps(each)),
    "copy of a pickle": lambda each: copy.deepcopy(pickle.loads(pickle.dumps(each))),
}


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
