from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ldm.cli.dry_run import describe
from ldm.config import from_dict, to_dict
from ldm.errors import ConfigError
from ldm.training.costs import outline
from ldm.training.experiment import Experiment, load_config
from tests.experiments import tiny_experiment, write_experiment

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted({*FOLDER.glob("**/*.yaml")} - {*(FOLDER / "recipes").iterdir()})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    """Each goes through the parser and back, and all its stages can be built."""
    experiment = load_config(path)
    assert from_dict(Experiment, to_dict(experiment)) == experiment
    for stage in experiment.stages:
        assert outline(experiment, stage).networks


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.parent.name != "toy")) for path in CONFIGS],
)
def test_shipped_configs_are_described(path: Path) -> None:
    experiment = load_config(path)
    summary = describe(experiment, experiment.stages)
    assert [stage for stage in ("vae", "clip", "denoiser", "decoder") if f"stage {stage}\n" in summary] == list(
        experiment.stages
    )
    assert "the stages fit each other" in summary


@pytest.mark.slow
def test_stable_diffusion_has_its_published_sizes() -> None:
    summary = describe(load_config(next(path for path in CONFIGS if path.stem == "sd1")), ("vae", "clip", "denoiser"))
    for count in ("denoiser: 859,520,964", "first stage: 83,653,863", "image tower: 303,966,208"):
        assert count in summary


def test_the_run_folder_goes_by_the_name(tmp_path: Path) -> None:
    assert tiny_experiment(tmp_path, "run_dir=null", "name=mine").folder == Path("runs/mine")
    assert tiny_experiment(tmp_path, "run_dir=elsewhere").folder == Path("elsewhere")


@pytest.mark.parametrize("name", ["", ".", "..", "../mine", "/tmp/mine", "a/b", "a\\b", "~/mine", "a\0b"])
def test_a_name_cannot_lead_out_of_the_folder_of_runs(tmp_path: Path, name: str) -> None:
    values = to_dict(tiny_experiment(tmp_path))
    with pytest.raises(ConfigError, match=r"config: name is .*; give one without slashes, and the place as run_dir"):
        from_dict(Experiment, values | {"name": name})


def test_stages_that_are_only_used_are_not_trained(tmp_path: Path) -> None:
    assert tiny_experiment(tmp_path).stages == ("vae", "clip", "denoiser")
    assert tiny_experiment(tmp_path, "vae.train=null", "clip.train=null").stages == ("denoiser",)


def test_one_tower_serves_clip_and_denoiser(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path)
    assert experiment.clip is not None
    conditioner: Any = experiment.model_config.conditioner
    assert conditioner.tower.embed_dim == experiment.clip.model.embed_dim
    assert (conditioner.tower.width, conditioner.tower.layers) == (16, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("denoiser.trian.max_steps=1", r"denoiser: unknown key 'trian'; did you mean 'train'\?"),
        ("vae.train.max_steps=many", r"vae\.train\.max_steps: expected a whole number, found 'many'"),
        ("denoiser.model.heads=3", r"denoiser\.model: levels\[1\]\.width 16 is not divisible by heads 3"),
        (
            "denoiser.model.in_channels=3",
            r"the denoiser has in_channels 3 .* latents have 4 channels; set them to 4 and 4",
        ),
        ("denoiser.model.context_width=8", "the denoiser's context_width is 8, but the conditioner gives 16"),
        ("denoiser.model.vector_width=null", "the denoiser's vector_width is None, but the conditioner gives 16"),
        ("clip.model.text.heads=3", r"clip\.model\.text: 3 heads do not divide"),
        ("clip.model.text.vocab_size=290", r"clip\.tokenizer makes up to 12 tokens below 300, but .* vocab_size 290"),
        ("clip=null", "denoiser.conditioner takes text, but there is no clip section"),
        ("data.size=17", "the size 17 x 17 is not divisible by the first stage's factor 2"),
        ("vae.model.image_channels=1", r"vae\.model\.image_channels is 1, but the data's images have 3"),
        ("denoiser.sampling.sampler=eular", r"denoiser\.sampling: unknown sampler 'eular'; did you mean 'euler'\?"),
        ("data.kind=shrads", r"data: unknown kind 'shrads'; did you mean 'shards'\?"),
        ("trainer.precision=fp8", r"trainer\.precision: unknown value 'fp8'"),
    ],
)
def test_an_invalid_config_is_reported_in_one_sentence(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        tiny_experiment(tmp_path, override)
    assert str(tmp_path / "tiny.yaml") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_child_config_says_only_what_differs(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    child = tmp_path / "child.yaml"
    child.write_text("base: tiny.yaml\nname: child\ndenoiser: {diffusion: {schedule: {kind: linear}}}")
    parent, experiment = load_config(tmp_path / "tiny.yaml"), load_config(child)
    assert experiment.vae == parent.vae
    assert experiment.denoiser.diffusion.schedule.kind == "linear"
    assert experiment.denoiser.diffusion.parametrization == parent.denoiser.diffusion.parametrization
