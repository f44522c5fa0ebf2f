"""Our own files: one safetensors file that holds weights and all that they mean.

The metadata of a file says ``format`` (what it holds), ``config`` (JSON of the typed config), ``tokenizer`` (JSON, where text
is read), ``fingerprint`` and ``provenance``. A first stage and a CLIP are what a stage leaves for the next; a model is the
whole LatentDiffusion that a pipeline opens.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from ldm.clip.model import CLIPConfig
from ldm.clip.tokenizer import Tokenizer
from ldm.config import from_dict, to_dict
from ldm.errors import CheckpointError, LdmError, counted, first_line
from ldm.formats.tensors import check_finite, fingerprint, read_metadata, to_dtype, write_tensors
from ldm.model import LatentDiffusion, ModelConfig
from ldm.vae import FirstStage, FirstStageConfig

FIRST_STAGE, CLIP, MODEL = "ldm.first_stage.1", "ldm.clip.1", "ldm.model.1"
"""What a file of ours can hold."""

CONFIG_BY_FORMAT: dict[str, type[Any]] = {FIRST_STAGE: FirstStageConfig, CLIP: CLIPConfig, MODEL: ModelConfig}
"""The config of each."""

LARGE = 1 << 30
"""Bytes of weights beyond which to look at all of them takes longer than to load them."""

M = TypeVar("M", bound=nn.Module)

LARGEST = 10**7
"""No number in a model's config is above it."""


def load_strictly(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Weights into a module; every name and shape must match, but a first stage may come with a preview or without.

    Args:
        module: whose parameters and buffers become the tensors.
        tensors: by name.
        source: where they are from, for the error.
        dtype: of those of floating point; None = as they are.

    Raises:
        CheckpointError: listing the first of the names that are missing, unexpected, or of another shape or kind of
            number; or the first that holds NaN or infinite values.
    """
    check_names(module, tensors, source)
    check_finite(tensors, source)
    module.load_state_dict({name: to_dtype(tensor, dtype) for name, tensor in tensors.items()}, assign=True)


def check_names(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises the CheckpointError of :func:`load_strictly` over names, shapes and kinds of number, loading nothing."""
    wanted = module.state_dict()
    optional = {
        f"{path}.latent_preview".lstrip(".") for path, part in module.named_modules() if isinstance(part, FirstStage)
    }
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted and name not in optional],
        "of another shape": [name for name in wanted if name in tensors and wanted[name].shape != tensors[name].shape],
        "of another kind of number": [
            name
            for name in wanted
            if name in tensors and wanted[name].is_floating_point() != tensors[name].is_floating_point()
        ],
    }
    if any(problems.values()):
        raise CheckpointError(f"{source} does not fit its config: {counted(problems)}.")


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
    return save_state(path, format, tensors, config, tokenizer, provenance)


def save_state(
    path: str | Path,
    format: str,
    tensors: Mapping[str, Tensor],
    config: Any,
    tokenizer: Tokenizer | None,
    provenance: Mapping[str, Any],
) -> str:
    """Write tensors under our names as they are, as :func:`save_module` does, and return their fingerprint."""
    metadata = metadata_of(config, tokenizer, format) | {"provenance": json.dumps(dict(provenance))}
    metadata["fingerprint"] = fingerprint(tensors, fingerprinted_metadata(metadata))
    write_tensors(path, tensors, metadata)
    return metadata["fingerprint"]


def metadata_of(config: Any, tokenizer: Tokenizer | None, format: str = MODEL) -> dict[str, str]:
    """The metadata that :func:`fingerprinted_metadata` reads."""
    return {
        "format": format,
        "config": json.dumps(to_dict(config)),
        "tokenizer": tokenizer.to_json() if tokenizer else "",
    }


def fingerprinted_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
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
    fingerprinted: dict[str, str]
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
            f"{path} does not hold what is wanted, {format}; its metadata says {str(metadata.get('format'))[:100]!r}."
        )
    return header_of(metadata, path, config)


def header_of(metadata: Mapping[str, str], path: str | Path, config: type[Any]) -> Header:
    """The header in the metadata of a file, its config as an instance of ``config``.

    Raises:
        CheckpointError: it is broken, or of a config that this version does not know.
    """
    try:
        return Header(
            from_dict(config, json.loads(metadata["config"], parse_int=_bounded, parse_float=_bounded)),
            Tokenizer.from_json(metadata["tokenizer"]) if metadata["tokenizer"] else None,
            fingerprinted_metadata(metadata),
            metadata["fingerprint"],
            dict(json.loads(metadata["provenance"])),
        )
    except Exception as error:  # a config of a file may hold anything, and goes through the constructors of all kinds
        told = first_line(error) if isinstance(error, LdmError) else f"{type(error).__name__} {first_line(error)}"
        raise CheckpointError(f"the header of {path} cannot be read: {told}.") from None


def _bounded(digits: str) -> int | float:
    """A number of a config, which may become the length of a list before any weight is made."""
    number = float(digits)
    if abs(number) > LARGEST:
        raise ValueError(f"the number {digits[:20]} is beyond that of any model")
    return number if set(digits) & set(".eE") else int(digits)


def assemble(
    model: LatentDiffusion,
    tensors: Mapping[str, Tensor],
    header: Header,
    source: str | Path,
    dtype: torch.dtype | None = None,
) -> LatentDiffusion:
    """Put weights into a model that was built without (:func:`build_on_meta`), and return it in evaluation mode, frozen.

    Its ``fingerprint`` is computed from the weights; a warning says if the model was written with another one. If there are
    more than ``LARGE`` bytes, no values are read before they are needed, and the fingerprint is the one in the header.

    Args:
        model: on the meta device.
        tensors: under our names.
        header: of the file.
        source: named in errors.
        dtype: dtype of the parameters; None: as stored.

    Raises:
        CheckpointError: they do not fit each other, or a weight is NaN.
    """
    check_names(model, tensors, source)
    model.fingerprint, model.provenance = header.fingerprint or None, header.provenance
    if sum(tensor.nbytes for tensor in tensors.values()) <= LARGE:
        check_finite(tensors, source)
        model.fingerprint = fingerprint(tensors, header.fingerprinted)
        if header.fingerprint and model.fingerprint != header.fingerprint:
            warnings.warn(
                f"{source}: its weights are not those that it was written with (fingerprint {model.fingerprint}, "
                f"written as {header.fingerprint!r}); get it anew if you did not change it.",
                stacklevel=4,
            )
    wanted = dict.fromkeys((name for name, _ in model.named_parameters()), dtype)
    state = {name: to_dtype(tensor, wanted.get(name, torch.float32)) for name, tensor in tensors.items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def build_on_meta(build: Callable[[], M], tensors: Mapping[str, Tensor], source: object) -> M:
    """What ``build`` makes, without weights; it must not be larger by far than what the file holds.

    Raises:
        CheckpointError: it is, or it cannot be built.
    """
    # Parts of an encoder that are cut off once it is built are in no file.
    left, largest = 4 * len(tensors) + 64, max((tensor.numel() for tensor in tensors.values()), default=0)
    thread = threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        if parameter is None or threading.get_ident() != thread:
            return
        left -= 1
        if left < 0 or parameter.numel() > 4 * largest:
            raise CheckpointError(f"{source} does not fit its config, which asks for far more weights than it holds.")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), WithoutInit():
            return build()
    except LdmError:
        raise
    except Exception as error:  # whatever a network's constructor makes of numbers that no network has
        raise CheckpointError(f"the config in {source} cannot be built ({first_line(error)}); get it anew.") from None
    finally:
        hook.remove()


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
