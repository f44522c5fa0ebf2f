"""A real experiment that learns in seconds: coloured rectangles of 16 pixels, whose captions name the colours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from ldm.data.samples import BatchIndices
from ldm.data.shapes import Shapes
from ldm.data.shards import Sample, write_shard
from tests.data.pictures import encoded

SIZE = 16
TRAIN_IMAGES, VAL_IMAGES = 1024, 256

FEW = {"log_every": 20, "validate_every": 10_000, "images_every": 10_000, "checkpoint_every": 10_000}

VAE_TRAIN = FEW | {
    "max_steps": 500,
    "batch_size": 16,
    "learning_rate": 4e-3,
    "warmup_steps": 20,
    "decay": "cosine",
    "ema_decay": 0.98,
}
CLIP_TRAIN = FEW | {
    "max_steps": 250,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "warmup_steps": 20,
    "decay": "cosine",
    "ema_decay": 0.98,
}
DENOISER_TRAIN = FEW | {
    "max_steps": 800,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "warmup_steps": 20,
    "decay": "cosine",
    "ema_decay": 0.99,
}

EXPERIMENT: dict[str, Any] = {
    "name": "shapes",
    "trainer": {"accelerator": "cpu", "devices": 1, "precision": "fp32"},
    "data": {"kind": "shards", "size": SIZE, "workers": 0, "cache": "ram", "cache_latents": True},
    "vae": {
        "model": {"kind": "autoencoder_kl", "widths": [16, 16, 32], "blocks": 1, "latent_channels": 8, "groups": 4},
        "loss": {"l1": 0.25, "l2": 2.0, "kl": 1e-4, "adversarial": 0.0},
        "train": VAE_TRAIN,
    },
    "clip": {
        "tokenizer": {"kind": "byte_bpe", "vocab_size": 300, "context_length": 12},
        "model": {
            "embed_dim": 32,
            "text": {"vocab_size": 300, "context_length": 12, "width": 32, "layers": 2, "heads": 2},
            "image": {"kind": "vit", "image_size": SIZE, "patch_size": 4, "width": 32, "layers": 2, "heads": 2},
        },
        "train": CLIP_TRAIN,
    },
    "denoiser": {
        "model": {
            "kind": "unet",
            "in_channels": 8,
            "out_channels": 8,
            "levels": [{"width": 32, "blocks": 1}, {"width": 48, "blocks": 1, "depth": 1}],
            "context_width": 32,
            "vector_width": 32,
            "heads": 2,
            "groups": 8,
        },
        "conditioner": {"kind": "text", "trainable": False, "pooled": True, "dropout": 0.1},
        "diffusion": {"schedule": "cosine", "parametrization": "v"},
        "sampling": {"num_inference_steps": 20, "guidance_scale": 2.0},
        "prompts": ["a red and a blue rectangle", "green rectangle"],
        "train": DENOISER_TRAIN,
    },
}


class Pictures(NamedTuple):
    """Images ``[n h w 3]`` of uint8, with a caption and a class of each."""

    images: np.ndarray
    captions: list[str]
    labels: list[int]


def rectangles(split: str, count: int) -> Pictures:
    """Draw the rectangles of a split of the set ``shapes``."""
    batch = Shapes(samples=count, size=SIZE).open(split)[BatchIndices(np.arange(count))]
    images = ((batch["image"] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return Pictures(images, list(batch["text"]), batch["label"].tolist())


def write_data(
    folder: Path,
    change: Callable[[Pictures], Pictures] | None = None,
    counts: Mapping[str, int] = MappingProxyType({"train": TRAIN_IMAGES, "val": VAL_IMAGES}),
) -> None:
    """Write ``train.tar`` and ``val.tar``, with the images and captions of both changed by ``change``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        pictures = rectangles(split, count)
        images, captions, labels = change(pictures) if change else pictures
        write_shard(
            folder / f"{split}.tar",
            (
                Sample(f"{i:05d}", caption, encoded(Image.fromarray(image)), "png", {"label": label})
                for i, (image, caption, label) in enumerate(zip(images, captions, labels, strict=True))
            ),
        )


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings; a value of ``changes`` replaces one that is not a mapping in both."""
    result = dict(base)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both and "kind" not in value else value
    return result


def write_config(folder: Path, data: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write the experiment as ``folder/shapes.yaml``, with its run in ``folder/run`` and its shards in ``data``."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {"data": {"train": str(data / "train.tar"), "val": str(data / "val.tar")}, "run_dir": str(folder / "run")}
    path = folder / "shapes.yaml"
    path.write_text(yaml.safe_dump(merged(merged(EXPERIMENT, own), changes or {})))
    return path


def train(config: Path, stages: Sequence[str], overrides: Sequence[str] = ()) -> Path:
    """Train stages of a config and return the run folder."""
    from ldm.training.experiment import load_config
    from ldm.training.stages import train_stage

    experiment = load_config(config, overrides)
    for stage in stages:
        train_stage(experiment, stage)
    return experiment.folder
