from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ldm import Pipeline
from ldm.animation import HOLD, Animation
from ldm.diffusion import Step
from ldm.errors import SamplingError
from ldm.image_output import FRAME_TIME
from tests.tiny import CAPTIONS, SIZE, tiny_model


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(tiny_model())


def animated(pipe: Pipeline, prompts: list[str], **settings: Any) -> tuple[Any, Animation]:
    frames = Animation(pipe)
    return pipe(prompts, seed=1, progress=False, callback=frames, **settings), frames


def test_a_frame_for_each_step_and_one_of_the_finished_image(pipe: Pipeline) -> None:
    steps: list[Step] = []
    pipe("a red apple", seed=1, progress=False, callback=steps.append)
    images, frames = animated(pipe, ["a red apple"])
    shown = frames.frames(images)
    assert len(shown) == len(steps) + 1 == 5
    assert shown[-1] is images[0]
    for frame, step in zip(shown, steps, strict=False):
        with torch.inference_mode():
            decoded = ((pipe.model.decode(step.denoised)[0] + 1) * 127.5).numpy()
        assert np.abs(np.asarray(frame).transpose(2, 0, 1) - decoded).max() < 0.51


def test_the_file_loops_and_holds_the_finished_image(pipe: Pipeline, tmp_path: Path) -> None:
    images, frames = animated(pipe, ["a red apple"], num_inference_steps=3)
    path = frames.save(tmp_path / "new" / "apple.gif", images)
    with Image.open(path) as gif:
        assert gif.info["loop"] == 0
        assert gif.size == (SIZE, SIZE)
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
    # the last step's estimate is the finished image: a GIF has the two as one frame
    assert durations == [FRAME_TIME] * 2 + [FRAME_TIME + HOLD]
    with pytest.raises(SamplingError, match=r"apple\.webp is to be an animation, which is a GIF; end it in \.gif"):
        frames.save("apple.webp", images)


def test_several_images_are_a_grid_however_they_were_batched(pipe: Pipeline) -> None:
    images, frames = animated(pipe, CAPTIONS[:3])
    at_once = frames.frames(images)
    images, frames = animated(pipe, CAPTIONS[:3], batch_size=2)
    in_batches = frames.frames(images)
    assert {frame.size for frame in at_once} == {images.grid().size}
    for a, b in zip(at_once, in_batches, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_a_batch_of_fewer_steps_waits(pipe: Pipeline) -> None:
    frames, latent = Animation(pipe), torch.zeros(1, 4, 8, 8)
    for index in (0, 1, 0):
        frames(Step(index, 1.0, latent, latent))
    images = pipe(CAPTIONS[:2], seed=1, num_inference_steps=1, progress=False)
    shown = frames.frames(images)
    assert len(shown) == 3
    assert np.array_equal(np.asarray(shown[0]), np.asarray(shown[1]))


def test_large_images_are_previewed(pipe: Pipeline) -> None:
    size = {"height": 130, "width": 144, "num_inference_steps": 1}
    images, frames = animated(pipe, ["a red apple"], **size)
    assert np.array_equal(frames.frames(images)[0], pipe.preview(frames.batches[0][0])[0])


def test_a_preview_has_the_size_of_the_image_and_its_colours(pipe: Pipeline) -> None:
    latents = torch.randn(2, 4, 10, 8)
    images = pipe.preview(latents)
    assert [image.size for image in images] == [(16, 20)] * 2
    small = pipe.model.preview(latents)[1].clamp(-1, 1)
    means = np.asarray(images[1]).mean((0, 1)) / 127.5 - 1
    np.testing.assert_allclose(means, small.mean((1, 2)), atol=0.05)
