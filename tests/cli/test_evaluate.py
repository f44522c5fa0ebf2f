from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ldm.cli import evaluate as command
from ldm.evaluation.receipt import read_receipts
from ldm.training.stages import train_stage
from tests.commands import exit_code
from tests.experiments import CAPTIONS, tiny_experiment, write_experiment


def evaluated(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command in this process and return its exit code."""
    return exit_code(monkeypatch, command.main, "evaluate.py", *arguments)


def test_a_run_is_measured_by_each_of_its_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = write_experiment(tmp_path)
    one_step = [f"{stage}.train.max_steps=1" for stage in ("vae", "clip", "denoiser")]
    experiment = tiny_experiment(tmp_path, *one_step)
    for stage in experiment.stages:
        train_stage(experiment, stage)
    settings = ["--train-every", 4, "--steps", 2, f"data.test={tmp_path / 'train.tar'}", *one_step]
    for split in ("val", "test"):
        assert evaluated(monkeypatch, "--config", config, "--split", split, *settings) == 0
        results = json.loads((tmp_path / "run" / f"evaluation-{split}-steps=2.json").read_text())
        assert list(results) == ["model", "split", "psnr", "clip", "samples"]
        assert 0 < results["psnr"] < 60
        assert results["clip"]["images"] == len(CAPTIONS)
        samples = results["samples"]
        assert samples["among"] == 3 * len(CAPTIONS)
        assert samples[split]["captions"] == len(CAPTIONS)
        assert samples["train[::4]"]["captions"] == 2
        with Image.open(tmp_path / "run" / f"evaluation-{split}-steps=2.png") as sheet:
            assert sheet.width > sheet.height
        receipts = read_receipts(tmp_path / "run" / f"receipts-{split}-steps=2.json")
        numbers = {each.conditions.metric: each for each in receipts.numbers}
        assert numbers["psnr"].value == pytest.approx(results["psnr"])
        assert numbers["recall_by_image@1"].value == pytest.approx(samples[split]["R@1"])
        assert numbers["fid"].conditions.network == "own"  # the image tower of the run
        assert numbers["fid"].conditions.ema == "EMA, decay 0.9"
        assert {each.conditions.split for each in numbers.values()} == {split}

    folder = tmp_path / "run"
    of_run = {path: path.read_bytes() for path in folder.glob("*.json")}
    for arguments, name in (([], "vae"), (["--metrics", "psnr,ssim"], "vae-psnr-ssim")):
        assert evaluated(monkeypatch, folder / "vae", f"data.val={tmp_path / 'train.tar'}", *arguments) == 0
        alone = {each.conditions.metric for each in read_receipts(folder / f"receipts-val-{name}.json").numbers}
        assert "psnr" in alone
        assert not alone & {"fid", "retrieval", "denoising_error@1"}
    assert all(path.read_bytes() == content for path, content in of_run.items())


def test_an_unknown_split_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert evaluated(monkeypatch, "--config", write_experiment(tmp_path), "--split", "trial") == 2
    assert "unknown split 'trial'" in capsys.readouterr().err
