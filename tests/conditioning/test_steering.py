"""Each of configs/conditioning, made smaller still, trained for seconds: what it is told shows in what it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.data import EvaluationLoader, Shapes
from ldm.data.shapes import COLOURS
from ldm.errors import ConfigError
from ldm.image_output import GAP
from ldm.modalities.edges import detect_edges
from ldm.pipeline import Pipeline
from ldm.training.experiment import load_config
from ldm.training.stages import train_stage

CONFIGS = Path(__file__).parents[2] / "configs" / "conditioning"
TRAIN = {"batch_size": 8, "learning_rate": 3e-3, "ema_decay": 0.9, "precision": "fp32", "images_every": 1000}
LEVELS = "[{width: 16, blocks: 1}, {width: 32, blocks: 1, depth: 1}, {width: 32, blocks: 1, depth: 1}]"
TOWARDS = torch.tensor(list(COLOURS.values())) / 127.5 - 1
"""The colours, in [-1, 1]: what a rectangle adds to the grey of the ground."""


def trained(folder: Path, kind: str, steps: int, *overrides: str) -> tuple[Pipeline, dict[str, Any]]:
    """The pipeline of a model of one rectangle an image, and the first four images that it was trained on."""
    settings = [f"denoiser.train.{name}={value}" for name, value in (TRAIN | {"max_steps": steps}).items()]
    settings += [f"run_dir={folder}", f"denoiser.model.levels={LEVELS}", "trainer.accelerator=cpu", "data.shapes=1"]
    settings += ["clip.train.max_steps=20", "clip.train.precision=fp32"] if kind == "image" else []
    experiment = load_config(CONFIGS / f"{kind}.yaml", [*settings, *overrides])
    for stage in experiment.stages:
        train_stage(experiment, stage)
    batch = next(iter(EvaluationLoader(experiment.data.open("train"), 4)))
    return Pipeline.from_pretrained(folder, "cpu", torch.float32), batch


def sampled(pipe: Pipeline, *args: Any, **asked: Any) -> Tensor:
    """Pictures ``[n 3 16 16]`` in [-1, 1], of noise that no training has seen."""
    return pipe(*args, num_inference_steps=8, seed=7, output_type="pt", progress=False, **asked) * 2 - 1


def colours_of(pictures: Tensor) -> list[int]:
    """The colour towards which the mean of each four images lies."""
    mean = pictures.unflatten(0, (-1, 4)).mean((1, 3, 4))
    return torch.nn.functional.cosine_similarity(mean[:, None], TOWARDS, dim=2).argmax(1).tolist()


def contrast(pictures: Tensor, inside: Tensor, colours: list[int]) -> Tensor:
    """How much more of each image's colour is inside of ``inside [n h w]`` than outside, ``[n]``; 1 for a true one."""
    towards = TOWARDS[colours]
    means = torch.stack(
        [
            picture[:, within].mean(1) - picture[:, ~within].mean(1)
            for picture, within in zip(pictures, inside, strict=True)
        ]
    )
    return (means * towards).sum(1) / towards.square().sum(1)


@pytest.mark.slow
def test_boxes_say_what_is_drawn_where(tmp_path: Path) -> None:
    """Of four layouts that it has learnt by heart; two are of one colour, told apart by the place alone."""
    pipe, batch = trained(tmp_path, "boxes", 140, "data.samples=4", "data.seed=1")
    colours = batch["label"].tolist()
    assert len(set(colours)) == 3
    pictures = sampled(pipe, condition={"boxes": batch["boxes"]})
    assert contrast(pictures, batch["semantic"] > 0, colours).min() > 0.4

    shown = np.asarray(Image.open(tmp_path / "denoiser" / "images" / "samples_0000140.png"))
    assert min(shown.shape[:2]) > 2 * 64, "two rows, enlarged: true images above samples"


def test_a_semantic_map_says_what_is_drawn_where(tmp_path: Path) -> None:
    """Of a map that it has never seen."""
    pipe, _ = trained(tmp_path, "semantic", 80, "data.samples=64")
    inside = torch.zeros(4, 16, 16, dtype=torch.bool)
    inside[:, 3:10, 5:13] = True
    maps = inside * torch.arange(1, 5)[:, None, None]
    pictures = sampled(pipe, condition={"semantic": maps})
    assert contrast(pictures, inside, [0, 1, 2, 3]).min() > 0.4
    larger = {"semantic": maps.repeat(1, 2, 2)[..., :24]}
    assert sampled(pipe, condition=larger, height=32, width=24).shape == (4, 3, 32, 24)


@pytest.mark.slow
def test_an_edge_map_says_what_is_drawn_where(tmp_path: Path) -> None:
    """Of four outlines that it has learnt by heart, whose images have no other condition."""
    pipe, batch = trained(tmp_path, "edges", 160, "data.samples=4", "data.seed=1")
    pictures = sampled(pipe, condition={"edges": detect_edges(batch["image"])})
    assert contrast(pictures, batch["semantic"] > 0, batch["label"].tolist()).min() > 0.4

    shown = Image.open(tmp_path / "denoiser" / "images" / "samples_0000160.png").convert("L")
    assert shown.height == 3 * (64 + GAP) + GAP, "edges above samples above true images"
    validated = next(iter(EvaluationLoader(Shapes(samples=4, shapes=1, seed=1).open("val"), 4)))["image"]
    for column, edges in enumerate(detect_edges(validated)):
        left = GAP + column * (64 + GAP)
        small = shown.crop((left, GAP, left + 64, GAP + 64)).resize((16, 16), Image.Resampling.BOX)
        assert np.array_equal(np.asarray(small) > 127, edges > 0.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a batch of stage clip has 64 samples")
def test_a_sample_has_the_colour_of_the_picture_that_is_given(tmp_path: Path) -> None:
    """Of images that it has never seen."""
    pipe, _ = trained(tmp_path, "image", 140, "data.samples=12")
    pictures = torch.zeros(4, 3, 16, 16)
    pictures[:, :, 3:10, 5:13] = TOWARDS[:, :, None, None]
    assert colours_of(sampled(pipe, condition={"image": pictures}, num_images_per_prompt=4)) == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_sample_has_the_colour_that_a_word_of_the_caption_says(tmp_path: Path) -> None:
    pipe, batch = trained(tmp_path, "transformer", 140, "data.samples=4")
    assert colours_of(sampled(pipe, batch["text"], num_images_per_prompt=4)) == batch["label"].tolist()
    assert sorted(batch["label"].tolist()) == [0, 1, 2, 3]


@pytest.mark.slow
def test_several_conditions_are_followed_together_and_each_alone(tmp_path: Path) -> None:
    dropouts = [f"denoiser.conditioner.parts.{part}.dropout=0.25" for part in ("caption", "places")]
    pipe, batch = trained(tmp_path, "several", 140, "data.samples=4", "data.seed=1", *dropouts)
    colours, boxes = batch["label"].tolist(), {"boxes": batch["boxes"]}
    for pictures in (sampled(pipe, batch["text"], condition=boxes), sampled(pipe, condition=boxes)):
        assert contrast(pictures, batch["semantic"] > 0, colours).min() > 0.4
    assert colours_of(sampled(pipe, batch["text"], num_images_per_prompt=4)) == colours


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_channels_that_do_not_fit_are_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="the denoiser has in_channels 7 and out_channels 3"):
        load_config(path, ["denoiser.model.in_channels=7"])
