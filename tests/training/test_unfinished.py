"""Use of a training before its end, by its checkpoints."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm import Pipeline, load
from ldm.cli import convert as conversion
from ldm.cli import evaluate as evaluation
from ldm.cli import sample as sampling
from ldm.errors import CheckpointError
from ldm.evaluation.opening import networks
from ldm.formats import read
from ldm.formats.single_network import save_single_network
from ldm.formats.tensors import read_metadata
from ldm.training.stages import train_stage
from tests.experiments import tiny_experiment, write_experiment

STAGES = ["vae", "clip", "denoiser"]
RESULTS = {"vae": "vae/final.safetensors", "clip": "clip/final.safetensors", "denoiser": "model.safetensors"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of an experiment whose best checkpoints are of step 1 or 2, the last ones of step 2."""
    folder = tmp_path_factory.mktemp("trained")
    short = [
        f"{stage}.train.{key}" for stage in STAGES for key in ("max_steps=2", "validate_every=1", "warmup_steps=0")
    ]
    experiment = tiny_experiment(folder, *short)
    for stage in STAGES:
        train_stage(experiment, stage)
    return folder


@pytest.fixture
def unfinished(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run without its results."""
    shutil.copytree(trained / "run", tmp_path / "run")
    for result in RESULTS.values():
        (tmp_path / "run" / result).unlink()
    return tmp_path / "run"


def state(source: Path, **options: Any) -> dict[str, torch.Tensor]:
    """All tensors of a source by part and name."""
    found = read(source, **options)
    return {f"{part}.{name}": each for part in found.parts for name, each in found.parts[part].state.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_the_checkpoint_of_the_last_step_equals_the_result(trained: Path, stage: str) -> None:
    ours, result = state(trained / "run" / stage / "last.ckpt"), state(trained / "run" / RESULTS[stage])
    measured = {name for name in result if "latent_" in name and stage == "vae"}
    assert ours.keys() | measured == result.keys()
    assert [name for name in ours.keys() - measured if not torch.equal(ours[name], result[name])] == []


def test_a_pipeline_of_the_last_checkpoint_makes_the_same_images(trained: Path) -> None:
    finished, last = (
        Pipeline.from_pretrained(trained / "run", "cpu", **options) for options in ({}, {"checkpoint": "last"})
    )
    images = [pipe("red car", seed=3, output_type="pt", progress=False) for pipe in (finished, last)]
    assert torch.equal(*images)
    assert finished.model.fingerprint == last.model.fingerprint


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_run_folder_or_stage_folder_has_its_checkpoints_by_name(unfinished: Path, name: str) -> None:
    expected = load(unfinished / "denoiser" / f"{name}.ckpt")
    for folder in (unfinished, unfinished / "denoiser"):
        assert load(folder, checkpoint=name).fingerprint == expected.fingerprint
        assert load(folder, checkpoint=f"{name}.ckpt").fingerprint == expected.fingerprint
    assert read(unfinished / "vae", checkpoint=name).parts.keys() == {"first_stage"}


@pytest.mark.parametrize("name", ["1", "step_1", "step_1.ckpt", "step_0000001.ckpt"])
def test_an_earlier_checkpoint_is_named_by_its_step(unfinished: Path, name: str) -> None:
    expected = load(unfinished / "denoiser" / "step_0000001.ckpt")
    assert expected.provenance["steps"] == 1
    for folder in (unfinished, unfinished / "denoiser"):
        assert load(folder, checkpoint=name).fingerprint == expected.fingerprint


def test_the_folder_of_a_finished_stage_is_its_network(trained: Path) -> None:
    for stage in ("vae", "clip"):
        assert read(trained / "run" / stage).fingerprint == read(trained / "run" / RESULTS[stage]).fingerprint


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_averaged_unless_ema_is_false(trained: Path, stage: str) -> None:
    path = trained / "run" / stage / "last.ckpt"
    content = torch.load(path, weights_only=True)
    prefix = {"vae": "first_stage", "clip": "clip", "denoiser": "model"}[stage]
    name, average = next((name, each) for name, each in content["ema"]["average"].items() if name.endswith("weight"))
    current = content["state_dict"][f"{prefix}.{name}"]
    assert not torch.equal(average, current)
    for ema, expected in ((True, average), (False, current)):
        assert any(
            torch.equal(each, expected) for each in state(path, ema=ema).values() if each.shape == expected.shape
        )


@pytest.mark.parametrize("stage", STAGES)
def test_provenance_and_notes_name_the_step(unfinished: Path, stage: str) -> None:
    best = unfinished / stage / "best.ckpt"
    steps = torch.load(best, weights_only=True)["completed_steps"]
    found = read(best)
    assert (found.provenance["stage"], found.provenance["steps"], found.provenance["max_steps"]) == (stage, steps, 2)
    assert found.provenance["unfinished"] is (steps < 2)
    assert any(f"after step {steps} of 2 of stage {stage}" in note for note in found.notes)


def test_a_saved_model_keeps_the_note(unfinished: Path, tmp_path: Path) -> None:
    file = Pipeline.from_pretrained(unfinished, "cpu", checkpoint="best").save_pretrained(tmp_path / "saved")
    assert any("of stage denoiser" in note for note in read(file).notes)


def test_commands_take_a_checkpoint(
    unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        sampling: f"car --model {unfinished} --checkpoint best --steps 1 --out {tmp_path}/a.png",
        conversion: f"{unfinished}/clip/last.ckpt {tmp_path}/clip.safetensors --inspect",
    }
    for command, arguments in given.items():
        monkeypatch.setattr(sys, "argv", ["command", *arguments.split()])
        with pytest.raises(SystemExit) as stopped:
            command.main()
        assert stopped.value.code == 0
    assert "the weights are those after step 2 of 2 of stage clip" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"a.png", "clip.safetensors"}


# Stages that begin with checkpoints of others


@pytest.mark.parametrize("converted", [False, True])
def test_latents_of_an_unfinished_first_stage_are_measured_by_the_stage_that_uses_it(
    trained: Path, unfinished: Path, tmp_path: Path, converted: bool
) -> None:
    vae = unfinished / "vae" / "last.ckpt"
    if converted:
        vae = save_single_network(read(vae), tmp_path / "vae.safetensors", "native")
    sources = [f"vae.checkpoint={vae}", f"clip.checkpoint={unfinished}/clip/last.ckpt"]
    init = f"denoiser.train.init={unfinished}/denoiser/best.ckpt"

    def model_after(steps: int) -> dict[str, torch.Tensor]:
        settings = [*sources, init, f"denoiser.train.max_steps={steps}", "denoiser.train.validate_every=100"]
        return load_file(train_stage(tiny_experiment(tmp_path, f"run_dir={tmp_path / 'other'}", *settings), "denoiser"))

    finished = load_file(trained / "run" / "vae" / "final.safetensors")
    for steps in (1,) if converted else (1, 2):  # the second time it is resumed
        model = model_after(steps)
        for name, tensor in finished.items():
            assert torch.equal(model[f"first_stage.{name}"], tensor), name
    handoff = load(tmp_path / "other").provenance["handoff"]
    assert handoff["clip"] == read_metadata(trained / "run" / "clip" / "final.safetensors")["fingerprint"]


def test_a_model_with_an_unfinished_first_stage_keeps_its_own_scale(trained: Path) -> None:
    model = load(trained / "run", vae=trained / "run" / "vae" / "best.ckpt")
    assert torch.equal(model.first_stage.latent_std, load(trained / "run").first_stage.latent_std)


# Evaluation


def evaluated(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> int:
    command = [
        "evaluate.py",
        "--config",
        write_experiment(folder),
        "--steps",
        1,
        *arguments,
        f"data.test={folder}/train.tar",
    ]
    monkeypatch.setattr(sys, "argv", [str(each) for each in command])
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stopped:
        evaluation.main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("stages", [["vae", "clip"], STAGES])
def test_an_unfinished_run_is_evaluated_by_the_checkpoints_that_there_are(
    monkeypatch: pytest.MonkeyPatch, unfinished: Path, stages: list[str]
) -> None:
    for stage in set(STAGES) - set(stages):
        shutil.rmtree(unfinished / stage)
    assert evaluated(monkeypatch, unfinished.parent, "--checkpoint", "last") == 0
    (file,) = unfinished.glob("evaluation-val-checkpoint=last-*.json")
    results = json.loads(file.read_text())
    used = [stage for stage in stages if "denoiser" not in stages or stage != "vae"]  # that of the model is evaluated
    assert [stage for stage in STAGES for each in results["checkpoints"] if f"of stage {stage}" in each] == used
    measured = {"vae": "psnr", "clip": "clip", "denoiser": "samples"}
    assert {measured[stage] for stage in stages} == results.keys() & set(measured.values())


def test_a_checkpoint_of_which_nothing_is_evaluated_has_no_note(unfinished: Path) -> None:
    found = read(unfinished / "vae" / "last.ckpt")
    assert len(networks({"vae": found})["notes"]) == 1
    assert networks({"decoder": found})["notes"] == []


@pytest.mark.parametrize(("source", "measured"), [("vae/best.ckpt", "psnr"), ("clip/last.ckpt", "clip")])
def test_a_first_stage_or_a_clip_is_evaluated_by_itself(
    monkeypatch: pytest.MonkeyPatch, unfinished: Path, source: str, measured: str
) -> None:
    assert evaluated(monkeypatch, unfinished.parent, "--model", unfinished / source) == 0
    (file,) = unfinished.parent.glob(f"evaluation-val-model={Path(source).name}.*.json")
    assert measured in json.loads(file.read_text())


# What cannot be used


def messages(trained: Path, folder: Path) -> Iterator[tuple[Path, dict[str, Any], str]]:
    run, last = folder / "run", (trained / "run" / "vae" / "last.ckpt").read_bytes()
    yield run, {}, r"run holds no model\.safetensors; .* until then use a checkpoint of it \(.*best\.ckpt"
    yield run, {"checkpoint": "first"}, r"holds no checkpoint 'first' of stage denoiser; there are .*best\.ckpt"
    yield run / "vae" / "last.ckpt", {"checkpoint": "best"}, "is not a run folder, so it has no checkpoint 'best'"
    yield run, {"checkpoint": "7"}, r"holds no checkpoint '7' of stage denoiser; there are .*best\.ckpt"
    yield run, {"checkpoint": "best", "variant": "fp16"}, "the checkpoint 'best' of a training has no variant 'fp16'"
    yield run / "vae", {}, r"holds no model\.safetensors"
    (run / "cut.ckpt").write_bytes(last[: len(last) // 2])
    yield run / "cut.ckpt", {}, r"cut\.ckpt is not a complete file of torch\.save .*download or write it again"
    content = torch.load(run / "vae" / "last.ckpt", weights_only=True)
    torch.save(content | {"export": None}, run / "old.ckpt")
    yield (
        run / "old.ckpt",
        {},
        "was written by an earlier version of ldm, which recorded no config in it; resume the training",
    )
    for broken in ({"export": 3}, {"export": {"module": "first_stage"}}, {"ema": {"average": 3}}, {"state_dict": 1}):
        torch.save(content | broken, run / "broken.ckpt")
        yield run / "broken.ckpt", {}, r"broken\.ckpt"


def test_a_checkpoint_that_cannot_be_used_is_one_sentence(trained: Path, unfinished: Path) -> None:
    for source, options, message in messages(trained, unfinished.parent):
        with pytest.raises(CheckpointError, match=message) as raised:
            load(source, **options)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_cut_checkpoint_does_not_end_a_resumed_training_in_a_traceback(unfinished: Path, name: str) -> None:
    path = unfinished / "vae" / f"{name}.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    experiment = tiny_experiment(unfinished.parent, "vae.train.max_steps=3", "vae.train.validate_every=1")
    instead = "the next validation writes it again" if name == "best" else "the training resumes from .*/step_0000001"
    with pytest.warns(UserWarning, match=rf"{name}\.ckpt cannot be read .*; {instead}"):
        train_stage(experiment, "vae")
    assert read(path).provenance["steps"] == 3
