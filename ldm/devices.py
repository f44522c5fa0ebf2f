"""Default device and precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.errors import SamplingError, first_line


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 if the device supports it natively, else fp32; emulated bf16 is many times slower."""
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def usable(device: torch.device | str) -> torch.device:
    """Return the device with its index, after checking that it can be used.

    Raises:
        SamplingError: it cannot be used.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise SamplingError(f"the device {device} cannot be used ({first_line(error)}); use 'cpu' instead.") from None
