"""A denoiser on pixels, trained in seconds on images of a test's own, for the tests of what steers its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm import Pipeline
from ldm.config import from_dict
from ldm.data.shards import Sample, write_shard
from ldm.training.experiment import Experiment
from ldm.training.stages import train_stage
from tests.data.pictures import encoded

WIDTH = 16
"""Of the vector, where the conditioner gives one."""


def experiment_on(
    folder: Path, pictures: Sequence[np.ndarray], conditioner: Mapping[str, Any], **train: Any
) -> Experiment:
    """An experiment on ``pictures``, uint8 ``[h w 3]``, all of which are validated on too; ``train`` are its settings."""
    files = [encoded(Image.fromarray(picture)) for picture in pictures]
    write_shard(folder / "pictures.tar", (Sample(f"{i:04d}", "", file, "png") for i, file in enumerate(files)))
    shard = str(folder / "pictures.tar")
    vector_width = WIDTH if "width" in conditioner else None
    concat = {"low_res": 3, "inpaint": 4}[conditioner["kind"]]
    settings = {"batch_size": 16, "learning_rate": 3e-3, "ema_decay": 0.98, "decay": "cosine", "warmup_steps": 10}
    rarely = {"validate_every": 10_000, "images_every": 10_000, "checkpoint_every": 10_000}
    config = {
        "name": "pixels",
        "run_dir": str(folder / "run"),
        "trainer": {"accelerator": "cpu", "devices": 1, "precision": "fp32"},
        "data": {
            "kind": "shards",
            "train": shard,
            "val": shard,
            "size": len(pictures[0]),
            "workers": 0,
            "cache": "ram",
        },
        "vae": {"model": {"kind": "identity"}},
        "denoiser": {
            "model": {
                "kind": "unet",
                "levels": [{"width": 16, "blocks": 1}, {"width": 32, "blocks": 1, "depth": 1}],
                "in_channels": 3 + concat,
                "out_channels": 3,
                "vector_width": vector_width,
                "heads": 2,
                "groups": 8,
            },
            "conditioner": dict(conditioner),
            "diffusion": {"schedule": "cosine", "parametrization": "v"},
            "sampling": {"num_inference_steps": 8, "guidance_scale": 1.0},
            "train": settings | rarely | train,
        },
    }
    return from_dict(Experiment, config)


def trained_on(folder: Path, pictures: Sequence[np.ndarray], conditioner: Mapping[str, Any], **train: Any) -> Pipeline:
    """The pipeline of such an experiment, trained."""
    experiment = experiment_on(folder, pictures, conditioner, **train)
    return Pipeline.from_pretrained(train_stage(experiment, "denoiser"), device="cpu")
