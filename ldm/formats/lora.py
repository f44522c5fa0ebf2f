"""LoRA files in kohya's, diffusers' and PEFT's naming: read as an adapter of a model, and written.

Names of layers are handled here; the tensors of a layer belong to a kind of adapter, such as LoRA or LoHa, which describes them
itself (:mod:`ldm.nn.adapter_format`).

kohya writes the names of layers with underscores for dots. They are never split: every layer of the model is
spelled as each naming has it, and looked up.

|              | U-Net                                                        | text towers                                  |
|--------------|--------------------------------------------------------------|----------------------------------------------|
| kohya        | ``lora_unet_`` + name of a diffusers folder or an LDM file   | ``lora_te_`` or ``lora_te1_``, ``lora_te2_`` |
| diffusers    | ``unet.`` or nothing + name of a diffusers folder            | ``text_encoder.``, ``text_encoder_2.``       |
| PEFT         | ``base_model.model.`` + name of a diffusers folder           | ``base_model.model.``                        |
| ComfyUI      | ``diffusion_model.`` + name of an LDM file                   |                                              |
| SimpleTuner  | ``lycoris_`` + name of a diffusers folder, as in kohya's     |                                              |
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import CheckpointError, unknown
from ldm.formats.hub import fetch, is_hub_id
from ldm.formats.kinds import kind_of
from ldm.formats.peft import COMPONENTS, CONFIG, METADATA, PREFIX, WEIGHTS, lora_config, read_config, scaling_of
from ldm.formats.tensors import SAFETENSORS, check_finite, fingerprint, read_tensors, write_tensors
from ldm.formats.textual_inversion import is_bundled
from ldm.model import LatentDiffusion
from ldm.nn.adapter_format import MisshapenTensor, MissingTensor, MixedKinds, format_of, formats, read_layer
from ldm.nn.adapters import Adapter, AdapterLayer, unwrapped
from ldm.nn.lora import LoRALayer
from ldm.nn.network_format import Rules, renamed
from ldm.paths import expanded

FILE = "pytorch_lora_weights.safetensors"
"""Name of the LoRA file in a folder that diffusers wrote."""

NAMINGS = ("diffusers", "kohya")
"""Namings that :func:`write_lora` knows."""

PREFIXES = ("", "text_encoder.", "text_encoder_2.")
"""Components that names without one are tried in; the names of the U-Net are known without."""

FACTORS = {"alpha": r"\.alpha", "scalar": r"\.scalar"}
"""Ends of the names of the factors of a layer, in all kinds of adapter; see :class:`ldm.nn.adapter_format.Scaling`."""

OLD: Rules = (
    (r"\.processor\.", "."),
    (r"\b(attn\d)\.to_out$", r"\1.to_out.0"),
    (r"\bself_attn\.to_([qkv])$", r"self_attn.\1_proj"),
    (r"\bself_attn\.to_out$", "self_attn.out_proj"),
)
"""Names of layers in files of the diffusers versions in which LoRA was a kind of attention processor."""

OTHERS: Rules = (
    (r"\bbase_model\.model\.", ""),
    (r"^lycoris_", "lora_unet_"),
)
"""Names of layers in files in which several programs had a part."""

COMFY = re.compile(r"(?:model\.)?diffusion_model\.(.+)")
"""Name of a layer in files of ComfyUI."""

UNSUPPORTED = {
    r"\.b?oft_": "OFT",
    r"\.on_input$": "(IA)^3",
    r"\.(a1|a2|b1|b2)\.weight$": "GLoRA",
}
"""Patterns of tensor names by which adapters of other kinds are recognized."""

FAMILY_MARKS = {
    r"double_blocks|single_blocks|single_transformer_blocks|joint_blocks|^(lora_)?transformer[._]": "FLUX or SD 3",
    r"^lora_te[12]_|^text_encoder_2\.|label_emb|add_embedding|transformer_blocks[._][1-9]": "SDXL",
}
"""Patterns of tensor names by which the kind of model that a LoRA is for is recognized."""

LORA_TYPES: tuple[type[nn.Module], ...] = nn.Linear, nn.Conv2d
"""Types of layers that LoRAs change."""

ADAPTED_TYPES = *LORA_TYPES, nn.GroupNorm, nn.LayerNorm
"""Types of layers that any kind of adapter changes."""

CONTEXT_WIDTHS = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}


def read_lora(
    source: str | PathLike[str],
    model: LatentDiffusion,
    scale: float = 1.0,
    name: str | None = None,
    merged: bool = False,
    files: Mapping[str, Path] | None = None,
) -> Adapter:
    """Read the LoRA of a file for a model.

    Args:
        source: a .safetensors file (or a pickle of tensors), a folder that diffusers or PEFT wrote (or one with a PEFT folder for
            each component, such as ``unet``), or the id of any of these on the hub.
        scale, name, merged: of the :class:`ldm.nn.adapters.Adapter`; default name: the last part of the source, without ending.
        files: the files of the source, if :func:`lora_files` has been called already.

    Raises:
        CheckpointError: the file is broken, is not a LoRA, or is one for another kind of model.
    """
    model = unwrapped(model)
    tensors, config = dict[str, Tensor](), dict[str, Any]()
    files = files or lora_files(source)
    path = next(iter(files.values()))
    for component, file in files.items():
        start = f"{component}." if component else ""
        own = read_tensors(file).items()
        tensors |= {start + key.removeprefix(PREFIX): tensor for key, tensor in own if not is_bundled(key)}
        config |= {start + key: value for key, value in read_config(file).items()}
    for key in tensors:
        for mark, what in UNSUPPORTED.items():
            if re.search(mark, key):
                raise CheckpointError(f"{path} holds {what} ({key}), which ldm does not read; use a LoRA.")
    check_finite(tensors, path)
    looks, names, errors = _looks(tensors, model), layer_names(model, ADAPTED_TYPES), []
    for prefix in PREFIXES:  # names without a component: of the U-Net, unless they fit a text encoder alone
        try:
            layers = {
                layer: _layer(path, found, config, model.get_submodule(layer), looks)
                for layer, found in _by_layer(path, tensors, names, prefix, looks).items()
            }
            break
        except CheckpointError as error:
            errors.append(error)
    else:
        raise errors[0]
    if not layers:
        raise CheckpointError(f"{path} holds no LoRA; name a file with tensors such as ...lora_down.weight in it.")
    name = name or Path(source).name.removesuffix(SAFETENSORS)
    return Adapter(name, layers, fingerprint(tensors, config), scale, merged)


def lora_files(source: str | PathLike[str]) -> dict[str, Path]:
    """Return the file of a source of :func:`read_lora`; those of a folder with PEFT folders of several components by component.

    Raises:
        CheckpointError: it cannot be downloaded.
    """
    hub = isinstance(source, str) and is_hub_id(source)
    path = fetch(str(source)) if hub else Path(expanded(source))
    if hub and path.name in WEIGHTS and str(source).count("/") == 1:
        fetch(f"{source}/{CONFIG}")
    if not path.is_dir():
        return {"": path}
    folders = {name: path / name for name in COMPONENTS if (path / name / CONFIG).is_file()} or {"": path}
    names = (FILE, *WEIGHTS)
    return {
        component: next((folder / name for name in names if (folder / name).is_file()), folder / FILE)
        for component, folder in folders.items()
    }


def write_lora(path: str | PathLike[str], adapter: Adapter, model: LatentDiffusion, naming: str = "diffusers") -> Path:
    """Write an adapter, loaded or trained, in the precision of its parameters and at scale 1.

    Args:
        path: of the .safetensors file.
        adapter: an adapter of ``model``; kinds other than LoRA have names in kohya's naming alone, those of LyCORIS.
        naming: ``"diffusers"``, with the alphas in the metadata as PEFT has them, or ``"kohya"``, with a tensor for each alpha.

    Raises:
        CheckpointError: the naming is unknown or has no name for a layer with its kind of adapter, or the adapter of a layer
            is not finite or does not fit it.
    """
    path = Path(expanded(path))
    if naming not in NAMINGS:
        raise CheckpointError(unknown("naming of LoRA files", naming, NAMINGS))
    spelled: dict[str, str] = {}  # the first that is listed is that of a diffusers folder, with all its infixes
    model = unwrapped(model)
    for theirs, ours in layer_names(model, ADAPTED_TYPES).items():
        if theirs.startswith("lora_") if naming == "kohya" else theirs.startswith(("unet.", "text_encoder")):
            spelled.setdefault(ours, theirs)
    tensors, layers = dict[str, Tensor](), dict[str, LoRALayer]()
    for layer, change in adapter.layers.items():
        form = format_of(change)
        own = form.write(change, naming) if form is not None and layer in spelled else None
        if own is None:
            raise CheckpointError(
                f"{path}: {naming}'s LoRA files have no name for {layer} with {type(change).__name__}."
            )
        finite = math.isfinite(getattr(change, "alpha", 0.0)) and all(
            tensor.isfinite().all() for tensor in own.values()
        )
        if not finite or not _fits(change, model.get_submodule(layer)):
            shapes = ", ".join(f"{end} {list(tensor.shape)}" for end, tensor in own.items())
            raise CheckpointError(
                f"nothing is written to {path}, because the adapter of {layer} is not finite or does not fit the layer, of shape "
                f"{list(model.get_submodule(layer).get_parameter('weight').shape)}: {shapes}."
            )
        tensors |= {f"{spelled[layer]}.{end}": tensor for end, tensor in own.items()}
        if isinstance(change, LoRALayer):
            layers[spelled[layer]] = change
    metadata = {METADATA: json.dumps(lora_config(layers), sort_keys=True)} if naming == "diffusers" else {}
    write_tensors(path, tensors, {"format": "pt"} | metadata)
    return path


@dataclass(frozen=True)
class Found:
    """A tensor of a layer's adapter: its key in the file, and the layer there."""

    key: str
    layer: str
    tensor: Tensor


def layer_names(model: LatentDiffusion, types: tuple[type[nn.Module], ...] = LORA_TYPES) -> dict[str, str]:
    """Map the names that layers of these types have in LoRA files of any naming to those in the model."""
    components, layers = model.components, dict[str, str]()
    for name, (prefix, config) in components.items():
        spelled = kind_of(config).lora_names
        modules = model.get_submodule(prefix).named_modules()
        own = [module for module, each in modules if isinstance(each, types)]
        theirs = spelled(config, own, name, components) if spelled else {}
        layers |= {each: f"{prefix}.{layer}" for each, layer in theirs.items()}
    return layers


def _by_layer(
    path: Path, tensors: Mapping[str, Tensor], layers: Mapping[str, str], prefix: str, looks: str
) -> dict[str, dict[str, Found]]:
    """Group the tensors by the names of layers in the model, then by role; ``prefix`` precedes names without a component."""
    endings = FACTORS | {role: end for form in formats() for role, end in form.endings.items()}
    updates: dict[str, dict[str, Found]] = defaultdict(dict)
    for key, tensor in tensors.items():
        ends = ((role, re.search(f"(?:{end})$", key)) for role, end in endings.items())
        role, match = next(((role, match) for role, match in ends if match), ("", None))
        if match is None:
            raise CheckpointError(f"{path} holds {key}, which is not a LoRA tensor{looks}; name a LoRA file.")
        layer = renamed(key[: match.start()], [*OLD, *OTHERS])
        if comfy := COMFY.fullmatch(layer):  # kohya's names lead to the same layers
            layer = f"lora_unet_{comfy[1].replace('.', '_')}"
        ours = layers.get(layer) or layers.get(prefix + layer)
        if ours is None:
            raise CheckpointError(
                f"{path} holds {key}, which fits no layer of this model{looks}; use one that was trained on this kind of model."
            )
        found = updates[ours].setdefault(role, Found(key, layer, tensor))
        if found.key != key:
            raise CheckpointError(f"{path} holds both {found.key} and {key}, of one layer; split it into two files.")
    return updates


def _layer(
    path: Path, found: Mapping[str, Found], config: Mapping[str, Any], layer: nn.Module, looks: str
) -> AdapterLayer:
    """Build the adapter of a layer."""
    for each in found.values():
        if not each.tensor.is_floating_point() and each is not found.get("alpha"):
            raise CheckpointError(
                f"{path}: {each.key} holds {each.tensor.dtype}, but weights are floats; download it again."
            )
    weight, first = layer.get_parameter("weight"), next(iter(found.values()))
    tensors = {role: each.tensor for role, each in found.items() if role not in FACTORS}
    scaling = scaling_of(config, first.layer, _factor(path, found.get("alpha")), path)
    scalar = _factor(path, found.get("scalar"))
    scaling = scaling if scalar is None else replace(scaling, scalar=scalar)
    try:
        adapter = read_layer(tensors, weight.shape, scaling)
        if not _fits(adapter, layer):
            raise MisshapenTensor(next(iter(tensors)))
    except MissingTensor as error:
        raise CheckpointError(
            f"{path} holds {first.key}, but no {error} of the same layer; download the file again."
        ) from None
    except MixedKinds:
        keys = ", ".join(each.key for each in found.values())
        raise CheckpointError(
            f"{path} holds tensors of several kinds of adapter for one layer ({keys}); split it into two files."
        ) from None
    except MisshapenTensor as error:
        each = found[str(error)]
        raise CheckpointError(
            f"{path}: {each.key} has the shape {list(each.tensor.shape)}, which does not fit the layer, of shape "
            f"{list(weight.shape)}{looks}; use one that was trained on this kind of model."
        ) from None
    return adapter


def _fits(adapter: AdapterLayer, layer: nn.Module) -> bool:
    """Return True if the changes of an adapter have the shapes of the layer's parameters."""
    weight = layer.get_parameter("weight")
    try:
        delta = adapter.delta(torch.empty_like(weight, device="meta"))
        bias_delta = adapter.bias_delta(torch.empty(weight.shape[:1], device="meta", dtype=weight.dtype))
    except RuntimeError:  # of a product of matrices that do not fit each other
        return False
    return delta.shape == weight.shape and (bias_delta is None or bias_delta.shape == weight.shape[:1])


def _factor(path: Path, found: Found | None) -> float | None:
    """Return the value of a tensor of :data:`FACTORS`; None if the layer has none."""
    if found is None:
        return None
    if found.tensor.numel() != 1:
        raise CheckpointError(
            f"{path}: {found.key} holds {found.tensor.numel()} numbers; it must be a single one. Download the file again."
        )
    return float(found.tensor)


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
