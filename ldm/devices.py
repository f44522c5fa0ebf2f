"""Default device and precision, and independence of the global state of torch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
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


def check_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of a model's weights; None for the usual one.

    Raises:
        SamplingError: it is not a floating-point dtype of torch.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SamplingError(f"dtype is {dtype!r}; give a floating-point dtype, such as torch.float16.")
    return dtype


@contextmanager
def usual_torch_state() -> Iterator[None]:
    """Context, or decorator, in which the defaults of torch are the usual ones, whatever the caller has set.

    New tensors are fp32 and on the CPU, there is no autocast, and gradients can be computed. What is usual already is not
    touched; the default device, autocast and the gradient mode are those of a thread, the default dtype is that of the process.
    """
    with ExitStack() as stack:
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        stack.enter_context(_FP32)
        yield


class _DefaultFP32:
    """Context in which the default dtype is fp32, until the last thread has left it."""

    def __init__(self) -> None:
        self.lock, self.users, self.before = threading.Lock(), 0, torch.float32

    def __enter__(self) -> None:
        with self.lock:
            if self.users == 0:
                self.before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self.users += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0 and self.before != torch.float32:
                torch.set_default_dtype(self.before)


_FP32 = _DefaultFP32()
