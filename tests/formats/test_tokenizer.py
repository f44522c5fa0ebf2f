from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase

from ldm.clip.tokenizer import CLIPBPEConfig, Tokenizer, train_byte_bpe
from ldm.errors import CheckpointError
from ldm.formats.tokenizer import read_tokenizer, write_tokenizer

PROMPTS = [
    "",
    "a red apple",
    "A Photo OF a CAT, 1920x1080!!! wow ! x!y",
    "crème brûlée, naïve façade; cafe\u0301 (decomposed)",
    "👩🏽‍🚀 on the 🌙, ❤️",
    "it's they're \u201ccurly\u201d \u2018quotes\u2019 \u2013 and \u2014 dashes\u2026",
    "  many   spaces\tand\n\nlines ",
    "数字と漢字 и кириллица ١٢٣ ½ ²",
    "a <|endoftext|> within <|startoftext|>",
    "word " * 100,
]
NAMES = ["clip", "clip_padded_with_zero", "byte_bpe"]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {
        "clip": CLIPBPEConfig().build(),
        "clip_padded_with_zero": CLIPBPEConfig(context_length=40, pad_id=0).build(),
        "byte_bpe": train_byte_bpe([*PROMPTS, *PROMPTS], vocab_size=400, context_length=48),
    }


@pytest.fixture(scope="module")
def folders(tokenizers: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What we write of each, and what transformers makes of that."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in tokenizers.items():
        write_tokenizer(tokenizer, root / name)
        AutoTokenizer.from_pretrained(root / name).save_pretrained(root / f"{name}_by_transformers")
    return {path.name: path for path in root.iterdir()}


def ids(peer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """As diffusers calls it."""
    return peer(
        texts, padding="max_length", max_length=peer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_same_tokens(
    name: str, tokenizers: dict[str, Tokenizer], folders: dict[str, Path]
) -> None:
    for folder in (folders[name], folders[f"{name}_by_transformers"]):
        peer = AutoTokenizer.from_pretrained(folder)
        for text, row, expected in zip(PROMPTS, tokenizers[name](PROMPTS), ids(peer, PROMPTS), strict=True):
            assert row.tolist() == expected.tolist(), text


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_what_was_written(
    name: str, tokenizers: dict[str, Tokenizer], folders: dict[str, Path]
) -> None:
    for folder in (folders[name], folders[f"{name}_by_transformers"]):
        copy = read_tokenizer(folder)
        assert copy.fingerprint() == tokenizers[name].fingerprint()
        assert torch.equal(copy(PROMPTS), tokenizers[name](PROMPTS))


@pytest.mark.parametrize("name", ["clip", "clip_padded_with_zero"])
def test_clip_tokenizer_and_we_agree_on_any_text(name: str, folders: dict[str, Path]) -> None:
    peer, ours = CLIPTokenizer.from_pretrained(folders[name]), read_tokenizer(folders[name])

    @given(st.text(max_size=60))
    def agree(text: str) -> None:
        assert ours(text).tolist() == ids(peer, [text]).tolist()

    agree()


def test_tokens_that_were_added_keep_their_ids(folders: dict[str, Path], tmp_path: Path) -> None:
    """Those of textual inversion."""
    peer = CLIPTokenizer.from_pretrained(folders["clip"])
    assert peer.add_tokens(["<cat-toy>", "Midjourney Style"]) == 2
    texts = ["a <cat-toy> on a table", "a <Cat-Toy>in midjourney style, ok"]
    peer.save_pretrained(tmp_path / "theirs")
    tokenizer = read_tokenizer(tmp_path / "theirs")
    assert 49408 in tokenizer(texts[0])
    assert torch.equal(tokenizer(texts), ids(peer, texts))
    write_tokenizer(tokenizer, tmp_path / "ours")
    for copy in (CLIPTokenizer.from_pretrained(tmp_path / "ours"), AutoTokenizer.from_pretrained(tmp_path / "theirs")):
        assert torch.equal(ids(copy, texts), ids(peer, texts))
    assert torch.equal(read_tokenizer(tmp_path / "ours")(texts), tokenizer(texts))


def test_older_folders_say_less(folders: dict[str, Path], tmp_path: Path) -> None:
    """Padding in special_tokens_map.json, or nowhere; no length, or one that is beyond any text."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folders["clip"] / name).read_bytes())
    bare = read_tokenizer(tmp_path)
    assert (bare.context_length, bare.pad_id) == (77, bare.eos_id)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!", "lstrip": False}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}))
    padded = read_tokenizer(tmp_path)
    assert (padded.context_length, padded.pad_id) == (77, 0)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("vocab.json", None, "holds no tokenizer"),
        ("merges.txt", None, "there is no file"),
        ("vocab.json", b"{", "cannot be read as JSON"),
        ("vocab.json", b"[]", "holds a JSON list, not an object"),
        ("vocab.json", b"\xff\xfe", "cannot be read as JSON"),
        ("vocab.json", b'{"a": 0}', "lacks the token '<|startoftext|>'"),
        ("vocab.json", b'{"<|startoftext|>": "x", "<|endoftext|>": 1}', "cannot be read"),
        ("merges.txt", b"a b c\n", "cannot be read"),
        ("merges.txt", b"\xff\xfe", "cannot be read"),
        ("merges.txt", b"zzz yyy\n", "cannot be read"),
        ("tokenizer.json", b'{"model": []}', "cannot be read"),
        ("tokenizer.json", b"{}", "cannot be read"),
        ("tokenizer_config.json", b'{"pad_token": "[PAD]"}', r"lacks the token '\[PAD\]'"),
        ("tokenizer_config.json", b'{"model_max_length": "long"}', "cannot be read"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}', "cannot be read"),
    ],
)
def test_a_broken_folder_is_told_in_one_sentence(
    name: str, content: bytes | None, part: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    for file in folders["clip"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=part) as error:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
