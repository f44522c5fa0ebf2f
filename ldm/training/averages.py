"""Averages of the training metrics between two rows of the log, without waiting for the device at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.training.ema import full_tensor
from ldm.training.noise_level_bins import NAMES, add_to_bins, means

UNREAD = 256
"""Largest number of calls of :meth:`Averages.add` after which the values are read, which bounds the memory that they need."""

Reduce = Callable[[Tensor, str], Tensor]
"""Function that combines a tensor of all ranks by ``"sum"`` or ``"max"``."""


class Averages:
    """Means and maxima of the metrics of the steps since the last row.

    Values stay on their device until a row is due, and are then read together. They are summed one after the other in double
    precision, so that the sums do not depend on when they are read, and a resumed training continues them exactly.

    Args:
        reduce: combines the sums of all ranks.
    """

    def __init__(self, reduce: Reduce = lambda tensor, operation: tensor):
        self.reduce = reduce
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[
            tuple[str, str], np.ndarray
        ] = {}  # sum and count [2 1] of ("mean", name), [2 bins] of ("levels", name)
        self.maxima: dict[str, float] = {}
        self._unread: list[tuple[str, str, list[Tensor | float]]] = []

    def add(
        self,
        metrics: Mapping[str, Tensor | float],
        norms: Mapping[str, Tensor] | None = None,
        by_noise_level: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Add the values of one batch; they must not be changed in place later.

        Args:
            metrics: scalars of which the mean is logged.
            norms: scalars of which the mean and the maximum are logged; infinite ones, of steps that the gradient scaler of
                fp16 skips, do not count.
            by_noise_level: values ``[b]`` and noise levels ``[b]`` of samples, of which the mean over each range of noise levels
                is logged.
        """
        self._unread += [("mean", name, [value]) for name, value in metrics.items()]
        self._unread += [("norm", name, [value]) for name, value in (norms or {}).items()]
        self._unread += [("levels", name, [*pair]) for name, pair in (by_noise_level or {}).items()]
        if len(self._unread) >= UNREAD:
            self._read()

    def _read(self) -> None:
        """Add the unread values to the sums; one transfer from the device."""
        unread, self._unread = self._unread, []
        tensors = [value for _, _, values in unread for value in values if isinstance(value, Tensor)]
        on_cpu = iter(_transferred(tensors))
        for kind, name, values in unread:
            first, *others = (next(on_cpu) if isinstance(value, Tensor) else np.array([value]) for value in values)
            if kind == "levels":
                add_to_bins(self.sums.setdefault((kind, name), np.zeros((2, len(NAMES)))), first, others[0])
                continue
            value = float(first[0])
            if kind == "norm":
                if not math.isfinite(value):
                    continue
                self.maxima[f"{name}_max"] = max(value, self.maxima.get(f"{name}_max", value))
            self.sums.setdefault(("mean", name), np.zeros((2, 1)))[:] += [[value], [1]]

    def state_dict(self) -> dict[str, Any]:
        """Return the sums over all ranks since the last row; called on all ranks."""
        self._read()
        sums, maxima = dict(self.sums), dict(self.maxima)
        if sums:
            flat = torch.from_numpy(np.concatenate([each.ravel() for each in sums.values()]))
            parts = np.split(self.reduce(flat, "sum").numpy(), np.cumsum([each.size for each in sums.values()])[:-1])
            sums = {key: part.reshape(2, -1) for key, part in zip(sums, parts, strict=True)}
        if maxima:
            largest = self.reduce(torch.tensor(list(maxima.values()), dtype=torch.float64, device="cpu"), "max")
            maxima = dict(zip(maxima, largest.tolist(), strict=True))
        return {"sums": {key: each.tolist() for key, each in sums.items()}, "maxima": maxima}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the sums of :meth:`state_dict`; on the first rank alone, since they are those of all ranks."""
        self._clear()
        self.sums = {key: np.array(each) for key, each in state["sums"].items()}
        self.maxima = dict(state["maxima"])

    def row(self) -> dict[str, float]:
        """Return the means and maxima over all ranks, and start again; called on all ranks."""
        state = self.state_dict()
        self._clear()
        row: dict[str, float] = {}
        for (kind, name), each in state["sums"].items():
            row |= means(name, np.array(each)) if kind == "levels" else {name: each[0][0] / each[1][0]}
        return row | state["maxima"]


def _transferred(tensors: list[Tensor]) -> list[np.ndarray]:
    """Return tensors as flat arrays in double precision, transferred from the device together."""
    if not tensors:
        return []
    flat = [full_tensor(tensor.detach()).reshape(-1) for tensor in tensors]
    whole = torch.cat([each.to(flat[0].device) for each in flat]).cpu().double().numpy()
    return np.split(whole, np.cumsum([len(each) for each in flat])[:-1])
