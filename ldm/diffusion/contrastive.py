"""Contrastive flow matching: velocities are drawn to their own targets and away from those of other samples."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ldm.config import config_field
from ldm.diffusion.loss import WeightedLoss, WeightedLossConfig
from ldm.diffusion.parametrization import Diffusion, Flow
from ldm.errors import ConfigError
from ldm.nn.ranks import next_rows


@dataclass(frozen=True)
class ContrastiveFlowLossConfig(WeightedLossConfig, kind="contrastive_flow"):
    """|F - target|^2 - strength |F - target of another sample|^2, of kind `weighted` else (Stoica et al. 2506.05350).

    For the parametrization flow. Validations report the loss without the second term.
    """

    strength: float = config_field(
        0.05, "Factor lambda of the distance from the target of the next sample of the batch."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength < 1:
            raise ConfigError(
                f"strength is {self.strength}; it must be in [0, 1), since the loss has no minimum from 1 on."
            )

    def check(self, diffusion: Diffusion) -> None:
        super().check(diffusion)
        if not isinstance(diffusion.parametrization, Flow):
            raise ConfigError(
                f"contrastive_flow cannot be used with the parametrization {diffusion.parametrization.kind}, because only the "
                "targets of flow are comparable between noise levels; choose flow."
            )

    @property
    def compares_samples(self) -> bool:
        return True

    def build(self) -> ContrastiveFlowLoss:
        return ContrastiveFlowLoss(self)


class ContrastiveFlowLoss(WeightedLoss):
    """The loss of a :class:`ContrastiveFlowLossConfig`; the next sample is that of the batch of all ranks."""

    config: ContrastiveFlowLossConfig

    def distance(self, output: Tensor, target: Tensor) -> Tensor:
        loss = super().distance(output, target)
        if not self.training:
            return loss
        return loss - self.config.strength * super().distance(output, next_rows(target))
