"""LoRA files in kohya's and in diffusers' naming: read as an adapter of a model, and written.

kohya writes the names of layers with underscores for dots. They are never split: every layer of the model is
spelled as each naming has it, and looked up.

|              | U-Net                                                        | text towers                                  |
|--------------|--------------------------------------------------------------|----------------------------------------------|
| kohya        | ``lora_unet_`` + name of a diffusers folder or an LDM file   | ``lora_te_`` or ``lora_te1_``, ``lora_te2_`` |
| diffusers    | ``unet.`` or nothing + name of a diffusers folder            | ``text_encoder.``, ``text_encoder_2.``       |
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import CheckpointError, first_line, unknown
from ldm.formats.hub import fetch, is_hub_id
from ldm.formats.kinds import kind_of
from ldm.formats.tensors import SAFETENSORS, check_finite, fingerprint, read_metadata, read_tensors, write_tensors
from ldm.model import LatentDiffusion
from ldm.nn.adapters import Adapter, AdapterLayer, unwrapped
from ldm.nn.lora import LoRALayer
from ldm.nn.network_format import Rules, renamed
from ldm.paths import expanded

FILE = "pytorch_lora_weights.safetensors"
"""Name of the LoRA file in a folder that diffusers wrote."""

METADATA = "lora_adapter_metadata"
"""Metadata entry of diffusers: the configs of PEFT in JSON, each key after the name of its component."""

TENSORS = {
    "down": r"(?:\.lora_(?:A|down)(?:\.\w+)?|[._]lora(?:_linear_layer)?\.down)\.weight",
    "up": r"(?:\.lora_(?:B|up)(?:\.\w+)?|[._]lora(?:_linear_layer)?\.up)\.weight",
    "mid": r"\.lora_mid\.weight",
    "alpha": r"\.alpha",
}
"""Endings of the names of a layer's tensors, as regular expressions; the name of the layer precedes them."""

ENDINGS = {"diffusers": ("lora_A.weight", "lora_B.weight"), "kohya": ("lora_down.weight", "lora_up.weight")}
"""Endings of the names that :func:`write_lora` gives to A and B, by naming."""

OLD: Rules = (
    (r"\.processor\.", "."),
    (r"\b(attn\d)\.to_out$", r"\1.to_out.0"),
    (r"\bself_attn\.to_([qkv])$", r"self_attn.\1_proj"),
    (r"\bself_attn\.to_out$", "self_attn.out_proj"),
)
"""Names of layers in files of the diffusers versions in which LoRA was a kind of attention processor."""

OTHERS = {
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.dora_scale|lora_magnitude_vector": "DoRA",
    r"\.oft_": "OFT",
    r"\.diff(_b)?$|\.(w|b)_norm$": "full differences of weights",
}
"""Patterns of tensor names by which adapters other than LoRA are recognized."""

FAMILY_MARKS = {
    r"double_blocks|single_blocks|single_transformer_blocks|joint_blocks|^(lora_)?transformer[._]": "FLUX or SD 3",
    r"^lora_te[12]_|^text_encoder_2\.|label_emb|add_embedding|transformer_blocks[._][1-9]": "SDXL",
}
"""Patterns of tensor names by which the kind of model that a LoRA is for is recognized."""

CONTEXT_WIDTHS = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}


def read_lora(
    source: str | PathLike[str],
    model: LatentDiffusion,
    scale: float = 1.0,
    name: str | None = None,
    merged: bool = False,
) -> Adapter:
    """Read the LoRA of a file for a model.

    Args:
        source: a .safetensors file (or a pickle of tensors), a folder with a ``pytorch_lora_weights.safetensors``, or the id of
            either on the hub.
        scale, name, merged: of the :class:`ldm.nn.adapters.Adapter`; default name: the last part of the source, without ending.

    Raises:
        CheckpointError: the file is broken, is not a LoRA, or is one for another kind of model.
    """
    model = unwrapped(model)
    path = fetch(source) if isinstance(source, str) and is_hub_id(source) else Path(expanded(source))
    if path.is_dir():
        path /= FILE
    tensors, config = read_tensors(path), _config(path)
    for key in tensors:
        for mark, what in OTHERS.items():
            if re.search(mark, key):
                raise CheckpointError(f"{path} holds {what} ({key}), which ldm does not read; use a plain LoRA.")
    check_finite(tensors, path)
    looks = _looks(tensors, model)
    layers: dict[str, AdapterLayer] = {}
    for layer, found in _by_layer(path, tensors, layer_names(model), looks).items():
        weight = model.get_submodule(layer).get_parameter("weight")
        layers[layer] = _update(path, found, config, weight.shape, looks)
    if not layers:
        raise CheckpointError(f"{path} holds no LoRA; name a file with tensors such as ...lora_down.weight in it.")
    name = name or Path(source).name.removesuffix(SAFETENSORS)
    return Adapter(name, layers, fingerprint(tensors, config), scale, merged)


def write_lora(path: str | PathLike[str], adapter: Adapter, model: LatentDiffusion, naming: str = "diffusers") -> Path:
    """Write a LoRA, loaded or trained, in the precision of its parameters and at scale 1.

    Args:
        path: of the .safetensors file.
        adapter: a LoRA for ``model``.
        naming: ``"diffusers"``, with the alphas in the metadata as PEFT has them, or ``"kohya"``, with a tensor for each alpha.

    Raises:
        CheckpointError: the naming is unknown, the adapter is not a LoRA, or the naming has no name for one of its layers.
    """
    path = Path(expanded(path))
    if naming not in ENDINGS:
        raise CheckpointError(unknown("naming of LoRA files", naming, ENDINGS))
    spelled: dict[str, str] = {}  # the first that is listed is that of a diffusers folder, with all its infixes
    for theirs, ours in layer_names(unwrapped(model)).items():
        if theirs.startswith("lora_") if naming == "kohya" else theirs.startswith(("unet.", "text_encoder")):
            spelled.setdefault(ours, theirs)
    tensors, layers = dict[str, Tensor](), dict[str, LoRALayer]()
    for layer, change in adapter.layers.items():
        if not isinstance(change, LoRALayer) or layer not in spelled:
            raise CheckpointError(
                f"{path}: {naming}'s LoRA files have no name for {layer} with {type(change).__name__}."
            )
        layers[spelled[layer]] = change
        pair = change.down, change.up[:, :, None, None] if change.down.ndim == 4 else change.up
        tensors |= {f"{spelled[layer]}.{end}": tensor for end, tensor in zip(ENDINGS[naming], pair, strict=True)}
        if naming == "kohya":
            tensors[f"{spelled[layer]}.alpha"] = torch.tensor(float(change.alpha))
    metadata = {METADATA: json.dumps(_peft_config(layers), sort_keys=True)} if naming == "diffusers" else {}
    write_tensors(path, tensors, {"format": "pt"} | metadata)
    return path


def _peft_config(layers: Mapping[str, LoRALayer]) -> dict[str, Any]:
    """Describe LoRA layers by their names in diffusers, as the fields of PEFT's LoraConfig for each component."""
    config: dict[str, Any] = {}
    for component in dict.fromkeys(name.partition(".")[0] for name in layers):
        parts = {name.partition(".")[2]: each for name, each in layers.items() if name.partition(".")[0] == component}
        ranks = {name: each.down.shape[0] for name, each in parts.items()}
        alphas = {name: each.alpha for name, each in parts.items()}
        for key, pattern, values in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
            usual = next(iter(values.values()))
            config[f"{component}.{key}"] = usual
            config[f"{component}.{pattern}"] = {name: value for name, value in values.items() if value != usual}
        config[f"{component}.target_modules"] = list(parts)
    return config


@dataclass(frozen=True)
class Found:
    """A tensor of a layer's LoRA: its key in the file, and the layer there."""

    key: str
    layer: str
    tensor: Tensor


def layer_names(model: LatentDiffusion) -> dict[str, str]:
    """Map the names that layers of a model have in LoRA files of either naming to those in the model."""
    components, layers = model.components, dict[str, str]()
    for name, (prefix, config) in components.items():
        spelled = kind_of(config).lora_names
        modules = model.get_submodule(prefix).named_modules()
        own = [module for module, each in modules if isinstance(each, nn.Linear | nn.Conv2d)]
        theirs = spelled(config, own, name, components) if spelled else {}
        layers |= {each: f"{prefix}.{layer}" for each, layer in theirs.items()}
    return layers


def _by_layer(
    path: Path, tensors: Mapping[str, Tensor], layers: Mapping[str, str], looks: str
) -> dict[str, dict[str, Found]]:
    """Group the tensors by the names of layers in the model, then by the keys of :data:`TENSORS`."""
    updates: dict[str, dict[str, Found]] = defaultdict(dict)
    for key, tensor in tensors.items():
        ends = ((what, re.search(f"{end}$", key)) for what, end in TENSORS.items())
        what, match = next(((what, match) for what, match in ends if match), ("", None))
        if match is None:
            raise CheckpointError(f"{path} holds {key}, which is not a LoRA tensor{looks}; name a LoRA file.")
        layer = renamed(key[: match.start()], OLD)
        if layer not in layers:
            raise CheckpointError(
                f"{path} holds {key}, which fits no layer of this model{looks}; use one that was trained on this kind of model."
            )
        found = updates[layers[layer]].setdefault(what, Found(key, layer, tensor))
        if found.key != key:
            raise CheckpointError(f"{path} holds both {found.key} and {key}, of one layer; split it into two files.")
    return updates


def _update(
    path: Path, found: Mapping[str, Found], config: Mapping[str, Any], shape: Sequence[int], looks: str
) -> LoRALayer:
    """Make the LoRA of a layer with a weight of this ``shape``."""
    for what in ("down", "up"):
        if what not in found:
            key = next(iter(found.values())).key
            raise CheckpointError(f"{path} holds {key}, but no {what} of the same layer; download the file again.")
    for each in found.values():
        if not each.tensor.is_floating_point() and each is not found.get("alpha"):
            raise CheckpointError(
                f"{path}: {each.key} holds {each.tensor.dtype}, but weights are floats; download it again."
            )
    down, up = found["down"].tensor, found["up"].tensor
    if "mid" in found:
        down = _with_mid(path, found["mid"], down)
    r = down.shape[0] if down.ndim else 0
    for each, tensor, expected in ((found["down"], down, (r, *shape[1:])), (found["up"], up, (shape[0], r))):
        if not r or _plain(tensor.shape) != _plain(expected):
            raise CheckpointError(
                f"{path}: {each.key} has the shape {list(each.tensor.shape)}, which does not fit the layer, of shape "
                f"{list(shape)}{looks}; use one that was trained on this kind of model."
            )
    alpha = _alpha(path, found, config, r)
    return LoRALayer(down.reshape(r, *shape[1:]).clone(), up.reshape(shape[0], r).clone(), alpha)


def _with_mid(path: Path, mid: Found, down: Tensor) -> Tensor:
    """Compose the 1 x 1 convolution ``down`` and the k x k one after it into one: ``[r in k k]``."""
    if mid.tensor.ndim != 4 or down.ndim != 4 or down.shape[2:] != (1, 1) or down.shape[0] != mid.tensor.shape[1]:
        raise CheckpointError(f"{path}: {mid.key} has the shape {list(mid.tensor.shape)}, which does not fit its down.")
    return torch.einsum("pqkl,qi->pikl", mid.tensor.float(), down.flatten(1).float())


def _plain(shape: Sequence[int]) -> list[int]:
    """Remove the ones at the end of a shape: linear layers and 1 x 1 convolutions are interchangeable."""
    sides = list(shape)
    while sides and sides[-1] == 1:
        sides.pop()
    return sides


def _alpha(path: Path, found: Mapping[str, Found], config: Mapping[str, Any], r: int) -> float:
    """Find alpha: in a tensor, or in the metadata (for all layers of a network, or by pattern); else it is r."""
    if "alpha" in found:
        alpha = found["alpha"].tensor
        if alpha.numel() != 1:
            raise CheckpointError(f"{path}: {found['alpha'].key} holds {alpha.numel()} numbers; an alpha is one.")
        return float(alpha)
    component, _, layer = found["down"].layer.partition(".")
    if component not in ("unet", "text_encoder", "text_encoder_2"):
        component, layer = "", found["down"].layer
    start = f"{component}." if component else ""
    value: Any = config.get(f"{start}lora_alpha", r)
    patterns = config.get(f"{start}alpha_pattern") or {}
    for pattern, own in patterns.items() if isinstance(patterns, dict) else ():
        if f".{layer}".endswith(f".{pattern}"):
            value = own
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{path} has an alpha of {value!r} in its {METADATA}; download the file again.")
    return value * math.sqrt(r) if config.get(f"{start}use_rslora") else float(value)


def _config(path: Path) -> dict[str, Any]:
    """Read PEFT's configs in the metadata that diffusers writes."""
    try:
        config = json.loads(read_metadata(path).get(METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the {METADATA} of {path} cannot be read ({first_line(error)}); download it again."
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"the {METADATA} of {path} is not a JSON object; download it again.")
    return config


def _looks(tensors: Mapping[str, Tensor], model: LatentDiffusion) -> str:
    """Describe, for errors, the kind of model that a file is for, if it is another than this one; else an empty string."""
    own = (
        "SDXL" if "text_encoder_2" in model.components else CONTEXT_WIDTHS.get(model.config.denoiser.context_width or 0)
    )
    kind = next((kind for mark, kind in FAMILY_MARKS.items() if any(re.search(mark, key) for key in tensors)), None)
    for key, tensor in tensors.items():
        if kind is None and re.search(r"attn2[._].*to_k.*(down|A)\b", key) and tensor.ndim > 1:
            kind = CONTEXT_WIDTHS.get(tensor.shape[1])
    return f" (it looks like a LoRA of {kind})" if kind and kind != own else ""
