"""Files of recipes for a model of pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.experiments import PIXELS, write_experiment

LEVELS = {"noise_level_sampler": {"kind": "lognormal", "mean": 0.5}}

CHANGES: dict[str, Any] = PIXELS | {"denoiser": PIXELS["denoiser"] | {"loss": LEVELS}}
"""The model of pixels, with noise levels that are not the default."""

RECIPES = {"plain": [], "twice the batch": ["denoiser.train.batch_size=8"]}


def write_recipes(folder: Path, recipes: Any = RECIPES, stage: Any = "denoiser") -> Path:
    path = folder / "recipes.yaml"
    path.write_text(yaml.safe_dump({"stage": stage, "recipes": recipes}, sort_keys=False))
    return path


def arguments_of(folder: Path, recipes: Any = RECIPES, minutes: float = 0.2) -> list[str]:
    """Arguments of the command for these recipes."""
    config, path = write_experiment(folder, CHANGES), write_recipes(folder, recipes)
    return ["--config", str(config), "--recipes", str(path), "--minutes", f"{minutes:g}"]
