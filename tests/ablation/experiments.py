"""A model of pixels, which needs no stage 1 and 2 and takes a step in milliseconds, and files of recipes for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.experiments import TRAIN, write_experiment

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
        "loss": {"noise_level_sampler": {"kind": "lognormal", "mean": 0.5}},
        "sampling": {"num_inference_steps": 1},
        "train": TRAIN,
    },
}

RECIPES = {"plain": [], "twice the batch": ["denoiser.train.batch_size=8"]}


def write_recipes(folder: Path, recipes: Any = RECIPES, stage: Any = "denoiser") -> Path:
    path = folder / "recipes.yaml"
    path.write_text(yaml.safe_dump({"stage": stage, "recipes": recipes}, sort_keys=False))
    return path


def arguments_of(folder: Path, recipes: Any = RECIPES, minutes: float = 0.2) -> list[str]:
    """Arguments of the command for these recipes."""
    config, path = write_experiment(folder, PIXELS), write_recipes(folder, recipes)
    return ["--config", str(config), "--recipes", str(path), "--minutes", f"{minutes:g}"]
