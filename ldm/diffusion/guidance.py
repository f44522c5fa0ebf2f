"""One denoiser out of a network, conditionings and a scale.

Guidance acts on estimates of x0. All parametrizations are affine in F, so this is the same as guiding F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ldm.diffusion.samplers import Denoiser


class Batched(Protocol):
    """What guidance needs of a conditioning: batches of it can be laid end to end."""

    @staticmethod
    def cat(batches: Sequence[Any], /) -> Any: ...


C = TypeVar("C", bound=Batched)


def guided(
    network: Callable[[Tensor, Tensor, C], Tensor], conditional: C, unconditional: C | None, scale: float
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2207.12598, equation 6, whose w is ``scale - 1``):

    D = D(x | unconditional) + scale (D(x | conditional) - D(x | unconditional))

    Args:
        network: (x [b ...], sigma [b], conditioning of b) -> x0 [b ...].
        conditional: what the pictures are to show.
        unconditional: what they are to keep away from (the empty or a negative prompt); None for no guidance.
        scale: how far to go; 0 is the unconditional model, 1 the conditional one, above 1 exaggerates.

    Returns:
        A denoiser that calls the network once, with a batch of 2b; of b where scale is 1 or nothing guides.
    """
    if unconditional is None or scale == 1:
        return lambda x, sigma: network(x, sigma, conditional)
    both = conditional.cat([unconditional, conditional])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        away, towards = network(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return away + scale * (towards - away)

    return denoise
