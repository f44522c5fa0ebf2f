"""Pickles of weights, as ``torch.save`` writes them, read without running code from them."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import CheckpointError, first_line
from ldm.formats.sharded_checkpoint import is_sharded, load_sharded
from ldm.formats.training_checkpoint import exported, is_training_checkpoint

IGNORED = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # the key of its state in files of latent-diffusion
    "numpy.dtype",  # metrics and learning rates
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
)
"""Names in pickles of what is no weight. Nothing is imported or called for them."""

NESTED = ("state_dict", "model_state_dict", "module", "model", "params", "weights", "net", "network")
"""Keys under which a pickle may hold its weights, in order of preference; each may be nested in another."""

AVERAGED = ("ema_state_dict", "ema", "model_ema", "params_ema")
"""Keys under which it may hold their averages."""


class _Ignored:
    """Placeholder for :data:`IGNORED`; takes any arguments and state, and does nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def unpickle(path: str | Path, harmless: Sequence[type] = ()) -> Any:
    """Read a file of ``torch.save`` without running code from it; its tensors are views of its memory-mapped pages.

    Args:
        path: a .ckpt, .pt, .pth or .bin file.
        harmless: classes that it may hold, in addition to those that torch allows.

    Raises:
        CheckpointError: the file is broken, or would run code.
    """
    if is_sharded(Path(path)):
        return _unpickle_sharded(Path(path))
    with Path(path).open("rb") as file:
        zipped = file.read(2) == b"PK"  # else from torch before 1.6, which cannot be memory-mapped
    try:
        known: list[Any] = [*((_Ignored, name) for name in IGNORED), *harmless]
        with warnings.catch_warnings(), torch.serialization.safe_globals(known):
            warnings.simplefilter("ignore")  # about pickle protocols and typed storages
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a broken pickle may raise any exception
        forbidden = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        if forbidden:
            raise CheckpointError(
                f"{path} is a pickle that would run code when loaded ({forbidden[1]}); "
                "convert it to .safetensors in an isolated environment."
            ) from None
        # torch's own message advises loading it with weights_only=False.
        detail = "its pickle is broken" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise CheckpointError(
            f"{path} is not a complete file of torch.save ({type(error).__name__}: {detail}); download or write it again."
        ) from None


def _unpickle_sharded(path: Path) -> Any:
    try:
        return load_sharded(path)
    except Exception as error:  # of torch.distributed.checkpoint, whose messages are many lines
        raise CheckpointError(f"{path} is not a complete checkpoint ({first_line(error)}); use another one.") from None


def read_pickle(path: Path, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a state dict, averages if ``ema`` and it has them; those of a training's checkpoint with metadata.

    Raises:
        CheckpointError: the file is broken, would run code, or holds something else than weights.
    """
    content, metadata = unpickle(path), dict[str, str]()
    if is_training_checkpoint(content):
        content, metadata = exported(content, path, ema)
    while isinstance(content, dict):
        order = AVERAGED + NESTED if ema else NESTED + AVERAGED
        nested = next((content[key] for key in order if _holds_tensors(content.get(key))), None)
        if nested is None:
            content = _joined(content)
            break
        content = dict(nested)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict of weights; save a state_dict.")
    tensors = {}
    for name, value in content.items():
        shown = repr(str(name)[:100])
        if isinstance(value, Mapping):
            raise CheckpointError(f"{path} holds a nested dict ({shown}) instead of weights; save a state_dict.")
        if not isinstance(value, Tensor):
            continue
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and value.device.type == "cpu"
        if not (isinstance(name, str) and plain and value.nbytes <= value.untyped_storage().nbytes()):
            raise CheckpointError(
                f"{path}: {shown} is not a plain dense CPU tensor; save a state_dict of such tensors."
            )
        tensors[name] = value.detach()
    return tensors, metadata


def _holds_tensors(value: object) -> bool:
    """Return whether a value is a state dict, bare or nested."""
    return isinstance(value, Mapping) and any(
        isinstance(each, Tensor) or _holds_tensors(each) for each in value.values()
    )


def _joined(content: dict[str, Any]) -> dict[str, Any]:
    """Return the state dicts of several networks (``{"unet": ..., "vae": ...}``) as one, each under its name."""
    nested = {name: value for name, value in content.items() if isinstance(value, Mapping) and value}
    networks = {
        name: each for name, each in nested.items() if all(isinstance(value, Tensor) for value in each.values())
    }
    if not networks:
        return content
    rest = {name: value for name, value in content.items() if name not in nested}
    return rest | {f"{name}.{key}": tensor for name, each in networks.items() for key, tensor in each.items()}
