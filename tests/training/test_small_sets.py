"""Trainings on few images: without validation, and with warnings for settings of larger sets."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest

from ldm.config import from_dict, read_yaml, to_yaml
from ldm.data.datamodule import DataModule
from ldm.data.preparation_report import LARGEST_HELD_OUT, SMALL_SPLIT, Report
from ldm.data.shards import SPLITS
from ldm.errors import ConfigError
from ldm.training.experiment import load_config
from ldm.training.stages import train_stage
from ldm.training.tasks import VAETask
from ldm.vae.loss import VAELossConfig
from tests.experiments import tiny_experiment

ONE_STEP = [f"{stage}.train.max_steps=1" for stage in ("vae", "clip", "denoiser")]


@pytest.mark.parametrize("stage", ["vae", "clip", "denoiser"])
def test_a_stage_is_trained_without_validation_and_says_so(
    tmp_path_factory: pytest.TempPathFactory, trained: Path, stage: str
) -> None:
    sources = [f"{name}.checkpoint={trained / name / 'final.safetensors'}" for name in ("vae", "clip") if name != stage]
    folder = tmp_path_factory.mktemp(stage)
    experiment = tiny_experiment(
        folder, *ONE_STEP, *sources, "data.val=null", "data.cache_latents=true", f"{stage}.train.images_every=1"
    )
    with pytest.warns(
        UserWarning, match=r"data\.val is null, so nothing is validated: there is no best\.ckpt"
    ) as caught:
        result = train_stage(experiment, stage)
    assert not [warning for warning in caught if "is zero" in str(warning.message)]  # of Lightning
    assert result.is_file()
    assert list((folder / "run" / stage / "images").iterdir())
    assert (folder / "run" / stage / "last.ckpt").is_file()
    assert not (folder / "run" / stage / "best.ckpt").exists()
    with (folder / "run" / stage / "metrics.csv").open() as file:
        assert not [name for name in next(csv.reader(file)) if name.startswith("val/")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    for stage in ("vae", "clip"):
        train_stage(tiny_experiment(folder, *ONE_STEP), stage)
    return folder / "run"


@pytest.mark.parametrize(("batch_size", "warned"), [(8, False), (9, True)])
def test_a_clip_batch_that_exceeds_the_set_is_reported(tmp_path: Path, batch_size: int, warned: bool) -> None:
    experiment = tiny_experiment(tmp_path, *ONE_STEP, f"clip.train.batch_size={batch_size}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_stage(experiment, "clip")
    sentence = (
        "has 9 samples, but there are only 8 to train on, so that it contains some of them twice; lower clip.train"
    )
    assert any(sentence in str(warning.message) for warning in caught) == warned


@pytest.mark.parametrize(("made_for", "warned"), [(24, False), (25, True), ("null", False)])
def test_a_config_for_far_more_images_is_reported(tmp_path: Path, made_for: Any, warned: bool) -> None:
    data = DataModule(tiny_experiment(tmp_path, f"data.made_for={made_for}").data, 4, seed=0, total_batches=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.train_dataloader()
    messages = [str(warning.message) for warning in caught]
    assert (
        messages
        == [
            "there are 8 training images, but the config was made for about 25 (data.made_for); see the section 'Few "
            "images' of docs/your-own-pictures.md."
        ]
        * warned
    )


@pytest.mark.parametrize(
    ("disc_start", "max_steps", "step"),
    [
        (0, 100, 0),
        (5000, 6000, 5000),
        ("5000", 6000, 5000),
        (0.85, 6000, 5100),
        (0.85, 100, 85),
        ("8.5e-1", 100, 85),
        (1, 9, 1),
        ("1", 9, 1),
        (1.0, 9, 9),
        ("1.0", 9, 9),
        (0.0, 9, 0),
    ],
)
def test_the_discriminator_may_start_at_a_fraction_of_the_training(disc_start: Any, max_steps: int, step: int) -> None:
    config = from_dict(VAELossConfig, {"disc_start": disc_start}, "loss")
    assert config.discriminator_step(max_steps) == step


@pytest.mark.parametrize("text", ["1", "1.0", "1e0", "'1.0'", "'1'", "5000", "5e3", "0.5"])
def test_the_decimal_point_tells_a_fraction_from_a_step_in_overrides_and_when_written(
    text: str, tmp_path: Path
) -> None:
    """An integer is a step, and a number with a decimal point or exponent a fraction; ``5e3`` is refused."""
    if text == "5e3":
        with pytest.raises(
            ConfigError, match=r"disc_start is 5000\.0; give a step as a whole number without a decimal point"
        ):
            tiny_experiment(tmp_path, f"vae.loss.disc_start={text}")
        return
    experiment = tiny_experiment(tmp_path, f"vae.loss.disc_start={text}", "vae.train.max_steps=6000")
    step = {"1": 1, "'1'": 1, "5000": 5000, "0.5": 3000}.get(text, 6000)
    assert VAETask(experiment.vae).discriminator_step == step
    (tmp_path / "again.yaml").write_text(to_yaml(experiment.vae.loss))
    assert from_dict(VAELossConfig, read_yaml(tmp_path / "again.yaml")) == experiment.vae.loss
    assert type(from_dict(VAELossConfig, read_yaml(tmp_path / "again.yaml")).disc_start) is type(
        experiment.vae.loss.disc_start
    )


@pytest.mark.parametrize("disc_start", [-1, 1.5, -0.1, float("inf"), 5000.0])
def test_a_start_that_is_neither_a_step_nor_a_fraction_is_refused(disc_start: float) -> None:
    with pytest.raises(ConfigError, match=r"or a fraction of max_steps from 0\.0 to 1\.0"):
        from_dict(VAELossConfig, {"disc_start": disc_start}, "loss")


def test_the_discriminator_of_a_shorter_training_starts_earlier(tmp_path: Path) -> None:
    for steps, start in {6: 3, 20: 10}.items():
        experiment = tiny_experiment(tmp_path, "vae.loss.disc_start=0.5", f"vae.train.max_steps={steps}")
        assert VAETask(experiment.vae).optimizers()[1].start == start


def test_the_shipped_recipe_starts_its_discriminator_where_it_did() -> None:
    vae = load_config(Path(__file__).parents[2] / "configs" / "emoji_64.yaml").vae
    assert VAETask(vae).discriminator_step == 5400


@pytest.mark.parametrize("shares", [(0.98, 0.01, 0.01), (0.9, 0.1, 0.0), (1.0, 0.0, 0.0), (0.7, 0.15, 0.15)])
@pytest.mark.parametrize("total", [1, 8, 40, 200, 600, 1500, 10_000])
def test_splits_that_are_too_small_are_reported_with_shares_that_are_not(total: int, shares: tuple[float, ...]) -> None:
    held_out = {split: int(share * total) for split, share in zip(SPLITS[1:], shares[1:], strict=True)}
    report = Report(images={"train": total - sum(held_out.values()), **held_out})
    advice = report.advice_on_shares(shares)
    too_small = [
        split for split, share in zip(SPLITS[1:], shares[1:], strict=True) if share and held_out[split] < SMALL_SPLIT
    ]
    assert (advice is not None) == bool(too_small)
    for split in too_small:
        assert f"{split} has {held_out[split]}" in str(advice)
    if advice is not None and "--shares 1,0,0" not in advice:
        better = [float(share) for share in advice.partition("--shares ")[2].rstrip(".").split(",")]
        assert sum(better) == pytest.approx(1)
        assert sum(better[1:]) <= LARGEST_HELD_OUT
        assert [bool(share) for share in better] == [bool(share) for share in shares]
        assert all(share * total >= SMALL_SPLIT for share in better if share)
