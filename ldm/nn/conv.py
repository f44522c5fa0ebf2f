"""Convolutions that choose the fastest formulation for inference on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn import winograd
from ldm.nn.inference import is_eager_cpu_inference, onednn_linear, uses_amx, uses_onednn


class Conv3x3(nn.Conv2d):
    """3 x 3 convolution padded by one: ``[b c h w] -> [b d ceil(h/stride) ceil(w/stride)]``

    On a CPU it is computed by :func:`ldm.nn.winograd.winograd` or :func:`conv_by_product` where that is faster.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__(in_channels, out_channels, 3, stride, padding=1)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_eager_cpu_inference(input):
            stride = self.stride[0]
            if stride == 1 and winograd.pays(input, weight):
                return winograd.winograd(input, weight, bias)
            if _product_pays(input, weight, stride):
                return conv_by_product(input, weight, bias, stride)
        return super()._conv_forward(input, weight, bias)


class Conv1x1(nn.Conv2d):
    """1 x 1 convolution: ``[b c h w] -> [b d h w]``; in bf16 on a CPU with AMX, a linear layer, which is faster there."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if uses_amx(input) and uses_onednn(input, weight):
            return onednn_linear(_channels_last(input), weight.flatten(1), bias).permute(0, 3, 1, 2)
        return super()._conv_forward(input, weight, bias)


def conv_by_product(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """Convolve with a 3 x 3 kernel, padded by one, as one product of matrices: the copied neighbourhoods by the kernel.

    oneDNN's convolution reorders its kernel at each call, which takes longer than the products where the kernel is large
    and the image small. The product takes the kernel as it lies in memory.

    Args:
        x: ``[b c h w]``.
        weight: ``[d c 3 3]`` in channels_last.
        bias: ``[d]`` or None.
        stride: distance of neighbourhoods, in rows and columns.

    Returns:
        ``[b d ceil(h/stride) ceil(w/stride)]`` in channels_last.
    """
    b, c, h, w = x.shape
    padded = F.pad(_channels_last(x), (0, 0, 1, 1, 1, 1)).contiguous()
    image, row, column, _ = padded.stride()
    size = (b, (h - 1) // stride + 1, (w - 1) // stride + 1)
    # three neighbours in a row lie side by side in memory, with all of their channels
    neighbourhoods = padded.as_strided((*size, 3, 3 * c), (image, stride * row, stride * column, row, 1)).flatten(3)
    return onednn_linear(neighbourhoods, _channels_last(weight).flatten(1), bias).permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _product_pays(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Return True where the products of AMX take less time than reordering the kernel, however large the batch is."""
    if not uses_amx(x) or not weight.is_contiguous(memory_format=torch.channels_last):
        return False
    positions = x.shape[-2] * x.shape[-1] // stride**2
    return weight.shape[0] >= 4 * positions and uses_onednn(x, weight)
