"""The denoising as an animation.

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
"""Milliseconds that the finished images are shown."""

DECODED = 128 * 128
"""Pixels up to which a frame shows decoded images: the previews of so small ones show little."""


class Animation:
    """The callback of one call of a pipeline, whose steps it collects.

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

    def frames(self, pictures: Images) -> list[Image.Image]:
        """A frame for each step, of what the images were going to be, and one of the finished ``pictures``.

        Several images make a grid. A batch that needed fewer steps than another waits for it.
        """
        shown = []
        for index in range(max(map(len, self.batches), default=0)):
            latents = torch.cat([steps[min(index, len(steps) - 1)] for steps in self.batches])
            shown.append(self._estimates(latents))
        return [each[0] if len(each) == 1 else each.grid() for each in [*shown, pictures]]

    def save(self, path: str | Path, pictures: Images) -> Path:
        """Write the frames as a GIF that goes on and on, the finished ``pictures`` shown for a second, and return its path.

        Raises:
            SamplingError: a path that does not end in .gif, or cannot be written.
        """
        return write_animation(self.frames(pictures), path, HOLD)

    def _estimates(self, latents: Tensor) -> Images:
        factor = self.pipe.model.config.first_stage.factor
        if factor**2 * math.prod(latents.shape[2:]) > DECODED:
            return self.pipe.preview(latents)
        with torch.inference_mode():
            return Images.of((self.pipe.model.decode(latents.to(self.pipe.device)) + 1) / 2)
