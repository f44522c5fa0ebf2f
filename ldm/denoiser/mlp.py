"""MLP denoiser for the two-dimensional toy data, with a timestep embedding at each layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ldm.config import config_field
from ldm.denoiser.config import DenoiserConfig
from ldm.errors import ConfigError
from ldm.nn.conditioning import Conditioning
from ldm.nn.input_output import input_or_output


@dataclass(frozen=True)
class MLPConfig(DenoiserConfig, kind="mlp"):
    """Config of linear layers with ReLU between; after each, the embedding of the step is added."""

    in_channels: int = config_field(2, "dimensions of a point")
    out_channels: int = config_field(2, "dimensions of a point")
    width: int = config_field(128, "units of a hidden layer")
    layers: int = config_field(3, "hidden layers")
    num_timesteps: int = config_field(100, "rows of the step embeddings; the schedule's num_timesteps")

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.in_channels, self.out_channels) < 1 or self.num_timesteps < 2:
            raise ConfigError("width, layers and channels must be at least 1, num_timesteps at least 2.")

    @property
    def context_width(self) -> None:  # type: ignore[override]
        return None

    @property
    def vector_width(self) -> None:  # type: ignore[override]
        return None

    def build(self) -> MLP:
        return MLP(self)


class StepEmbedding(nn.Module):
    """Table with a row for each timestep, linearly interpolated between its rows: ``t [b] -> [b width]``"""

    def __init__(self, num_timesteps: int, width: int):
        super().__init__()
        self.table = nn.Embedding(num_timesteps, width)
        nn.init.normal_(self.table.weight, std=0.1)  # the scale of the points; 1 would dominate them early in training

    def forward(self, t: Tensor) -> Tensor:
        t = t.clamp(0, self.table.num_embeddings - 1)
        below = t.floor().long()
        above = (below + 1).clamp(max=self.table.num_embeddings - 1)
        return torch.lerp(self.table(below), self.table(above), (t - below).to(self.table.weight.dtype)[:, None])


class MLP(nn.Module):
    """Perceptron F(x, t) on points."""

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.config = config
        widths = [config.in_channels] + [config.width] * config.layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.steps = nn.ModuleList(StepEmbedding(config.num_timesteps, config.width) for _ in range(config.layers))
        input_or_output(self.layers[0])
        self.out = input_or_output(nn.Linear(config.width, config.out_channels))

    def forward(self, x: Tensor, noise_level: Tensor, cond: Conditioning) -> Tensor:
        """``x [b c 1 1]``, ``noise_level [b]`` in [0, num_timesteps) ``-> [b c 1 1]``; the conditioning has no effect."""
        h = x.flatten(1)
        for layer, step in zip(self.layers, self.steps, strict=True):
            h = torch.relu(layer(h) + step(noise_level))
        return self.out(h)[:, :, None, None]
