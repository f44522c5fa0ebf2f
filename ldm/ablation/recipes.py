"""Recipes: named lists of ``key=value`` changes of a config, read from YAML and checked before anything is trained."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.ablation.metrics import METRICS
from ldm.config import to_dict
from ldm.diffusion.loss import DenoisingLossConfig
from ldm.errors import ConfigError, LdmError, TrainingError, unknown
from ldm.training.experiment import Experiment, load_config
from ldm.training.handoff import result_file
from ldm.training.subruns import with_predecessors
from ldm.yaml_text import parse, parse_value

PLAIN = "plain"
"""Recipe that the others are compared with."""

LOSS = "denoiser.loss"
"""Section of which a recipe that names another kind keeps the fields that both kinds have."""

FIXED = ("name", "run_dir", "seed")
"""Keys that the comparison itself sets."""


@dataclass(frozen=True)
class Recipes:
    """Recipes for a stage: the overrides of each, by name."""

    stage: str
    overrides: Mapping[str, Sequence[str]]


def read_recipes(path: Path) -> Recipes:
    """Read a file of recipes: ``stage``, and ``recipes`` with a list of ``key=value`` for each name.

    Raises:
        ConfigError: it is no such file, or has no recipe ``plain``.
    """
    try:
        values = parse(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"the recipes {path} cannot be read ({error.strerror}); configs/recipes/ has some.") from None
    except ConfigError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}.") from None
    if not isinstance(values, dict) or not isinstance(values.get("recipes"), dict):
        raise ConfigError(f"{path} needs the keys stage and recipes, as configs/recipes/denoiser.yaml has them.")
    for key in values:
        if key not in ("stage", "recipes"):
            raise ConfigError(f"{path}: {unknown('key', key, ('stage', 'recipes'))}")
    stage, recipes = values.get("stage"), values["recipes"]
    if stage not in METRICS:
        raise ConfigError(f"{path}: {unknown('stage', stage, METRICS)}")
    for name, overrides in recipes.items():
        if not (isinstance(overrides, list) and all(isinstance(each, str) for each in overrides)):
            raise ConfigError(
                f"{path}: the recipe {name!r} is {overrides!r}; write a list of texts, such as "
                f'["{stage}.train.optimizer=muon"].'
            )
        for key in map(_key, overrides):
            if key in (*FIXED, f"{stage}.train.max_steps"):
                raise ConfigError(
                    f"{path}: the recipe {name!r} sets {key}, which the comparison sets itself; remove it from the recipe."
                )
    if PLAIN not in recipes:
        raise ConfigError(
            f"{path} has no recipe {PLAIN!r}, with which the others are compared; add it as '{PLAIN}: []'."
        )
    return Recipes(stage, {str(name): tuple(overrides) for name, overrides in recipes.items()})


def chosen(recipes: Recipes, only: Sequence[str]) -> Recipes:
    """Return the recipes of these names, and ``plain``; all, if there are no names.

    Raises:
        ConfigError: a name is unknown.
    """
    for name in only:
        if name not in recipes.overrides:
            raise ConfigError(unknown("recipe", name, recipes.overrides))
    if not only:
        return recipes
    kept = {name: each for name, each in recipes.overrides.items() if name in (PLAIN, *only)}
    return replace(recipes, overrides=kept)


def open_recipes(config: Path, recipes: Recipes, overrides: Sequence[str]) -> dict[str, Experiment]:
    """Return the experiment of each recipe, ``plain`` first, with the results of the preceding stages as sources.

    Args:
        config: YAML of the experiment.
        recipes: the recipes.
        overrides: overrides of all runs; a recipe that gives one of their keys replaces it.

    Raises:
        LdmError: the experiment of a recipe is invalid, or the package of its optimizer is missing, the message names it; or a
            preceding stage has no result.
    """
    names = sorted(recipes.overrides, key=lambda name: name != PLAIN)  # a stable sort
    found: dict[str, Experiment] = {}
    for name in names:
        own = recipes.overrides[name]
        try:
            plain = found[PLAIN] if found else load_config(config, overrides)
            own = [_with_sources(_with_kept_fields(each, plain), plain) for each in own]
            common = [each for each in overrides if _key(each) not in map(_key, own)]
            experiment = load_config(config, [*common, *own])
            if recipes.stage not in experiment.stages:
                raise TrainingError(
                    f"{config} does not train stage {recipes.stage}; choose recipes for one of "
                    f"{', '.join(experiment.stages)}."
                )
            getattr(experiment, recipes.stage).train.optimizer.check()
        except LdmError as error:
            raise type(error)(f"recipe {name!r}: {error}") from None
        found[name] = with_predecessors(experiment, recipes.stage, "a comparison of recipes")
    if not found[PLAIN].data.has("val"):
        raise ConfigError("data.val is null, but recipes are compared on validation data; give them.")
    return found


def clip_source(experiment: Experiment) -> str | None:
    """Return the source of the CLIP of an experiment: ``clip.checkpoint`` or its result; None if there is none yet."""
    if experiment.clip is None:
        return None
    result = result_file(experiment, "clip")
    return experiment.clip.checkpoint or (str(result.absolute()) if result.is_file() else None)


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _with_sources(override: str, plain: Experiment) -> str:
    """Replace ``{clip}`` in an override by the source of the CLIP of stage 2.

    Raises:
        TrainingError: there is none.
    """
    if "{clip}" not in override:
        return override
    source = clip_source(plain)
    if source is None:
        raise TrainingError(
            f"{override} needs the CLIP of stage 2, but {result_file(plain, 'clip')} does not exist; train stage clip first, "
            "give clip.checkpoint, or leave the recipe out with --only."
        )
    return re.sub(r"\{clip\}", lambda _: json.dumps(source), override)


def _with_kept_fields(override: str, plain: Experiment) -> str:
    """Give a loss of another kind the fields of the plain one that both have, so that nothing but the kind differs."""
    key, _, text = override.partition("=")
    if key.strip() not in (LOSS, f"{LOSS}.kind"):
        return override
    value = parse_value(text)
    given: dict[str, Any] = value if isinstance(value, dict) else {"kind": value}
    kind = DenoisingLossConfig.kinds.get(given.get("kind", plain.denoiser.loss.kind))
    if kind is None:
        return override  # an error that load_config finds
    names = {each.name for each in dataclasses.fields(kind)}
    kept = {name: each for name, each in to_dict(plain.denoiser.loss).items() if name in names}
    return f"{LOSS}={json.dumps({**kept, **given})}"
