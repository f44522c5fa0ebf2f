"""A whole experiment on eight images of 16 pixels, each of four colours, each stage of which trains in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ldm.data.shards import Sample, write_shard
from ldm.formats import native
from ldm.training.experiment import Experiment, load_config
from tests.data.pictures import encoded, noise_picture

CAPTIONS = ["red apple", "green apple", "red car", "blue car", "green car", "blue sky", "red sky", "old ship"]
SIZE = 16

TRAIN = {
    "max_steps": 6,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "ema_decay": 0.9,
    "log_every": 1,
    "validate_every": 3,
    "images_every": 1000,
    "checkpoint_every": 1,
}
"""A checkpoint at each step, so that a training can be stopped at any."""

PIXELS: dict[str, Any] = {
    "vae": {"model": {"kind": "identity"}},
    "clip": None,
    "denoiser": {
        "model": {
            "kind": "unet",
            "levels": [{"width": 16, "blocks": 1}],
            "in_channels": 3,
            "out_channels": 3,
            "middle_depth": 0,
            "heads": 2,
            "groups": 4,
        },
        "conditioner": {"kind": "none"},
        "sampling": {"num_inference_steps": 1},
        "train": TRAIN,
    },
}
"""A model of pixels, which needs no stage 1 and 2 and takes a step in milliseconds."""

EXPERIMENT: dict[str, Any] = {
    "name": "tiny",
    "trainer": {"accelerator": "cpu", "devices": 1, "precision": "fp32"},
    "data": {"kind": "shards", "size": SIZE, "workers": 0},
    "vae": {
        "model": {"kind": "autoencoder_kl", "widths": [8, 16], "blocks": 1, "latent_channels": 4, "groups": 4},
        "loss": {"kl": 1e-4, "adversarial": 0.5, "disc_start": 2, "disc_width": 8, "disc_layers": 1},
        "train": TRAIN,
    },
    "clip": {
        "tokenizer": {"kind": "byte_bpe", "vocab_size": 300, "context_length": 12},
        "model": {
            "embed_dim": 16,
            "text": {"vocab_size": 300, "context_length": 12, "width": 16, "layers": 1, "heads": 2},
            "image": {"kind": "vit", "image_size": SIZE, "patch_size": 8, "width": 16, "layers": 1, "heads": 2},
        },
        "train": TRAIN,
    },
    "denoiser": {
        "model": {
            "kind": "unet",
            "levels": [{"width": 16, "blocks": 1}, {"width": 16, "blocks": 1, "depth": 1}],
            "context_width": 16,
            "vector_width": 16,
            "heads": 2,
            "groups": 4,
            "dropout": 0.1,
        },
        "conditioner": {"kind": "text", "trainable": True, "pooled": True},
        "diffusion": {"schedule": "cosine", "parametrization": "v"},
        "sampling": {"num_inference_steps": 2},
        "prompts": ["red apple", "blue sky"],
        "train": TRAIN,
    },
}


def write_experiment(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """The experiment in ``folder/tiny.yaml``, its run in ``folder/run``; ``changes`` replace top-level sections."""
    shard = folder / "train.tar"
    if not shard.exists():
        flags = [noise_picture(i, 2, 2).resize((SIZE, SIZE), Image.Resampling.NEAREST) for i in range(len(CAPTIONS))]
        pictures = [encoded(flag) for flag in flags]
        write_shard(
            shard, (Sample(f"{i}", CAPTIONS[i], picture, "png", {"label": i % 3}) for i, picture in enumerate(pictures))
        )
    data = EXPERIMENT["data"] | {"train": str(shard), "val": str(shard)}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**EXPERIMENT, "data": data, "run_dir": str(folder / "run"), **(changes or {})}))
    return path


def tiny_experiment(folder: Path, *overrides: str) -> Experiment:
    """The experiment with ``key=value`` overrides, of which the last counts if a key is given twice."""
    return load_config(write_experiment(folder), [*{each.partition("=")[0]: each for each in overrides}.values()])


def write_clip(folder: Path) -> Path:
    """Write the CLIP of the tiny experiment with random weights."""
    from ldm.training.stages import build_module  # Lightning reads the rank when it is imported

    task: Any = build_module(tiny_experiment(folder), "clip").task
    path = folder / "clip.safetensors"
    native.save_state(path, native.CLIP, task.clip.state_dict(), task.config.model, task.tokenizer, {})
    return path
