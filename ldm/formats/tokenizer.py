"""Tokenizers in transformers and diffusers folders: read as :class:`Tokenizer`, and written for transformers.

A folder holds ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``; ``tokenizer_config.json``, ``special_tokens_map.json``
and ``added_tokens.json`` hold further settings and are optional.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import methodcaller
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ldm.clip.tokenizer import BOS, END_OF_WORD, EOS, Tokenizer, clip_bpe, finish, is_clip_bpe
from ldm.errors import CheckpointError, first_line
from ldm.formats.tensors import read_json, write_atomically

CONTEXT_LENGTH = 77
"""CLIP's context length, used if a folder does not give one (transformers then writes a huge number)."""

LONGEST = 1 << 20
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""Attributes of an added token in addition to its text."""


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """Read the tokenizer of a transformers or diffusers folder; it gives the same tokens for any text.

    Args:
        folder: folder of a tokenizer (diffusers' ``tokenizer/``), or of a transformers model that includes one.

    Raises:
        CheckpointError: the folder holds no tokenizer, one of its files is broken, or it is not a CLIP tokenizer.
    """
    folder = Path(folder)
    settings = _optional(folder / "special_tokens_map.json") | _optional(folder / "tokenizer_config.json")
    single = folder / "tokenizer.json"
    if not has_tokenizer(folder):
        raise CheckpointError(f"{folder} holds no tokenizer; it needs tokenizer.json, or vocab.json and merges.txt.")
    try:
        return _from_json(single, settings) if single.is_file() else _from_parts(folder, settings)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises plain Exception, and any value may have the wrong type
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read ({first_line(error)}); download it again."
        ) from None


def has_tokenizer(folder: str | Path) -> bool:
    """Return whether a folder holds files that :func:`read_tokenizer` reads."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.json"))


def _from_json(path: Path, settings: Mapping[str, Any]) -> Tokenizer:
    values = read_json(path)
    model, padding, truncation = values["model"], values.get("padding") or {}, values.get("truncation") or {}
    settings = {"pad_token": padding.get("pad_token"), "model_max_length": truncation.get("max_length"), **settings}
    if model.get("end_of_word_suffix") == END_OF_WORD:
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        return _clip(model["vocab"], merges, _added(values.get("added_tokens") or [], settings), settings, path)
    backend = tokenizers.Tokenizer.from_str(json.dumps(values))
    return finish(backend, _context_length(settings), _pad_id(backend.get_vocab(), settings, path))


def _from_parts(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    path = folder / "merges.txt"
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; download the folder again.")
    lines = path.read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    added = [{"content": token, "id": index} for token, index in _optional(folder / "added_tokens.json").items()]
    return _clip(read_json(folder / "vocab.json"), merges, _added(added, settings), settings, folder / "vocab.json")


def _clip(
    vocab: Mapping[str, int],
    merges: list[Any],
    added: Mapping[int, AddedToken],
    settings: Mapping[str, Any],
    source: Path,
) -> Tokenizer:
    vocab = {**vocab, **{token.content: index for index, token in added.items()}}
    pad_id = _pad_id(vocab, settings, source)
    return clip_bpe(
        merges, _context_length(settings), None if pad_id == vocab[EOS] else pad_id, vocab, [*added.values()]
    )


def _added(entries: list[Any], settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return added tokens by id; ``tokenizer_config.json`` overrides ``tokenizer.json`` and ``added_tokens.json``."""
    tokens = {entry["id"]: entry for entry in entries}
    tokens |= {int(index): entry for index, entry in (settings.get("added_tokens_decoder") or {}).items()}
    return {
        index: AddedToken(entry["content"], **{flag: entry[flag] for flag in FLAGS if flag in entry})
        for index, entry in sorted(tokens.items())
        if entry["content"] not in (BOS, EOS)
    }


def _pad_id(vocab: Mapping[str, int], settings: Mapping[str, Any], source: Path) -> int:
    pad = settings.get("pad_token") or EOS
    pad = pad["content"] if isinstance(pad, dict) else pad
    for token in (BOS, EOS, pad):
        if token not in vocab:
            raise CheckpointError(f"{source} lacks the token {token!r}; only CLIP tokenizers can be read.")
    return vocab[pad]


def _context_length(settings: Mapping[str, Any]) -> int:
    length = settings.get("model_max_length") or LONGEST
    return int(length) if length < LONGEST else CONTEXT_LENGTH


def write_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a tokenizer for transformers' ``AutoTokenizer``, which then gives the same tokens.

    CLIP's byte-pair encoding is written as ``vocab.json`` and ``merges.txt``, which ``CLIPTokenizer`` of any version reads; a
    tokenizer trained by ldm is written as ``tokenizer.json``, of the class ``PreTrainedTokenizerFast``.
    """
    folder = Path(folder)
    values = json.loads(tokenizer.to_json())
    special = {
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": tokenizer.backend.id_to_token(tokenizer.pad_id),
    }
    if is_clip_bpe(tokenizer):
        special["unk_token"] = EOS
        merges = "".join(f"{first} {second}\n" for first, second in values["model"]["merges"])
        vocab = json.dumps(tokenizer.backend.get_vocab(), ensure_ascii=False)
        files = {"vocab.json": vocab, "merges.txt": f"#version: 0.2\n{merges}"}
    else:
        files = {"tokenizer.json": tokenizer.to_json()}
    files["special_tokens_map.json"] = json.dumps(special, indent=2)
    settings = {
        **special,
        "tokenizer_class": tokenizer_class(tokenizer),
        "model_max_length": tokenizer.context_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "added_tokens_decoder": {
            str(token["id"]): {name: token[name] for name in ("content", *FLAGS)} for token in values["added_tokens"]
        },
    }
    files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False)
    for name, text in files.items():
        write_atomically(folder / name, methodcaller("write_text", text, encoding="utf-8"))


def tokenizer_class(tokenizer: Tokenizer) -> str:
    """Return the transformers class that reads what :func:`write_tokenizer` writes; diffusers' ``model_index.json`` names it."""
    return "CLIPTokenizer" if is_clip_bpe(tokenizer) else "PreTrainedTokenizerFast"


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
