"""Networks of timm as teachers of a denoiser, such as DINOv2, with which REPA was proposed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.clip.image import to_size
from ldm.errors import CheckpointError
from ldm.paths import expanded

PREFIX = "timm:"
"""Beginning of a source that names a network of timm: ``timm:NAME``, or ``timm:NAME=FILE`` with a file of its weights."""


class TimmTower(nn.Module):
    """Image network of timm whose feature maps can be read.

    Args:
        source: ``timm:NAME``, whose weights are in the cache of the hub, or ``timm:NAME=FILE``; under ``torch.device("meta")``
            the weights are not needed.

    Raises:
        CheckpointError: timm has no such network, its feature maps cannot be read, or its weights are missing or do not fit.
    """

    def __init__(self, source: str):
        super().__init__()
        import timm

        name, _, file = source.removeprefix(PREFIX).partition("=")
        if not timm.is_model(name):
            similar = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:5])
            raise CheckpointError(
                f"timm has no network {name!r}; "
                + (f"it has {similar}." if similar else "timm.list_models() lists the names.")
            )
        file = expanded(file)
        if file and not Path(file).is_file():
            raise CheckpointError(f"{file}, the file of weights of {PREFIX}{name}, does not exist; correct the path.")
        options: dict[str, Any] = {"pretrained_cfg_overlay": {"file": file}} if file else {}
        try:
            network: Any = timm.create_model(name, pretrained=not torch.empty(0).is_meta, **options)
        except Exception as error:  # of many kinds: the hub, the file, its keys
            instead = f"give the file of weights of {name}" if file else f"give {PREFIX}{name}=FILE"
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"the weights of {source} cannot be loaded ({reason}); {instead}.") from None
        self.network: Any = network.eval()
        values: Mapping[str, Any] = network.pretrained_cfg
        self.size, self.mean, self.std = values["input_size"][-1], tuple(values["mean"]), tuple(values["std"])
        self.settings = {"name": name, "size": self.size, "mean": list(self.mean), "std": list(self.std)}
        try:
            with torch.no_grad():
                self.feature_map(torch.zeros(1, 3, self.size, self.size), 1)
        except (AttributeError, AssertionError, TypeError):  # the method is missing, or cannot normalize
            raise CheckpointError(
                f"the feature maps of {PREFIX}{name} cannot be read; choose another network."
            ) from None

    @property
    def depth(self) -> int:
        """Number of blocks, or of stages of a convolutional network."""
        return len(self.network.feature_info)

    def feature_map(self, image: Tensor, layer: int) -> Tensor:
        """Return the output of a block, from 1, ``[b z h w]`` for ``image [b 3 H W]`` in [-1, 1], of any size.

        The image is resized to the size that the network was trained with. The states of a transformer pass through its last
        norm, as those of DINOv2 in REPA.
        """
        mean, std = (image.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
        x = ((to_size(image, self.size) + 1) / 2 - mean) / std
        found: list[Tensor] = self.network.forward_intermediates(
            x, indices=[layer - 1], norm=True, stop_early=True, intermediates_only=True
        )
        return found[0]
