from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm import Pipeline, editing
from ldm.diffusion import Guidance
from ldm.errors import SamplingError
from ldm.serving.batching import BatchedModel, BatchedPipeline, Batcher
from tests.tiny import SIZE, tiny_lora, tiny_model

QUIET: dict[str, Any] = {"progress": False, "output_type": "pt"}

MIXED: list[dict[str, Any]] = [
    {"prompt": "a red apple", "seed": 1, "sampler": "euler", "num_inference_steps": 3},
    {"prompt": "a blue car", "seed": 2, "sampler": "dpmpp_2m", "num_inference_steps": 6, "guidance_scale": 7.0},
    {"prompt": "a green apple", "seed": 3, "sampler": "heun", "num_inference_steps": 4, "negative_prompt": "red"},
    {"prompt": "two green cars", "seed": 4, "sampler": "euler_ancestral", "num_inference_steps": 5},
    {"prompt": "a red car", "seed": 5, "guidance": Guidance(scale=2.0, interval=(0.5, 5.0))},
    {"prompt": "a red (car:1.3)", "seed": 6, "prompt_syntax": "weighted", "sampler": "dpm_adaptive"},
    {"prompt": "a blue sky", "seed": 7, "guidance_scale": 1.0, "height": 2 * SIZE},
    {"prompt": "a blue sky " * 9, "seed": 8, "guidance": Guidance(scale=2.0, perturbed=1.0)},
]
"""Requests that differ in everything that a request can differ in."""


@pytest.fixture
def rows() -> list[int]:
    """Rows of each call of a denoiser."""
    return []


@pytest.fixture
def make(rows: list[int]) -> Iterator[Callable[..., tuple[Pipeline, BatchedPipeline, Batcher]]]:
    batchers: list[Batcher] = []

    def make_(pipe: Pipeline | None = None, **options: Any) -> tuple[Pipeline, BatchedPipeline, Batcher]:
        pipe = pipe or Pipeline(tiny_model())
        batchers.append(batcher := Batcher(observe=rows.append, **options))
        return pipe, BatchedPipeline(BatchedModel.of(pipe.model, batcher)), batcher

    yield make_
    for batcher in batchers:
        batcher.close()


def sampled(pipe: Pipeline, batcher: Batcher, requests: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The image of each request, all made at once, each in a thread of its own."""
    start = threading.Barrier(len(requests))

    def sample(request: dict[str, Any]) -> Tensor:
        with batcher.sampling():
            start.wait()
            return pipe(**request, **QUIET)

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(sample, requests))


def test_images_of_mixed_requests_are_bitwise_those_of_the_pipeline(make: Any, rows: list[int]) -> None:
    pipe, batched, batcher = make()
    for image, request in zip(sampled(batched, batcher, MIXED), MIXED, strict=True):
        assert torch.equal(image, pipe(**request, **QUIET)), request
    assert max(rows) > 3, "nothing was batched"


@pytest.mark.parametrize("n", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 8))])
def test_images_of_the_shipped_model_are_bitwise_those_of_the_pipeline(make: Any, rows: list[int], n: int) -> None:
    pipe, batched, batcher = make(Pipeline.from_pretrained(device="cpu", dtype=torch.float32))
    requests = [
        {"prompt": f"{n} apples", "seed": n, "num_inference_steps": 2 + n % 2, "guidance_scale": 3.0 + n}
        for n in range(n)
    ]
    for image, request in zip(sampled(batched, batcher, requests), requests, strict=True):
        assert torch.equal(image, pipe(**request, **QUIET)), request
    assert max(rows) == 2 * n


def test_an_evaluation_with_guidance_does_not_depend_on_its_batch_to_the_bit() -> None:
    """In the shipped model in fp32 on the CPU, from two rows on; see docs/serving.md."""
    model = Pipeline.from_pretrained(device="cpu", dtype=torch.float32).model
    x, sigma = torch.randn(8, *model.latent_shape()), torch.linspace(0.1, 10, 8)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        cond = model.conditioner({"text": [f"{n} cars" for n in range(8)]})
        full = model.denoise(x, sigma, cond)
        for n in (2, 3, 4, 5, 6, 7):
            for start in (0, 8 - n):
                part = slice(start, start + n)
                assert torch.equal(model.denoise(x[part], sigma[part], cond[part]), full[part]), (n, start)


@pytest.mark.parametrize("n", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 7))])
def test_the_pipeline_makes_bitwise_the_same_guided_images_in_any_batch(n: int) -> None:
    """With the shipped model in fp32 on one thread of the CPU; see docs/serving.md."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pipe = Pipeline.from_pretrained(device="cpu", dtype=torch.float32)
        settings: dict[str, Any] = {"num_inference_steps": 2, **QUIET}
        prompts = [f"{index} apples" for index in range(n)]
        together = pipe(prompts, seed=0, **settings)
        for index in {0, 1, n - 1}:
            assert torch.equal(pipe(prompts[index], seed=index, **settings)[0], together[index])
    finally:
        torch.set_num_threads(threads)


def test_in_exact_mode_numbers_of_rows_that_change_the_images_are_not_used(make: Any, rows: list[int]) -> None:
    class Rounding(torch.nn.Module):
        """A network that rounds differently in batches of more than four rows."""

        def __init__(self, network: torch.nn.Module):
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, *inputs: Any) -> Tensor:
            return self.network(x, *inputs) * (1 + 1e-6 * (len(x) > 4))

    pipe = Pipeline(tiny_model())
    pipe.model.denoiser = Rounding(pipe.model.denoiser)  # type: ignore[assignment]
    requests = [{"prompt": "a red apple", "seed": n, "num_inference_steps": 8} for n in range(4)]
    _, batched, batcher = make(pipe)
    for image, request in zip(sampled(batched, batcher, requests), requests, strict=True):
        assert torch.equal(image, pipe(**request, **QUIET))
    assert rows.count(8) == 1, "the number that failed is tried once"
    assert rows.count(4) > rows.count(2) / 4, "the number that did not fail is used"
    rows.clear()
    _, batched, batcher = make(pipe, exact=False)
    sampled(batched, batcher, requests)
    assert rows.count(8) > 6


def test_a_sampling_joins_and_leaves_while_others_run(make: Any, rows: list[int]) -> None:
    pipe, batched, batcher = make()
    halfway, images = threading.Event(), []

    def long() -> None:
        with batcher.sampling():
            images.append(
                batched(
                    "a red apple",
                    seed=1,
                    num_inference_steps=12,
                    sampler="euler",
                    callback=lambda step: halfway.set() if step.done == 6 else None,
                    **QUIET,
                )
            )

    thread = threading.Thread(target=long)
    thread.start()
    halfway.wait()
    with batcher.sampling():
        joined = batched("a blue car", seed=2, num_inference_steps=2, sampler="euler", **QUIET)
    thread.join()
    assert torch.equal(joined, pipe("a blue car", seed=2, num_inference_steps=2, sampler="euler", **QUIET))
    assert torch.equal(images[0], pipe("a red apple", seed=1, num_inference_steps=12, sampler="euler", **QUIET))
    assert 4 in rows
    assert rows[-1] == 2


def test_a_cancelled_sampling_ends_before_its_next_evaluation(make: Any, rows: list[int]) -> None:
    _, batched, batcher = make()

    def check() -> None:
        if len(rows) == 3:
            raise KeyError("cancelled")

    with pytest.raises(KeyError, match="cancelled"), batcher.sampling(check):
        batched("a red apple", num_inference_steps=20, sampler="heun", **QUIET)
    assert len(rows) == 3


def test_an_error_reaches_the_sampling_that_caused_it_and_no_other(make: Any) -> None:
    pipe, batched, batcher = make()
    with batcher.sampling(), pytest.raises(SamplingError, match="not divisible"):
        batched("a red apple", height=SIZE + 1, **QUIET)
    with batcher.sampling(), pytest.raises(SamplingError, match="not finite"):
        batched("a red apple", guidance_scale=3e38, **QUIET)
    with batcher.sampling():
        assert torch.equal(batched("a red apple", seed=1, **QUIET), pipe("a red apple", seed=1, **QUIET))


@pytest.mark.slow
def test_loras_of_prompts_apply_to_their_own_images(make: Any, tmp_path: Path) -> None:
    save_file(tiny_lora(), tmp_path / "style.safetensors")
    pipe, batched, batcher = make()
    prompts = ["a red apple", "a red apple <lora:style:0.8>", "a red apple <lora:style:0.3>"]
    settings = {"seed": 1, "prompt_syntax": "weighted", "lora_folder": tmp_path}
    images = sampled(batched, batcher, [{"prompt": prompt, **settings} for prompt in prompts])
    for image, prompt in zip(images, prompts, strict=True):
        assert torch.equal(image, pipe(prompt, **settings, **QUIET))
    assert not torch.equal(images[0], images[1])


def test_editing_works_with_a_batched_pipeline(make: Any) -> None:
    pipe, batched, batcher = make()
    image, settings = torch.rand(3, SIZE, SIZE), {"seed": 1, **QUIET}
    with batcher.sampling():
        found = editing.image_to_image(batched, "a red apple", image, 0.5, **settings)
    assert torch.equal(found, editing.image_to_image(pipe, "a red apple", image, 0.5, **settings))


def test_calls_after_the_end_raise(make: Any) -> None:
    _, batched, batcher = make()
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        batched("a red apple", **QUIET)
