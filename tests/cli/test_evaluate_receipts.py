"""Receipts of the command: what it measures on a model and a CLIP, computing again, comparing, sweeping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm.cli import evaluate as command
from ldm.evaluation.receipt import Receipts, read_receipts
from tests.commands import exit_code
from tests.evaluation.subjects import data_of, write_subject

CHEAP = "psnr,retrieval,recall_by_image"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return exit_code(monkeypatch, command.main, "evaluate.py", *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("receipts")
    write_subject(folder)
    return folder


def measured(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object, model: str = "model.safetensors"
) -> Receipts:
    monkeypatch.chdir(folder)
    common = ["--config", "tiny.yaml", "--model", model, "--steps", 2]
    assert call(monkeypatch, *common, "--receipts", "receipts.json", *data_of(folder), *arguments) == 0
    return read_receipts(folder / "receipts.json")


def test_each_number_of_a_model_has_its_receipt(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(folder))  # which holds no weights
    with pytest.warns(UserWarning, match="the metric lpips is left out: the metric lpips needs the weights of AlexNet"):
        found = measured(
            monkeypatch, folder, "--metrics", "all", "--features", "own=clip.safetensors", "--probe-steps", 2
        )
    numbers = {each.conditions.metric: each for each in found.numbers}
    assert numbers.keys() >= {
        *(
            "fid",
            "kid",
            "cmmd",
            "precision",
            "recall",
            "density",
            "coverage",
            "clip_score",
            "diversity",
            "memorisation",
        ),
        *("recall_by_embedding@1", "recall_by_image@1", "nearest_training_image", "nearest_training_image_true"),
        *("psnr", "ssim", "rfid", "probe_fid", "probe_error"),
        *("latent_mean", "latent_std_min", "latent_std_max", "latent_noise"),
        *("denoising_error@0.1", "denoising_error@1", "denoising_error@10"),
    }
    assert all(each.contains(each.value) and each.conditions.n > 0 for each in found.numbers)
    fid, psnr, diversity = numbers["fid"].conditions, numbers["psnr"].conditions, numbers["diversity"].conditions
    assert (fid.n, fid.reference_n, fid.sampler, fid.steps, fid.guidance_scale) == (24, 24, "dpmpp_2m", 2, 3.0)
    assert (fid.network, fid.resize) == ("own", "bicubic with antialias to 16")
    assert (psnr.n, psnr.network, psnr.sampler, psnr.reference) == (24, None, None, None)
    assert diversity.parameters["images_per_caption"] == 8
    assert 0 < numbers["fid"].high < 1e9  # 24 images are enough for an interval
    sampling = numbers["probe_fid"].conditions.parameters["sampling"]
    assert (sampling["num_inference_steps"], sampling["guidance_scale"]) == (20, 1.0)
    assert all(each.conditions.versions["torch"] for each in found.numbers)


def test_a_clip_is_measured_with_classes_by_label(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "classes.txt").write_text("red\ngreen\nblue\n")
    found = measured(
        monkeypatch,
        folder,
        "--metrics",
        "clip",
        "--classes",
        "classes.txt",
        "--template",
        "a {} car",
        model="clip.safetensors",
    )
    numbers = {each.conditions.metric: each for each in found.numbers}
    assert numbers.keys() >= {
        "text_to_image_R@1",
        "image_to_text_R@5",
        "zero_shot@1",
        "calibration_error",
        "logit_scale_ratio",
    }
    assert numbers["zero_shot@1"].conditions.parameters["classes"] == 3
    assert numbers["zero_shot@1"].conditions.parameters["templates"] == ["a {} car"]


def test_receipts_are_verified_and_a_changed_one_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    found = measured(monkeypatch, folder, "--metrics", CHEAP, "--images", 10, "--seed", 5)
    assert {each.conditions.n for each in found.numbers} == {10}
    capsys.readouterr()
    assert call(monkeypatch, "--verify", "receipts.json") == 0
    printed = capsys.readouterr().out
    assert f"{len(found.numbers)} of {len(found.numbers)} numbers are inside" in printed
    assert "was" not in printed  # no condition has changed
    assert call(monkeypatch, "--verify", "receipts.json", "--steps", 3) == 2
    assert "without effect of steps; leave them out" in capsys.readouterr().err

    content: dict[str, Any] = json.loads((folder / "receipts.json").read_text())
    number = next(each for each in content["numbers"] if each["conditions"]["metric"] == "psnr")
    number["value"], number["low"], number["high"] = 99.0, 98.0, 100.0
    number["conditions"]["versions"]["torch"] = "1.0"
    (folder / "changed.json").write_text(json.dumps(content))
    assert call(monkeypatch, "--verify", "changed.json") == 1
    printed = capsys.readouterr().out
    assert "is OUTSIDE of 99 [98, 100] dB (versions.torch was 1.0, is" in printed


def test_runs_are_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "few.json").write_bytes(b"")
    measured(monkeypatch, folder, "--metrics", CHEAP, "--images", 10)
    (folder / "receipts.json").rename(folder / "few.json")
    measured(monkeypatch, folder, "--metrics", CHEAP, "--steps", 3)
    capsys.readouterr()
    assert call(monkeypatch, "compare", "few.json", "receipts.json") == 0
    printed = capsys.readouterr().out
    assert "n differs (10, 24)" in printed
    assert "steps differs (2, 3)" in printed
    assert call(monkeypatch, "compare", "few.json", "receipts.json", "--across", "n", "--across", "steps") == 0
    assert "not ranked" not in capsys.readouterr().out
    assert call(monkeypatch, "compare", "few.json", "--across", "step") == 2
    assert "unknown field of receipts 'step'; did you mean 'steps'" in capsys.readouterr().err


def test_settings_are_in_the_receipts_and_their_effect_in_the_summary(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    with pytest.warns(UserWarning, match="the metrics rfid, .*fid, kid, .* are left out: there is no feature network"):
        found = measured(monkeypatch, folder, "--setting", "cache_interval=2", "--images", 4, "--train-every", 40)
    numbers = {each.conditions.metric: each for each in found.numbers}
    assert numbers["recall_by_image@1"].conditions.sampling["cache_interval"] == 2
    assert numbers["psnr"].conditions.sampling == {}
    assert "fid" not in numbers  # there is no image tower
    results = json.loads(
        (folder / "evaluation-val-model=model.safetensors-steps=2-cache_interval=2-images=4.json").read_text()
    )
    assert results["distance"]["cache_interval"] == 2
    assert results["samples"]["val"]["captions"] == 4


def test_images_of_another_size_than_the_data_are_measured(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    settings = ["--setting", "height=32", "--setting", "width=32", "--images", 4, "--train-every", 40]
    with pytest.warns(UserWarning, match="there is no feature network"):
        found = measured(monkeypatch, folder, *settings)
    conditions = {each.conditions.metric: each.conditions for each in found.numbers}["recall_by_image@1"]
    assert (list(conditions.size), conditions.sampling["size"]) == ([16, 16], [32, 32])
    name = "evaluation-val-model=model.safetensors-steps=2-height=32-width=32-images=4"
    assert "distance" not in json.loads((folder / f"{name}.json").read_text())
    with Image.open(folder / f"{name}.png") as sheet:
        assert sheet.width > 4 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--setting", "batch_size=8"], "the evaluation gives batch_size itself; leave it out"),
        (["--setting", "eta=0.5"], "eta"),
        (["--setting", "shfit=2"], "unknown setting 'shfit'; did you mean 'shift'"),
        (["--metrics", "fidd"], "unknown metric 'fidd'; did you mean 'fid'"),
        (["--metrics", "retrieval"], "none of the metrics retrieval applies"),
        (["--metrics", "fid", "--features", "clip"], "the feature network 'clip' needs its weights"),
        (["--metrics", "lpips"], "the metric lpips needs the weights of AlexNet"),
        (["--metrics", "psnr,fid"], "there is no feature network; train stage clip, or give --features"),
        (["--classes", "nowhere.txt"], "--classes nowhere.txt cannot be read"),
        (["--train-every", "0"], "greater than or equal to 1"),
        (["--reference", "trian"], "unknown reference split 'trian'; did you mean 'train'"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    assert call(monkeypatch, "--config", "tiny.yaml", "--model", "model.safetensors", *data_of(folder), *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_config_is_that_of_one_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    monkeypatch.chdir(folder)
    for arguments, message in (
        (["data.size=16"], "give either --config"),
        (["--config", "tiny.yaml", "."], "give either --config"),
        (["."], "holds no config.yaml"),
    ):
        assert call(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
