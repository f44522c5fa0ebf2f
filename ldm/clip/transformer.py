"""The pre-norm transformer of both towers (Radford et al. 2021, arXiv 2103.00020, section 2.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.nn.attention import Attention
from ldm.nn.gradient_checkpointing import CheckpointedBlock

Activation = Literal["gelu", "quick_gelu"]


def quick_gelu(x: Tensor) -> Tensor:
    """Compute x sigmoid(1.702 x), the approximation of gelu that OpenAI's weights were trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class Block(CheckpointedBlock):
    """Self-attention, then a feed-forward layer; each pre-normed and residual.

    Args:
        width: channels of a token.
        heads: attention heads; must divide ``width``.
        mlp_ratio: width of the hidden layer over ``width``.
        activation: activation of the hidden layer.
        causal: whether a token attends only to itself and to those before it.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Activation, causal: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, bias=True)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, int(width * mlp_ratio))
        self.fc2 = nn.Linear(int(width * mlp_ratio), width)
        self.activation = ACTIVATIONS[activation]
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """``[b n width] -> [b n width]``"""
        x = x + self.attn(self.norm1(x), causal=self.causal)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


def stack(layers: int, width: int, heads: int, mlp_ratio: float, activation: Activation, causal: bool) -> nn.ModuleList:
    """Build ``layers`` blocks with CLIP's initialization: residual branches are scaled down with the number of layers."""
    blocks = nn.ModuleList(Block(width, heads, mlp_ratio, activation, causal) for _ in range(layers))
    into, out_of, hidden = width**-0.5, (2 * layers * width) ** -0.5, (2 * width) ** -0.5
    for name, parameter in blocks.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith(("to_out.weight", "fc2.weight")):
            nn.init.normal_(parameter, std=out_of)
        elif name.endswith("fc1.weight"):
            nn.init.normal_(parameter, std=hidden)
        elif ".attn." in name:
            nn.init.normal_(parameter, std=into)
    return blocks


def check_shape(width: int, layers: int, heads: int) -> None:
    """Raise a ConfigError unless width, layers and heads are at least 1 and heads divide the width."""
    if min(width, layers, heads) < 1:
        raise ConfigError("width, layers and heads must be at least 1.")
    if width % heads:
        raise ConfigError(f"{heads} heads do not divide the width {width}; choose heads among its divisors.")
