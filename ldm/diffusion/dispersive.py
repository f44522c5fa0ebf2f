"""Dispersive loss: hidden representations of a batch are spread out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.config import config_field
from ldm.diffusion.loss import WeightedLoss, WeightedLossConfig
from ldm.errors import ConfigError
from ldm.nn.ranks import gather_rows_with_gradients


@dataclass(frozen=True)
class DispersiveLossConfig(WeightedLossConfig, kind="dispersive"):
    """The loss of kind `weighted` plus strength ln mean exp(-|z_i - z_j|^2 / tau) (Wang & He 2506.09027).

    z are the outputs of a block of the denoiser, divided by the square root of their number of values; the mean is over all pairs
    of the batch. Validations report the loss without the second term.
    """

    strength: float = config_field(0.5, "Factor lambda of the dispersion.")
    temperature: float = config_field(0.5, "tau: squared distance at which samples are far from each other.")
    feature: str = config_field("middle.0", "Module of the denoiser whose outputs are spread out.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength < math.inf or not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"strength is {self.strength} and temperature {self.temperature}; they must be at least 0 and above 0."
            )

    @property
    def features(self) -> tuple[str, ...]:
        return (self.feature,)

    @property
    def compares_samples(self) -> bool:
        return True

    def build(self) -> DispersiveLoss:
        return DispersiveLoss(self)


class DispersiveLoss(WeightedLoss):
    """The loss of a :class:`DispersiveLossConfig`."""

    config: DispersiveLossConfig

    def feature_term(self, features: Mapping[str, Tensor], teacher: Tensor | None) -> Tensor:
        z = gather_rows_with_gradients(features[self.config.feature])
        return self.config.strength * dispersion(z, self.config.temperature)


def dispersion(z: Tensor, temperature: float) -> Tensor:
    """Return ln mean exp(-|z_i - z_j|^2 / (n temperature)) over all pairs of rows [b ...] of n values each."""
    z = z.flatten(1).float() / math.sqrt(z[0].numel())
    with torch.autocast(z.device.type, enabled=False):  # differences of products need fp32
        products = z @ z.T
    squares = products.diagonal()
    distances = (squares[:, None] + squares - 2 * products).clamp(min=0)
    return (-distances / temperature).logsumexp((0, 1)) - 2 * math.log(len(z))
