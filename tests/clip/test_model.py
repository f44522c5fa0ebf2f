from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ldm.clip.image import ViTConfig
from ldm.clip.loss import CrossEntropyConfig
from ldm.clip.model import CLIPConfig
from ldm.clip.retrieval import recall_at_k
from ldm.clip.text import TextTowerConfig
from ldm.clip.tokenizer import train_byte_bpe
from ldm.config import from_dict, to_dict
from ldm.errors import ConfigError

clip_loss = CrossEntropyConfig().build()

TINY = CLIPConfig(
    text=TextTowerConfig(vocab_size=300, context_length=16, width=32, layers=2, heads=2),
    image=ViTConfig(image_size=16, patch_size=4, width=32, layers=2, heads=2),
    embed_dim=16,
)


@pytest.mark.parametrize("n", [2, 7])
def test_loss_of_orthonormal_pairs_has_a_closed_form(n: int) -> None:
    """Each own logit is s and each other is 0: -ln(e^s / (e^s + n - 1))."""
    scale = torch.tensor(3.0)
    features = torch.eye(n)
    expected = torch.log(1 + (n - 1) * torch.exp(-scale))
    torch.testing.assert_close(clip_loss(features, features, scale), expected)
    torch.testing.assert_close(clip_loss(features, features[:1].expand(n, -1), 0 * scale), torch.tensor(n).log())


def test_loss_is_the_mean_of_both_directions() -> None:
    image, text = F.normalize(torch.randn(5, 8), dim=-1), F.normalize(torch.randn(5, 8), dim=-1)
    scale = torch.tensor(12.0)
    p = (scale * image @ text.T).exp()
    own = p.diagonal()
    expected = -0.5 * ((own / p.sum(dim=1)).log() + (own / p.sum(dim=0)).log()).mean()
    torch.testing.assert_close(clip_loss(image, text, scale), expected)


def test_embeddings_have_unit_length_and_the_scale_starts_at_the_inverse_temperature() -> None:
    image, text, scale = TINY.build()(torch.rand(3, 3, 16, 16), torch.randint(0, 300, (3, 9)))
    for features in (image, text):
        assert features.shape == (3, 16)
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(scale, torch.tensor(1 / 0.07))


@pytest.mark.parametrize("size", [(40, 40), (24, 36), (8, 8)])
def test_a_picture_of_another_size_is_resized_as_pillow_does(size: tuple[int, int]) -> None:
    model, image = TINY.build(), 2 * torch.rand(3, *size) - 1
    channels = [Image.fromarray(channel.numpy()).resize((16, 16), Image.Resampling.BICUBIC) for channel in image]
    resized = torch.stack([torch.from_numpy(np.array(channel)) for channel in channels]).clamp(-1, 1)
    torch.testing.assert_close(model.encode_image(image[None]), model.encode_image(resized[None]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("log_scale", "expected"), [(10.0, 100.0), (2.0, math.exp(2.0)), (-1.0, 1.0)])
def test_the_logit_scale_is_clamped_to_between_one_and_a_hundred(log_scale: float, expected: float) -> None:
    model = TINY.build()
    torch.nn.init.constant_(model.logit_scale, log_scale)
    model.clamp_logit_scale()
    assert model.logit_scale.requires_grad
    assert model.logit_scale.exp().item() == pytest.approx(expected, rel=1e-5)


def test_a_tiny_model_overfits_eight_pairs() -> None:
    names = [
        "red apple",
        "green apple",
        "red car",
        "green car",
        "dog",
        "cat",
        "a dog and a cat",
        "flag: Japan",
    ]
    tokenizer = train_byte_bpe(names, vocab_size=300, context_length=16)
    tokens, images = tokenizer(names), torch.rand(8, 3, 16, 16) * 2 - 1
    model = TINY.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = clip_loss(*model(images, tokens)).item()
    for _ in range(60):
        loss = clip_loss(*model(images, tokens))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.clamp_logit_scale()
    assert first > 1.0
    assert loss.item() < 0.05
    assert set(recall_at_k(model.encode_text(tokens), model.encode_image(images), ks=(1,)).values()) == {1.0}


def test_the_text_tower_leaves_with_a_config_that_rebuilds_it() -> None:
    model = TINY.build()
    config = from_dict(TextTowerConfig, to_dict(model.text.config))
    tower = config.build()
    tower.load_state_dict(model.text.state_dict())
    tokens = torch.randint(0, 300, (2, 9))
    torch.testing.assert_close(F.normalize(tower(tokens).pooled, dim=-1), model.encode_text(tokens))


def test_the_defaults_are_the_size_of_vit_l_14() -> None:
    """OpenAI's ViT-L/14 has 427,616,513 parameters."""
    config = from_dict(CLIPConfig, {"text": {}, "image": "vit"})
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in config.build().parameters()) == 427_616_513


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"text": {"embed_dim": 512}, "image": "vit", "embed_dim": 768}, "text.embed_dim is 512"),
        ({"text": {}, "image": "vit", "temperature": 0.0}, "temperature"),
        ({"text": {}, "image": "vit", "embed_dim": 0}, "embed_dim must be at least 1"),
        ({"text": {}, "image": "vit", "embed_dim": None}, "embed_dim is null, but there is an image tower"),
    ],
)
def test_what_cannot_be_built_is_refused(values: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(CLIPConfig, values, "clip.model")
    assert part in str(error.value)


def test_towers_and_tokenizers_import_no_training_package() -> None:
    heavy = {"open_clip", "transformers", "torchvision", "lightning", "timm"}
    script = (
        "import sys, ldm.clip.model, ldm.clip.retrieval; from ldm.clip.tokenizer import CLIPBPEConfig;"
        "CLIPBPEConfig().build()('a red apple'); print(*{name.split('.')[0] for name in sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not heavy & set(run.stdout.split())
