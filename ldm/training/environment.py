"""Environment of the sessions of a training: versions and devices."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ldm import __version__
from ldm.training.config import TrainerConfig

SESSIONS = "sessions.jsonl"
"""File in the folder of a stage: one JSON object per line, the start and the end of each session; a kill leaves no end."""

PACKAGES = ("torch", "lightning", "torchvision", "numpy", "webdataset", "open_clip_torch", "transformers", "tokenizers")
"""Packages whose versions are recorded."""


def environment(device: torch.device) -> dict[str, Any]:
    """Return the versions of the packages, and what the training runs on, as JSON values."""
    return {
        "ldm": __version__,
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name)) is not None},
        **({"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if device.type == "cuda" else {}),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu()} ({device.type})",
    }


def device_name(trainer: TrainerConfig) -> str:
    """Return the name of the device on which a training of one device runs."""
    on_cpu = trainer.accelerator == "cpu" or not torch.cuda.is_available()
    return str(environment(torch.device("cpu" if on_cpu else "cuda"))["device"])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
