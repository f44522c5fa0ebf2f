from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from ldm.ablation.recipes import Recipes, chosen, open_recipes, read_recipes
from ldm.ablation.runs import Task, make_run
from ldm.errors import LdmError
from ldm.training.experiment import load_config
from ldm.training.subruns import digest
from tests.ablation.experiments import CHANGES, RECIPES, write_recipes
from tests.experiments import write_experiment

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("recipes", "stage", "problem"),
    [
        ({"muon": ["denoiser.train.optimizer=muon"]}, "denoiser", "has no recipe 'plain'"),
        (RECIPES, "denoisr", r"unknown stage 'denoisr'; did you mean 'denoiser'"),
        ({"plain": [], "muon": "denoiser.train.optimizer=muon"}, "denoiser", "'muon' is .*write a list of texts"),
        ({"plain": [], "long": ["denoiser.train.max_steps=9"]}, "denoiser", "'long' sets denoiser.train.max_steps"),
        ({"plain": [], "other": ["seed=1"]}, "denoiser", "'other' sets seed"),
        (["plain"], "denoiser", "needs the keys stage and recipes"),
    ],
)
def test_a_file_of_recipes_is_checked(tmp_path: Path, recipes: Any, stage: str, problem: str) -> None:
    with pytest.raises(LdmError, match=problem):
        read_recipes(write_recipes(tmp_path, recipes, stage))


def test_a_recipe_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipes.yaml"
    path.write_text("stage: denoiser\nrecipes:\n  plain: []\n  muon: []\n  muon: []\n")
    with pytest.raises(LdmError, match=r"the key 'muon' is given twice in line 5"):
        read_recipes(path)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("denoiser.train.optimiser=muon", r"recipe 'wrong': .*unknown key 'optimiser'; did you mean 'optimizer'"),
        ("denoiser.loss=contrastive_flow", r"recipe 'wrong': .*flow"),
        ("denoiser.loss.weighting=min_snrr", r"recipe 'wrong': .*min_snr"),
        ("denoiser.train", r"recipe 'wrong': .*key=value"),
        ("vae.loss.terms=[{kind: perceptual, checkpoint: {clip}}]", r"recipe 'wrong': .*needs the CLIP of stage 2"),
    ],
)
def test_a_recipe_that_is_refused_is_named(tmp_path: Path, override: str, problem: str) -> None:
    changes = {} if "clip" in override else CHANGES
    config = write_experiment(tmp_path, changes)
    stage = "vae" if "clip" in override else "denoiser"
    with pytest.raises(LdmError, match=problem):
        open_recipes(config, Recipes(stage, {"plain": (), "wrong": (override,)}), [])


def test_a_missing_package_is_named_before_steps_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    recipes = Recipes("denoiser", {"plain": (), "8 bits": ("denoiser.train.optimizer=adamw_8bit",)})
    with pytest.raises(LdmError, match=r"recipe '8 bits': .*bitsandbytes is not installed"):
        open_recipes(write_experiment(tmp_path, CHANGES), recipes, [])


def test_a_missing_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match=r"a comparison of recipes of stage denoiser needs the result of stage vae"):
        open_recipes(write_experiment(tmp_path), Recipes("denoiser", {"plain": ()}), [])


def test_recipes_replace_overrides_of_all_runs_and_keep_the_noise_levels(tmp_path: Path) -> None:
    recipes = Recipes(
        "denoiser", {"large": ("denoiser.train.batch_size=8",), "spread": ("denoiser.loss=dispersive",), "plain": ()}
    )
    found = open_recipes(write_experiment(tmp_path, CHANGES), recipes, ["denoiser.train.batch_size=2"])
    assert list(found) == ["plain", "large", "spread"]
    assert [each.denoiser.train.batch_size for each in found.values()] == [2, 8, 2]
    losses = [each.denoiser.loss for each in found.values()]
    assert losses[2].kind == "dispersive"
    assert losses[2].noise_level_sampler == losses[0].noise_level_sampler  # type: ignore[attr-defined]
    assert losses[0].noise_level_sampler.mean == 0.5  # type: ignore[attr-defined]


def test_recipes_are_chosen_by_name() -> None:
    recipes = Recipes("denoiser", {"plain": (), "a": (), "b": ()})
    assert list(chosen(recipes, ["b"]).overrides) == ["plain", "b"]
    with pytest.raises(LdmError, match="unknown recipe 'c'"):
        chosen(recipes, ["c"])


def test_a_run_is_an_ordinary_experiment_with_its_own_folder_steps_and_seed(tmp_path: Path) -> None:
    experiment = load_config(write_experiment(tmp_path, CHANGES), ["seed=7"])
    run = make_run(experiment, Task("min-SNR, soft", 2, "denoiser", 40, 1, ()))
    assert run.folder.parent == tmp_path / "run" / "ablation"
    assert run.folder.name == f"min-SNR_soft-seed2-{digest(run.experiment, 'denoiser')}"
    train = run.experiment.denoiser.train
    assert (run.experiment.seed, train.max_steps, train.validate_every) == (9, 40, 10)
    assert run.experiment.data.test is None  # type: ignore[attr-defined]


def test_runs_of_other_trainings_have_other_folders(tmp_path: Path) -> None:
    config = write_experiment(tmp_path, CHANGES)

    def name(*overrides: str, steps: int = 40) -> str:
        task = Task("plain", 0, "denoiser", steps, 1, ())
        return make_run(load_config(config, overrides), task).folder.name

    assert name("denoiser.train.log_every=3", "data.workers=1", "name=other") == name()
    others = [name("denoiser.train.learning_rate=1e-4"), name(steps=41), name("seed=1"), name("data.flip=true")]
    assert len({name(), *others}) == 5


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/recipes/*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_fit_the_emoji_config_and_differ(path: Path, tmp_path: Path) -> None:
    recipes, source = read_recipes(path), ROOT / "ldm" / "assets" / "model.safetensors"
    overrides = [f"run_dir={tmp_path}", *(["clip.checkpoint=any"] if recipes.stage != "clip" else [])]
    if recipes.stage == "denoiser":
        overrides += [f"vae.checkpoint={source}", "vae.train=null", "clip.train=null"]
    found = open_recipes(ROOT / "configs" / "emoji_64.yaml", recipes, overrides)
    assert next(iter(found)) == "plain"
    assert len({digest(each, recipes.stage) for each in found.values()}) == len(found) > 5
