"""Token routing (TREAD, Krause et al. 2025, arXiv 2501.04765): in training, some tokens skip a span of transformer blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.errors import ConfigError


def route_tokens(x: Tensor, share: float, span: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``span`` to a random choice of the tokens of each sample; the others are returned unchanged.

    Args:
        x: tokens ``[b n d]``.
        share: share of the tokens that skip the span, in [0, 1).
        span: transformer blocks ``[b m d] -> [b m d]`` that do not depend on the places of the tokens; m is n times
            1 - ``share``, rounded, and at least 1.
    """
    b, n, _ = x.shape
    kept = random_tokens(x, share)
    rows = (kept + n * torch.arange(b, device=x.device)[:, None]).flatten()
    tokens = x.flatten(0, 1)  # index_select and index_copy of rows are faster than gather and scatter of values
    routed = span(tokens.index_select(0, rows).unflatten(0, kept.shape))
    return tokens.index_copy(0, rows, routed.flatten(0, 1)).view_as(x)


def random_tokens(x: Tensor, dropped: float) -> Tensor:
    """Return the places of a random choice of the tokens of each sample, in random order: ``[b n d] -> [b m]``.

    m is n times 1 - ``dropped``, rounded, and at least 1. As those of dropout, the random numbers are from torch's default
    generator, which a training seeds for each batch.
    """
    count = max(1, round(x.shape[1] * (1 - dropped)))
    return torch.rand(x.shape[:2], device=x.device).argsort(dim=1)[:, :count]


def shares_by_level(given: float | tuple[float, ...], depths: Sequence[int]) -> tuple[float, ...]:
    """Return the share of the tokens that skip the transformer blocks of each level of a network.

    Args:
        given: the share of each level, or one for all levels that have such blocks.
        depths: number of transformer blocks of each level that tokens can skip.

    Raises:
        ConfigError: a share is not in [0, 1), or there are no blocks to skip where it is given.
    """
    each = given if isinstance(given, tuple) else (given,)
    if wrong := [share for share in each if not 0 <= share < 1]:
        raise ConfigError(f"token_routing must be in [0, 1), not {wrong[0]}.")
    if any(each) and not any(depths):
        raise ConfigError("token_routing needs a network with transformer blocks outside of its middle; set it to 0.")
    if not isinstance(given, tuple):
        return tuple(given if depth else 0.0 for depth in depths)
    if len(given) != len(depths):
        raise ConfigError(
            f"token_routing has {len(given)} values, but the network {len(depths)} levels; give one for each."
        )
    for level, (share, depth) in enumerate(zip(given, depths, strict=True)):
        if share and not depth:
            raise ConfigError(
                f"token_routing[{level}] is {share}, but the level has no transformer blocks; set it to 0."
            )
    return given
