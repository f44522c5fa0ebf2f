from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm import Pipeline, editing
from ldm.conditioning import Conditioner, ConditionerConfig
from ldm.conditioning.inpaint import draw_mask
from ldm.config import from_dict
from ldm.errors import ConfigError, DataError, SamplingError
from ldm.training.stages import build_module, train_stage
from tests.conditioning.training import experiment_on, trained_on
from tests.tiny import CHANNELS, FACTOR, SIZE, tiny_model

QUIET: dict[str, Any] = {"progress": False}
PIXELS = {"kind": "inpaint", "latent_channels": 3}


def inpaint(**changes: Any) -> Conditioner:
    return from_dict(ConditionerConfig, {"kind": "inpaint"} | changes).build()


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masks(n: int, whole: float, side: int = 64) -> Tensor:
    generator = drawn()
    return torch.stack([draw_mask(side, side, whole, generator) for _ in range(n)])


# The record


def test_the_concat_is_the_mask_and_the_known_latents_also_without_a_condition() -> None:
    known = [torch.randn(5, 6, 4) for _ in range(2)]
    for cond in (inpaint()({"inpaint": known}), inpaint().unconditional({"inpaint": known})):
        assert torch.equal(cond.concat, torch.stack(known))
        assert cond.vector is None
        assert cond.context is None


@pytest.mark.parametrize("given", [[None], [torch.zeros(4, 6, 6)], [torch.zeros(6, 6)], ["picture.png"]])
def test_what_is_no_known_part_is_told_in_a_sentence(given: list[Any]) -> None:
    with pytest.raises(SamplingError, match=r"use editing\.inpaint, or give .* of shape \[5, h, w\] for each"):
        inpaint()({"inpaint": given})


@pytest.mark.parametrize("changes", [{"latent_channels": 0}, {"whole": 1.1}, {"whole": -0.1}])
def test_impossible_conditioners_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        inpaint(**changes)


def test_the_channels_of_the_first_stage_must_be_as_counted_on() -> None:
    with pytest.raises(ConfigError, match="conditioner's latent_channels is 3, but the first stage's is 4; set it"):
        tiny_model("none", conditioner=PIXELS)


# Training


def test_masks_are_of_all_sizes_and_whole_as_often_as_asked() -> None:
    drawn_masks = masks(400, whole=0.25)
    assert set(drawn_masks.unique().tolist()) == {0.0, 1.0}
    share = drawn_masks.flatten(1).mean(1)
    whole = share == 1
    assert 65 < whole.sum() < 135  # of 400, four standard deviations
    assert share.min() > 0
    parts = share[~whole]
    assert parts.quantile(0.1) < 0.15
    assert parts.quantile(0.9) > 0.4
    assert 0.2 < parts.mean() < 0.4
    assert masks(20, whole=1.0).all()
    assert not masks(50, whole=0.0).flatten(1).all(1).any()


def test_masks_cover_all_places_alike() -> None:
    """Nowhere, up to the edges, is a pixel masked much more rarely than elsewhere."""
    often = F.avg_pool2d(masks(600, whole=0.0).mean(0)[None], 16)
    assert often.min() > 0.5 * often.max()


def test_masks_are_boxes_and_strokes() -> None:
    """A single rectangle fills its bounding box; a stroke does not."""
    filled = []
    for mask in masks(200, whole=0.0)[:, 0]:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        filled.append(float(mask.sum() / box))
    assert sum(share == 1 for share in filled) > 15
    assert sum(share < 0.5 for share in filled) > 40


def test_training_greys_the_hole_before_it_is_encoded() -> None:
    image, seen = torch.rand(8, 3, 16, 24) * 2 - 1, []

    def encode(pictures: Tensor) -> Tensor:
        seen.append(pictures)
        return F.avg_pool2d(pictures, 4)

    batch = inpaint(latent_channels=3).prepare_batch({"image": image}, encode, drawn())
    mask, known = batch["inpaint"][:, :1], batch["inpaint"][:, 1:]
    assert batch["image"] is image
    assert batch["inpaint"].shape == (8, 4, 4, 6)
    assert torch.equal(known, F.avg_pool2d(seen[0], 4))
    hole = (seen[0] == 0).all(1, keepdim=True)
    assert torch.equal(seen[0], torch.where(hole, 0.0, image))
    assert torch.equal(mask.bool(), F.max_pool2d(hole.float(), 4).bool())
    assert 0 < hole.float().mean() < 1
    again, other = (inpaint(latent_channels=3).prepare_batch({"image": image}, encode, drawn(seed)) for seed in (0, 1))
    assert torch.equal(batch["inpaint"], again["inpaint"])
    assert not torch.equal(batch["inpaint"], other["inpaint"])


def test_cached_latents_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"conditioner inpaint .* cached latents do not contain; set data\.cache_latents"
    ):
        inpaint().prepare_batch({"mean": torch.zeros(1), "std": torch.zeros(1)}, lambda x: x, drawn())


# The model


def test_editing_shows_the_model_what_training_shows_it() -> None:
    """The condition of editing.inpaint, in both passes, is that of a training example with the same mask."""
    network = {"kind": "unet", "levels": [{"width": 16, "blocks": 1}], "heads": 2, "groups": 4, "middle_depth": 0}
    denoiser = network | {"in_channels": 2 * CHANNELS + 1}
    pipe = Pipeline(tiny_model("none", conditioner={"kind": "inpaint"}, denoiser=denoiser))
    seen: list[Tensor] = []
    pipe.model.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[2].concat))
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), np.uint8)) for i in (0, 1)]
    hole = Image.new("L", (SIZE, SIZE))
    hole.paste(255, (3, 4, 9, 12))
    painted = editing.inpaint(pipe, None, pictures, hole, seed=[3, 4], **QUIET)
    assert len(painted) == 2
    image = torch.from_numpy(np.stack([np.array(picture) for picture in pictures])).permute(0, 3, 1, 2) / 127.5 - 1
    mask = torch.from_numpy(np.array(hole)).float()[None, None] / 255
    with torch.no_grad():
        known = pipe.model.encode(image * (1 - mask))
    expected = torch.cat([F.max_pool2d(mask, FACTOR).expand(2, -1, -1, -1), known], dim=1)
    torch.testing.assert_close(seen[0], expected.repeat(2, 1, 1, 1), rtol=0, atol=1e-5)
    alone = editing.inpaint(pipe, None, pictures[1], hole, seed=4, **QUIET)[0]
    assert np.abs(np.asarray(painted[1], int) - np.asarray(alone, int)).max() <= 1


@pytest.fixture(scope="module")
def flat() -> list[np.ndarray]:
    """96 images of 16 pixels, each of one random colour."""
    return list(
        np.random.default_rng(0).integers(0, 256, (96, 1, 1, 3), np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    )


@pytest.mark.slow
def test_the_sample_continues_the_known_part(tmp_path: Path, flat: list[np.ndarray]) -> None:
    """In flat images with a hole, the hole gets the colour of the rest, by the condition alone, without an edit."""
    pipe = trained_on(tmp_path, flat[:64], PIXELS | {"whole": 0.0}, max_steps=150)
    truth = torch.from_numpy(np.stack(flat[64:])).permute(0, 3, 1, 2) / 127.5 - 1
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:12, 8:] = 1
    mask = mask.expand(len(truth), -1, -1, -1)
    known = list(torch.cat([mask, truth * (1 - mask)], dim=1))
    made = 2 * pipe(condition={"inpaint": known}, seed=0, output_type="pt", **QUIET) - 1
    hole = made[:, :, 4:12, 8:].mean((2, 3))
    colours = truth[:, :, 0, 0]
    error, by_chance = ((hole - batch).abs().mean() for batch in (colours, colours.roll(1, 0)))
    assert error < 0.2 * by_chance


def test_training_shows_holes_samples_and_the_truth(tmp_path: Path, flat: list[np.ndarray]) -> None:
    large = [picture.repeat(4, axis=0).repeat(4, axis=1) | 1 for picture in flat[:8]]  # nowhere the grey of a hole
    train_stage(experiment_on(tmp_path, large, PIXELS | {"whole": 0.0}, max_steps=1), "denoiser")
    grid = np.asarray(Image.open(tmp_path / "run" / "denoiser" / "images" / "samples_0000001.png"))
    holes, _, truth = grid[4:, 4:].reshape(3, 68, 8, 68, 3)[:, :64, :, :64].swapaxes(1, 2)
    assert np.array_equal(truth, np.stack(large))
    is_hole = (holes == 128).all(-1)
    assert (is_hole.any((1, 2)) & ~is_hole.all((1, 2))).all()
    assert np.array_equal(holes[~is_hole], truth[~is_hole])


def test_validation_draws_the_same_masks_each_time(tmp_path: Path, flat: list[np.ndarray]) -> None:
    module = build_module(experiment_on(tmp_path, flat[:8], PIXELS, max_steps=1), "denoiser")
    torch.nn.init.normal_(module.task.model.denoiser.conv_out.weight)  # a fresh U-Net answers 0 whatever it is shown
    seen: list[Tensor] = []
    module.task.model.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[2].concat[:, :1]))
    images = torch.from_numpy(np.stack(flat[:8])).permute(0, 3, 1, 2) / 127.5 - 1
    batch = {"image": images, "key": [f"{i}" for i in range(8)]}
    steps = [module.batch_step("validation", index, rows=range(8), size=8) for index in (0, 0, 1)]
    with torch.no_grad():
        losses = [module.task.evaluate(batch, step)["loss"] for step in steps]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(losses[0], losses[1])
