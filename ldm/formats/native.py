"""The native format: one safetensors file with weights, config and tokenizer.

The metadata of a file has the keys ``format`` (what it holds), ``config`` (JSON of the typed config), ``tokenizer`` (JSON, if
the model reads text), ``fingerprint`` and ``provenance``. A first stage, a CLIP and a tiny decoder are outputs of a
training stage; a model is the complete LatentDiffusion that a pipeline loads.
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
from ldm.formats.tensors import (
    check_finite,
    check_plain,
    fingerprint,
    read_metadata,
    to_dtype,
    without_wrappers,
    write_tensors,
)
from ldm.model import LatentDiffusion, ModelConfig
from ldm.nn import wrappers
from ldm.vae import FirstStage, FirstStageConfig, TinyDecoderConfig

FIRST_STAGE, CLIP, MODEL, DECODER = "ldm.first_stage.1", "ldm.clip.1", "ldm.model.1", "ldm.tiny_decoder.1"
"""Values of ``format``: what a native file can hold."""

CONFIG_BY_FORMAT: dict[str, type[Any]] = {
    FIRST_STAGE: FirstStageConfig,
    CLIP: CLIPConfig,
    MODEL: ModelConfig,
    DECODER: TinyDecoderConfig,
}
"""Config class of each format."""

LARGE = 1 << 30
"""Size of the weights in bytes above which checking all values takes longer than loading them."""

M = TypeVar("M", bound=nn.Module)

LARGEST = 10**7
"""Largest absolute value of a number in a model's config."""


def load_strictly(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Load weights into a module; every name and shape must match, except that the preview of a first stage is optional.

    Args:
        module: module whose parameters and buffers become the tensors.
        tensors: tensors by name.
        source: where they are from, for error messages.
        dtype: dtype of floating-point tensors; None: unchanged.

    Raises:
        CheckpointError: names are missing or unexpected, shapes or kinds of number differ (the first of each are listed),
            or a weight holds NaN or infinite values (the first is named).
    """
    check_names(module, tensors, source)
    check_finite(tensors, source)
    module.load_state_dict({name: to_dtype(tensor, dtype) for name, tensor in tensors.items()}, assign=True)


def check_names(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Check names, shapes and kinds of number as :func:`load_strictly` does (same CheckpointError), loading nothing."""
    expected = module.state_dict()
    optional = {
        f"{path}.latent_preview".lstrip(".") for path, part in module.named_modules() if isinstance(part, FirstStage)
    }
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected and name not in optional],
        "of another shape": [
            name for name in expected if name in tensors and expected[name].shape != tensors[name].shape
        ],
        "of another kind of number": [
            name
            for name in expected
            if name in tensors and expected[name].is_floating_point() != tensors[name].is_floating_point()
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
    """Write the weights of a module with its config and tokenizer, and return their fingerprint.

    Args:
        path: path of the file.
        format: ``FIRST_STAGE``, ``CLIP``, ``MODEL`` or ``DECODER``.
        module: module whose state is written.
        config: config that it was built from.
        tokenizer: tokenizer of its text encoders, if any.
        provenance: origin of the weights as JSON values (fingerprints of stages, steps, versions).
        dtype: dtype of the stored weights; the statistics of the latents stay fp32. None: unchanged.
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
    """Write tensors with native names, as :func:`save_module` does, and return their fingerprint.

    Raises:
        CheckpointError: they could not be read again; see :func:`written_state`. Then nothing is written.
    """
    build = (lambda: LatentDiffusion(config, tokenizer)) if format == MODEL else config.build
    tensors = written_state(tensors, build, path)[1]
    metadata = metadata_of(config, tokenizer, format) | {"provenance": json.dumps(dict(provenance))}
    metadata["fingerprint"] = fingerprint(tensors, fingerprinted_metadata(metadata))
    write_tensors(path, tensors, metadata)
    return metadata["fingerprint"]


def written_state(tensors: Mapping[str, Tensor], build: Callable[[], M], path: object) -> tuple[M, dict[str, Tensor]]:
    """Return a module on the meta device, and the tensors for it by the names that readers demand.

    Args:
        tensors: state of a module, which torch.compile, DistributedDataParallel and others may have wrapped.
        build: builds the module from the config that is written, as readers do.
        path: the file or folder to be written, for error messages.

    Raises:
        CheckpointError: names, shapes or kinds of number are not those that readers demand, or a tensor is not plain.
    """
    state = without_wrappers(tensors, path)
    check_plain(state, path)
    outline = build_on_meta(build, state, path)
    check_names(outline, state, f"nothing is written to {path}, because the model")
    return outline, state


def plain_model(model: nn.Module, path: object) -> LatentDiffusion:
    """Return a model of the same tensors for a writer: without wrappers, and checked as readers do.

    Raises:
        CheckpointError: it is no LatentDiffusion, or :func:`written_state` rejects it.
    """
    inner = innermost(model, LatentDiffusion)
    plain, state = written_state(model.state_dict(), lambda: LatentDiffusion(inner.config, inner.tokenizer), path)
    plain.requires_grad_(False).load_state_dict(state, assign=True)
    plain.provenance, plain.textual_inversions = inner.provenance, inner.textual_inversions
    return plain.eval()


def innermost(module: nn.Module, kind: type[M]) -> M:
    """Return the module of this kind within the wrappers around it.

    Raises:
        CheckpointError: there is none.
    """
    inner = wrappers.innermost(module)
    if not isinstance(inner, kind):
        raise CheckpointError(f"the model is a {type(inner).__name__}; pass a {kind.__name__}.")
    return inner


def metadata_of(config: Any, tokenizer: Tokenizer | None, format: str = MODEL) -> dict[str, str]:
    """Return the metadata that :func:`fingerprinted_metadata` reads."""
    return {
        "format": format,
        "config": json.dumps(to_dict(config)),
        "tokenizer": tokenizer.to_json() if tokenizer else "",
    }


def fingerprinted_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata that the fingerprint covers in addition to the weights."""
    return {name: metadata[name] for name in ("format", "config", "tokenizer")}


def save_model(
    path: str | Path, model: LatentDiffusion, provenance: Mapping[str, Any], dtype: torch.dtype | None = None
) -> str:
    """Write a complete model, as :func:`save_module` does, and return its fingerprint."""
    return save_module(path, MODEL, model, model.config, model.tokenizer, provenance, dtype)


@dataclass(frozen=True)
class Header:
    """Metadata of a native file."""

    config: Any
    tokenizer: Tokenizer | None
    fingerprinted: dict[str, str]
    fingerprint: str
    provenance: dict[str, Any]


def read_header(path: str | Path, format: str, config: type[Any]) -> Header:
    """Read the header of a file of this format, with its config as an instance of ``config``.

    Raises:
        CheckpointError: the file is missing, broken, of another format, or has a config that this version does not know.
    """
    metadata = read_metadata(path)
    if metadata.get("format") != format:
        raise CheckpointError(
            f"{path} does not hold the format {format}; its metadata says {str(metadata.get('format'))[:100]!r}."
        )
    return header_of(metadata, path, config)


def header_of(metadata: Mapping[str, str], path: str | Path, config: type[Any]) -> Header:
    """Parse the header from the metadata of a file, with its config as an instance of ``config``.

    Raises:
        CheckpointError: it is broken, or has a config that this version does not know.
    """
    try:
        return Header(
            from_dict(config, json.loads(metadata["config"], parse_int=_bounded, parse_float=_bounded)),
            Tokenizer.from_json(metadata["tokenizer"]) if metadata["tokenizer"] else None,
            fingerprinted_metadata(metadata),
            metadata["fingerprint"],
            dict(json.loads(metadata["provenance"])),
        )
    except Exception as error:  # the config may hold any value, and any config class may reject it
        detail = first_line(error) if isinstance(error, LdmError) else f"{type(error).__name__} {first_line(error)}"
        raise CheckpointError(f"the header of {path} cannot be read: {detail}.") from None


def _bounded(digits: str) -> int | float:
    """Parse a number of a config, bounded since it may become the length of a list before any weight is made."""
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
    """Load weights into a model that :func:`build_on_meta` built, and return it in evaluation mode with frozen parameters.

    Its ``fingerprint`` is computed from the weights; a warning is issued if the header has another one. If there are more
    than ``LARGE`` bytes, no values are read before they are needed, and the fingerprint is the one in the header.

    Args:
        model: model on the meta device.
        tensors: tensors by native names.
        header: header of the file.
        source: where they are from, for error messages.
        dtype: dtype of the parameters; None: as stored.

    Raises:
        CheckpointError: model and tensors do not match, or a weight holds NaN.
    """
    check_names(model, tensors, source)
    model.fingerprint, model.provenance = header.fingerprint or None, header.provenance
    if sum(tensor.nbytes for tensor in tensors.values()) <= LARGE:
        check_finite(tensors, source)
        model.fingerprint = fingerprint(tensors, header.fingerprinted)
        if header.fingerprint and model.fingerprint != header.fingerprint:
            warnings.warn(
                f"{source}: its weights are not those that it was written with (fingerprint {model.fingerprint}, "
                f"written as {header.fingerprint!r}); download it again unless you changed it on purpose.",
                stacklevel=4,
            )
    dtypes = dict.fromkeys((name for name, _ in model.named_parameters()), dtype)
    state = {name: to_dtype(tensor, dtypes.get(name, torch.float32)) for name, tensor in tensors.items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def build_on_meta(build: Callable[[], M], tensors: Mapping[str, Tensor], source: object) -> M:
    """Build a module on the meta device; it must not be far larger than the content of the file.

    Raises:
        CheckpointError: it is far larger, or it cannot be built.
    """
    # Allow for parts of an encoder that are removed after it is built, which no file holds.
    left, largest = 4 * len(tensors) + 64, max((tensor.numel() for tensor in tensors.values()), default=0)
    thread = threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        if parameter is None or threading.get_ident() != thread:
            return
        left -= 1
        if left < 0 or parameter.numel() > 4 * largest:
            raise CheckpointError(
                f"{source} does not fit its config, which needs far more weights than the file holds."
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"), WithoutInit():
            return build()
    except LdmError:
        raise
    except Exception as error:  # a constructor may raise anything for invalid numbers
        raise CheckpointError(
            f"the config in {source} cannot be built ({first_line(error)}); download it again."
        ) from None
    finally:
        hook.remove()


class WithoutInit(TorchFunctionMode):
    """Mode that skips ``torch.nn.init``, which on the meta device imports torch._dynamo and takes 1.5 s."""

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
