"""Every config in configs/ is composed, and each stage that it trains is trained for two steps, with small networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ldm.config import from_dict, read_yaml
from ldm.training.experiment import Experiment, load_config
from ldm.training.stages import train_stage
from tests.experiments import write_experiment

CONFIGS = sorted({*Path("configs").rglob("*.yaml")} - {*Path("configs/recipes").iterdir()})
WIDTH, SIZE = 32, 32

SMALL: dict[str, Any] = {
    **dict.fromkeys(("width", "context_width", "vector_width", "embed_dim"), WIDTH),
    "groups": 8,
    "heads": 4,
    "layers": 1,
    "blocks": 1,
    "patch_size": 8,
    "disc_width": 8,
    "samples": 16,
    "points": 64,
    "lpips": 0.0,
    "disc_start": 1,
    "workers": 0,
    "cache": "none",
    "init": None,
    "batch_size": 4,
    "max_steps": 2,
    "warmup_steps": 1,
    "validate_every": 2,
    "images_every": 100,
    "checkpoint_every": 2,
    "num_inference_steps": 2,
}
"""Values that replace those of a config, if it has the key and not null, wherever it is."""


def shrunk(value: Any) -> Any:
    """Return a section with fewer channels, blocks and steps, and smaller images."""
    if isinstance(value, list):
        return [shrunk(each) for each in value]
    if not isinstance(value, dict):
        return value
    small = {key: shrunk(each) if each is None or key not in SMALL else SMALL[key] for key, each in value.items()}
    if "widths" in small:
        small["widths"] = [WIDTH] * len(small["widths"])
    for key in ("size", "image_size", "accumulate", "depth"):
        if key in small:
            small[key] = min(small[key], {"accumulate": 2, "depth": 1}.get(key, SIZE))
    return small


def small_experiment(path: Path, folder: Path) -> Experiment:
    """Return the experiment of a config on eight images, with small networks trained in place of checkpoints."""
    config = shrunk(read_yaml(path))
    shard = str(folder / "train.tar")
    write_experiment(folder)
    if config["data"]["kind"] == "shards":
        config["data"] |= {"train": shard, "val": shard}
    for stage in ("vae", "clip"):
        if config.get(stage, {}).get("checkpoint"):
            config[stage] |= {"checkpoint": None, "train": config["denoiser"]["train"]}
    if (clip := config.get("clip")) is not None and clip["model"].get("image") is None:  # the text encoder alone
        clip["model"] |= {
            "embed_dim": WIDTH,
            "image": {"kind": "vit", "image_size": SIZE, "patch_size": 8, "width": WIDTH},
        }
        clip["model"]["image"] |= {"layers": 1, "heads": 4}
    trainer = {"accelerator": "cpu", "devices": 1, "precision": "fp32"}
    return from_dict(Experiment, config | {"run_dir": str(folder / "run"), "trainer": trainer})


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_config_is_composed(path: Path) -> None:
    assert load_config(path).stages


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the prompt .* has more tokens")  # the tokenizer has eight captions to learn from
@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_each_stage_of_a_config_trains(path: Path, tmp_path: Path) -> None:
    experiment = small_experiment(path, tmp_path)
    for stage in experiment.stages:
        assert train_stage(experiment, stage).is_file()
