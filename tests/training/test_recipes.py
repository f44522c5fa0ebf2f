"""Recipes of training, one line of the config each: they train, and a resumed training ends in the same weights to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import ConfigError, TrainingError
from ldm.formats.ema_snapshots import reconstructed
from ldm.report.run import Run
from ldm.training.engine import StageModule
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
    recipe += ["denoiser.loss={kind: dispersive, noise_level_sampler: low_discrepancy}"]
    resumed, at_once = trained(tmp_path / "resumed", recipe, 2, 4), trained(tmp_path / "at_once", recipe, 4)
    stages = [tmp_path / folder / "run" / "denoiser" for folder in ("resumed", "at_once")]
    for length in (0.05, 0.1):
        (average, step), (expected, _) = (reconstructed(stage, length) for stage in stages)
        assert step == 4
        assert [name for name in expected if not torch.equal(average[name], expected[name])] == []
    assert [name for name in at_once if not torch.equal(resumed[name], at_once[name])] == []


def test_a_finished_training_with_wsd_goes_on_from_before_its_decay(tmp_path: Path) -> None:
    """The result of a training whose ``max_steps`` is raised twice is that of the longest one, to the bit."""
    recipe = ["denoiser.train.decay={kind: wsd, share: 0.5}", "denoiser.train.checkpoint_every=1"]
    expected = trained(tmp_path / "at_once", recipe, 16)
    names = [path.name for path in sorted((tmp_path / "at_once" / "run" / "denoiser").glob("step_*"))]
    assert names == ["step_0000009.ckpt", "step_0000015.ckpt"]  # 9 steps at the peak, and the one before last.ckpt
    with pytest.warns(UserWarning, match=r"max_steps was raised, .*from .*step_0000003.ckpt, .* not from .*\(step 4\)"):
        found = trained(tmp_path / "raised", recipe, 4, 8, 16)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_what_is_left_of_an_abandoned_decay_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints and images of later steps, ``best.ckpt`` as well."""
    recipe = ["denoiser.train.decay={kind: wsd, share: 0.5}", "denoiser.train.checkpoint_every=1"]
    recipe += ["denoiser.train.keep_checkpoints=4", "denoiser.train.images_every=5", "denoiser.train.validate_every=7"]
    trained(tmp_path / "raised", recipe, 8)
    folder = tmp_path / "raised" / "run" / "denoiser"
    names = [f"step_000000{step}.ckpt" for step in (5, 6, 7)]
    assert {path.name for path in folder.glob("*.ckpt")} == {"best.ckpt", "last.ckpt", *names}
    images = ["samples_0000005.png", "samples_0000008.png"]
    assert sorted(path.name for path in (folder / "images").iterdir()) == images
    seen: list[set[str]] = []

    def training_step(module: StageModule, *arguments: Any) -> None:
        seen.append({path.name for path in (*folder.glob("*.ckpt"), *(folder / "images").iterdir())})
        raise TrainingError("enough")

    monkeypatch.setattr(StageModule, "training_step", training_step)
    with pytest.raises(TrainingError, match="enough"):
        train_stage(tiny_experiment(tmp_path / "raised", *PIXELS, *recipe, "denoiser.train.max_steps=16"), "denoiser")
    assert seen == [{"last.ckpt", names[0], images[0]}]
    assert Run(folder.parent).stages[0].step == 5


def test_a_training_whose_stable_checkpoints_are_gone_goes_on_with_a_warning(tmp_path: Path) -> None:
    recipe = ["denoiser.train.decay={kind: wsd, share: 0.5}", "denoiser.train.checkpoint_every=4"]
    with pytest.warns(UserWarning, match="has begun to decay, and there is no intact checkpoint from before that"):
        trained(tmp_path / "raised", recipe, 4, 8)


def test_a_damaged_stable_checkpoint_is_named(tmp_path: Path) -> None:
    recipe = ["denoiser.train.decay={kind: wsd, share: 0.5}", "denoiser.train.checkpoint_every=1"]
    trained(tmp_path / "raised", recipe, 4)
    (tmp_path / "raised" / "run" / "denoiser" / "step_0000003.ckpt").write_bytes(b"damaged")
    longer = tiny_experiment(tmp_path / "raised", *PIXELS, *recipe, "denoiser.train.max_steps=8")
    with pytest.warns(
        UserWarning, match="step_0000003.ckpt cannot be read .*; the training resumes from .*last.ckpt"
    ) as found:
        train_stage(longer, "denoiser")
    assert any("there is no intact checkpoint from before that" in str(each.message) for each in found)


FLOW = "denoiser.diffusion={schedule: flow, parametrization: flow}"
RECIPES = [
    ([], "denoiser.loss={weighting: min_snr}"),
    ([], "denoiser.loss={weighting: soft_min_snr}"),
    ([], "denoiser.loss={noise_level_sampler: lognormal}"),
    ([], "denoiser.loss={noise_level_sampler: low_discrepancy}"),
    ([], "denoiser.loss={offset_noise: 0.1}"),
    ([], "denoiser.loss={input_perturbation: 0.1}"),
    ([], "denoiser.diffusion.schedule={kind: cosine, zero_terminal_snr: true}"),
    ([FLOW], "denoiser.loss={kind: contrastive_flow}"),
    ([FLOW], "denoiser.loss={base_resolution: 8}"),
    ([FLOW], "denoiser.loss={noise_level_sampler: logit_normal}"),
    ([FLOW], "denoiser.diffusion={schedule: {kind: flow, shift: 2}, parametrization: flow}"),
]


@pytest.mark.parametrize(("common", "recipe"), RECIPES, ids=str)
def test_recipes_of_the_loss_have_an_effect(tmp_path: Path, common: list[str], recipe: str) -> None:
    plain, found = (trained(tmp_path / str(i), [*common, *each], 2) for i, each in enumerate(([], [recipe])))
    assert plain.keys() == found.keys()
    assert not torch.equal(plain["denoiser.conv_out.weight"], found["denoiser.conv_out.weight"])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            ["denoiser.diffusion.schedule.zero_terminal_snr=true", "denoiser.loss={weighting: min_snr}"],
            "weighting min_snr",
        ),
        (["denoiser.diffusion={schedule: flow, parametrization: eps}"], "eps cannot be trained with the schedule flow"),
        (
            ["denoiser.diffusion.schedule=flow", "denoiser.loss={weighting: min_snr}"],
            "weighting min_snr .* the schedule flow",
        ),
        (["denoiser.loss=contrastive_flow"], "contrastive_flow cannot be used with the parametrization v"),
    ],
)
def test_recipes_that_do_not_fit_are_refused_when_the_config_is_read(
    tmp_path: Path, recipe: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"denoiser: loss: .*{message}"):
        tiny_experiment(tmp_path, *recipe)
