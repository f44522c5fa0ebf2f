"""Class labels: one integer for each image."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ldm.checks import plain, shown
from ldm.errors import DataError, SamplingError
from ldm.modalities.base import Modality, listed, register


class Label(Modality):
    """A class label: stored as decimal digits, in batches int64 ``[b]``."""

    def decode(self, data: bytes) -> int:
        try:
            return int(data)
        except ValueError:
            raise DataError(f"is {data!r}, not an integer") from None

    def encode(self, value: int) -> bytes:
        return str(value).encode()

    def collate(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values)

    def entries(self, value: Any) -> list[Any]:
        labels = [plain(label) for label in listed(value)]
        if not labels or not all(isinstance(label, Integral) and not isinstance(label, bool) for label in labels):
            raise SamplingError(f"label is {shown(value)}; give one or several integers.")
        if any(abs(label) >= 2**31 for label in labels):
            raise SamplingError(f"label is {shown(value)}; no model has as many classes.")
        return [int(label) for label in labels]


LABEL = register(Label("label", "class", "class labels", argument="label", suffix="cls", describes=True))
