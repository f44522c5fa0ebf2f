"""Large images through an autoencoder in bounded memory: tile by tile, and a batch a few images at a time.

What works at the resolution of the latents, self-attention above all, takes little memory and is done at once; what works at
finer ones goes tile by tile. Convolutions see across a tile's border by the overlap, over which tiles are blended. Group
norms are what tiles would disagree on: over a tile they have other statistics than over the image, so that its contrast and
colours would differ from its neighbours'. All tiles are therefore normalised alike, by :class:`SharedNorms`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor, nn

from ldm.errors import SamplingError
from ldm.vae.first_stage import DiagonalGaussian, FirstStage

MEASUREMENTS = 2
"""How often the tiles are gone through before they are kept. With 0, 1, 2, 3 the shipped model's decoder agrees with the whole
decode to 35, 47, 55, 55 dB on a sheet of emoji whose lower half is blank (384 x 384, tiles of 32)."""

BLOCK = 8
"""Side of the blocks, in latent positions, of which the sample of an image is made up."""


@dataclass(frozen=True)
class Span:
    """A tile along one axis, in latent positions; its core, counted from its start, overlaps no other tile's."""

    start: int
    stop: int
    core_start: int
    core_stop: int


Tile = tuple[Span, Span]


@dataclass(frozen=True)
class Tiling:
    """How much an autoencoder works on at once.

    Attributes:
        tile: what is larger than this squared, in latent positions, is worked on in parts, be it a large image or a
            large batch.
        overlap: latent positions that neighbouring tiles have in common, at least.

    Raises:
        SamplingError: an overlap below 0, or not below ``tile``.
    """

    tile: int = 128
    overlap: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.tile:
            raise SamplingError(
                f"tiles of {self.tile} cannot overlap by {self.overlap}; give from 0 to {self.tile - 1}."
            )

    def decode(self, first_stage: FirstStage, latent: Tensor) -> Tensor:
        """As :meth:`FirstStage.decode`: ``[b z h w] -> [b c fh fw]``."""

        def tiled(latent: Tensor) -> Tensor:
            features = first_stage.coarse_decode(latent)
            return self._tiled(first_stage, first_stage.fine_decode, features, 1, first_stage.factor)

        return self._in_parts(first_stage.decode, tiled, latent, 1)

    def encode(self, first_stage: FirstStage, image: Tensor) -> DiagonalGaussian:
        """As :meth:`FirstStage.encode`: ``[b c fh fw]`` to the posterior over ``[b z h w]``."""

        def whole(image: Tensor) -> Tensor:
            return _moments(first_stage.encode(image))

        def tiled(image: Tensor) -> Tensor:
            features = self._tiled(first_stage, first_stage.fine_encode, image, first_stage.factor, 1)
            return _moments(first_stage.coarse_encode(features.to(image.dtype)))

        return DiagonalGaussian(*self._in_parts(whole, tiled, image, first_stage.factor).chunk(2, dim=1))

    def spans(self, length: int) -> list[Span]:
        """As few tiles as cover ``length`` positions, of one size and evenly spaced."""
        count = max(1, -(-(length - self.overlap) // (self.tile - self.overlap)))
        size = -(-(length + (count - 1) * self.overlap) // count)
        starts = [round(i * (length - size) / max(1, count - 1)) for i in range(count)]
        cuts = [0, *((a + size + b) // 2 for a, b in pairwise(starts)), length]
        return [Span(s, s + size, a - s, b - s) for s, (a, b) in zip(starts, pairwise(cuts), strict=True)]

    def weights(self, length: int, scale: int) -> list[Tensor]:
        """Of each span, the weights of its ``scale`` pixels a position: linear ramps that add up to 1 at every pixel."""
        spans, total, ramps = self.spans(length), torch.zeros(length * scale), []
        for span in spans:
            inside = (torch.arange((span.stop - span.start) * scale) + 0.5) / max(1, self.overlap * scale)
            up = inside if span.start > 0 else torch.ones_like(inside)
            down = inside.flip(0) if span.stop < length else torch.ones_like(inside)
            ramps.append(torch.minimum(up, down).clamp(max=1.0))
            total[span.start * scale : span.stop * scale] += ramps[-1]
        return [ramp / total[span.start * scale : span.stop * scale] for span, ramp in zip(spans, ramps, strict=True)]

    def _in_parts(
        self, whole: Callable[[Tensor], Tensor], tiled: Callable[[Tensor], Tensor], x: Tensor, scale: int
    ) -> Tensor:
        """Of ``x [b c scale*h scale*w]`` each large image ``tiled``, small ones ``whole``, as many at once as make a tile."""
        positions = x.shape[-2] * x.shape[-1] // scale**2
        if positions > self.tile**2:
            return torch.cat([tiled(picture) for picture in x.split(1)])
        together = self.tile**2 // positions
        return whole(x) if len(x) <= together else torch.cat([whole(part) for part in x.split(together)])

    def _tiled(
        self, module: nn.Module, network: Callable[[Tensor], Tensor], x: Tensor, inner: int, outer: int
    ) -> Tensor:
        """``network``, a method of ``module``, tile by tile: ``[1 c inner*h inner*w] -> [1 c' outer*h outer*w]``."""
        height, width = (side // inner for side in x.shape[-2:])
        tiles = list(product(self.spans(height), self.spans(width)))
        weights = list(product(self.weights(height, outer), self.weights(width, outer)))
        rows, columns = (self._sampled(side, inner).to(x.device) for side in (height, width))
        sample, out = x[..., rows[:, None], columns], torch.zeros(())
        with shared_norms(module) as norms:
            for last in [False] * MEASUREMENTS + [True]:
                norms.sampling, norms.tile = True, None
                network(sample)
                norms.sampling = False
                for tile, (down, across) in zip(tiles, weights, strict=True):
                    norms.tile = None if last else tile
                    done = network(_part(x, tile, inner)).float()
                    if not out.ndim:
                        out = done.new_zeros(1, done.shape[1], outer * height, outer * width)
                    if last:
                        _part(out, tile, outer).add_(done * torch.outer(down, across).to(done))
                norms.compare()
        return out

    def _sampled(self, length: int, scale: int) -> Tensor:
        """Indices of pixels, ``scale`` a position: all, or where these are too many, those of evenly spaced blocks."""
        if length <= self.tile:
            return torch.arange(length * scale)
        block = min(BLOCK, self.tile)
        starts = torch.linspace(0, length - block, self.tile // block).round().long()
        return (scale * starts[:, None] + torch.arange(block * scale)).flatten()


def _moments(posterior: DiagonalGaussian) -> Tensor:
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


class SharedNorms:
    """Gives the group norms of a network the statistics of a whole image, of which the network sees tile after tile.

    The statistics of a norm depend on how the norms before it have normalised, so those that are measured while tiles are
    normalised in one way do not fit each other in another. Those of a sample that goes through the network at once do;
    what is measured over the tiles is by how much the image differs from its sample, which hardly depends on the way.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()  # other threads may use the same network meanwhile, and keep its norms
        self.sampling = False  # whether the network is called with the sample, else with a tile
        self.tile: Tile | None = None  # with which, if it is to be measured
        # mean and deviation of the sample, and difference of the image's mean in such deviations and ratio of its deviation
        self.sample: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}  # [b g] each
        self.differences: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}
        self.sums: dict[nn.GroupNorm, Tensor] = {}  # of 1, x and x^2 over the cores of the tiles, [3 b g]

    def compare(self) -> None:
        """Call when all tiles have been gone through: what was measured counts from the next sample on."""
        for norm, sums in self.sums.items():
            (mean, deviation), (of_sample, its_deviation) = _statistics(sums, norm.eps), self.sample[norm]
            self.differences[norm] = (mean - of_sample) / its_deviation, deviation / its_deviation
        self.sums = {}

    def hook(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """A forward hook of the norms: measures, and gives what they are to give, ``[b c h w]``."""
        assert isinstance(norm, nn.GroupNorm)
        if threading.get_ident() != self.thread:
            return None
        (x,) = inputs
        if self.sampling:
            self.sample[norm] = _statistics(_sums(x, norm.num_groups), norm.eps)
        elif self.tile is not None:
            scale = x.shape[-2] // (self.tile[0].stop - self.tile[0].start)
            rows, columns = (slice(scale * span.core_start, scale * span.core_stop) for span in self.tile)
            sums = _sums(x[..., rows, columns], norm.num_groups)
            self.sums[norm] = self.sums[norm] + sums if norm in self.sums else sums
        mean, deviation = self.sample[norm]
        if norm in self.differences:
            shift, ratio = self.differences[norm]
            mean, deviation = mean + shift * deviation, ratio * deviation
        mean, deviation = (each.repeat_interleave(x.shape[1] // norm.num_groups, 1) for each in (mean, deviation))
        scales, biases = norm.weight / deviation, norm.bias - norm.weight * mean / deviation
        return torch.addcmul(biases[..., None, None], x.float(), scales[..., None, None]).to(x.dtype)


def _sums(x: Tensor, groups: int) -> Tensor:
    """Of 1, x and x^2 over each group of ``x [b c h w]``, in fp32: ``[3 b g]``."""
    x = x.float()
    means = [each.mean((2, 3)).unflatten(1, (groups, -1)).mean(2) for each in (x, x.square())]
    return x[0].numel() / groups * torch.stack([torch.ones_like(means[0]), *means])


def _statistics(sums: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation, ``[b g]``, out of such sums."""
    mean, squares = sums[1] / sums[0], sums[2] / sums[0]
    return mean, ((squares - mean.square()).clamp(min=0) + eps).sqrt()


@contextmanager
def shared_norms(module: nn.Module) -> Iterator[SharedNorms]:
    """Within the block, the group norms of ``module`` share their statistics."""
    norms = SharedNorms()
    hooks = [part.register_forward_hook(norms.hook) for part in module.modules() if isinstance(part, nn.GroupNorm)]
    try:
        yield norms
    finally:
        for hook in hooks:
            hook.remove()


def _part(x: Tensor, tile: Tile, scale: int) -> Tensor:
    """A view of what of ``x [b c h w]``, ``scale`` pixels a position, lies in a tile."""
    rows, columns = (slice(scale * span.start, scale * span.stop) for span in tile)
    return x[..., rows, columns]
