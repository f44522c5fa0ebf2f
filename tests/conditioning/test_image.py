from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from ldm import editing
from ldm.clip.model import CLIPConfig
from ldm.conditioning import ConditionerConfig, ImageConditioner
from ldm.config import from_dict, to_dict
from ldm.errors import ConfigError, SamplingError
from ldm.model import LatentDiffusion, ModelConfig
from ldm.pipeline import Pipeline
from ldm.training.experiment import load_config
from ldm.training.stages import build_module, train_stage
from tests.tiny import TOWER, tiny_model

CONFIG = Path(__file__).parents[2] / "configs" / "conditioning" / "image.yaml"
VIT = {"kind": "vit", "image_size": 8, "patch_size": 4, "width": 12, "layers": 1, "heads": 2}
QUIET: dict[str, Any] = {"progress": False, "num_inference_steps": 2}


def image(**changes: Any) -> ImageConditioner:
    config = from_dict(ConditionerConfig, {"kind": "image", "dropout": 0.0} | changes)
    clip = from_dict(CLIPConfig, {"text": TOWER, "image": VIT, "embed_dim": 16})
    conditioner = config.resolved(clip, (8, 8), 2).build()
    assert isinstance(conditioner, ImageConditioner)
    return conditioner


def model(**changes: Any) -> LatentDiffusion:
    """A model that listens to images, and to nothing else."""
    sections = to_dict(tiny_model().config) | {"conditioner": to_dict(image(**changes).config)}
    built = LatentDiffusion(from_dict(ModelConfig, sections)).eval()
    for parameter in built.denoiser.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return built


def picture(seed: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def test_a_picture_is_its_embedding_as_one_token() -> None:
    conditioner = image(pooled=True)
    pictures = torch.rand(2, 3, 8, 8) * 2 - 1
    cond = conditioner({"image": pictures})
    expected = F.normalize(conditioner.tower(pictures).embedding, dim=-1) * 4  # the root of 16: unit variance
    torch.testing.assert_close(cond.context, expected[:, None])
    torch.testing.assert_close(cond.vector, expected)
    assert cond.mask is None
    assert (conditioner.config.context_width, conditioner.config.vector_width) == (16, 16)
    assert image()({"image": pictures}).vector is None


def test_or_the_states_of_its_patches() -> None:
    conditioner = image(tokens=True)
    pictures = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(conditioner({"image": pictures}).context, conditioner.tower.states(pictures)[:, 1:])
    assert conditioner({"image": pictures}).context.shape == (2, 4, 12)
    assert conditioner.config.context_width == 12


def test_pictures_of_any_size_are_brought_to_that_of_the_tower() -> None:
    large = torch.rand(3, 20, 12) * 2 - 1
    resized = F.interpolate(large[None], (8, 8), mode="bicubic", antialias=True).clamp(-1, 1)
    both = image()
    assert torch.equal(both({"image": [large]}).context, both({"image": resized}).context)


def test_an_absent_or_dropped_picture_is_zeros() -> None:
    pictures = torch.rand(3, 8, 8) * 2 - 1
    conditioner = image(pooled=True, dropout=0.5)
    cond = conditioner({"image": [pictures, None]})
    assert cond.context[0].any()
    assert not cond.context[1].any()
    assert not cond.vector[1].any()
    kept = conditioner({"image": pictures.expand(100, -1, -1, -1)}, torch.Generator().manual_seed(0)).context[:, 0, 0]
    assert 25 < kept.bool().sum() < 75
    assert not conditioner.unconditional({"image": [pictures]}).context.any()


def test_the_tower_gets_gradients_only_if_it_is_trained_along() -> None:
    pictures = torch.rand(2, 3, 8, 8)
    assert not image()({"image": pictures}).context.requires_grad
    assert image(trainable=True)({"image": pictures}).context.requires_grad


def test_a_file_a_picture_and_a_tensor_ask_for_the_same(tmp_path: Path) -> None:
    pipe, shown = Pipeline(model()), picture(0)
    shown.save(tmp_path / "shown.png")
    tensor = torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 127.5 - 1
    asked = [[shown], [tmp_path / "shown.png"], [tensor], tensor[None], tensor, shown, str(tmp_path / "shown.png")]
    made = [pipe(condition={"image": each}, seed=0, output_type="pt", **QUIET) for each in asked]
    for other in made[1:]:
        torch.testing.assert_close(made[0], other)
    assert not torch.allclose(made[0], pipe(condition={"image": [picture(1)]}, seed=0, output_type="pt", **QUIET))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([torch.zeros(1, 8, 8)], r"an image as a tensor is \[3, h, w\] in \[-1, 1\], not \[1, 8, 8\]"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)], "of torch.uint8"),
        (["absent.png"], "absent.png cannot be read as an image"),
        ([7], "an image is a PIL.Image or the name of a file, not int"),
    ],
)
def test_what_is_no_picture_is_one_sentence(wrong: Any, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        Pipeline(model())(condition={"image": wrong}, **QUIET)


def test_variations_and_style_transfer_follow_the_picture() -> None:
    pipe = Pipeline(model())
    one, other = (editing.variations(pipe, picture(i), seed=0, output_type="pt", **QUIET) for i in range(2))
    assert not torch.allclose(one, other)
    contents = [picture(2), picture(3)]
    styled, restyled = (
        editing.style_transfer(pipe, contents, picture(i), seed=[0, 1], output_type="pt", **QUIET) for i in range(2)
    )
    assert len(styled) == 2
    assert not torch.allclose(styled, restyled)


def test_the_tower_is_that_of_stage_2(tmp_path: Path) -> None:
    few = [f"clip.train.{each}" for each in ("max_steps=2", "batch_size=4", "images_every=9", "precision=fp32")]
    experiment = load_config(CONFIG, [f"run_dir={tmp_path}", "data.samples=16", "trainer.accelerator=cpu", *few])
    clip = load_file(train_stage(experiment, "clip"))
    begun = build_module(experiment, "denoiser")
    assert isinstance(begun.task.model.conditioner, ImageConditioner)
    for name, tensor in begun.task.model.conditioner.tower.state_dict().items():
        assert torch.equal(tensor, clip[f"image.{name}"]), name
    assert set(begun.handoff) == {"clip"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.cache_latents=true"], r"reads images, which cached latents lack; set data\.cache_latents to false"),
        (["clip=null"], "takes images, but there is no clip section that defines its tower"),
        (
            ["denoiser.conditioner.embed_dim=8"],
            r"image tower that differs from that of clip\.model; remove tower and embed_dim",
        ),
        (["denoiser.conditioner.tokens=true", "denoiser.model.context_width=8"], "but the conditioner gives 64"),
    ],
)
def test_what_does_not_fit_is_one_sentence(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIG, overrides)


def test_a_tower_of_its_own_is_trained_along() -> None:
    own = ["clip=null", f"denoiser.conditioner.tower={VIT}".replace("'", ""), "denoiser.conditioner.embed_dim=64"]
    with pytest.raises(ConfigError, match="set tower, embed_dim and trainable: true for one of its own"):
        load_config(CONFIG, own)
    experiment = load_config(CONFIG, [*own, "denoiser.conditioner.trainable=true"])
    begun = build_module(experiment, "denoiser")
    assert all(parameter.requires_grad for parameter in begun.task.model.conditioner.parameters())
    assert not begun.handoff
