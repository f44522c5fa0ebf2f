"""Recipes of training, one line of the config each: they train, and a resumed training ends in the same weights to the bit."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from ldm.formats.ema_snapshots import reconstructed
from ldm.training.stages import train_stage
from tests.experiments import tiny_experiment

PIXELS = [
    "clip=null",
    "trainer.threads=1",
    "vae.model.kind=identity",
    "denoiser.conditioner=none",
    "denoiser.model.in_channels=3",
    "denoiser.model.out_channels=3",
    "denoiser.model.context_width=null",
    "denoiser.model.vector_width=null",
    "denoiser.train.validate_every=4",
    "denoiser.train.log_every=4",
    "denoiser.train.checkpoint_every=2",
]


def trained(folder: Path, recipe: list[str], *ends: int) -> dict[str, torch.Tensor]:
    """The weights of a denoiser in pixel space after trainings that end at these steps, each resumed from the one before."""
    folder.mkdir()
    for end in ends:
        result = train_stage(tiny_experiment(folder, *PIXELS, *recipe, f"denoiser.train.max_steps={end}"), "denoiser")
    return load_file(result)


def test_recipes_with_a_state_resume_bitwise(tmp_path: Path) -> None:
    recipe = ["denoiser.train.optimizer=muon", "denoiser.train.decay=wsd", "denoiser.train.ema_snapshots.every=1"]
    resumed, at_once = trained(tmp_path / "resumed", recipe, 2, 4), trained(tmp_path / "at_once", recipe, 4)
    stages = [tmp_path / folder / "run" / "denoiser" for folder in ("resumed", "at_once")]
    for length in (0.05, 0.1):
        (average, step), (expected, _) = (reconstructed(stage, length) for stage in stages)
        assert step == 4
        assert [name for name in expected if not torch.equal(average[name], expected[name])] == []
    assert [name for name in at_once if not torch.equal(resumed[name], at_once[name])] == []
