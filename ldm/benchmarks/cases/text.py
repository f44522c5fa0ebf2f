"""Text encoder of SD 1.5 on two prompts of 77 tokens, against transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.benchmarks.case import Setup, Work, register
from ldm.benchmarks.compare import Comparison, inference
from ldm.benchmarks.models import pipeline, sd15, sd15_text, transformers_text


def _tokens(setup: Setup) -> Tensor:
    shape = (setup.batch_size or 2, 77)
    return torch.randint(49407, shape, generator=setup.generator()).to(setup.device)


def ours(setup: Setup) -> Work:
    """Build our text encoder in a pipeline."""
    conditioner: Any = pipeline(sd15(setup, whole=False, tower=sd15_text(setup.small)), setup).model.conditioner
    tower, tokens = conditioner.tower, _tokens(setup)
    return Work(inference(lambda: tower(tokens).context), tower)


def theirs(setup: Setup, ours: Work) -> Work:
    """Build transformers' text encoder."""
    tower, tokens = transformers_text(ours.network), _tokens(setup)
    if setup.compile_peer:
        tower.compile()
    return Work(inference(lambda: tower(tokens).last_hidden_state), tower)


register(
    Comparison(
        "text", "text encoder of SD 1.5, 2 prompts of 77 tokens", "transformers", ours, theirs, ("transformers",)
    )
)
