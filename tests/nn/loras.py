"""Shared by the tests of LoRAs: a prompt, the output of a denoiser, and the comparison of two models."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.pipeline import Pipeline

PROMPT = "a red apple"


def network(pipe: Pipeline) -> Tensor:
    """Return the output of the denoiser for a fixed noisy input and the prompt."""
    with torch.inference_mode():
        cond = pipe.model.conditioner({"text": [PROMPT]})
        x = torch.linspace(-2, 2, 256).view(1, 4, 8, 8)
        return pipe.model.denoise(x, torch.tensor([1.0]), cond)


def assert_equal_states(pipe: Pipeline, other: Pipeline) -> None:
    """Check that two models have the same names, dtypes and bits."""
    mine, theirs = pipe.model.state_dict(), other.model.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        mine_bits, their_bits = (each.flatten().view(torch.uint8) for each in (tensor, theirs[name]))
        assert torch.equal(mine_bits, their_bits), name
