"""Configs of PEFT: in the metadata of diffusers' LoRA files, and in the ``adapter_config.json`` of PEFT's own folders.

A config is a flat dictionary. In diffusers' metadata each key is preceded by the name of its component, such as ``unet.r``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import CheckpointError, first_line
from ldm.formats.tensors import read_metadata
from ldm.nn.adapter_format import Scaling
from ldm.nn.lora import LoRALayer

METADATA = "lora_adapter_metadata"
"""Metadata entry of diffusers: the configs in JSON."""

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
"""Files of PEFT's own folders."""

PREFIX = "base_model.model."
"""Prefix of all names in PEFT's own files."""

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def read_config(path: Path) -> dict[str, Any]:
    """Read the config of a file: of the ``adapter_config.json`` next to it if the file is PEFT's, else of its metadata.

    Raises:
        CheckpointError: the config cannot be read.
    """
    sibling = path.with_name(CONFIG)
    own = path.name in WEIGHTS and sibling.is_file()
    where = str(sibling) if own else f"the {METADATA} of {path}"
    try:
        config = json.loads(sibling.read_text(encoding="utf-8") if own else read_metadata(path).get(METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} cannot be read ({first_line(error)}); download it again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{where} is not a JSON object; download it again.")
    return config


def scaling_of(config: Mapping[str, Any], layer: str, tensor: float | None, path: Path) -> Scaling:
    """Return the scaling of a layer of a file.

    Args:
        config: config of the file.
        layer: name of the layer in the file, after its component and a dot if it has one.
        tensor: value of its alpha tensor; None if it has none.
        path: the file, for error messages.

    Raises:
        CheckpointError: the config has an invalid value for it.
    """
    component, _, name = layer.partition(".")
    start, name = (f"{component}.", name) if component in COMPONENTS else ("", layer)
    values: dict[str, float | None] = {}
    for keys, patterns in ((("lora_alpha", "alpha"), "alpha_pattern"), (("r",), "rank_pattern")):
        usual = next((config[start + key] for key in keys if start + key in config), None)
        value = values[keys[-1]] = _matching(config.get(start + patterns), name, usual, path)
        if isinstance(value, bool) or not isinstance(value, int | float | None) or not math.isfinite(value or 0):
            raise CheckpointError(
                f"{path} has {keys[0]} {value!r} for {layer} in its PEFT config; download the file again."
            )
    rank = values["r"]
    return Scaling(tensor, values["alpha"], None if rank is None else int(rank), bool(config.get(f"{start}use_rslora")))


def _matching(patterns: Any, layer: str, usual: Any, path: Path) -> Any:
    """Return the value of the first pattern that matches the end of a layer's name, after a dot, as PEFT does; else ``usual``."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        except re.error as error:
            raise CheckpointError(
                f"{path} has the pattern {pattern!r} in its PEFT config, which is not a regular expression "
                f"({first_line(error)}); download the file again."
            ) from None
    return usual


def lora_config(layers: Mapping[str, LoRALayer]) -> dict[str, Any]:
    """Describe LoRA layers (by their names in diffusers) as fields of PEFT's LoraConfig for each component."""
    config: dict[str, Any] = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in layers):
        parts = {name.partition(".")[2]: each for name, each in layers.items() if name.partition(".")[0] == component}
        ranks = {name: len(layer.down) for name, layer in parts.items()}
        alphas = {name: layer.alpha for name, layer in parts.items()}
        for key, pattern, values in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
            usual = next(iter(values.values()))
            config[f"{component}.{key}"] = usual
            config[f"{component}.{pattern}"] = {name: value for name, value in values.items() if value != usual}
        config[f"{component}.target_modules"] = list(parts)
        if any(layer.bias is not None for layer in parts.values()):
            config[f"{component}.lora_bias"] = True
    return config
