"""Parts of the pipeline's sampling loop: where it starts, its solver, its steps as a stream, and how editing changes it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import Tensor

from ldm.devices import usual_torch_state
from ldm.diffusion import SAMPLERS, SPECS, Denoiser, Noise, Step, brownian_noise
from ldm.diffusion.parametrization import Diffusion
from ldm.diffusion.schedule import BetaSchedule
from ldm.errors import SamplingError
from ldm.image_output import Images
from ldm.model import LatentDiffusion


class Edit:
    """Changes that an editing task makes to a sampling; this base class makes none.

    ``rows`` are the images of the current batch, among all that the call makes.
    """

    def levels(self, levels: Tensor) -> Tensor:
        """Return the noise levels to sample along, ``[steps + 1]``."""
        return levels

    def start(self, x: Tensor, unit: Tensor, sigma: float, rows: slice) -> Tensor:
        """Return the start at level ``sigma`` instead of ``x``, which is made of ``unit`` noise; all ``[b c h w]``."""
        return x

    def wrap(self, denoise: Denoiser, rows: slice) -> Denoiser:
        """Return the denoiser to sample with."""
        return denoise

    def finish(self, images: Tensor, rows: slice) -> Tensor:
        """Return the result for the decoded images, ``[b 3 h w]`` in [0, 1]."""
        return images

    def record(self) -> dict[str, Any]:
        """Return the entries of the task in the images' record of their settings."""
        return {}


@dataclass(frozen=True)
class SamplingStep(Step):
    """A finished step of a sampling, with its place among all steps of the call."""

    done: int
    """Number of steps that are finished, in all batches."""
    total: int | None
    """Number of steps of all batches; None for a solver that chooses its steps."""
    rows: slice
    """The images of the current batch, among all that the call makes."""
    make_preview: Callable[[Tensor], Images] = field(repr=False)

    def preview(self) -> Images:
        """Return a rough preview of the finished images of this batch, made without the decoder."""
        return self.make_preview(self.denoised)


class SamplingStream(Iterator[SamplingStep]):
    """Iterator over the steps of a sampling, each of which is computed when the iterator reaches it.

    The adapters and textual inversions of ``model`` must stay as they are until the last step.

    >>> stream = pipe.stream("a red apple")
    >>> for step in stream:
    ...     step.preview()[0].save(f"{step.done}-of-{step.total}.png")
    >>> stream.result()[0].save("apple.png")
    """

    def __init__(self, steps: Generator[SamplingStep, None, Any], model: LatentDiffusion):
        self._steps, self._model, self._additions = steps, model, model.additions
        self._result: Any = None

    def __next__(self) -> SamplingStep:
        if self._result is None and self._model.additions != self._additions:
            self.close()
            raise SamplingError(
                "the LoRAs or textual inversions of the model were changed during the sampling; start it again, and change "
                "them after its last step."
            )
        try:
            with usual_torch_state():
                return next(self._steps)
        except StopIteration as end:
            self._result = self._result if end.value is None else end.value
            raise

    def close(self) -> None:
        """Cancel the sampling: no further step is computed, and there is no result."""
        self._steps.close()

    def result(self) -> Any:
        """Compute the steps that are left, and return what :meth:`ldm.pipeline.Pipeline.__call__` returns.

        Raises:
            SamplingError: :meth:`close` or an error ended the sampling before its last step.
        """
        for _ in self:
            pass
        if self._result is None:
            raise SamplingError("the sampling ended before its last step; start a new one.")
        return self._result


def batches_of(models: Sequence[LatentDiffusion], size: int) -> list[tuple[LatentDiffusion, slice]]:
    """Return the batches of at most ``size`` images, of one model each; the last slice may end beyond the last image."""
    batches, first = [], 0
    for model, run in groupby(models):
        end = first + len([*run])
        last = end if end < len(models) else end + size
        batches += [(model, slice(start, min(start + size, last))) for start in range(first, end, size)]
        first = end
    return batches


def starting_point(diffusion: Diffusion, unit: Tensor, sigma: float, sampler: str, spacing: str) -> Tensor:
    """Return the noisy latents ``[b c h w]`` at level ``sigma`` to start from: of unit variance as the network sees them.

    On grids that reach up to the last timestep, the solvers of k-diffusion start at sigma times the noise, as in diffusers.
    """
    from_last_timestep = SPECS[sampler].grid == "fractional" and spacing != "leading"
    if from_last_timestep and isinstance(diffusion.schedule, BetaSchedule):
        return sigma * unit
    return diffusion.start(unit, sigma)


def solve(
    diffusion: Diffusion,
    sampler: str,
    denoise: Denoiser,
    x: Tensor,
    levels: Tensor,
    noise: Noise,
    options: Mapping[str, Any],
    seeds: Sequence[int],
) -> Iterator[Step]:
    """Run a solver along ``levels [steps + 1]`` with the kind of noise that it takes; without a step, yield nothing.

    Args:
        x: noisy latents at the first level, ``[b c h w]``.
        noise: white noise of each image.
        seeds: of the images; a Brownian path depends on them alone.
    """
    if len(levels) < 2:
        return iter(())
    spec, schedule = SPECS[sampler], diffusion.schedule
    keywords = dict(options)
    if spec.brownian and options.get("eta") != 0:
        # over the range of the schedule, and wider only where the levels are: it must depend on the seed alone
        least = min(levels[levels > 0].min().item(), schedule.sigma_min)
        noise = brownian_noise(seeds, x.shape[1:], least, max(levels[0].item(), schedule.sigma_max), x.device)
    if spec.stochastic:
        keywords["noise"] = noise
    return SAMPLERS[sampler](denoise, x, levels, **keywords)
