"""Tiling: large images through an autoencoder in bounded memory, tile by tile, and a batch a few images at a time.

Layers at the resolution of the latents, above all self-attention, need little memory and process the image at once; layers at
finer resolutions process it tile by tile. Convolutions see across a tile's border by the overlap, over which tiles are blended.
Group norms would differ between tiles: the statistics of a tile are not those of the image, so that its contrast and
colours would differ from its neighbours'. All tiles are therefore normalised with the same statistics, by :class:`SharedNorms`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ldm.errors import SamplingError
from ldm.vae.first_stage import FirstStage
from ldm.vae.posterior import Posterior
from ldm.vae.tiny_decoder import TinyDecoder

T = TypeVar("T")

MEASUREMENTS = 2
"""Passes over the tiles that measure statistics, before the one whose output is kept. With 0, 1, 2, 3 the shipped model's
decoder agrees with decoding at once to 35, 47, 55, 55 dB on a sheet of emoji whose lower half is blank (384 x 384, tiles of
32)."""

BLOCK = 8
"""Side, in latent positions, of the blocks that the sample of an image consists of."""


@runtime_checkable
class Tileable(Protocol):
    """A first stage that can be tiled; others process each image at once.

    ``encode`` and ``decode`` each have a coarse part, which works at the resolution of the latents, and a fine part.
    """

    def fine_encode(self, image: Tensor) -> Tensor:
        """The first part of ``encode``: ``[b c fh fw] -> [b e h w]``."""

    def coarse_encode(self, features: Tensor) -> Posterior:
        """The second part of ``encode``: ``[b e h w]`` to the posterior over ``[b z h w]``."""

    def coarse_decode(self, latent: Tensor) -> Tensor:
        """The first part of ``decode``: ``[b z h w] -> [b e h w]``."""

    def fine_decode(self, features: Tensor) -> Tensor:
        """The second part of ``decode``: ``[b e h w] -> [b c fh fw]``."""


@dataclass(frozen=True)
class Span:
    """A tile along one axis, in latent positions; its core, counted from its start, does not overlap that of another tile."""

    start: int
    stop: int
    core_start: int
    core_stop: int


Tile = tuple[Span, Span]


@dataclass(frozen=True)
class Tiling:
    """Bound on what a first stage processes at once.

    Attributes:
        tile: an image or batch of more than ``tile ** 2`` latent positions is processed in parts.
        overlap: least number of latent positions that neighbouring tiles have in common.

    Raises:
        SamplingError: ``overlap`` is below 0, or not below ``tile``.
    """

    tile: int = 128
    overlap: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.tile:
            raise SamplingError(
                f"tiles of {self.tile} cannot overlap by {self.overlap}; give from 0 to {self.tile - 1}."
            )

    def decode(self, first_stage: FirstStage | TinyDecoder, latent: Tensor) -> Tensor:
        """Call ``decode`` of a first stage or a tiny decoder in parts: ``[b z h w] -> [b c fh fw]``."""

        def in_tiles(latent: Tensor) -> Tensor:
            if not isinstance(first_stage, Tileable):
                return first_stage.decode(latent)
            return self._tiled(first_stage.fine_decode, first_stage.coarse_decode(latent), 1, first_stage.factor)

        return torch.cat(self._in_parts(first_stage.decode, in_tiles, latent, 1))

    def encode(self, first_stage: FirstStage, image: Tensor) -> Posterior:
        """Call :meth:`FirstStage.encode` in parts: ``[b c fh fw]`` to the posterior over ``[b z h w]``."""

        def in_tiles(image: Tensor) -> Posterior:
            if not isinstance(first_stage, Tileable):
                return first_stage.encode(image)
            features = self._tiled(first_stage.fine_encode, image, first_stage.factor, 1)
            return first_stage.coarse_encode(features.to(image.dtype))

        parts = self._in_parts(first_stage.encode, in_tiles, image, first_stage.factor)
        return first_stage.posterior_type.cat(parts)

    def in_tiles(self, x: Tensor, scale: int) -> bool:
        """Return True if each image of ``x [b c scale*h scale*w]`` is too large to be processed at once."""
        return x.shape[-2] * x.shape[-1] // scale**2 > self.tile**2

    def spans(self, length: int) -> list[Span]:
        """Return the fewest tiles that cover ``length`` positions, of equal size and evenly spaced."""
        count = max(1, -(-(length - self.overlap) // (self.tile - self.overlap)))
        size = -(-(length + (count - 1) * self.overlap) // count)
        starts = [round(i * (length - size) / max(1, count - 1)) for i in range(count)]
        cuts = [0, *((a + size + b) // 2 for a, b in pairwise(starts)), length]
        return [Span(s, s + size, a - s, b - s) for s, (a, b) in zip(starts, pairwise(cuts), strict=True)]

    def weights(self, length: int, scale: int) -> list[Tensor]:
        """Return blending weights of each span, ``scale`` pixels per position: linear ramps that add up to 1 at every pixel."""
        spans, total, ramps = self.spans(length), torch.zeros(length * scale), []
        for span in spans:
            inside = (torch.arange((span.stop - span.start) * scale) + 0.5) / max(1, self.overlap * scale)
            up = inside if span.start > 0 else torch.ones_like(inside)
            down = inside.flip(0) if span.stop < length else torch.ones_like(inside)
            ramps.append(torch.minimum(up, down).clamp(max=1.0))
            total[span.start * scale : span.stop * scale] += ramps[-1]
        return [ramp / total[span.start * scale : span.stop * scale] for span, ramp in zip(spans, ramps, strict=True)]

    def _in_parts(
        self, at_once: Callable[[Tensor], T], in_tiles: Callable[[Tensor], T], x: Tensor, scale: int
    ) -> list[T]:
        """Process a batch ``x [b c scale*h scale*w]``: large images ``in_tiles``, small ones ``at_once``, several per call."""
        if self.in_tiles(x, scale):
            return [in_tiles(image) for image in x.split(1)]
        positions = x.shape[-2] * x.shape[-1] // scale**2
        return [at_once(part) for part in x.split(self.tile**2 // positions)]

    def _tiled(self, network: Callable[[Tensor], Tensor], x: Tensor, inner: int, outer: int) -> Tensor:
        """Call a network tile by tile: ``[1 c inner*h inner*w] -> [1 c' outer*h outer*w]``."""
        height, width = (side // inner for side in x.shape[-2:])
        tiles = list(product(self.spans(height), self.spans(width)))
        weights = list(product(self.weights(height, outer), self.weights(width, outer)))
        rows, columns = (self._sampled(side, inner).to(x.device) for side in (height, width))
        sample, out = x[..., rows[:, None], columns], torch.zeros(())
        norms = SharedNorms()
        for last in [False] * MEASUREMENTS + [True]:
            norms.sampling, norms.tile = True, None
            with norms:
                network(sample)
            norms.sampling = False
            for tile, (down, across) in zip(tiles, weights, strict=True):
                norms.tile = None if last else tile
                with norms:
                    done = network(_part(x, tile, inner))
                done = done.float()
                if not out.ndim:
                    out = done.new_zeros(1, done.shape[1], outer * height, outer * width)
                if last:
                    _part(out, tile, outer).add_(done * torch.outer(down, across).to(done))
            norms.compare()
        return out

    def _sampled(self, length: int, scale: int) -> Tensor:
        """Return indices of pixels, ``scale`` per position: all of them, or if these are too many, evenly spaced blocks."""
        if length <= self.tile:
            return torch.arange(length * scale)
        block = min(BLOCK, self.tile)
        starts = torch.linspace(0, length - block, self.tile // block).round().long()
        return (scale * starts[:, None] + torch.arange(block * scale)).flatten()


class SharedNorms(TorchFunctionMode):
    """Context in which group norms use the statistics of an image, while the network is called with one tile after the other.

    The statistics of a norm depend on how the preceding norms normalise, so statistics measured over tiles under one
    normalisation are inconsistent under another. The statistics of a sample that passes through the network at once are
    consistent; over the tiles only the difference of the image from its sample is measured, which hardly depends on it.

    A context acts on the calls of its own thread alone and changes nothing in the network, so that threads can share one.
    Norms are identified by their weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sampling = False  # True while the network is called with the sample, else it is called with a tile
        self.tile: Tile | None = None  # the tile, if it is to be measured
        # mean and deviation of the sample, and difference of the image's mean in such deviations and ratio of its deviation
        self.sample: dict[int, tuple[Tensor, Tensor]] = {}  # [b g] each
        self.differences: dict[int, tuple[Tensor, Tensor]] = {}
        self.sums: dict[int, tuple[Tensor, float]] = {}  # of 1, x and x^2 over the cores of the tiles, [3 b g]; and eps

    def compare(self) -> None:
        """Apply the measurements over the tiles from the next sample on; called after all tiles."""
        for norm, (sums, eps) in self.sums.items():
            (mean, deviation), (of_sample, its_deviation) = _statistics(sums, eps), self.sample[norm]
            self.differences[norm] = (mean - of_sample) / its_deviation, deviation / its_deviation
        self.sums = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (self.group_norm if func is F.group_norm else func)(*args, **(kwargs or {}))

    def group_norm(self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Group norm with shared statistics, in place of :func:`F.group_norm`: ``[b c h w] -> [b c h w]``."""
        norm = id(weight)
        if self.sampling:
            self.sample[norm] = _statistics(_sums(x, groups), eps)
        elif self.tile is not None:
            scale = x.shape[-2] // (self.tile[0].stop - self.tile[0].start)
            rows, columns = (slice(scale * span.core_start, scale * span.core_stop) for span in self.tile)
            sums = _sums(x[..., rows, columns], groups)
            self.sums[norm] = (self.sums[norm][0] + sums if norm in self.sums else sums), eps
        mean, deviation = self.sample[norm]
        if norm in self.differences:
            shift, ratio = self.differences[norm]
            mean, deviation = mean + shift * deviation, ratio * deviation
        mean, deviation = (each.repeat_interleave(x.shape[1] // groups, 1) for each in (mean, deviation))
        scales, biases = weight / deviation, bias - weight * mean / deviation
        return torch.addcmul(biases[..., None, None], x.float(), scales[..., None, None]).to(x.dtype)


def _sums(x: Tensor, groups: int) -> Tensor:
    """Return the sums of 1, x and x^2 over each group of ``x [b c h w]``, in fp32: ``[3 b g]``."""
    x = x.float()
    means = [each.mean((2, 3)).unflatten(1, (groups, -1)).mean(2) for each in (x, x.square())]
    return x[0].numel() / groups * torch.stack([torch.ones_like(means[0]), *means])


def _statistics(sums: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, ``[b g]``, given the result of :func:`_sums`."""
    mean, squares = sums[1] / sums[0], sums[2] / sums[0]
    return mean, ((squares - mean.square()).clamp(min=0) + eps).sqrt()


def _part(x: Tensor, tile: Tile, scale: int) -> Tensor:
    """Return the view of ``x [b c h w]``, ``scale`` pixels per position, that lies in a tile."""
    rows, columns = (slice(scale * span.start, scale * span.stop) for span in tile)
    return x[..., rows, columns]
