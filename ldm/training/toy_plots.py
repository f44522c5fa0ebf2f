"""Previews of two-dimensional toy models: the forward and the reverse process as scatter plots."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import require_package
from ldm.model import LatentDiffusion
from ldm.pipeline import Pipeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 10
"""Number of states of a process that are shown, in two rows."""

FRAMES = 50
"""Approximate number of states of a process in the animation."""

MARGIN = 0.4
"""Inches for the title above a panel and the numbers below it."""


def require_matplotlib() -> None:
    """Check that matplotlib is installed, before the training rather than after it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_package("matplotlib", "the plots of two-dimensional data", "toy")


def process_plots(
    model: LatentDiffusion, x0: Tensor, generator: torch.Generator
) -> dict[str, Image.Image | list[Image.Image]]:
    """Plot ``PANELS`` states of each process, as ``forward`` and ``reverse``, and animate both in turn, as ``diffusion``.

    Args:
        model: model of two-dimensional points.
        x0: points of the data, ``[n 2 1 1]``; as many are sampled.
        generator: source of the noise of both.
    """
    processes = {"forward": forward_process(model, x0, generator), "reverse": reverse_process(model, x0, generator)}
    plots: dict[str, Image.Image | list[Image.Image]] = {}
    frames: list[Image.Image] = []
    for name, states in processes.items():
        steps = len(states) - 1
        titled = [(f"{name}, {step} of {steps}", state) for step, state in enumerate(states)]
        plots[name] = draw_panels([titled[i] for i in np.linspace(0, steps, min(PANELS, steps + 1)).astype(int)])
        frames += draw_frames(titled[:: max(1, steps // FRAMES)])
    return plots | {"diffusion": frames}


def forward_process(model: LatentDiffusion, x0: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Add noise to the data along the sampled noise levels: ``[n 2]`` at the start and after each step.

    x_i = x_{i-1} + sqrt(s_i^2 - s_{i-1}^2) n, drawn divided by sqrt(1 + s_i^2): the x_t of Ho et al. 2006.11239, equation 2.
    """
    levels = Pipeline(model).noise_levels().flip(0)
    states, x = [x0], x0
    for s, s_next in pairwise(levels.tolist()):
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        x = x + (s_next**2 - s**2) ** 0.5 * noise
        states.append(model.diffusion.finish(x, s_next))
    return [state.flatten(1).cpu() for state in states]


def reverse_process(model: LatentDiffusion, x0: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Sample as many points as ``x0`` from unit noise: ``[n 2]`` at the start and after each step of the sampler."""
    unit, seed = torch.randn(x0.shape, generator=generator), int(torch.randint(2**31, (), generator=generator))
    pipe = Pipeline(model)
    start = float(pipe.noise_levels()[0])
    states = [model.diffusion.finish(model.diffusion.start(unit, start), start)]
    pipe(
        num_images_per_prompt=len(x0),
        latents=unit,
        seed=seed,
        output_type="latent",
        callback=lambda step: states.append(model.diffusion.finish(step.x, step.sigma)),
        progress=False,
    )
    return [state.flatten(1).cpu() for state in states]


def draw_panels(states: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Draw titled points ``[n 2]`` as one panel each, in two rows."""
    from matplotlib.figure import Figure

    columns = (len(states) + 1) // 2
    figure = Figure(figsize=(2.2 * columns, 2 * (2.2 + MARGIN)), dpi=100, layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False).flatten()
    for panel, (title, points) in zip(axes, states, strict=False):
        _scatter(panel, title, points)
    for panel in axes[len(states) :]:
        panel.set_axis_off()
    return _rendered(figure)


def draw_frames(states: Sequence[tuple[str, Tensor]]) -> list[Image.Image]:
    """Draw titled points ``[n 2]`` as one image each, all of the same size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2, 3.2 + MARGIN), dpi=100)
    panel = figure.subplots()
    frames = []
    for title, points in states:
        panel.clear()
        _scatter(panel, title, points)
        frames.append(_rendered(figure))
    return frames


def _scatter(panel: Axes, title: str, points: Tensor) -> None:
    """Draw points in a square around 0 that contains nearly all of them; their scale is read from the axes."""
    half = 1.2 * float(points.abs().amax(dim=1).quantile(0.98))
    panel.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=4, alpha=0.4, linewidths=0, color="tab:red")
    panel.set(xlim=(-half, half), ylim=(-half, half), aspect="equal")
    panel.set_title(title, fontsize=9)
    panel.tick_params(labelsize=6)


def _rendered(figure: Figure) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
