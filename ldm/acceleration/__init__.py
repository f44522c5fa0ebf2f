"""Backends that compile the networks of a model, one file each in :mod:`ldm.acceleration.backends`, for faster sampling.

The public interface is :meth:`ldm.pipeline.Pipeline.compile`.
"""

from __future__ import annotations

from typing import Any

import torch

from ldm.acceleration.backend import Accelerator, Backend
from ldm.config import from_dict
from ldm.discovery import import_modules
from ldm.errors import SamplingError, unknown
from ldm.model import LatentDiffusion
from ldm.nn.wrappers import innermost


def known_backends() -> dict[str, type[Backend]]:
    """Return all backends by name."""
    import_modules("ldm.acceleration.backends")
    return dict(Backend.kinds)


def default_backend(device: torch.device) -> str:
    """Return the name of the fastest backend that is installed for a device."""
    usable = [backend for backend in known_backends().values() if backend.is_default(device)]
    return str(max(usable, key=lambda backend: backend.priority).kind)


def accelerate(model: LatentDiffusion, name: str, **options: Any) -> None:
    """Make ``model`` run its networks with a backend from now on, each compiled when it is first called.

    Args:
        model: the model, which gets an accelerator; its networks and weights stay as they are.
        name: name of the backend, or "auto" for :func:`default_backend`.
        options: fields of the backend's config.

    Raises:
        SamplingError: there is no such backend, or it cannot be used on the device of the model.
        ConfigError: there is no such option.
        MissingExtraError: the backend needs a package that is not installed.
    """
    device = next(model.denoiser.parameters()).device
    known = known_backends()
    name = default_backend(device) if name == "auto" else name
    if name not in known:
        raise SamplingError(unknown("backend", name, [*known, "auto"]))
    backend = from_dict(known[name], options, f"the backend {name!r}")
    backend.check(device)
    innermost(model).accelerator = Accelerator(backend)
