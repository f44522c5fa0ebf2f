"""LoRA, low-rank adaptation of linear layers and convolutions (Hu et al. 2021, arXiv 2106.09685): W' = W + s (alpha / r) B A."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.nn.adapter_format import AdapterFormat, MisshapenTensor, Scaling, Tensors, register, require
from ldm.nn.adapters import Adapter, AdapterLayer, unwrapped

ATTENTION = r"denoiser\..*\.attn\d\.to_(q|k|v|out)"
"""Pattern of the layers that LoRAs of a denoiser usually change: the projections of its attention."""


class LoRALayer(AdapterLayer):
    """The low-rank change of one layer.

    Args:
        down: A, ``[r in]``, or ``[r in k k]`` of a convolution with such a kernel.
        up: B, ``[out r]``.
        alpha: the change is alpha / r times B A.
        bias: bias of B, ``[out]``, which is multiplied by alpha / r too (``lora_bias`` of PEFT); None, usually: none.
    """

    def __init__(self, down: Tensor, up: Tensor, alpha: float, bias: Tensor | None = None):
        super().__init__()
        self.down, self.up, self.alpha = nn.Parameter(down), nn.Parameter(up), alpha
        self.bias = None if bias is None else nn.Parameter(bias)

    @property
    def factor(self) -> float:
        return self.alpha / self.down.shape[0]

    def delta(self, weight: Tensor) -> Tensor:
        down, up = self.down.to(weight), self.up.to(weight)
        return (self.factor * (up @ down.flatten(1))).unflatten(1, down.shape[1:])

    def bias_delta(self, bias: Tensor) -> Tensor | None:
        return None if self.bias is None else self.factor * self.bias.to(bias)

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        down, up, scale = self.down.to(x), self.up.to(x), self.scale * self.factor
        bias = None if self.bias is None else scale * self.bias.to(x)
        if isinstance(layer, nn.Conv2d):
            h = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
            return F.conv2d(scale * h, up[:, :, None, None], bias)
        return F.linear(scale * F.linear(x, down), up, bias)


class LoRAFormat(AdapterFormat):
    """LoRA in files of kohya, diffusers and PEFT, with LoCon's ``lora_mid`` between the two convolutions."""

    kind = LoRALayer
    endings: ClassVar[dict[str, str]] = {
        "down": r"(?:\.lora_(?:A|down)(?:\.\w+)?|[._]lora(?:_linear_layer)?\.down)\.weight",
        "up": r"(?:\.lora_(?:B|up)(?:\.\w+)?|[._]lora(?:_linear_layer)?\.up)\.weight",
        "mid": r"\.lora_mid\.weight",
        "bias_of_up": r"(?:\.lora_(?:B|up)(?:\.\w+)?|[._]lora(?:_linear_layer)?\.up)\.bias",
    }

    def read(self, tensors: Tensors, shape: Sequence[int], scaling: Scaling) -> LoRALayer:
        require(tensors, ("down", "up"))
        down, up = tensors["down"], tensors["up"]
        if "mid" in tensors:
            down = _with_mid(tensors["mid"], down)
        r = down.shape[0] if down.ndim else 0
        for role, tensor, expected in (("down", down, (r, *shape[1:])), ("up", up, (shape[0], r))):
            if not r or _plain(tensor.shape) != _plain(expected):
                raise MisshapenTensor(role)
        bias = tensors.get("bias_of_up")
        if bias is not None and bias.shape != shape[:1]:
            raise MisshapenTensor("bias_of_up")
        down, up = down.reshape(r, *shape[1:]).clone(), up.reshape(shape[0], r).clone()
        return LoRALayer(down, up, scaling.for_rank(r), None if bias is None else bias.clone())

    def write(self, layer: AdapterLayer, naming: str) -> dict[str, Tensor]:
        assert isinstance(layer, LoRALayer)
        up = layer.up[:, :, None, None] if layer.down.ndim == 4 else layer.up
        a, b = ("lora_A", "lora_B") if naming == "diffusers" else ("lora_down", "lora_up")
        alpha = {"alpha": torch.tensor(float(layer.alpha))} if naming == "kohya" else {}
        bias = {} if layer.bias is None else {f"{b}.bias": layer.bias}
        return {f"{a}.weight": layer.down, f"{b}.weight": up} | alpha | bias


register(LoRAFormat())


def _with_mid(mid: Tensor, down: Tensor) -> Tensor:
    """Compose the 1 x 1 convolution ``down`` and the k x k one after it into one: ``[r in k k]``."""
    if mid.ndim != 4 or down.ndim != 4 or down.shape[2:] != (1, 1) or down.shape[0] != mid.shape[1]:
        raise MisshapenTensor("mid")
    return torch.einsum("pqkl,qi->pikl", mid.float(), down.flatten(1).float())


def _plain(shape: Sequence[int]) -> list[int]:
    """Remove the ones at the end of a shape: linear layers and 1 x 1 convolutions are interchangeable."""
    sides = list(shape)
    while sides and sides[-1] == 1:
        sides.pop()
    return sides


def new_lora(
    model: nn.Module,
    rank: int = 4,
    alpha: float | None = None,
    layers: str = ATTENTION,
    name: str = "lora",
    generator: torch.Generator | None = None,
) -> Adapter:
    """Create a LoRA for training: A is initialized like the weight of ``nn.Linear``, B with zeros (no effect at first).

    ``model.adapters.add(model, new_lora(model))`` adds it to the model; ``model.adapters.parameters()`` are its fp32 weights.

    Args:
        model: a LatentDiffusion.
        rank: r, 1 or more.
        alpha: default: r.
        layers: regular expression that fully matches the names of the layers to change, linear or convolutions without groups.
        name: name by which it is scaled and unloaded.
        generator: CPU generator that A is drawn from; default: the global one.

    Raises:
        ConfigError: ``layers`` matches no layer.
    """
    changes: dict[str, AdapterLayer] = {}
    for path, layer in unwrapped(model).named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and re.fullmatch(layers, path):
            shape = layer.weight.shape
            down, up = torch.empty(rank, *shape[1:]), torch.zeros(shape[0], rank)
            nn.init.kaiming_uniform_(down, a=5**0.5, generator=generator)
            changes[path] = LoRALayer(down, up, rank if alpha is None else alpha)
    if not changes:
        raise ConfigError(f"layers {layers!r} matches no linear layer or convolution of the model.")
    return Adapter(name, changes)
