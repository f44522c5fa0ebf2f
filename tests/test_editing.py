from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import Pipeline, editing
from ldm.diffusion import SAMPLERS
from ldm.editing import slerp
from ldm.errors import SamplingError
from tests.tiny import SIZE, tiny_model

QUIET: dict[str, Any] = {"progress": False}
PROMPT = "a red apple"


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline(tiny_model())


def random_image(seed: int = 0, height: int = SIZE, width: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def mask(white: tuple[int, int, int, int] | None = None, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """Black, with a white box (left, top, right, bottom)."""
    result = Image.new("L", size)
    if white is not None:
        result.paste(255, white)
    return result


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


# Image to image


def test_strength_0_returns_the_image_and_strength_1_what_noise_alone_gives(pipe: Pipeline) -> None:
    image = random_image()
    assert same(editing.image_to_image(pipe, PROMPT, image, strength=0, seed=1, **QUIET)[0], image)
    whole = editing.image_to_image(pipe, PROMPT, image, strength=1, seed=1, **QUIET)[0]
    assert same(whole, pipe(PROMPT, seed=1, **QUIET)[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_solver_needs_a_step(pipe: Pipeline, sampler: str) -> None:
    image = random_image()
    assert same(editing.image_to_image(pipe, PROMPT, image, strength=0, sampler=sampler, **QUIET)[0], image)


def test_conditions_count_as_prompts_do() -> None:
    network = {"kind": "unet", "levels": [{"width": 16, "blocks": 1, "depth": 1}], "heads": 2, "groups": 4}
    boxes = {"kind": "boxes", "classes": 2, "max_boxes": 2, "width": 16}
    pipe = Pipeline(tiny_model("none", conditioner=boxes, denoiser=network | {"context_width": 16}))
    left, right = [(0, 0.0, 0.0, 0.5, 1.0)], [(1, 0.5, 0.0, 1.0, 1.0)]
    options: dict[str, Any] = {"strength": 0.5, "seed": [3, 4], **QUIET}
    two = editing.image_to_image(pipe, None, [random_image(0), random_image(1)], condition={"boxes": [left]}, **options)
    assert len(two) == 2
    two = editing.image_to_image(
        pipe, None, random_image(), condition={"boxes": [left, right]}, batch_size=1, **options
    )
    assert len(two) == 2
    with pytest.raises(SamplingError, match="3 images do not fit 2 of boxes"):
        editing.image_to_image(pipe, None, [random_image()] * 3, condition={"boxes": [left, right]})


@pytest.mark.parametrize(("strength", "steps"), [(0.0, 0), (0.3, 3), (0.75, 8), (1.0, 10)])
def test_strength_is_the_share_of_the_steps(pipe: Pipeline, strength: float, steps: int) -> None:
    seen: list[float] = []
    editing.image_to_image(
        pipe,
        PROMPT,
        random_image(),
        strength,
        num_inference_steps=10,
        callback=lambda step: seen.append(step.sigma),
        **QUIET,
    )
    assert seen == pipe.noise_levels(10)[-steps:].tolist()[:steps]


def test_it_starts_from_the_image_with_noise_of_its_level(pipe: Pipeline) -> None:
    """With a denoiser that knows the image, any solver comes back to it."""
    image, known = random_image(), None

    class Oracle(editing.ImageToImage):
        def wrap(self, denoise: Any, rows: slice) -> Any:
            return lambda x, sigma: self.latents[rows]

    known = pipe.encode(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)
    edit = Oracle(latents=known, strength=0.5)
    found = pipe(PROMPT, seed=3, edit=edit, sampler="heun", output_type="latent", **QUIET)
    torch.testing.assert_close(found, known)
    levels = edit.levels(pipe.noise_levels())
    unit = torch.randn(known.shape)
    start = edit.start(torch.zeros(()), unit, float(levels[0]), slice(0, 1))
    torch.testing.assert_close(start, known + levels[0] * unit)


def test_prompts_and_images_go_together_one_by_one(pipe: Pipeline) -> None:
    two, prompts = [random_image(0), random_image(1)], [PROMPT, "a blue car"]
    options: dict[str, Any] = {"strength": 0.5, **QUIET}
    both = editing.image_to_image(pipe, prompts, two, seed=[4, 5], **options)
    for index in range(2):
        alone = editing.image_to_image(pipe, prompts[index], two[index], seed=4 + index, **options)[0]
        assert np.abs(np.asarray(both[index], int) - np.asarray(alone, int)).max() <= 1
    assert len(editing.image_to_image(pipe, PROMPT, two, **options)) == 2
    assert len(editing.image_to_image(pipe, prompts, two[0], num_images_per_prompt=2, **options)) == 4
    assert len(editing.image_to_image(Pipeline(tiny_model("none")), None, two, **options)) == 2
    assert len(editing.image_to_image(Pipeline(tiny_model("class")), None, two, label=1, **options)) == 2


def test_an_image_may_be_a_file(pipe: Pipeline, tmp_path: Path) -> None:
    image, path = random_image(), tmp_path / "image.png"
    image.save(path)
    for name in (path, str(path)):
        assert same(editing.image_to_image(pipe, PROMPT, name, strength=0, **QUIET)[0], image)


# Inpainting and outpainting


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "dpmpp_sde", "heun", "ddpm"])
def test_the_known_part_stays_to_the_bit_and_the_rest_changes(pipe: Pipeline, sampler: str) -> None:
    image, hole = random_image(), mask((4, 4, 12, 12))
    painted = editing.inpaint(pipe, PROMPT, image, hole, seed=1, sampler=sampler, **QUIET)[0]
    is_hole = np.asarray(hole) > 0
    assert np.array_equal(np.asarray(painted)[~is_hole], np.asarray(image)[~is_hole])
    assert (np.asarray(painted)[is_hole] != np.asarray(image)[is_hole]).any(-1).mean() > 0.9


def test_a_blurred_edge_blends_and_leaves_what_lies_beyond_it(pipe: Pipeline) -> None:
    image, hole = random_image(height=64, width=64), mask((28, 28, 36, 36), (64, 64))
    painted = np.asarray(editing.inpaint(pipe, PROMPT, image, hole, blur=2.0, seed=1, **QUIET)[0], int)
    changed = (painted != np.asarray(image)).any(-1)
    rows, columns = np.where(changed)
    assert changed[30:34, 30:34].mean() > 0.8
    assert 20 <= rows.min() < 28 <= 36 <= rows.max() < 44
    assert 20 <= columns.min() < 28 <= 36 <= columns.max() < 44


def test_a_white_mask_masks_nothing_and_a_black_one_everything(pipe: Pipeline) -> None:
    image = random_image()
    everything = editing.inpaint(pipe, PROMPT, image, mask((0, 0, SIZE, SIZE)), seed=1, **QUIET)[0]
    assert same(everything, pipe(PROMPT, seed=1, **QUIET)[0])
    assert same(editing.inpaint(pipe, PROMPT, image, mask(), seed=1, **QUIET)[0], image)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral", "unipc", "dpm_adaptive"])
def test_known_latents_are_kept(pipe: Pipeline, sampler: str) -> None:
    latents = torch.randn(1, *pipe.latent_shape(), generator=torch.Generator().manual_seed(0))
    free = torch.zeros(1, 1, *latents.shape[2:])
    free[..., :3] = 1
    blank = torch.zeros(1, 3, SIZE, SIZE)
    edit = editing.Inpaint(latents=latents, strength=1.0, mask=free, images=blank, blend=blank[:, :1])
    found = pipe(PROMPT, seed=2, edit=edit, sampler=sampler, output_type="latent", **QUIET)
    torch.testing.assert_close(found[..., 3:], latents[..., 3:], rtol=0, atol=2e-5)
    assert (found[..., :3] - latents[..., :3]).abs().mean() > 0.1


def test_outpainting_keeps_the_image_in_its_place(pipe: Pipeline) -> None:
    image = random_image()
    wide = editing.outpaint(pipe, PROMPT, image, left=4, right=8, top=2, seed=1, **QUIET)[0]
    assert wide.size == (SIZE + 12, SIZE + 2)
    assert same(wide.crop((4, 2, 4 + SIZE, 2 + SIZE)), image)
    with pytest.raises(SamplingError, match="a side to continue"):
        editing.outpaint(pipe, PROMPT, image)


# The others


def test_a_row_between_two_seeds_begins_and_ends_with_their_images(pipe: Pipeline) -> None:
    row = editing.interpolate(pipe, PROMPT, seeds=(1, 5), frames=4, **QUIET)
    assert len(row) == 4
    for frame, seed in ((0, 1), (3, 5)):
        alone = np.asarray(pipe(PROMPT, seed=seed, **QUIET)[0], int)
        assert np.abs(np.asarray(row[frame], int) - alone).max() <= 1
    a, b = torch.randn(2, 4, 64, 64)
    assert slerp(a, b, 0.5).std() == pytest.approx(1, abs=0.02)


def test_two_passes_give_the_requested_size_and_begin_with_the_trained_one(pipe: Pipeline) -> None:
    shapes: list[torch.Size] = []
    large = editing.high_resolution(
        pipe, PROMPT, 32, 48, seed=1, callback=lambda step: shapes.append(step.x.shape), **QUIET
    )
    assert large[0].size == (48, 32)
    assert set(shapes) == {torch.Size([1, *pipe.latent_shape(32, 48)])}
    draft = pipe(PROMPT, height=14, width=20, seed=1, output_type="latent", **QUIET)
    enlarged = torch.nn.functional.interpolate(draft, size=(16, 24), mode="bicubic")
    unchanged = editing.high_resolution(pipe, PROMPT, 32, 48, strength=0, seed=1, output_type="latent", **QUIET)
    torch.testing.assert_close(unchanged, enlarged)


def test_style_is_a_prompt_if_the_model_reads_no_image(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"strength": 0.5, "seed": 1, **QUIET}
    styled = editing.style_transfer(pipe, random_image(), "a blue sky", **options)[0]
    assert same(styled, editing.image_to_image(pipe, "a blue sky", random_image(), **options)[0])
    with pytest.raises(SamplingError, match="reads no image; describe the style"):
        editing.style_transfer(pipe, random_image(), random_image(1))
    both = editing.style_transfer(pipe, random_image(), ["a blue sky", "red"], **options)
    expected = editing.image_to_image(pipe, ["a blue sky", "red"], random_image(), **options)
    assert all(map(same, both, expected))
    for style in ([], 3, None):
        with pytest.raises(SamplingError, match=r"an image is a PIL\.Image or the name of a file, not"):
            editing.style_transfer(pipe, random_image(), cast(Any, style))
    with pytest.raises(SamplingError, match=r"nowhere\.png cannot be read"):
        editing.style_transfer(pipe, random_image(), Path("nowhere.png"))
    with pytest.raises(SamplingError, match="reads no image, which variations need"):
        editing.variations(pipe, random_image())


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            lambda pipe: editing.image_to_image(pipe, PROMPT, random_image(), 1.5),
            r"strength is 1\.5; it must be from 0 to 1",
        ),
        (
            lambda pipe: editing.image_to_image(pipe, [PROMPT] * 3, [random_image()] * 2),
            "2 images do not fit 3 of prompt",
        ),
        (lambda pipe: editing.image_to_image(pipe, PROMPT, [random_image(), random_image(0, 8)]), "16 x 16, 16 x 8"),
        (lambda pipe: editing.image_to_image(pipe, PROMPT, []), "the list of images is empty"),
        (lambda pipe: editing.image_to_image(pipe, PROMPT, random_image(0, 17)), "the height 17 is not divisible by 2"),
        (lambda pipe: editing.image_to_image(pipe, PROMPT, "absent.png"), "absent.png cannot be read as an image"),
        (lambda pipe: editing.image_to_image(pipe, PROMPT, 3), "not int"),
        (lambda pipe: editing.image_to_image(pipe, PROMPT, random_image(), height=32), "the size goes by the image"),
        (
            lambda pipe: editing.inpaint(pipe, PROMPT, random_image(), mask(size=(8, 8))),
            "mask is 8 x 8 .* image 16 x 16",
        ),
        (lambda pipe: editing.inpaint(pipe, PROMPT, random_image(), [mask()] * 2), "2 masks do not fit 1 images"),
        (lambda pipe: editing.interpolate(pipe, PROMPT, seeds=(1, 2), frames=1), "needs 2 or more"),
    ],
)
def test_invalid_edits_are_reported_in_a_sentence(pipe: Pipeline, task: Any, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        task(pipe)


def test_files_in_the_working_folder_change_no_style(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "progress": False}
    before = editing.style_transfer(pipe, random_image(), "sunrise", **options)[0]
    random_image(1).save("sunrise", "PNG")
    assert editing.style_transfer(pipe, random_image(), "sunrise", **options)[0].tobytes() == before.tobytes()
    with pytest.raises(SamplingError, match=r"give pathlib\.Path\('sunrise\.PNG'\) for an image"):
        editing.style_transfer(pipe, random_image(), "sunrise.PNG", **options)
    with pytest.raises(SamplingError, match="this model reads no image"):
        editing.style_transfer(pipe, random_image(), Path("sunrise"), **options)
    with pytest.raises(SamplingError, match="the style is a prompt already"):
        editing.style_transfer(pipe, random_image(), "sunrise", prompt="a", **options)
