"""An experiment on small images of several aspect ratios, whose denoiser can be trained on encoded data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from ldm.data.shards import Sample, write_shard
from ldm.training.experiment import Experiment, load_config
from ldm.training.stages import train_stage
from tests.data.pictures import encoded, noise_picture
from tests.experiments import EXPERIMENT

ROOT = Path(__file__).parents[2]

NAMES = ["apple", "car", "sky", "ship", "tree"]

STEPS = {"max_steps": 2, "validate_every": 2}


def write_images(path: Path, count: int, captions: int = 1, first: int = 0) -> None:
    """Write a shard of images of 20 x 20 to 20 x 32 pixels, with several captions a line and a box each."""
    samples = []
    for i in range(first, first + count):
        text = "\n".join(f"{NAMES[i % 5]} {i} {line}" for line in range(captions))
        box = f"[[{i % 3}, 0.1, 0.2, 0.5, 0.6]]".encode()
        picture = encoded(noise_picture(i, height=20, width=20 + 4 * (i % 4)))
        samples.append(Sample(f"{i:03d}", text, picture, "png", {"label": i % 3, "boxes": box}))
    write_shard(path, samples)


def write_config(folder: Path, **changes: Any) -> Path:
    """Write the config of the experiment; ``changes`` replace top-level sections."""
    stages = ("vae", "clip", "denoiser")
    training = {stage: {**EXPERIMENT[stage], "train": EXPERIMENT[stage]["train"] | STEPS} for stage in stages}
    training["denoiser"]["conditioner"] = {"kind": "text", "pooled": True}
    data = EXPERIMENT["data"] | {
        "train": [str(folder / "images" / f"{i}.tar") for i in range(2)],
        "val": str(folder / "images" / "val.tar"),
        "captions": {"format": "lines"},
        "encoded": {"batch_size": 4, "shard_size": 8},
    }
    content = {**EXPERIMENT, **training, "data": data, "run_dir": str(folder / "run"), **changes}
    path = folder / "encoding.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def prepared(folder: Path, captions: int = 2) -> Path:
    """Write images and config, train the stages before the denoiser, and return the config."""
    (folder / "images").mkdir(parents=True)
    for i, count in enumerate((11, 10)):
        write_images(folder / "images" / f"{i}.tar", count, captions, 11 * i)
    write_images(folder / "images" / "val.tar", 5, captions, 100)
    config = write_config(folder)
    for stage in ("vae", "clip"):
        train_stage(load_config(config), stage)
    return config


def experiment(config: Path, *overrides: str) -> Experiment:
    """Return the experiment with overrides, of which the last counts if a key is given twice."""
    return load_config(config, [*{each.partition("=")[0]: each for each in overrides}.values()])


def started(config: Path, *arguments: str, ranks: int = 1) -> subprocess.Popen[str]:
    """Start tools/encode.py, with several ranks by torchrun."""
    start = (
        [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    )
    command = [*start, str(ROOT / "tools" / "encode.py"), "--config", str(config), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def encode(config: Path, *arguments: str, ranks: int = 1) -> str:
    """Run tools/encode.py and return what it prints."""
    process = started(config, *arguments, ranks=ranks)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out
