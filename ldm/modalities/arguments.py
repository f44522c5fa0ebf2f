"""Raw conditions as arguments of a pipeline: ``prompt``, ``label`` and the entries of ``condition``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ldm.errors import SamplingError
from ldm.modalities.base import MODALITIES, Modality


def of_key(key: str) -> Modality:
    """Return the modality with this key, or one without checks and conversion if none is registered."""
    return MODALITIES.get(key) or Modality(key, key, key)


def argument_of(key: str) -> str:
    """Return the name of the pipeline argument, or of the entry of ``condition``, for the raw condition ``key``."""
    return of_key(key).argument or key


def entries(argument: str, value: Any) -> list[Any]:
    """Return the entries of one argument of a pipeline, or of one entry of ``condition``; see :meth:`Modality.entries`.

    Raises:
        SamplingError: the value is empty, or an entry has the wrong type.
    """
    key = next((key for key in MODALITIES if argument_of(key) == argument), argument)
    return of_key(key).entries(value)


def condition_lists(keys: Sequence[str], defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the entries of each raw condition that a model takes.

    Args:
        keys: the input keys of its conditioner.
        defaults: further raw conditions, with the default entry of each.
        given: the values of the caller by argument; no value is None.

    Returns:
        A list for each key; ``[None]`` for a key that is not given while another one is.

    Raises:
        SamplingError: none of ``keys`` is given, an argument that the model does not take is, or a type is wrong.
    """
    by_argument = {argument_of(key): key for key in keys}
    for argument in given:
        if argument not in by_argument and argument not in defaults:
            instead = f"give {' and '.join(of_key(key).request for key in keys)}" if keys else "leave it out"
            raise SamplingError(f"this model reads no {argument}; {instead}.")
    if keys and not by_argument.keys() & given.keys():
        raise SamplingError(
            f"this model needs {' or '.join(of_key(key).request for key in keys)}; give one or several."
        )
    lists = {
        key: entries(argument, given[argument]) if argument in given else [None]
        for argument, key in by_argument.items()
    }
    for key, default in defaults.items():
        lists[key] = [default if each is None else each for each in entries(key, given.get(key))]
    return lists


def pipeline_arguments(conditions: Mapping[str, Sequence[Any] | Tensor]) -> dict[str, Any]:
    """Return raw conditions by key as keyword arguments of a pipeline."""
    arguments: dict[str, Any] = {"condition": {}}
    for key, values in conditions.items():
        argument = of_key(key).argument
        # Numbers as such, not as tensors.
        listed = values.tolist() if isinstance(values, Tensor) and values.ndim == 1 else list(values)
        (arguments if argument else arguments["condition"])[argument or key] = listed
    return arguments
