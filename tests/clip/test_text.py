from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ldm.clip.text import TextTowerConfig
from ldm.config import from_dict
from ldm.errors import ConfigError
from tests.clip.peers import from_open_clip, from_transformers, randomize

VOCAB, BOS, EOS, LENGTH = 100, 98, 99, 20
TINY = TextTowerConfig(vocab_size=VOCAB, context_length=LENGTH, width=32, layers=3, heads=4, embed_dim=24)


def captions(batch: int, length: int, pad: int = EOS) -> Tensor:
    """Start, words, end and padding, with the end at another place in each row."""
    tokens = torch.randint(1, BOS, (batch, length))
    tokens[:, 0] = BOS
    for row in range(batch):
        end = length - 1 - 2 * row
        tokens[row, end] = EOS
        tokens[row, end + 1 :] = pad
    return tokens


def transformers_peer(eos_id: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=VOCAB,
        hidden_size=TINY.width,
        intermediate_size=4 * TINY.width,
        num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads,
        max_position_embeddings=LENGTH,
        projection_dim=TINY.embed_dim,
        hidden_act="quick_gelu",
        eos_token_id=eos_id,
    )
    return randomize(CLIPTextModelWithProjection(config))


@torch.no_grad()
@pytest.mark.parametrize("length", [13, LENGTH])
def test_sd1_and_sdxl_towers_equal_transformers(length: int) -> None:
    peer = transformers_peer(EOS)
    tokens = captions(3, length)
    expected = peer(tokens, output_hidden_states=True)
    sd1 = replace(TINY, activation="quick_gelu").build()
    sdxl = replace(TINY, activation="quick_gelu", hidden_state="penultimate", context_norm=False).build()
    for tower, context in ((sd1, expected.last_hidden_state), (sdxl, expected.hidden_states[-2])):
        tower.load_state_dict(from_transformers(peer))
        output = tower(tokens)
        assert output.context.shape == (3, length, TINY.width)
        torch.testing.assert_close(output.context, context, atol=1e-4, rtol=0)
        torch.testing.assert_close(output.pooled, expected.text_embeds, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("length", [13, LENGTH])
def test_sd2_and_sdxl_towers_equal_open_clip(length: int) -> None:
    peer = randomize(
        TextTransformer(
            context_length=LENGTH,
            vocab_size=VOCAB,
            width=TINY.width,
            heads=TINY.heads,
            layers=TINY.layers,
            output_dim=TINY.embed_dim,
        )
    )
    peer.attn_mask = peer.attn_mask[:length, :length]  # it does not cut its mask to shorter captions
    tokens = captions(3, length, pad=0)
    for normed in (True, False):
        tower = replace(TINY, hidden_state="penultimate", context_norm=normed).build()
        tower.load_state_dict(from_open_clip(peer))
        output = tower(tokens)
        hidden = peer.forward_intermediates(
            tokens, indices=[TINY.layers - 2], normalize_intermediates=normed, output_fmt="NLC"
        )
        torch.testing.assert_close(output.context, hidden["text_intermediates"][0], atol=1e-4, rtol=0)
        torch.testing.assert_close(output.pooled, peer(tokens), atol=1e-4, rtol=0)


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_states() -> None:
    tower = TINY.build()
    tokens = captions(2, LENGTH)
    changed = tokens.clone()
    changed[:, 7] = (tokens[:, 7] + 1) % BOS
    before, after = tower(tokens).context, tower(changed).context
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=0)
    assert ((before[:, 7:] - after[:, 7:]).abs().amax(dim=-1) > 1e-4).all()


@torch.no_grad()
def test_padding_does_not_change_the_pooled_state() -> None:
    tower = TINY.build()
    tokens = captions(1, 9)
    for pad in (EOS, 0, 5):
        padded = torch.nn.functional.pad(tokens, (0, 6), value=pad)
        torch.testing.assert_close(tower(padded).pooled, tower(tokens).pooled, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_first_end_token_is_pooled_when_higher_ids_were_added() -> None:
    """A vocabulary that grew, as by textual inversion, has tokens above the end token."""
    end = 90
    tokens = torch.tensor([[BOS, 95, 3, end, 7, end], [BOS, 4, end, end, end, end]])
    peer = transformers_peer(end)
    tower = replace(TINY, activation="quick_gelu", eos_id=end).build()
    tower.load_state_dict(from_transformers(peer))
    torch.testing.assert_close(tower(tokens).pooled, peer(tokens).text_embeds, atol=1e-4, rtol=0)
    highest = replace(TINY, activation="quick_gelu").build()
    highest.load_state_dict(tower.state_dict())
    assert not torch.allclose(highest(tokens).pooled, tower(tokens).pooled, atol=1e-2)


@torch.no_grad()
def test_without_projection_the_pooled_state_is_the_normed_state_of_the_end_token() -> None:
    tower = replace(TINY, embed_dim=None).build()
    tokens = captions(3, LENGTH)
    output = tower(tokens)
    ends = (tokens == EOS).int().argmax(dim=1)
    torch.testing.assert_close(output.pooled, output.context[torch.arange(3), ends], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"width": 32, "heads": 5}, "5 heads do not divide the width 32"),
        ({"layers": 0}, "at least 1"),
        ({"context_length": 2}, "no room for text"),
        ({"vocab_size": 100, "eos_id": 100}, "eos_id 100"),
        ({"activation": "relu"}, "unknown value 'relu'"),
        ({"head": 4}, "did you mean 'heads'"),
    ],
)
def test_what_cannot_be_built_is_refused_with_its_place(values: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError, match=r"^clip\.text") as error:
        from_dict(TextTowerConfig, values, "clip.text")
    assert part in str(error.value)
