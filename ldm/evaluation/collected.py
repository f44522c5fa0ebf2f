"""Records of a pass over images: features, small copies, captions and a hash, but no images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.clip.retrieval import reduce_images
from ldm.evaluation.features import FeatureNetwork, quantized


class Collected:
    """Record of a pass over images, which keeps no images.

    Args:
        networks: feature networks.
        reduce: whether reduced images are kept.

    Attributes:
        features: features of the images by network, ``[n d]``.
        reduced: images reduced to 16 x 16, ``[n 768]``.
        captions: captions, empty if the data has none.
    """

    def __init__(self, networks: Sequence[FeatureNetwork], reduce: bool = True):
        self._networks, self._reduce, self._digest, self._count = networks, reduce, hashlib.sha256(), 0
        self._features: dict[str, list[Tensor]] = {each.name: [] for each in networks}
        self._reduced: list[Tensor] = []
        self.captions: list[Any] = []

    def add(
        self, images: Tensor, captions: Sequence[Any] = (), conditions: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Add images ``[b 3 h w]`` in [-1, 1], their captions, and further conditions such as labels, which are hashed."""
        self._count += len(images)
        if self._reduce:
            self._reduced.append(reduce_images(images))
        self.captions += captions
        self._digest.update(quantized(images).cpu().contiguous().numpy().tobytes())
        self._digest.update("\0".join(map(str, captions)).encode())
        for name, values in sorted(conditions.items()):
            self._digest.update(f"\0{name}\0".encode())
            is_tensor = isinstance(values, Tensor)
            self._digest.update(values.contiguous().numpy().tobytes() if is_tensor else str(values).encode())
        if images.shape[1] == 3:
            for each in self._networks:
                self._features[each.name].append(each(images))

    def __len__(self) -> int:
        return self._count

    @cached_property
    def features(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self._features.items() if parts}

    @cached_property
    def reduced(self) -> Tensor:
        return torch.cat(self._reduced)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the images in 8 bits and of the captions and further conditions: 16 hexadecimal digits."""
        return self._digest.hexdigest()[:16]


class TrueImages(Collected):
    """True images of a split; ``rows`` has the numbers of its good samples."""

    rows: np.ndarray


class GeneratedImages(Collected):
    """Images generated for captions of a split.

    Attributes:
        rows: row of each caption among the true images of its split, ``[n]``.
        shown: some of the images, ``[s 3 h w]`` in [-1, 1], and ``places``, the rows of their captions.
        seconds: time that generating one image took.
    """

    rows: np.ndarray
    places: np.ndarray
    shown: Tensor
    seconds: float


@dataclass
class Reconstructions:
    """Measurements on reconstructions: values of each image by name, ``[n]``, and features by network ``[n d]``."""

    values: dict[str, np.ndarray]
    features: dict[str, Tensor]
    originals: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))
