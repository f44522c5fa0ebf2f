from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.ablation.recipes import PLAIN
from ldm.ablation.runs import FOLDER
from ldm.ablation.step_times import MEASUREMENTS, phase_starts, step_times, steps_in, stored_times
from ldm.errors import ConfigError, LdmError
from ldm.training.experiment import load_config
from tests.ablation.experiments import CHANGES
from tests.experiments import tiny_experiment, write_experiment


@pytest.mark.parametrize(("relative", "steps"), [(1.0, 100), (2.0, 50), (0.8, 125), (3.0, 33)])
def test_recipes_get_steps_for_the_same_time(relative: float, steps: int) -> None:
    assert steps_in(100, [relative], lambda _: (0,)) == steps


@pytest.mark.parametrize(("start", "steps"), [("0.5", 50), ("40", 60), ("0", 33), ("1000", 100)])
def test_steps_with_a_discriminator_count_with_their_own_time(tmp_path: Path, start: str, steps: int) -> None:
    """A step takes 1 without and 3 with the discriminator: 25 + 3 * 25 = 40 + 3 * 20 = 3 * 33 + 1 = 100."""
    experiment = tiny_experiment(tmp_path, f"vae.loss.disc_start={start}")
    assert steps_in(100, [1.0, 3.0], phase_starts(experiment, "vae", 2)) == steps


def test_times_are_measured_once_for_a_recipe(tmp_path: Path) -> None:
    config, lines = write_experiment(tmp_path, CHANGES), []
    experiments = {
        PLAIN: load_config(config),
        "large": load_config(config, ["denoiser.train.batch_size=64"]),
    }
    first = step_times(experiments, "denoiser", 1, lines.append)
    assert first.relative[PLAIN] == (1.0,)
    assert 1 < first.relative["large"][0] < 30
    assert len(lines) == 2
    experiments["small"] = load_config(config, ["denoiser.train.batch_size=2"])
    again = step_times(experiments, "denoiser", 1, lines.append)
    assert len(lines) == 3
    assert (again.seconds, again.relative["large"]) == (first.seconds, first.relative["large"])
    assert [path.name for path in (tmp_path / "run" / FOLDER).iterdir()] == [MEASUREMENTS]
    (kept,) = json.loads((tmp_path / "run" / FOLDER / MEASUREMENTS).read_text())
    assert kept["seconds"] == first.seconds


def test_times_of_another_machine_are_taken_from_its_file(tmp_path: Path) -> None:
    config = write_experiment(tmp_path, CHANGES)
    experiments = {PLAIN: load_config(config), "large": load_config(config, ["denoiser.train.batch_size=64"])}
    path = tmp_path / "run" / FOLDER / MEASUREMENTS
    measured = step_times(experiments, "denoiser", 1, lambda line: None)
    other = path.read_text().replace(measured.device, "another machine")
    path.write_text(other)
    found = stored_times(experiments, "denoiser", path)
    assert found.device == "another machine"
    assert (found.seconds, found.relative) == (measured.seconds, measured.relative)
    experiments["small"] = load_config(config, ["denoiser.train.batch_size=2"])
    with pytest.raises(ConfigError, match="no time of recipe 'small'"):
        stored_times(experiments, "denoiser", path)
    with pytest.raises(ConfigError, match="no times of stage denoiser of this config"):
        stored_times({PLAIN: load_config(config, ["seed=5"])}, "denoiser", path)
    path.write_text('{"device": "of a forecast"}')
    with pytest.raises(ConfigError, match="no times of stage denoiser of this config"):
        stored_times(experiments, "denoiser", path)


def test_both_phases_of_a_vae_are_measured(tmp_path: Path) -> None:
    times = step_times({PLAIN: tiny_experiment(tmp_path)}, "vae", 1, lambda line: None)
    without, with_discriminator = times.relative[PLAIN]
    assert without == 1
    assert with_discriminator > 1


def test_a_recipe_that_cannot_be_trained_is_named(tmp_path: Path) -> None:
    config = write_experiment(tmp_path, CHANGES)
    one = load_config(config, ["denoiser.loss=dispersive", "denoiser.train.batch_size=1"])
    with pytest.raises(LdmError, match=r"recipe 'alone': .*batch_size to at least 2"):
        step_times({PLAIN: load_config(config), "alone": one}, "denoiser", 1, lambda line: None)
