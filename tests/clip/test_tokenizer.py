from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizer

from ldm.clip.tokenizer import (
    ByteBPEConfig,
    CLIPBPEConfig,
    Tokenizer,
    TokenizerConfig,
    clip_merges,
    train_byte_bpe,
)
from ldm.config import from_dict
from ldm.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from tests.clip.peers import clip_tokenizer

PROMPTS = [
    "",
    "a red apple",
    "A Photo OF a CAT, 1920x1080!!!",
    "crème brûlée, naïve façade; cafe\u0301 (decomposed)",
    "👩🏽‍🚀 on the 🌙, ❤️",
    "it's they're we'll I'd 'quoted' O'Neill",
    "\u201ccurly\u201d \u2018quotes\u2019 \u2013 and \u2014 dashes\u2026",
    "  many   spaces\tand\n\nlines ",
    "数字と漢字 и кириллица ١٢٣ ½ ²",
    "<b>&amp; under_score #tag @me https://a.b/c?d=e",
    "word " * 100,
    "Æther ŒUVRE İstanbul ǅ ß",
]
CAPTIONS = [
    "man health worker: dark skin tone",
    "woman health worker: light skin tone",
    "flag: Åland Islands",
] * 2
CAPTIONS += ["rotes Auto", "красная машина", "赤い車", "سيارة حمراء"] * 2


@pytest.fixture(scope="module")
def clip_bpe() -> Tokenizer:
    return CLIPBPEConfig().build()


@pytest.fixture(scope="module")
def byte_bpe() -> Tokenizer:
    return train_byte_bpe(CAPTIONS, vocab_size=400, context_length=1024)


@pytest.fixture(scope="module")
def transformers_peer() -> CLIPTokenizer:
    return clip_tokenizer()


def test_clip_bpe_equals_transformers(clip_bpe: Tokenizer, transformers_peer: CLIPTokenizer) -> None:
    assert (clip_bpe.vocab_size, clip_bpe.bos_id, clip_bpe.eos_id) == (49408, 49406, 49407)
    expected = transformers_peer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    for prompt, row, peer_row in zip(PROMPTS, clip_bpe(PROMPTS), expected.input_ids, strict=True):
        assert row.tolist() == peer_row.tolist(), prompt


@given(st.text(max_size=60))
def test_clip_bpe_equals_transformers_on_any_text(
    clip_bpe: Tokenizer, transformers_peer: CLIPTokenizer, text: str
) -> None:
    expected = transformers_peer(text, padding="max_length", max_length=77, truncation=True).input_ids
    assert clip_bpe(text)[0].tolist() == expected


def test_sd2_pads_with_zero(clip_bpe: Tokenizer) -> None:
    zero = from_dict(TokenizerConfig, {"kind": "clip_bpe", "pad_id": 0}).build()
    expected = torch.from_numpy(SimpleTokenizer()(["a red apple"]).numpy())
    assert torch.equal(zero("a red apple"), expected)
    assert zero.pad_id == 0
    assert zero.fingerprint() != clip_bpe.fingerprint()
    assert zero.decode(zero("a red apple")[0]) == "a red apple"


def test_the_padding_is_one_token_within_a_text_as_in_transformers(clip_bpe: Tokenizer) -> None:
    """SD 2's "!" is then not the "!" that ends a word."""
    for zero in (CLIPBPEConfig(pad_id=0).build(), clip_bpe.with_padding(0)):
        row = zero("hello! wow!!")[0]
        assert row[:7].tolist() == [49406, 3306, 0, 2781, 0, 0, 49407]
        assert torch.equal(zero.windows("hello! wow!!")[0][0], row)
        assert zero.decode(row).count("!") == 3


def test_another_padding_changes_what_follows_the_end_alone(clip_bpe: Tokenizer) -> None:
    texts = [prompt for prompt in PROMPTS if "!" not in prompt]
    padded, rows = clip_bpe.with_padding(0), clip_bpe(texts)
    is_padding = (rows == clip_bpe.eos_id).cumsum(1) - (rows == clip_bpe.eos_id).int() > 0
    assert torch.equal(padded(texts), rows.masked_fill(is_padding, 0))
    assert torch.equal(padded.with_padding(clip_bpe.pad_id)(texts), rows)
    assert padded.fingerprint() == CLIPBPEConfig(pad_id=0).build().fingerprint()
    with pytest.raises(ConfigError, match="pad_id 49408 is not among the 49408 tokens"):
        clip_bpe.with_padding(49408)


def test_a_long_text_is_cut_and_keeps_its_end(clip_bpe: Tokenizer) -> None:
    row = clip_bpe("word " * 100)[0]
    assert row.shape == (77,)
    assert row[0] == clip_bpe.bos_id
    assert row[-1] == clip_bpe.eos_id
    assert len(set(row[1:-1].tolist())) == 1


def test_padding_to_the_longest_only_leaves_padding_out(clip_bpe: Tokenizer) -> None:
    texts = ["a red apple", "a cat"]
    short, full = clip_bpe(texts, longest=True), clip_bpe(texts)
    assert short.shape == (2, 5)
    assert torch.equal(short, full[:, :5])
    assert (full[:, 5:] == clip_bpe.pad_id).all()


@given(st.text(max_size=60))
def test_byte_bpe_gives_back_any_text_as_it_normalised_it(byte_bpe: Tokenizer, text: str) -> None:
    normalizer = byte_bpe.backend.normalizer
    assert normalizer is not None
    assert byte_bpe.decode(byte_bpe(text)[0]) == normalizer.normalize_str(text)


def test_byte_bpe_forgets_case_spaces_and_composition_alone(byte_bpe: Tokenizer) -> None:
    assert torch.equal(byte_bpe("  Flag:\t A\u030aLAND  islands\n"), byte_bpe("flag: åland islands"))
    assert not torch.equal(byte_bpe("flag: aland islands"), byte_bpe("flag: åland islands"))
    assert byte_bpe.decode(byte_bpe("Слава赤い車!")[0]) == "слава赤い車!"


def test_words_of_the_captions_become_single_tokens(byte_bpe: Tokenizer) -> None:
    ids = byte_bpe("skin tone", longest=True)[0].tolist()
    assert len(ids) == 4
    assert ids[0] == byte_bpe.bos_id
    assert ids[-1] == byte_bpe.eos_id == byte_bpe.pad_id == byte_bpe.vocab_size - 1


def test_byte_bpe_does_not_depend_on_the_order_of_the_captions(byte_bpe: Tokenizer) -> None:
    for order in (sorted(CAPTIONS), sorted(CAPTIONS, reverse=True)):
        assert train_byte_bpe(order, vocab_size=400, context_length=1024).to_json() == byte_bpe.to_json()


def test_vocab_size_is_an_upper_bound() -> None:
    assert train_byte_bpe(CAPTIONS, vocab_size=270).vocab_size == 270
    assert train_byte_bpe(["a b"], vocab_size=5000).vocab_size == 258


@pytest.mark.parametrize("name", ["clip_bpe", "byte_bpe"])
def test_json_and_pickle_carry_the_whole_tokenizer(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    for copy in (Tokenizer.from_json(tokenizer.to_json()), pickle.loads(pickle.dumps(tokenizer))):
        assert torch.equal(copy(PROMPTS), tokenizer(PROMPTS))
        assert copy.fingerprint() == tokenizer.fingerprint()
        assert (copy.context_length, copy.vocab_size) == (tokenizer.context_length, tokenizer.vocab_size)
        assert (copy.bos_id, copy.eos_id, copy.pad_id) == (
            tokenizer.bos_id,
            tokenizer.eos_id,
            tokenizer.pad_id,
        )


def test_the_fingerprint_tells_lengths_and_vocabularies_apart(byte_bpe: Tokenizer) -> None:
    shorter = byte_bpe.with_context_length(16)
    assert shorter(CAPTIONS[0]).shape == (1, 16)
    other = train_byte_bpe(CAPTIONS, vocab_size=300, context_length=1024)
    assert len({byte_bpe.fingerprint(), shorter.fingerprint(), other.fingerprint()}) == 3


def test_a_file_is_read_instead_of_training(tmp_path: Path, byte_bpe: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_bpe.to_json(), encoding="utf-8")
    values = {"kind": "byte_bpe", "path": str(path), "context_length": 24, "vocab_size": 400}
    tokenizer = from_dict(TokenizerConfig, values).build()
    assert torch.equal(tokenizer(CAPTIONS), byte_bpe(CAPTIONS)[:, :24])
    with pytest.raises(ConfigError, match="set vocab_size to at least"):
        from_dict(TokenizerConfig, values | {"vocab_size": 260}).build()
    path.write_text("{}")
    with pytest.raises(CheckpointError):
        from_dict(TokenizerConfig, values).build()
    path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        from_dict(TokenizerConfig, values).build()


@pytest.mark.parametrize("texts", [None, 3, ["a", 2.5], [float("nan")], b"bytes", ["a", None], "\udcff"])
def test_what_is_no_text_is_refused(byte_bpe: Tokenizer, texts: object) -> None:
    with pytest.raises(DataError, match="text number"):
        byte_bpe(texts)  # type: ignore[arg-type]


def test_no_texts_give_no_rows(byte_bpe: Tokenizer) -> None:
    assert byte_bpe([]).shape == (0, 1024)


def test_training_needs_captions_and_room_for_all_bytes() -> None:
    with pytest.raises(DataError, match="no captions"):
        train_byte_bpe([])
    with pytest.raises(DataError, match="text number 1"):
        train_byte_bpe(["a", None])  # type: ignore[list-item]
    for config, values in ((ByteBPEConfig, {"vocab_size": 257}), (CLIPBPEConfig, {"pad_id": 49408})):
        with pytest.raises(ConfigError, match=r"^clip\.tokenizer"):
            from_dict(config, values, "clip.tokenizer")


def test_without_open_clip_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    clip_merges.cache_clear()
    with pytest.raises(MissingExtraError, match="pip install open_clip_torch"):
        CLIPBPEConfig().build()
