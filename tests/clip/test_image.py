from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from open_clip.transformer import VisionTransformer
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ldm.clip.image import ImageTowerConfig, ViTConfig
from ldm.config import from_dict
from ldm.errors import ConfigError
from tests.clip.peers import from_open_clip, from_transformers, randomize

TINY = ViTConfig(image_size=24, patch_size=8, width=32, layers=2, heads=4)
EMBED = 20


@torch.no_grad()
def test_vit_equals_transformers() -> None:
    config = CLIPVisionConfig(
        hidden_size=TINY.width,
        intermediate_size=4 * TINY.width,
        num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads,
        image_size=TINY.image_size,
        patch_size=TINY.patch_size,
        projection_dim=EMBED,
        hidden_act="quick_gelu",
    )
    peer = randomize(CLIPVisionModelWithProjection(config))
    tower = replace(TINY, activation="quick_gelu").build(EMBED)
    tower.load_state_dict(from_transformers(peer))
    image = torch.rand(3, 3, 24, 24) * 2 - 1
    torch.testing.assert_close(tower(image).embedding, peer(image).image_embeds, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("pool", "theirs"), [("class", "tok"), ("mean", "avg")])
def test_vit_equals_open_clip(pool: str, theirs: str) -> None:
    """With bigG's mlp_ratio, whose hidden width is rounded down, and on channels_last images."""
    peer = randomize(
        VisionTransformer(
            image_size=TINY.image_size,
            patch_size=TINY.patch_size,
            width=TINY.width,
            layers=TINY.layers,
            heads=TINY.heads,
            mlp_ratio=4.9231,
            output_dim=EMBED,
            pool_type=theirs,
        )
    )
    values = {"kind": "vit", "image_size": 24, "patch_size": 8, "width": 32, "layers": 2, "heads": 4}
    tower = from_dict(ImageTowerConfig, values | {"mlp_ratio": 4.9231, "pool": pool}).build(EMBED)
    tower.load_state_dict(from_open_clip(peer))
    image = torch.rand(3, 3, 24, 24) * 2 - 1
    expected = peer(image)
    for picture in (image, image.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(tower(picture).embedding, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_pixels_are_normalised_as_the_weights_were_trained() -> None:
    mean, std = (0.48, 0.45, 0.4), (0.26, 0.27, 0.28)
    plain = TINY.build(EMBED)
    tower = replace(TINY, mean=mean, std=std).build(EMBED)
    tower.load_state_dict(plain.state_dict())
    image = torch.rand(2, 3, 24, 24)
    normalized = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(tower(2 * image - 1).embedding, plain(normalized).embedding, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"kind": "vit", "width": 32, "heads": 5}, "5 heads do not divide"),
        ({"kind": "vit", "image_size": 60, "patch_size": 8}, "patches of 8 pixels do not divide"),
        ({"kind": "vit", "std": [0.5, 0, 0.5]}, "must be positive"),
        ({"kind": "resnet"}, "unknown kind 'resnet'"),
    ],
)
def test_what_cannot_be_built_is_refused_with_its_place(values: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError, match=r"^clip\.image") as error:
        from_dict(ImageTowerConfig, values, "clip.image")
    assert part in str(error.value)
