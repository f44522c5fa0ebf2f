"""The evaluation reads images one batch after the other, and only those of the splits that there are."""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm import Pipeline
from ldm.cli import evaluate as command
from ldm.clip.retrieval import reduce_images, reduced_recall
from ldm.data import BatchIndices, ShardsData
from ldm.data.samples import StoredImages
from ldm.data.shards import Sample, write_shard
from ldm.formats import save
from tests.data.pictures import encoded, noise_picture
from tests.experiments import write_experiment
from tests.tiny import SIZE, tiny_model

COUNTS = {"train": 70, "val": 34}
EVERY = 35


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_experiment(folder)
    save(tiny_model(), folder / "model.safetensors")
    for split, count in COUNTS.items():
        pictures = (encoded(noise_picture(i, 4, 4).resize((SIZE, SIZE))) for i in range(count))
        samples = [Sample(f"{i}", f"{split} {i}", picture, "png") for i, picture in enumerate(pictures)]
        write_shard(folder / f"{split} set.tar", samples)
    return folder


def evaluate(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    data = [f"data.{split}={folder / split} set.tar" for split in COUNTS]
    common = ["--model", "model.safetensors", "--steps", "1", "--guidance", "1", "--train-every", str(EVERY)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--config", "tiny.yaml", *common, *data, *arguments])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert not stopped.value.code
    name = "evaluation-val-model=model.safetensors-steps=1-guidance=1.0.json"
    results: dict[str, Any] = json.loads((folder / name).read_text())
    return results


def test_images_are_not_kept_and_the_test_set_is_not_needed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    read, alive, most = StoredImages.__getitem__, list[weakref.ref[Any]](), [0]

    def watched(samples: StoredImages, draw: BatchIndices) -> Any:
        batch = read(samples, draw)
        alive.append(weakref.ref(batch["image"]))
        most[0] = max(most[0], sum(each() is not None for each in alive))
        return batch

    monkeypatch.setattr(StoredImages, "__getitem__", watched)
    results = evaluate(monkeypatch, folder, "data.cache=ram")
    assert len(alive) >= 5
    assert most[0] <= 3  # the one in use, the one ahead of it, and the one being read
    assert results["samples"]["among"] == sum(COUNTS.values())

    monkeypatch.undo()
    pipe = Pipeline.from_pretrained(folder / "model.safetensors")
    sets = [ShardsData(str(folder / f"{split} set.tar"), size=SIZE, workers=0).open("train") for split in COUNTS]
    truths = torch.cat([samples[BatchIndices(np.arange(len(samples)))]["image"] for samples in sets])
    captions = [f"val {i}" for i in range(COUNTS["val"])]
    made = pipe(captions, seed=0, num_inference_steps=1, guidance_scale=1.0, output_type="pt", batch_size=32)
    own = torch.arange(COUNTS["val"]) + COUNTS["train"]
    recall = reduced_recall(reduce_images(made.cpu() * 2 - 1), reduce_images(truths), own)
    assert results["samples"]["val"] == pytest.approx({"captions": 34, **recall})
