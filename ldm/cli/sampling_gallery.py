"""Images of docs/sampling.md: a strip for each sampler, spacing and kind of guidance (``tools/sampling_gallery.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm import Pipeline
from ldm.diffusion import SAMPLERS, SPACINGS, Guidance, Projection
from ldm.image_output import Images

OUT = Path("docs/images/sampling")
STEPS = (5, 10, 20, 50)
PROMPTS = ("red apple", "man astronaut medium-light skin tone")
SEED = 0
MILD, HIGH = 3.0, 8.0

GUIDANCE: dict[str, Guidance] = {
    "none": Guidance(1.0),
    "mild": Guidance(MILD),
    "high": Guidance(HIGH),
    "rescale": Guidance(HIGH, rescale=0.7),
    "interval": Guidance(MILD, interval=(0.2, 5.0)),
    "threshold": Guidance(HIGH, threshold=0.95),
    "perturbed": Guidance(MILD, perturbed=4.0),
    "projection": Guidance(HIGH, projection=Projection(norm_threshold=2.0, momentum=-0.5)),
}
"""Guidance settings, as quoted in docs/sampling.md."""


def strip(pipe: Pipeline, **settings: Any) -> Images:
    """Sample one row: the first prompt with 5, 10, 20 and 50 steps, then the second."""
    counts = {n: pipe(list(PROMPTS), num_inference_steps=n, seed=[SEED] * len(PROMPTS), **settings) for n in STEPS}
    return Images(counts[n][index] for index in range(len(PROMPTS)) for n in STEPS)


def main() -> None:
    """Write every strip to the folder from which the page includes it."""
    OUT.mkdir(parents=True, exist_ok=True)
    pipe = Pipeline.from_pretrained()
    strips: dict[str, dict[str, Any]] = {f"sampler-{name}": {"sampler": name} for name in SAMPLERS}
    strips |= {f"spacing-{name}": {"spacing": name} for name in SPACINGS}
    strips |= {f"guidance-{name}": {"guidance": guidance} for name, guidance in GUIDANCE.items()}
    for name, settings in strips.items():
        images = strip(pipe, progress=False, **settings)
        images.grid(columns=len(images)).save(OUT / f"{name}.png", optimize=True)
        print(OUT / f"{name}.png")
