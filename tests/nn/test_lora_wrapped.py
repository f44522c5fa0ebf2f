"""LoRAs in networks that are compiled or wrapped."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ldm.pipeline import Pipeline
from tests.nn.loras import PROMPT, network
from tests.tiny import tiny_model


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
