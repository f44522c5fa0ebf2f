"""Patch discriminator of the adversarial loss of stage 1 (Isola et al. 2017, arXiv 1611.07004)."""

from __future__ import annotations

from torch import Tensor, nn

from ldm.nn.batch_norm import BatchNorm
from ldm.nn.input_output import input_or_output


class PatchDiscriminator(nn.Module):
    """Stack of 4 x 4 convolutions with one logit for each patch of the image.

    Args:
        channels: channels of the image.
        width: channels after the first convolution; doubled at each further one, up to eightfold.
        layers: number of convolutions of stride 2; more give larger patches (3: 70 pixels).
    """

    def __init__(self, channels: int, width: int, layers: int):
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        first = input_or_output(nn.Conv2d(channels, width, 4, stride=2, padding=1))
        parts: list[nn.Module] = [first, nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            parts += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                BatchNorm(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        self.body = nn.Sequential(*parts, input_or_output(nn.Conv2d(widths[-1], 1, 4, padding=1)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        """Map images ``[b c h w]`` in [-1, 1] to logits ``[b 1 h' w']``, high for patches that look real."""
        return self.body(image)


def largest_number_of_layers(size: int) -> int:
    """Return the most ``layers`` of a :class:`PatchDiscriminator` for images of ``size`` pixels; 0 if they are too small for any.

    Each convolution of stride 2 halves the size, and each of the two of stride 1 takes 1 from it, of which 1 must be left.
    """
    return max(0, (size // 3).bit_length() - 1)
