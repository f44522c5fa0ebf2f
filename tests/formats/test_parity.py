"""Whole images of foreign models, by us and by diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm import Pipeline
from ldm.formats import save
from tests.formats import world

NEGATIVE = "blurry, (low quality)"
PROMPTS = {
    "plain": "a red apple on a wooden table",
    "accents and brackets": "Café (crème) [brûlée], naïve façade – “quoted”",
    "too long": "a very long story of a red apple, " * 20,
}
SIZES = {"square": (32, 32), "wide": (24, 40)}

CASES = [(kind, name) for kind in world.KINDS for name in world.SCHEDULERS if (kind, name) != ("sd2", "plms")]
"""Without one: diffusers' plms mixes raw outputs of v-models, which is not PLMS."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("world")
    for kind in world.KINDS:
        world.pipeline(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in world.KINDS}


@pytest.fixture(scope="module")
def peers() -> dict[str, Any]:
    return {kind: world.pipeline(kind) for kind in world.KINDS}


@pytest.fixture(scope="module")
def ours(folders: dict[str, Path]) -> dict[str, Pipeline]:
    """Our pipelines of an LDM file that we wrote of what we read from the folder."""
    pipes = {}
    for kind, folder in folders.items():
        file = save(Pipeline.from_pretrained(folder, dtype=torch.float32).model, folder / "one.safetensors", "ldm")
        pipes[kind] = Pipeline.from_pretrained(file, dtype=torch.float32)
    return pipes


def unit_noise(height: int, width: int) -> torch.Tensor:
    shape = (1, 4, height // world.FACTOR, width // world.FACTOR)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def picture_of_peer(pipe: Any, prompt: str, size: tuple[int, int], **settings: Any) -> np.ndarray:
    height, width = size
    latents = unit_noise(height, width)
    return pipe(prompt, latents=latents, height=height, width=width, output_type="np", **settings).images


def picture(pipe: Pipeline, prompt: str, size: tuple[int, int], **settings: Any) -> np.ndarray:
    height, width = size
    settings |= {"output_type": "np", "progress": False, "long_prompts": "cut"}
    return pipe(prompt, latents=unit_noise(height, width), height=height, width=width, **settings)


def assert_alike(ours: np.ndarray, peers: np.ndarray) -> None:
    assert ours.shape == peers.shape
    assert peers.std() > 0.05  # there is something to see
    assert np.abs(ours - peers).max() < 1e-3


def with_scheduler(source: Path, scheduler: Any, folder: Path) -> Path:
    """A folder of the same parts, but for the scheduler."""
    folder.mkdir()
    for part in source.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "scheduler").unlink()
    scheduler.save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    text = index.read_text().replace("DDIMScheduler", type(scheduler).__name__)
    index.unlink()
    index.write_text(text)
    return folder


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_grid_of_a_folder_is_diffusers(
    kind: str, name: str, folders: dict[str, Path], peers: dict[str, Any], tmp_path: Path
) -> None:
    scheduler = world.scheduler(name, kind)
    pipe = Pipeline.from_pretrained(with_scheduler(folders[kind], scheduler, tmp_path / kind), dtype=torch.float32)
    assert pipe.model.config.sampling.sampler == name
    settings = {"negative_prompt": NEGATIVE, "guidance_scale": 5.0, "num_inference_steps": 7}
    peers[kind].scheduler = scheduler
    expected = picture_of_peer(peers[kind], PROMPTS["plain"], (32, 32), **settings)
    assert_alike(picture(pipe, PROMPTS["plain"], (32, 32), **settings), expected)


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_levels_by_a_flag_of_the_folder_begin_where_diffusers_does(
    flag: str, name: str, folders: dict[str, Path], peers: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**world.BETAS, "prediction_type": "v_prediction", "timestep_spacing": "linspace", flag: True}
    scheduler = peers["sd2"].scheduler = world.CLASSES[name](**settings)
    pipe = Pipeline.from_pretrained(with_scheduler(folders["sd2"], scheduler, tmp_path / "sd2"), dtype=torch.float32)
    asked = {"guidance_scale": 5.0, "num_inference_steps": 5}
    expected = picture_of_peer(peers["sd2"], PROMPTS["plain"], (32, 32), **asked)
    assert_alike(picture(pipe, PROMPTS["plain"], (32, 32), **asked), expected)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_same_timesteps_make_the_same_picture(
    kind: str, name: str, peers: dict[str, Any], ours: dict[str, Pipeline]
) -> None:
    """With a file of ours that was written from a folder of ddim, and the solver asked for."""
    settings = peers[kind].scheduler = world.scheduler("ddim", kind)
    scheduler = peers[kind].scheduler = world.CLASSES[name].from_config(settings.config, skip_prk_steps=True)
    scheduler.set_timesteps(6)
    stops = scheduler.timesteps.unique().flip(0)
    expected = picture_of_peer(peers[kind], PROMPTS["plain"], (32, 32), num_inference_steps=6, guidance_scale=4.0)
    actual = picture(ours[kind], PROMPTS["plain"], (32, 32), sampler=name, timesteps=stops, guidance_scale=4.0)
    assert_alike(actual, expected)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("kind", world.KINDS)
def test_prompts_and_sizes(
    kind: str, prompt: str, size: tuple[int, int], peers: dict[str, Any], ours: dict[str, Pipeline]
) -> None:
    peers[kind].scheduler = world.scheduler("ddim", kind)
    for negative in (None, NEGATIVE):
        settings = {"negative_prompt": negative, "guidance_scale": 7.5, "num_inference_steps": 4}
        assert_alike(
            picture(ours[kind], prompt, size, **settings), picture_of_peer(peers[kind], prompt, size, **settings)
        )


@pytest.mark.parametrize("kind", world.KINDS)
def test_without_guidance(kind: str, peers: dict[str, Any], ours: dict[str, Pipeline]) -> None:
    peers[kind].scheduler = world.scheduler("ddim", kind)
    settings = {"guidance_scale": 1.0, "num_inference_steps": 4}
    expected = picture_of_peer(peers[kind], "a cat", (32, 32), **settings)
    assert_alike(picture(ours[kind], "a cat", (32, 32), **settings), expected)


def test_the_sizes_that_sdxl_is_told(peers: dict[str, Any], ours: dict[str, Pipeline]) -> None:
    peers["sdxl"].scheduler = world.scheduler("ddim", "sdxl")
    sizes = {"original_size": (300, 200), "crops_coords_top_left": (10, 20), "target_size": (64, 48)}
    expected = picture_of_peer(peers["sdxl"], "a cat", (32, 32), num_inference_steps=4, **sizes)
    assert_alike(picture(ours["sdxl"], "a cat", (32, 32), num_inference_steps=4, condition=sizes), expected)
