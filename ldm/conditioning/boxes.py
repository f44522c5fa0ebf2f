"""Conditioner for boxes with their classes, each encoded as one token of the context.

Cf. Li et al. 2023 (GLIGEN, arXiv 2301.07093).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning.conditioner import Conditioner, ConditionerConfig, check_dropout, dropped, input_of
from ldm.config import config_field
from ldm.errors import ConditionError, ConfigError, DataError, SamplingError
from ldm.modalities.boxes import Box, read_boxes
from ldm.nn.conditioning import Conditioning
from ldm.nn.embeddings import mlp

FREQUENCIES = 8
"""Number of frequencies of the Fourier features of a coordinate."""


@dataclass(frozen=True)
class BoxesConditionerConfig(ConditionerConfig, kind="boxes"):
    """Boxes with their classes, in any order."""

    classes: int = config_field(help="number of classes; a box has one of 0 .. classes - 1")
    max_boxes: int = config_field(8, "largest number of boxes of an image")
    width: int = config_field(128, "width of a box's token, and of the context")
    dropout: float = config_field(
        0.1, "fraction of the training images whose boxes are dropped, for classifier-free guidance", changeable=True
    )

    def __post_init__(self) -> None:
        check_dropout(self.dropout)
        if min(self.classes, self.max_boxes, self.width) < 1:
            raise ConfigError("classes, max_boxes and width must be at least 1.")

    @property
    def input_keys(self) -> tuple[str, ...]:
        return ("boxes",)

    @property
    def context_width(self) -> int:
        return self.width

    def build(self, tokenizer: Tokenizer | None = None) -> BoxesConditioner:
        return BoxesConditioner(self)


class BoxesConditioner(Conditioner):
    """Perceptron that makes a token of a box from a class embedding and Fourier features of the coordinates.

    The context ``[b 1+max_boxes width]`` begins with a learned token that does not depend on the boxes, so that the
    attention always has an unmasked key; unused tokens at the end are masked.
    """

    def __init__(self, config: BoxesConditionerConfig):
        super().__init__()
        self.config = config
        self.classes = nn.Embedding(config.classes, config.width)
        self.mlp = mlp(config.width + 4 * 2 * FREQUENCIES, config.width)
        self.norm = nn.LayerNorm(config.width)  # gives tokens the scale of other contexts
        self.ground = nn.Parameter(torch.empty(config.width))
        nn.init.normal_(self.ground)

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        given = input_of(inputs, "boxes")
        drop = dropped(len(given), self.config.dropout, generator).tolist()
        layouts = [self._checked(number, boxes) for number, boxes in enumerate(given)]
        boxes = torch.zeros(len(layouts), self.config.max_boxes, 5, dtype=torch.float32, device="cpu")
        mask = torch.zeros(len(layouts), self.config.max_boxes, dtype=torch.bool, device="cpu")
        for row, (layout, gone) in enumerate(zip(layouts, drop, strict=True)):
            if layout and not gone:
                boxes[row, : len(layout)] = torch.tensor(layout, dtype=torch.float32, device="cpu")
                mask[row, : len(layout)] = True
        device, dtype = self.ground.device, self.ground.dtype
        boxes, is_box = boxes.to(device), mask.to(device)
        features = torch.cat([self.classes(boxes[..., 0].long()), fourier_features(boxes[..., 1:]).to(dtype)], dim=-1)
        context = torch.where(is_box[..., None], self.norm(self.mlp(features)), 0)
        ground = self.ground.expand(len(layouts), 1, -1)
        return Conditioning(
            context=torch.cat([ground.to(context), context], dim=1),
            mask=torch.cat([torch.ones_like(is_box[:, :1]), is_box], dim=1),
        )

    def _checked(self, number: int, boxes: Any) -> list[Box]:
        """Return the validated boxes of image ``number`` of the batch; an empty list for None."""
        if boxes is None:
            return []
        try:
            layout = read_boxes(boxes)
        except DataError as error:
            raise SamplingError(f"the boxes of image {number} {error}; correct them.") from None
        if len(layout) > self.config.max_boxes:
            raise ConditionError.of(
                number, f"has {len(layout)} boxes, but the model takes at most {self.config.max_boxes} (max_boxes)"
            )
        for label, *_ in layout:
            if label >= self.config.classes:
                raise ConditionError.of(
                    number, f"has a box of class {label}, but the classes are 0 to {self.config.classes - 1}"
                )
        return layout


def fourier_features(x: Tensor) -> Tensor:
    """Compute sin and cos of x at frequencies 100^(k/8), k = 0 .. 7: ``[... d] -> [... 16 d]``."""
    frequencies = 100.0 ** (torch.arange(FREQUENCIES, dtype=torch.float32, device=x.device) / FREQUENCIES)
    angles = (x[..., None] * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
