"""Recipes of stage 2: gradient caching, patch dropout, short token sequences."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from ldm.clip.gradient_cache import encode_in_chunks
from ldm.clip.image import ViTConfig
from ldm.clip.loss import CLIPLossConfig
from ldm.clip.model import CLIP, CLIPConfig
from ldm.clip.patch_dropout import drop_patches
from ldm.clip.text import TextTowerConfig
from ldm.clip.token_choice import TokenChoiceConfig
from ldm.config import from_dict
from ldm.errors import ConfigError
from ldm.nn.ranks import BatchGenerator

START, END, PAD = 100, 101, 0


def clip(**image: Any) -> CLIP:
    torch.manual_seed(0)
    text = TextTowerConfig(vocab_size=64, context_length=8, width=16, layers=2, heads=2)
    vit = ViTConfig(image_size=16, patch_size=4, width=16, layers=2, heads=2, **image)
    return CLIPConfig(text=text, image=vit, embed_dim=8).build()


# Gradient caching


@pytest.mark.parametrize("loss", ["cross_entropy", "siglip"])
@pytest.mark.parametrize("chunk", [1, 3, 8, 20])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_caching_changes_neither_loss_nor_gradients(loss: str, chunk: int, dropout: float) -> None:
    """For chunks that divide the batch or not, and with patch dropout, whose random numbers are replayed."""
    model, contrast = clip().double().train(), from_dict(CLIPLossConfig, loss).build().double()
    model.image.patch_dropout = dropout
    image, tokens = torch.rand(8, 3, 16, 16).double() * 2 - 1, torch.randint(1, 64, (8, 8))
    parameters = [*model.parameters(), *contrast.parameters()]

    def gradients(encode: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        images, texts = encode(model.encode_image, image), encode(model.encode_text, tokens)
        value = contrast(images, texts, model.logit_scale.exp())
        return (value.detach(), *torch.autograd.grad(value, parameters))

    def plain(encode: Any, x: Tensor) -> Tensor:  # which draws the same random numbers chunk by chunk
        return torch.cat([encode(part) for part in x.split(chunk)]) if dropout else encode(x)

    expected, found = gradients(plain), gradients(lambda encode, x: encode_in_chunks(encode, x, chunk))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_gradient_caching_keeps_the_activations_of_one_chunk() -> None:
    layers = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 2))
    x = torch.randn(32, 4)

    def saved(chunk: int | None) -> int:
        """The number of values that the forward pass keeps."""
        counts: list[int] = []

        def count(tensor: Tensor) -> Tensor:
            counts.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            encode_in_chunks(layers, x, chunk).sum()
        return sum(counts)

    assert saved(None) > 2 * 32 * 64
    assert saved(4) <= 32 * 4
    assert saved(32) == saved(None), "a chunk that is the batch is encoded once"


def test_without_gradients_chunks_are_only_encoded() -> None:
    layer, x = nn.Linear(4, 2), torch.randn(7, 4)
    with torch.no_grad():
        found = encode_in_chunks(layer, x, 3)
    assert not found.requires_grad
    torch.testing.assert_close(found, layer(x).detach())


# Patch dropout


def test_patches_are_dropped_in_training_alone() -> None:
    tower = clip().image
    image, seen = torch.rand(4, 3, 16, 16) * 2 - 1, []
    tower.blocks[0].register_forward_hook(lambda block, inputs, output: seen.append(inputs[0].detach()))
    plain = tower.train()(image)
    tower.patch_dropout = 0.7
    torch.testing.assert_close(tower.eval()(image), plain)
    tower.train()(image)
    complete, _, kept = seen
    assert [each.shape[1] for each in seen] == [17, 17, 1 + 5]
    torch.testing.assert_close(kept[:, 0], complete[:, 0])  # the class token
    nearest = torch.cdist(kept, complete).min(
        dim=2
    )  # the kept patches have the positions that they have without dropout
    assert nearest.values.max() < 1e-3
    assert all(len(set(row)) == 6 for row in nearest.indices.tolist())


def test_dropped_patches_are_a_random_choice_of_those_of_each_image() -> None:
    patches = torch.arange(16.0).expand(2000, 16)[..., None] + 100 * torch.arange(2000.0)[:, None, None]
    torch.manual_seed(0)
    kept = drop_patches(patches, 0.75)
    assert kept.shape == (2000, 4, 1)
    places = kept[..., 0] - 100 * torch.arange(2000.0)[:, None]
    assert all(len(set(row)) == 4 for row in places.tolist())
    shares = torch.bincount(places.flatten().long(), minlength=16) / 2000
    assert (shares - 0.25).abs().max() < 0.05
    assert drop_patches(patches[:1], 0.999).shape[1] == 1


# Short token sequences


def rows(*lengths: int) -> Tensor:
    """Captions of tokens 1, 2, ... between start and end."""
    table = torch.full((len(lengths), max(lengths) + 2), PAD)
    for row, length in zip(table, lengths, strict=True):
        row[: length + 2] = torch.tensor([START, *range(1, length + 1), END])
    return table


@pytest.mark.parametrize("choice", ["first", "block", "random"])
def test_captions_keep_start_end_and_order(choice: Literal["first", "block", "random"]) -> None:
    config, generator, seen = TokenChoiceConfig(6, choice), torch.Generator().manual_seed(0), set()
    for _ in range(200):
        long, short, exact, empty = config.apply(rows(9, 2, 4, 0), END, PAD, 12, generator).tolist()
        assert short == [START, 1, 2, END, PAD, PAD]
        assert exact == [START, 1, 2, 3, 4, END]
        assert empty == [START, END, PAD, PAD, PAD, PAD]
        assert (long[0], long[5]) == (START, END)
        assert long[1:5] == sorted({*long[1:5]})
        assert {*long[1:5]} <= {*range(1, 10)}
        seen.add(tuple(long[1:5]))
    if choice == "first":
        assert seen == {(1, 2, 3, 4)}
    elif choice == "block":
        assert seen == {tuple(range(first, first + 4)) for first in range(1, 7)}
    else:
        assert 60 < len(seen) <= 126  # of 9 over 4 choices


def test_a_padding_that_is_the_end_token_is_no_text() -> None:
    tokens = rows(9, 1)
    tokens[tokens == PAD] = END
    short = TokenChoiceConfig(5, "random").apply(tokens, END, END, 12, torch.Generator())
    assert short[1].tolist() == [START, 1, END, END, END]


def test_captions_that_are_short_enough_are_not_changed() -> None:
    tokens = rows(3, 1)
    assert TokenChoiceConfig(5, "random").apply(tokens, END, PAD, 12, torch.Generator()) is tokens
    assert TokenChoiceConfig().apply(tokens, END, PAD, 12, torch.Generator()) is tokens


@pytest.mark.parametrize("choice", ["block", "random"])
def test_the_choice_does_not_depend_on_the_number_of_ranks(choice: Literal["block", "random"]) -> None:
    config, parts = TokenChoiceConfig(6, choice), []
    together = config.apply(rows(9, 6, 8, 7), END, PAD, 12, torch.Generator().manual_seed(3))
    for start, lengths in ((0, (9, 6)), (2, (8, 7))):
        generator = BatchGenerator("cpu")
        generator.manual_seed(3)
        generator.start, generator.total = start, 4
        parts.append(config.apply(rows(*lengths), END, PAD, 12, generator))
    assert torch.equal(torch.cat(parts), together)


def test_a_length_without_room_for_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="length 2 leaves no room for text"):
        TokenChoiceConfig(2)
