"""LoRAs that prompts name, such as ``<lora:name:0.8>``: in effect for the images of that prompt, and for one call."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.conditioning.textual_inversion import add_inversions, changed_modules
from ldm.errors import SamplingError, some, unknown, warn
from ldm.formats.lora import read_lora
from ldm.formats.tensors import PICKLES, SAFETENSORS
from ldm.formats.textual_inversion import read_bundled
from ldm.load_options import Source
from ldm.model import LatentDiffusion
from ldm.nn.adapters import Adapter, unwrapped
from ldm.nn.views import view
from ldm.prompt_syntax import LoRATag

Scales = Mapping[str, tuple[float, float]]
"""Scales of LoRAs by name: in the text encoders, and in the denoiser."""


def prompt_models(
    model: LatentDiffusion, named: Sequence[Sequence[LoRATag]], folder: Source | None
) -> list[LatentDiffusion]:
    """Return the model of each image: ``model``, or a view of it with the LoRAs that its prompt names.

    A LoRA that is loaded already gets the scale of the tag; the others are read from ``folder``.

    Args:
        model: the model, which stays as it is.
        named: the LoRAs that the prompt of each image names; one that is named several times has the sum of its scales.
        folder: folder of LoRA files, searched with its subfolders; None: such names have no effect, and a warning is issued.

    Raises:
        SamplingError: a LoRA is neither loaded nor in the folder, occurs there several times, or is merged.
        CheckpointError: a file cannot be read, or is for another model.
    """
    found = {} if folder is None else _files(Path(folder))
    files = {name: paths[0] for name, paths in found.items()}
    known = {*files, *model.adapters.loaded}
    for tag in dict.fromkeys(tag for tags in named for tag in tags if tag.name not in known):
        if folder is not None:
            raise SamplingError(f"{tag.written} in a prompt: {unknown('LoRA', tag.name, known)}")
        warn(f"{tag.written!r} in a prompt has no effect: no such LoRA is loaded, and lora_folder is not given.")
    for tag in dict.fromkeys(tag for tags in named for tag in tags if tag.name not in model.adapters.loaded):
        if len({path.resolve() for path in found.get(tag.name, ())}) > 1:
            raise SamplingError(
                f"{tag.written} in a prompt: {folder} has several LoRAs of this name "
                f"({some([str(path.relative_to(str(folder))) for path in found[tag.name]])}); rename all but one."
            )
    views: dict[tuple[tuple[str, tuple[float, float]], ...], LatentDiffusion] = {(): model}
    models = []
    for tags in named:
        scales: dict[str, tuple[float, float]] = {}
        for tag in (tag for tag in tags if tag.name in known):
            text_scale, scale = scales.get(tag.name, (0.0, 0.0))
            scales[tag.name] = text_scale + tag.text_scale, scale + tag.scale
        key = tuple(sorted(scales.items()))
        if key not in views:
            views[key] = _with_loras(model, scales, files)
        models.append(views[key])
    return models


def lora_names(folder: Path) -> list[str]:
    """Return the names by which prompts call the LoRAs of a folder."""
    return sorted(_files(folder))


def _files(folder: Path) -> dict[str, list[Path]]:
    """Return the LoRA files of a folder and its subfolders by name, without ending."""
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.suffix in (SAFETENSORS, *PICKLES):
            files[path.stem].append(path)
    return files


def _with_loras(model: LatentDiffusion, scales: Scales, files: Mapping[str, Path]) -> LatentDiffusion:
    """Return a view of the model with these LoRAs."""
    adapters, inversions = [], []
    for name, (text_scale, scale) in scales.items():
        loaded = model.adapters.loaded.get(name)
        if loaded is not None and loaded.merged:
            raise SamplingError(
                f"the LoRA {name!r} is merged into the weights; load it without merge=True to scale it in prompts."
            )
        if loaded is None:
            inversions += read_bundled(files[name], model, name)
        adapters += _scaled(loaded or read_lora(files[name], model, name=name), text_scale, scale)
    paths = {path for adapter in adapters for path in adapter.layers}
    own = view(model, [*paths, "adapters", *(changed_modules(unwrapped(model)) if inversions else ())])
    for name in scales.keys() & model.adapters.loaded.keys():
        own.adapters.remove(own, name)
    for adapter in adapters:
        own.adapters.add(own, adapter)
    add_inversions(own, inversions)
    return own


def _scaled(adapter: Adapter, text_scale: float, scale: float) -> list[Adapter]:
    """Return the adapter at these scales, as two if they differ and it changes both text encoders and the denoiser."""
    layers = {path: copy.copy(layer) for path, layer in adapter.layers.items()}
    denoiser = {path: layer for path, layer in layers.items() if path.startswith("denoiser.")}
    text = {path: layer for path, layer in layers.items() if path not in denoiser}
    if text_scale == scale or not text or not denoiser:
        return [Adapter(adapter.name, layers, adapter.fingerprint, scale if denoiser else text_scale)]
    return [
        Adapter(adapter.name, denoiser, adapter.fingerprint, scale),
        Adapter(f"{adapter.name} (text encoders)", text, adapter.fingerprint, text_scale),
    ]
