"""Conditioner for class labels, each a learned vector that is added to the embedding of the noise level.

Dhariwal & Nichol 2021 (arXiv 2105.05233).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning.conditioner import Conditioner, ConditionerConfig, dropped, input_of
from ldm.config import config_field
from ldm.errors import ConfigError, SamplingError
from ldm.nn.conditioning import Conditioning


@dataclass(frozen=True)
class ClassConditionerConfig(ConditionerConfig, kind="class"):
    """A class label, encoded as a vector."""

    classes: int = config_field(help="number of classes; labels are 0 .. classes - 1")
    width: int = config_field(128, "width of the vector")
    dropout: float = config_field(
        0.1, "fraction of the training examples whose label is dropped, for classifier-free guidance", changeable=True
    )

    def __post_init__(self) -> None:
        if self.classes < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"classes must be at least 1 and dropout in [0, 1), not {self.classes} and {self.dropout}."
            )

    @property
    def input_keys(self) -> tuple[str, ...]:
        return ("label",)

    @property
    def vector_width(self) -> int:
        return self.width

    def build(self, tokenizer: Tokenizer | None = None) -> ClassConditioner:
        return ClassConditioner(self)


class ClassConditioner(Conditioner):
    """Embedding table with one row more than there are classes: the last is for an absent label."""

    def __init__(self, config: ClassConditionerConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.classes + 1, config.width)

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        given = input_of(inputs, "label")
        absent = torch.tensor([label is None for label in given], device="cpu")
        labels = torch.tensor([0 if label is None else int(label) for label in given], dtype=torch.int64, device="cpu")
        self.check(labels)
        drop = dropped(len(labels), self.config.dropout, generator)
        labels = torch.where(absent | drop, self.config.classes, labels)
        return Conditioning(vector=self.embedding(labels.to(self.embedding.weight.device)))

    def check(self, labels: Tensor) -> None:
        """Check that labels ``[b]`` are classes.

        Raises:
            SamplingError: the first that is not one.
        """
        wrong = labels[(labels < 0) | (labels >= self.config.classes)]
        if len(wrong):
            raise SamplingError(
                f"label {int(wrong[0])} is not one of the {self.config.classes} classes, 0 to {self.config.classes - 1}."
            )
