"""Our own files: one safetensors file that holds weights and all that they mean.

The metadata of a file says ``format`` (what it holds), ``config`` (JSON of the typed config), ``tokenizer`` (JSON, where text
is read), ``fingerprint`` and ``provenance``. A first stage and a CLIP are what a stage leaves for the next; a model is the
whole LatentDiffusion that a pipeline opens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.clip.model import CLIPConfig
from ldm.clip.tokenizer import Tokenizer
from ldm.config import structure, unstructure
from ldm.errors import CheckpointError, LdmError
from ldm.formats.tensors import fingerprint, read_metadata, read_tensors, to_dtype, write_tensors
from ldm.model import LatentDiffusion, ModelConfig
from ldm.vae import FirstStage, FirstStageKind

FIRST_STAGE, CLIP, MODEL = "ldm.first_stage.1", "ldm.clip.1", "ldm.model.1"
"""What a file of ours can hold."""

HELD: dict[str, type[Any]] = {FIRST_STAGE: FirstStageKind, CLIP: CLIPConfig, MODEL: ModelConfig}
"""The config of each."""


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Weights into a module; every name and shape must match, but a first stage may come with a preview or without.

    Raises:
        CheckpointError: listing the first of the names that are missing, unexpected or of another shape.
    """
    check_names(module, tensors, source)
    module.load_state_dict(dict(tensors), assign=True)


def check_names(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises the CheckpointError of :func:`load_strictly`, loading nothing."""
    wanted = module.state_dict()
    optional = {
        f"{path}.latent_preview".lstrip(".") for path, part in module.named_modules() if isinstance(part, FirstStage)
    }
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted and name not in optional],
        "of another shape": [name for name in wanted if name in tensors and wanted[name].shape != tensors[name].shape],
    }
    told = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in problems.items()
        if names
    ]
    if told:
        raise CheckpointError(f"{source} does not fit its config: {'; '.join(told)}.")


def save_module(
    path: str | Path,
    format: str,
    module: nn.Module,
    config: Any,
    tokenizer: Tokenizer | None = None,
    provenance: Mapping[str, Any] = MappingProxyType({}),
    dtype: torch.dtype | None = None,
) -> str:
    """Write weights with all that they mean, and return their fingerprint.

    Args:
        path: of the file.
        format: ``FIRST_STAGE``, ``CLIP`` or ``MODEL``.
        module: whose state is written.
        config: what it was built from.
        tokenizer: of what reads text.
        provenance: JSON values that say where it comes from (stages' fingerprints, steps, versions).
        dtype: of the stored weights; the statistics of the latents stay fp32. None = as they are.
    """
    tensors = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() and "latent_" not in name else tensor
        for name, tensor in module.state_dict().items()
    }
    metadata = {
        "format": format,
        "config": json.dumps(unstructure(config)),
        "tokenizer": tokenizer.to_json() if tokenizer else "",
        "provenance": json.dumps(dict(provenance)),
    }
    metadata["fingerprint"] = fingerprint(tensors, meaning(metadata))
    write_tensors(path, tensors, metadata)
    return metadata["fingerprint"]


def meaning(metadata: Mapping[str, str]) -> dict[str, str]:
    """What of the metadata the fingerprint covers beside the weights."""
    return {name: metadata[name] for name in ("format", "config", "tokenizer")}


def save_model(
    path: str | Path, model: LatentDiffusion, provenance: Mapping[str, Any], dtype: torch.dtype | None = None
) -> str:
    """Write a whole model, as :func:`save_module` does, and return its fingerprint."""
    return save_module(path, MODEL, model, model.config, model.tokenizer, provenance, dtype)


@dataclass(frozen=True)
class Header:
    """What a file of ours says about its weights."""

    config: Any
    tokenizer: Tokenizer | None
    fingerprint: str
    provenance: dict[str, Any]


def read_header(path: str | Path, format: str, config: type[Any]) -> Header:
    """The header of a file of this format, its config as an instance of ``config``.

    Raises:
        CheckpointError: the file is missing, broken, of another format, or of a config that this version does not know.
    """
    metadata = read_metadata(path)
    if metadata.get("format") != format:
        raise CheckpointError(
            f"{path} does not hold what is wanted, {format}; its metadata says {metadata.get('format')!r}."
        )
    return header_of(metadata, path, config)


def header_of(metadata: Mapping[str, str], path: str | Path, config: type[Any]) -> Header:
    """The header in the metadata of a file, its config as an instance of ``config``.

    Raises:
        CheckpointError: it is broken, or of a config that this version does not know.
    """
    try:
        return Header(
            structure(config, json.loads(metadata["config"])),
            Tokenizer.from_json(metadata["tokenizer"]) if metadata["tokenizer"] else None,
            metadata["fingerprint"],
            json.loads(metadata["provenance"]),
        )
    except (LdmError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"the header of {path} cannot be read: {error}") from None


def load_model(path: str | Path, dtype: torch.dtype | None = None) -> LatentDiffusion:
    """A model that :func:`save_model` wrote, in evaluation mode, in ``dtype`` (default: fp32).

    Raises:
        CheckpointError: the file is missing, broken, of another format, or does not fit its own config.
    """
    header = read_header(path, MODEL, ModelConfig)
    with torch.device("meta"), WithoutInit():
        model = LatentDiffusion(header.config, header.tokenizer)
    tensors = {name: to_dtype(tensor, dtype or torch.float32) for name, tensor in read_tensors(path).items()}
    load_strictly(model, tensors, path)
    model.fingerprint, model.provenance = header.fingerprint, header.provenance
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class WithoutInit(TorchFunctionMode):
    """Modules built under it skip ``torch.nn.init``, which on the meta device imports torch._dynamo, for 1.5 s."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        initialises = getattr(func, "__module__", None) == "torch.nn.init"
        return kwargs["tensor"] if initialises else func(*args, **kwargs)
