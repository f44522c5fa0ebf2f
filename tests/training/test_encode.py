from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.cli.encode import encode
from ldm.data.encoded import EncodedImages, crop_places
from ldm.data.samples import BatchIndices, StoredImages
from ldm.data.stream import TrainStream
from ldm.training.stages import build_module, data_of
from ldm.training.tasks.task import Step
from tests.training import encoding

AUGMENTED = ["data.crop=random", "data.flip=true", "data.encoded.crops=3"]
EXACT = ["data.encoded.latents=fp32", "data.encoded.text=fp32"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of an experiment of which the first two stages are trained."""
    return encoding.prepared(tmp_path_factory.mktemp("encoding"))


def loss(module: Any, batch: dict[str, Any]) -> float:
    """Return the training loss of a batch with a fixed noise, including dropped captions."""
    step = Step(0, 0, torch.Generator().manual_seed(3))
    with torch.no_grad():
        return float(next(iter(module.task.losses(batch, step))).value)


def sensitive(module: Any) -> None:
    """Give values to the weights that are 0 at first, so that the loss depends on latents and conditions."""
    module.task.eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.task.model.denoiser.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)


@pytest.mark.parametrize(("types", "tolerance"), [(EXACT, 1e-6), ([], 1e-4)])
def test_encoded_data_give_the_losses_of_live_encoding(
    trained: Path, tmp_path: Path, types: list[str], tolerance: float
) -> None:
    settings = [f"data.encoded.folder={tmp_path / 'encoded'}", *AUGMENTED, *types, "denoiser.conditioner.dropout=0.3"]
    encode(config=trained, overrides=settings)
    experiment = encoding.experiment(trained, *settings)
    module = build_module(experiment, "denoiser")
    sensitive(module)
    data = data_of(experiment, module)
    samples, images = data.samples("train"), experiment.data.open("train")
    assert isinstance(samples, EncodedImages)
    assert isinstance(images, StoredImages)
    variants = set()
    for number, batch in enumerate(TrainStream(samples, 8, 0, 6)):
        draw = TrainStream(images, 8, 0, 6)._order.draw(8 * number, 8)
        assert draw.jitter is not None
        crops = (3 * draw.jitter[:, 0]).astype(int)
        variants |= set(zip(crops.tolist(), (draw.jitter[:, 2] < 0.5).tolist(), strict=True))
        places = [crop_places(key, 3)[crop] for key, crop in zip(batch["key"], crops, strict=True)]
        live = images[BatchIndices(draw.index, np.c_[np.array(places), draw.jitter[:, 2]])]
        live["text"] = images.annotations(draw)["text"]
        for name in ("key", "text", "boxes"):
            assert batch[name] == live[name]
        assert "image" not in batch
        batch = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
        assert loss(module, batch) == pytest.approx(loss(module, live), rel=tolerance)
    assert len(variants) == 6
