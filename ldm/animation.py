"""Animations of the denoising.

>>> from ldm import Pipeline
>>> from ldm.animation import Animation
>>> pipe = Pipeline.from_pretrained("emoji")
>>> frames = Animation(pipe)
>>> images = pipe("a red apple", callback=frames)
>>> frames.save("apple.gif", images)
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm.diffusion import Step
from ldm.image_output import Images, write_animation
from ldm.pipeline import Pipeline

HOLD = 1000
"""Milliseconds for which the finished images are shown."""

DECODED = 128 * 128
"""Number of pixels up to which frames are decoded; previews of such small images show little."""


class Animation:
    """Callback for one call of a pipeline, which collects the steps.

    Args:
        pipe: the pipeline that calls it.
    """

    def __init__(self, pipe: Pipeline):
        self.pipe = pipe
        self.batches: list[list[Tensor]] = []
        """The estimates of the clean latents after each step, ``[b c h w]`` on the CPU, of each batch."""

    def __call__(self, step: Step) -> None:
        if step.index == 0:
            self.batches.append([])
        self.batches[-1].append(step.denoised.cpu())

    def frames(self, images: Images) -> list[Image.Image]:
        """Return a frame of the estimated images after each step, and one of the finished ``images``.

        Several images make a grid. The frames of a batch with fewer steps than another repeat its last one.
        """
        estimates = []
        for index in range(max(map(len, self.batches), default=0)):
            latents = torch.cat([steps[min(index, len(steps) - 1)] for steps in self.batches])
            estimates.append(self._estimates(latents))
        return [each[0] if len(each) == 1 else each.grid() for each in [*estimates, images]]

    def save(self, path: str | Path, images: Images) -> Path:
        """Write the frames as a GIF that loops, the finished ``images`` shown for a second, and return its path.

        Raises:
            SamplingError: a path that does not end in .gif, or cannot be written.
        """
        return write_animation(self.frames(images), path, HOLD)

    def _estimates(self, latents: Tensor) -> Images:
        factor = self.pipe.model.config.first_stage.factor
        if factor**2 * math.prod(latents.shape[2:]) > DECODED:
            return self.pipe.preview(latents)
        with torch.inference_mode():
            return Images.of((self.pipe.model.decode(latents.to(self.pipe.device)) + 1) / 2)
