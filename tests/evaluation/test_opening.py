"""Opening of a subject: parts of its sources that are evaluated, parts of the data that are read, and names of files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.clip.retrieval import reduced_recall
from ldm.errors import CheckpointError, DataError
from ldm.evaluation.metric import all_metrics
from ldm.evaluation.opening import Request, networks, open_subject, sources_of
from ldm.evaluation.runner import measure
from ldm.evaluation.subject import Options, Subject
from ldm.evaluation.summary import samples_of_training
from ldm.formats import read
from tests.evaluation.subjects import COUNTS, data_of, numbers, opened
from tests.experiments import tiny_experiment


def test_of_a_complete_model_in_place_of_a_vae_the_first_stage_alone_is_evaluated(folder: Path) -> None:
    model = folder / "model.safetensors"
    experiment = tiny_experiment(folder, f"vae.checkpoint={model}", "vae.train=null", f"clip.checkpoint={model}")
    (folder / "run" / "clip").mkdir(parents=True, exist_ok=True)
    sources = sources_of(experiment, None, say=lambda sentence: None)
    assert sources.keys() == {"vae", "clip"}
    found = networks({stage: read(source) for stage, source in sources.items()})
    assert found["pipe"] is None
    assert found["clip"] is None
    expected = networks({"model": read(model)})["first_stage"].state_dict()
    assert all(torch.equal(expected[name], each) for name, each in found["first_stage"].state_dict().items())


@pytest.mark.parametrize(("most", "among"), [(sum(COUNTS.values()), "train+val"), (30, "val")])
def test_many_images_are_searched_in_the_evaluated_split_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, most: int, among: str
) -> None:
    monkeypatch.setattr("ldm.evaluation.subject.GALLERY", most)
    read_samples: list[int] = []
    batches = Subject.batches

    def counted(subject: Subject, split: str, most: int | None = None, every: int = 1) -> Any:
        for batch in batches(subject, split, most, every):
            read_samples.extend([len(batch["key"])] if split == "train" else [])
            yield batch

    monkeypatch.setattr(Subject, "batches", counted)
    subject = opened(folder)
    (first, _) = numbers(subject, "recall_by_image").values()
    assert first.reference == among
    assert first.parameters["among"] == sum(COUNTS[split] for split in among.split("+"))
    subject.train_every = 8
    found = samples_of_training(subject)["train[::8]"]
    assert found["captions"] == 5
    assert sum(read_samples) == 5 + (COUNTS["train"] if among == "train+val" else 0)
    true, made = subject.true("train", 8), subject.generated(8)
    rest = torch.cat([subject.true("val").reduced] + ([subject.true("train").reduced] if among == "train+val" else []))
    others = [row for row in rest if not (row == true.reduced).all(1).any()]
    expected = reduced_recall(made.reduced, torch.stack([*true.reduced, *others]), torch.arange(5))
    assert found == pytest.approx({"captions": 5, **expected})


def test_the_numbers_do_not_depend_on_how_many_images_are_computed_at_once(folder: Path) -> None:
    at_once, apart = (opened(folder, images=10, batch_size=size) for size in (10, 3))
    for name in ("psnr", "latents", "recall_by_image", "denoising"):
        values = [[each.estimate.value for each in numbers(subject, name).values()] for subject in (at_once, apart)]
        np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["fid", "kid", "cmmd", "precision_recall", "memorisation", "clip_score", "diversity"])
def test_nothing_is_generated_for_features_that_there_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def generate(*arguments: Any) -> None:
        raise AssertionError("an image is generated")

    monkeypatch.setattr(Subject, "_generate", generate)
    subject = opened(folder)
    subject.networks = ()
    with pytest.raises(CheckpointError, match="there is no feature network"):
        numbers(subject, name)


def test_a_metric_that_the_data_do_not_allow_is_left_out(folder: Path) -> None:
    request = Request(
        str(folder / "tiny.yaml"),
        data_of(folder),
        model=str(folder / "clip.safetensors"),
        options=Options(classes=("a",)),
    )
    subject = open_subject(request)
    metrics = [each for each in all_metrics().values() if each.name in ("retrieval", "zero_shot")]
    with pytest.warns(UserWarning, match="the metric zero_shot is left out: zero-shot classification by 1 class names"):
        found = measure(subject, metrics)
    assert {each.conditions.metric for each in found} == {
        f"{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)
    }
    with pytest.raises(DataError, match="zero-shot classification by 1 class names"):
        measure(subject, metrics, required=["zero_shot"])


@pytest.mark.parametrize(
    ("changes", "suffix"),
    [
        ({}, ""),
        (
            {"settings": {"num_inference_steps": 8, "guidance_scale": None, "sampler": "euler"}},
            "-steps=8-sampler=euler",
        ),
        ({"model": "emoji", "checkpoint": "last"}, "-model=emoji-checkpoint=last"),
        ({"options": Options(images=96, seed=1, batch_size=4)}, "-images=96-seed=1"),
        ({"ema_length": 0.1, "further": {"shift": 2.5}}, "-ema_length=0.1-shift=2.5"),
    ],
)
def test_files_are_named_by_what_differs_from_the_run(changes: dict[str, Any], suffix: str) -> None:
    assert Request("mine.yaml", **changes).suffix == suffix


def test_what_is_no_word_is_named_by_its_hash() -> None:
    def suffix(**changes: Any) -> str:
        return Request("mine.yaml", **changes).suffix

    assert suffix(features=["own=a/b"]) == suffix(features=["own=a/b"]) != suffix(features=["own=a/c"])
    models = {suffix(model=f"{run}/vae/best.ckpt") for run in ("a", "b")}
    assert len(models) == 2
    for found in (suffix(features=["own=a/b"]), *models):
        assert re.fullmatch(r"-features=[0-9a-f]{8}|-model=best\.ckpt\.[0-9a-f]{8}", found)
