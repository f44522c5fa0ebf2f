from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm import Pipeline, editing
from ldm.diffusion import Guidance
from ldm.errors import SamplingError
from ldm.vae import Tiling
from tests.tiny import CAPTIONS, SIZE, tiny_lora, tiny_model

QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline(tiny_model())


# Streams


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_the_result_of_a_stream_is_that_of_a_call(pipe: Pipeline, output_type: str) -> None:
    settings: dict[str, Any] = {"seed": 1, "output_type": output_type, "batch_size": 2, **QUIET}
    stream = pipe.stream(CAPTIONS[:3], **settings)
    for _ in stream:
        pass
    expected, found = pipe(CAPTIONS[:3], **settings), stream.result()
    assert type(found) is type(expected)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
        assert not isinstance(a, Image.Image) or a.info == b.info
    assert stream.result() is found


def test_a_stream_counts_the_steps_of_all_batches_and_previews_each(pipe: Pipeline) -> None:
    levels = pipe.noise_levels(3).tolist()
    steps = list(pipe.stream(CAPTIONS[:3], seed=1, num_inference_steps=3, batch_size=2, **QUIET))
    assert [(step.index, step.done, step.total) for step in steps] == [(i % 3, i + 1, 6) for i in range(6)]
    assert [step.sigma for step in steps] == levels[1:] * 2
    assert [step.rows for step in steps] == [slice(0, 2)] * 3 + [slice(2, 4)] * 3
    for step in steps:
        expected = pipe.preview(step.denoised)
        assert [image.tobytes() for image in step.preview()] == [image.tobytes() for image in expected]
    assert steps[-1].preview()[0].size == (SIZE, SIZE)


def test_a_stream_computes_nothing_before_it_is_read_and_nothing_after_it_is_closed(pipe: Pipeline) -> None:
    calls: list[int] = []
    pipe.model.denoiser.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    stream = pipe.stream("a red apple", num_inference_steps=4, sampler="euler", **QUIET)
    assert len(calls) == 0
    next(stream), next(stream)
    assert len(calls) == 2
    stream.close()
    assert list(stream) == []
    with pytest.raises(SamplingError, match="ended before its last step"):
        stream.result()
    assert len(calls) == 2


def test_the_caller_of_a_stream_is_not_left_in_inference_mode(pipe: Pipeline) -> None:
    stream, weight = (
        pipe.stream("a red apple", seed=1, output_type="latent", **QUIET),
        torch.ones(2, requires_grad=True),
    )
    for _ in stream:
        assert not torch.is_inference_mode_enabled()
        weight.square().sum().backward()
    stream.result().requires_grad_().square().sum().backward()  # an ordinary tensor


def test_streams_can_take_turns(pipe: Pipeline) -> None:
    """Each has a state of its own."""
    keywords = [{"seed": 1, "sampler": "dpmpp_2m"}, {"seed": 2, "sampler": "euler_ancestral", "height": 20}]
    expected = [pipe(caption, **QUIET, **k)[0] for caption, k in zip(CAPTIONS, keywords, strict=False)]
    streams = [pipe.stream(caption, **QUIET, **k) for caption, k in zip(CAPTIONS, keywords, strict=False)]
    for _ in zip(*streams, strict=True):
        pass
    assert [stream.result()[0].tobytes() for stream in streams] == [image.tobytes() for image in expected]


# Threads

Job = Callable[[Pipeline], Any]


def jobs() -> list[Job]:
    """24 different samplings: of prompts, seeds, solvers, sizes, guidances and editing, in one batch and several."""
    kinds: list[dict[str, Any]] = [
        {"sampler": "dpmpp_2m"},
        {"sampler": "euler_ancestral", "height": 20, "width": 12},
        {"guidance": Guidance(4.0, perturbed=2.0)},
        {"sampler": "ddim", "eta": 0.5, "num_images_per_prompt": 3, "batch_size": 2},
        {"height": 40, "width": 36, "num_inference_steps": 1},  # tiled
        {"prompt_syntax": "weighted", "negative_prompt": "[a:b:0.5] (car:1.3)", "sampler": "heun"},
        {"sampler": "plms", "spacing": "karras", "guidance_scale": 1.0},
    ]

    def sampled(index: int, kind: dict[str, Any]) -> Job:
        settings = {"seed": index, "num_inference_steps": 2, "output_type": "pt"} | kind | QUIET
        return lambda pipe: pipe(CAPTIONS[index % 6], **settings)

    def edited(index: int) -> Job:
        image = Image.fromarray(np.random.default_rng(index).integers(0, 256, (34, 40, 3), np.uint8))
        return lambda pipe: editing.image_to_image(
            pipe, CAPTIONS[index % 6], image, 0.5, seed=index, num_inference_steps=2, output_type="pt", **QUIET
        )

    return [edited(i) if i % 8 == 7 else sampled(i, kinds[i % 8]) for i in range(24)]


def in_threads(count: int, tasks: list[Callable[[], Any]]) -> list[Any]:
    """The results of tasks, in order, of which so many run at once."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda task: task(), tasks))


def test_eight_threads_make_the_images_of_one_bitwise(tmp_path: Path) -> None:
    """24 calls, the very first of a pipeline, with a LoRA and with tiles so small that large images need several."""
    save_file(tiny_lora(), tmp_path / "lora.safetensors")

    def new() -> Pipeline:
        pipe = Pipeline(tiny_model().requires_grad_(False))
        pipe.load_lora(tmp_path / "lora.safetensors", scale=0.5)
        pipe.model.tiling = Tiling(tile=16, overlap=4)
        return pipe

    alone, shared = new(), new()
    state = {name: tensor.clone() for name, tensor in shared.model.state_dict().items()}
    expected = [job(alone) for job in jobs()]
    found = in_threads(8, [lambda job=job: job(shared) for job in jobs()])  # type: ignore[misc]
    assert [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not torch.equal(a, b)] == []
    assert all(torch.equal(tensor, state[name]) for name, tensor in shared.model.state_dict().items())


def test_threads_preview_a_file_without_a_preview_alike(pipe: Pipeline) -> None:
    """The map from latents to colours is then fitted in the first call."""
    latents = torch.randn(1, *pipe.latent_shape(), generator=torch.Generator().manual_seed(0))
    expected = Pipeline(tiny_model()).preview(latents)[0]
    assert pipe.model.first_stage.latent_preview is None
    found = in_threads(4, [lambda: pipe.preview(latents)[0]] * 4)
    assert [image.tobytes() for image in found] == [expected.tobytes()] * 4
