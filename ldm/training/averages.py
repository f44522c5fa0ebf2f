"""Averages of the training metrics between two rows of the log, without waiting for the device at each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.nn.ranks import sum_over_ranks, world_size
from ldm.training.noise_level_bins import NAMES, add_to_bins, means

UNREAD = 256
"""Number of values from which they are read although no row is due, which bounds the memory that they need."""


class Averages:
    """Means and maxima of the metrics of the steps since the last row.

    Values stay on their device until a row is due, and are then read together. They are summed one after the other in double
    precision, so that the sums do not depend on when they are read, and a resumed training continues them exactly.

    Metrics and norms are the same on all ranks (:class:`~ldm.training.engine.StageModule` averages them); the samples by noise
    level are those of this rank, and are summed over all ranks here.

    Args:
        device: device of the sums over ranks.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, tuple[float, int]] = {}  # sum and number of the values of each metric
        self.maxima: dict[str, float] = {}
        self.levels: dict[str, np.ndarray] = {}  # sums and numbers [2 bins] of each metric by noise level, on this rank
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
                add_to_bins(self.levels.setdefault(name, np.zeros((2, len(NAMES)))), first, others[0])
                continue
            value = float(first[0])
            if kind == "norm":
                if not math.isfinite(value):
                    continue
                self.maxima[f"{name}_max"] = max(value, self.maxima.get(f"{name}_max", value))
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last row, over all ranks; called on all ranks."""
        self._read()
        levels = {name: self._over_ranks(each).tolist() for name, each in self.levels.items()}
        return {"sums": dict(self.sums), "maxima": dict(self.maxima), "levels": levels}

    def _over_ranks(self, sums: np.ndarray) -> np.ndarray:
        if world_size() == 1:
            return sums
        return sum_over_ranks(torch.from_numpy(sums).to(self.device)).cpu().numpy()

    def load_state_dict(self, state: Mapping[str, Any], first: bool = True) -> None:
        """Continue from the sums of :meth:`state_dict`, of which earlier versions have ``sums`` alone.

        Those by noise level are over all ranks, and continue on the ``first`` one.
        """
        self._clear()
        self.sums, self.maxima = dict(state["sums"]), dict(state.get("maxima", {}))
        self.levels = {name: np.array(each) * first for name, each in state.get("levels", {}).items()}

    def row(self) -> dict[str, float]:
        """Return the means and maxima over all ranks, and start again; called on all ranks."""
        state = self.state_dict()
        self._clear()
        row = {name: total / count for name, (total, count) in state["sums"].items()}
        for name, each in state["levels"].items():
            row |= means(name, np.array(each))
        return row | state["maxima"]


def _transferred(tensors: list[Tensor]) -> list[np.ndarray]:
    """Return tensors as flat arrays in double precision, transferred from the device together."""
    if not tensors:
        return []
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    whole = torch.cat([each.to(flat[0].device) for each in flat]).cpu().double().numpy()
    return np.split(whole, np.cumsum([len(each) for each in flat])[:-1])
