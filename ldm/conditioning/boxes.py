"""Layout: boxes with their classes, each a token of the context (cf. Li et al. 2023, GLIGEN, arXiv 2301.07093)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning.conditioner import Conditioner, ConditionerConfig, check_dropout, dropped
from ldm.config import config_field
from ldm.errors import ConfigError, DataError, SamplingError
from ldm.nn.conditioning import Conditioning
from ldm.nn.embeddings import mlp

Box = tuple[int, float, float, float, float]
"""Class number, left, top, right and bottom, as shares of the image's width and height."""

FREQUENCIES = 8


@dataclass(frozen=True)
class BoxesConditionerConfig(ConditionerConfig, kind="boxes"):
    """What is to be where: boxes with their classes, in any order."""

    classes: int = config_field(help="number of classes; a box has one of 0 .. classes - 1")
    max_boxes: int = config_field(8, "most boxes of an image")
    width: int = config_field(128, "width of a box's token, and of the context")
    dropout: float = config_field(0.1, "share of the training images whose boxes are all dropped, for guidance")

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
    """A perceptron on class embedding and Fourier features of the coordinates makes a token of a box.

    Before them stands a learnt token for where no box is, so that each place has something to attend to in any case; after
    them, masked ones make up for ``max_boxes``.
    """

    def __init__(self, config: BoxesConditionerConfig):
        super().__init__()
        self.config = config
        self.classes = nn.Embedding(config.classes, config.width)
        self.mlp = mlp(config.width + 4 * 2 * FREQUENCIES, config.width)
        self.norm = nn.LayerNorm(config.width)  # a token weighs as much as those of other contexts
        self.ground = nn.Parameter(torch.empty(config.width))
        nn.init.normal_(self.ground)

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        if "boxes" not in inputs:
            raise DataError(
                "the denoiser is conditioned on boxes, but the data has none; give each sample a .boxes.json."
            )
        drop = dropped(len(inputs["boxes"]), self.config.dropout, generator).tolist()
        layouts = [self._checked(number, boxes) for number, boxes in enumerate(inputs["boxes"])]
        boxes = torch.zeros(len(layouts), self.config.max_boxes, 5)
        mask = torch.zeros(len(layouts), self.config.max_boxes, dtype=torch.bool)
        for row, (layout, gone) in enumerate(zip(layouts, drop, strict=True)):
            if layout and not gone:
                boxes[row, : len(layout)] = torch.tensor(layout)
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
        """The boxes of one image, none for None."""
        if boxes is None:
            return []
        try:
            layout = read_boxes(boxes)
        except DataError as error:
            raise SamplingError(f"the boxes of image {number} {error}; correct them.") from None
        if len(layout) > self.config.max_boxes:
            raise SamplingError(
                f"picture {number} has {len(layout)} boxes, but the model takes {self.config.max_boxes} (max_boxes)."
            )
        for label, *_ in layout:
            if label >= self.config.classes:
                raise SamplingError(
                    f"picture {number} has a box of class {label}, but the classes are 0 to {self.config.classes - 1}."
                )
        return layout


def read_boxes(values: Any) -> list[Box]:
    """Boxes out of any sequence of sequences of five numbers.

    Raises:
        DataError: one that is no box; the message is a clause without a place.
    """
    boxes = []
    try:
        for value in values:
            label, x0, y0, x1, y1 = (float(number) for number in value)
            if not (label.is_integer() and label >= 0 and 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
                raise ValueError
            boxes.append((int(label), x0, y0, x1, y1))
    except (TypeError, ValueError):
        wanted = "a list of (class, x0, y0, x1, y1) with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1"
        place = f" at number {len(boxes)}" if boxes else ""
        raise DataError(f"are not {wanted}{place}") from None
    return boxes


def fourier_features(x: Tensor) -> Tensor:
    """sin and cos of x at frequencies from 1 to 56, a factor of 100^(1/8) from one to the next: ``[... d] -> [... 16 d]``."""
    frequencies = 100.0 ** (torch.arange(FREQUENCIES, device=x.device) / FREQUENCIES)
    angles = (x[..., None] * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
