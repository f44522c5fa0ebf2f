"""Guidance: one denoiser from a network, conditionings and a rule that combines their estimates.

Guidance acts on estimates of x0. All parametrizations are affine in F, so classifier-free guidance of D is the same
as that of F; for the nonlinear operations (rescaling, projection, thresholding) it is documented on which quantity they act.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ldm.checks import number, numbers
from ldm.diffusion.parametrization import per_item
from ldm.diffusion.samplers import Denoiser
from ldm.errors import SamplingError


class Batched(Protocol):
    """Interface of a conditioning under guidance: batches of it can be concatenated."""

    @staticmethod
    def cat(batches: Sequence[Any], /) -> Any: ...


C = TypeVar("C", bound=Batched)


@dataclass(frozen=True)
class Projection:
    """Adaptive projected guidance (Sadat et al. 2410.02416), which reduces oversaturation.

    Of the difference between conditional and unconditional estimate, the part along the conditional one mostly raises
    contrast; ``eta`` of it is kept. Differences longer than ``norm_threshold`` are shortened to it, and each evaluation
    adds ``momentum`` times the sum so far, where a negative number damps the direction that evaluations have in common.
    """

    eta: float = 0.0
    norm_threshold: float | None = None
    momentum: float = 0.0


@dataclass(frozen=True)
class Guidance:
    """Settings of guidance: its scale, its variants, and the noise levels at which it acts.

    Args:
        scale: scale of classifier-free guidance, one for all images or one for each; 0 is the unconditional model, 1
            the conditional one, above 1 extrapolates. None is 1, or in a pipeline the default of its model.
        rescale: share, 0 to 1, to which the contrast of the conditional estimate is restored, measured on the
            velocity v (Lin et al. 2305.08891, section 3.4); reduces overexposure.
        interval: (least, greatest) noise level at which guidance acts; outside it the conditional model runs alone, in
            half the time (Kynkäänniemi et al. 2404.07724).
        threshold: quantile of magnitudes, such as 0.995: larger values of the guided estimate are clipped and the
            estimate is scaled to the range of the conditional one (dynamic thresholding, Saharia et al.
            2205.11487, section 2.3, with that range in place of [-1, 1]).
        perturbed: scale of perturbed-attention guidance (Ahn et al. 2403.17377): away from the estimate of
            the network with its self-attention replaced by the identity; works without a prompt.
        projection: settings of adaptive projected guidance, which then replaces plain classifier-free guidance.
    """

    scale: float | Sequence[float] | None = None
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    threshold: float | None = None
    perturbed: float = 0.0
    projection: Projection | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rescale", number("the guidance rescale", self.rescale, 0, 1))
        if self.interval is not None:
            interval = numbers("the guidance interval", self.interval)
            if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
                raise SamplingError(f"the guidance interval is {interval}; give two rising noise levels, 0 or more.")
            object.__setattr__(self, "interval", tuple(interval))
        if self.threshold is not None:
            object.__setattr__(self, "threshold", number("the guidance threshold", self.threshold))
            if not 0 < self.threshold <= 1:
                raise SamplingError(f"the guidance threshold is {self.threshold}; it must be above 0 and at most 1.")

    def record(self) -> dict[str, Any]:
        """Return the scale and all settings that differ from their defaults, for the metadata of an image."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        named = {name: asdict(value) if isinstance(value, Projection) else value for name, value in values.items()}
        return {"guidance_scale": self.scale} | {
            f"guidance_{name}": value
            for name, value in named.items()
            if name != "scale" and values[name] != defaults[name]
        }


@dataclass(frozen=True)
class Perturbable(Generic[C]):
    """Conditionings of a batch, and which of its rows the network evaluates with perturbed attention.

    Attributes:
        conditioning: conditioning with b rows.
        rows: ``[b]`` of bool, True where the attention is perturbed.
    """

    conditioning: C
    rows: Tensor

    @staticmethod
    def cat(batches: Sequence[Perturbable[C]]) -> Perturbable[C]:
        """Concatenate along the batch dimension, in order."""
        conditionings = [batch.conditioning for batch in batches]
        return Perturbable(conditionings[0].cat(conditionings), torch.cat([batch.rows for batch in batches]))


@dataclass(frozen=True)
class Composition:
    """Several prompts for one image (conjunction in composable diffusion, Liu et al. 2206.01714, section 4).

    D(x | composed) = D(x | unconditional) + sum_i w_i (D(x | prompt i) - D(x | unconditional))

    Attributes:
        rows: the image of each prompt, rising.
        weights: w of each prompt.
    """

    rows: tuple[int, ...]
    weights: tuple[float, ...]

    def combine(self, estimates: Tensor, unconditional: Tensor) -> Tensor:
        """Return the composed estimates ``[b ...]`` of those for each prompt ``[m ...]`` and the unconditional ``[b ...]``."""
        left = [1.0] * len(unconditional)
        for row, weight in zip(self.rows, self.weights, strict=True):
            left[row] -= weight
        result = unconditional * per_item(unconditional.new_tensor(left), unconditional)
        for row, weight, estimate in zip(self.rows, self.weights, estimates, strict=True):
            result[row] += weight * estimate
        return result


def guided(
    network: Callable[[Tensor, Tensor, C], Tensor],
    conditional: C,
    unconditional: C | None,
    guidance: Guidance | float,
    perturbed: C | None = None,
    composition: Composition | None = None,
) -> Denoiser:
    """Return a denoiser with classifier-free guidance (Ho & Salimans 2207.12598, equation 6, whose w is ``scale - 1``):

    D = D(x | unconditional) + scale (D(x | conditional) - D(x | unconditional))

    Args:
        network: (x [b ...], sigma [b], conditioning of b) -> x0 [b ...].
        conditional: positive conditioning; with a composition, a row for each prompt.
        unconditional: negative conditioning (of the empty or a negative prompt); None for no guidance.
        guidance: how the estimates are combined; a number is a scale.
        perturbed: the positive conditioning with the perturbation, if ``guidance.perturbed`` is not 0; see :class:`Perturbable`.
        composition: which rows of the positive conditioning make up which image; None: one is one image.

    Returns:
        A denoiser that calls the network once, with a batch of b for each estimate that it needs: only one at noise levels
        without guidance. It may have state (momentum), so each sampling run needs a new one.
    """
    how = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    scale = torch.as_tensor(1.0 if how.scale is None else how.scale, dtype=torch.float32, device="cpu")
    parts = [conditional]
    if unconditional is not None and (composition is not None or bool((scale != 1).any())):
        parts.append(unconditional)
    if perturbed is not None and how.perturbed:
        parts.append(perturbed)
    if len(parts) == 1:
        return lambda x, sigma: network(x, sigma, conditional)
    unguided = parts[: 1 if composition is None else 2]
    joined = conditional.cat(parts)
    joined_unguided = conditional if len(unguided) == 1 else conditional.cat(unguided)
    is_guided = (scale != 1) | (perturbed is not None and how.perturbed != 0)  # images to which any guidance applies
    all_guided = bool(is_guided.all())
    momentum = torch.zeros((), dtype=torch.float32, device="cpu")

    def evaluate(x: Tensor, sigma: Tensor, batch: C, n: int) -> Sequence[Tensor]:
        """Return the estimates of the first ``n`` parts, which ``batch`` holds, ``[b ...]`` each."""
        if composition is None:
            return network(torch.cat([x] * n), torch.cat([sigma] * n), batch).chunk(n)
        index = [composition.rows, range(len(x)), composition.rows][:n]
        rows = [row for part in index for row in part]
        each, avoided, *others = network(x[rows], sigma[rows], batch).split([len(part) for part in index])
        composed = [composition.combine(estimates, avoided) for estimates in (each, *others)]
        return composed[0], avoided, *composed[1:]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal momentum
        scales = scale.to(x).expand(len(x))
        acts = None if all_guided else is_guided.to(x.device).expand(len(x))
        if how.interval is not None:
            inside = (how.interval[0] <= sigma) & (sigma <= how.interval[1])
            acts = inside if acts is None else inside & acts
            if not acts.any():
                return evaluate(x, sigma, joined_unguided, len(unguided))[0]
        towards, *others = evaluate(x, sigma, joined, len(parts))
        result = towards
        if perturbed is not None and how.perturbed:
            result = result + how.perturbed * (towards - others.pop())
        if others:
            difference = towards - others[0]
            if how.projection is not None:
                summed = difference + how.projection.momentum * momentum
                momentum = summed if acts is None else torch.where(per_item(acts, x), summed, momentum)
                difference = _projected(summed, towards, how.projection)
            result = result + (per_item(scales, x) - 1) * difference
        if how.rescale:
            result = _rescaled(result, towards, x, per_item(sigma, x), how.rescale)
        if how.threshold is not None:
            result = _thresholded(result, towards, how.threshold)
        return result if acts is None else torch.where(per_item(acts, x), result, towards)

    return denoise


def _projected(difference: Tensor, towards: Tensor, projection: Projection) -> Tensor:
    """Return ``difference [b ...]``, shortened, with its part along ``towards [b ...]`` scaled by ``eta``."""
    flat, along = difference.flatten(1), torch.nn.functional.normalize(towards.flatten(1), dim=1)
    if projection.norm_threshold is not None:
        flat = flat * (projection.norm_threshold / flat.norm(dim=1, keepdim=True)).clamp(max=1)
    parallel = (flat * along).sum(1, keepdim=True) * along
    return (flat - (1 - projection.eta) * parallel).reshape(difference.shape)


def _rescaled(result: Tensor, towards: Tensor, x: Tensor, sigma: Tensor, share: float) -> Tensor:
    """Interpolate by ``share`` towards the estimate whose v has the per-image standard deviation of the conditional v."""
    skip, out = 1 / (1 + sigma**2), -sigma * (1 + sigma**2).rsqrt()
    v, v_towards = ((estimate - skip * x) / out for estimate in (result, towards))
    deviation, target = (per_item(values.flatten(1).std(1), x) for values in (v, v_towards))
    return skip * x + out * v * (share * target / deviation + 1 - share)


def _thresholded(result: Tensor, towards: Tensor, share: float) -> Tensor:
    """Clip ``result`` at the quantile ``share`` of its magnitudes and scale it to that of ``towards``."""
    limit, target = (
        per_item(torch.quantile(estimate.flatten(1).abs().float(), share, dim=1), result)
        for estimate in (result, towards)
    )
    limit = torch.maximum(limit, target)
    return result.clamp(-limit, limit) * (target / limit)
