"""Captions to tokens: CLIP's byte-pair encoding, or a byte-level one trained on the captions at hand.

A tokenizer is one ``tokenizer.json`` of the ``tokenizers`` library. Normalisation, vocabulary, start and end
tokens, truncation and padding all stand in it, so that a model file carries it whole.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from ldm.config import Kind, config_field
from ldm.errors import CheckpointError, ConfigError, DataError, MissingExtraError, first_line

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_VOCAB_SIZE = 49408
BYTES = 256
END_OF_WORD = "</w>"
"""What CLIP's tokens end with that end a word."""

COMMAS = frozenset(",;\N{FULLWIDTH COMMA}\N{IDEOGRAPHIC COMMA}")
"""Behind them a long text is parted best."""


class Tokenizer:
    """Texts to rows of token ids ``[start, ..., end, padding ...]``.

    End is the highest id, in CLIP's vocabulary and in those trained here: pooling at the highest token fits.

    Args:
        backend: with the start and end tokens in its vocabulary, truncation and padding set.

    Raises:
        CheckpointError: one of these is missing.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        bos_id, eos_id = backend.token_to_id(BOS), backend.token_to_id(EOS)
        truncation, padding = backend.truncation, backend.padding
        if bos_id is None or eos_id is None or truncation is None or padding is None:
            raise CheckpointError(
                f"the tokenizer lacks the tokens {BOS} and {EOS}, truncation or padding; "
                "take one written by tools/prepare.py tokenizer."
            )
        self.backend = backend
        self.context_length: int = truncation["max_length"]
        self.vocab_size = backend.get_vocab_size()
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id: int = padding["pad_id"]

    def __call__(self, texts: str | list[str] | tuple[str, ...], longest: bool = False) -> Tensor:
        """Tokens ``[b context_length]`` of int64; a text that is too long is cut, its end token kept.

        Args:
            texts: one text (a batch of 1) or several.
            longest: pad to the longest of the batch only, ``[b n]``; what a causal tower pools is the same.

        Raises:
            DataError: a text that is not a string, or that is not valid Unicode.
        """
        batch = texts if isinstance(texts, (list, tuple)) else [texts]
        encodings = [self.backend.encode(_checked(text, index)) for index, text in enumerate(batch)]
        tokens = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)
        tokens = tokens.reshape(len(encodings), self.context_length)
        if longest:
            return tokens[:, : max((sum(encoding.attention_mask) for encoding in encodings), default=0)]
        return tokens

    def windows(self, text: str, cut: bool = False) -> tuple[Tensor, Tensor]:
        """A text of any length as rows of tokens, each with start, end and padding of its own.

        A row ends where a word does, and after a comma rather than elsewhere, if that is in its last third; without
        either it is filled.

        Args:
            cut: keep what fits one filled row, and leave the rest out.

        Returns:
            Tokens ``[k context_length]`` of int64, and the place in ``text`` of each one's last character, -1 for
            start, end and padding, of the same shape.

        Raises:
            DataError: the text is not a string, or not valid Unicode.
        """
        encoding = self.backend.encode(_checked(text, 0))
        tokens = [
            (token, span)
            for part in (encoding, *(() if cut else encoding.overflowing))
            for token, span, added in zip(part.ids, part.offsets, part.special_tokens_mask, strict=True)
            if not added
        ]
        starts = _starts(text, [span for _, span in tokens], self.context_length - 2)
        ids, places = [], []
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            padding = self.context_length - 2 - (end - start)
            ids.append([self.bos_id, *(token for token, _ in tokens[start:end]), self.eos_id, *[self.pad_id] * padding])
            places.append([-1, *(last - 1 for _, (_, last) in tokens[start:end]), -1, *[-1] * padding])
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(places, dtype=torch.int64)

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The normalised text of one row of tokens, up to its end token."""
        ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        ids = ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids
        return self.backend.decode([token for token in ids if token != self.bos_id], skip_special_tokens=False)

    def with_context_length(self, context_length: int) -> Tokenizer:
        """The same tokens, cut and padded to another length."""
        return finish(tokenizers.Tokenizer.from_str(self.to_json()), context_length, self.pad_id)

    def with_padding(self, pad_id: int) -> Tokenizer:
        """The same tokens, padded with another one, which then is that one wherever it stands in a text, as in transformers.

        Raises:
            ConfigError: there is no such token.
        """
        if not 0 <= pad_id < self.vocab_size:
            raise ConfigError(f"the pad_id {pad_id} is not among the {self.vocab_size} tokens of the tokenizer.")
        backend = tokenizers.Tokenizer.from_str(self.to_json())
        backend.add_special_tokens([_token(backend, pad_id)] if pad_id != self.pad_id else [])
        return finish(backend, self.context_length, pad_id)

    def fingerprint(self) -> str:
        """16 hex digits that change with the meaning of any token, with the length or with the padding.

        They do not depend on how a version of ``tokenizers`` writes its file.
        """
        vocabulary = sorted(self.backend.get_vocab().items(), key=lambda entry: entry[1])
        meaning = json.dumps([vocabulary, self.context_length, self.pad_id])
        return hashlib.sha256(meaning.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        return self.backend.to_str()

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The inverse of :meth:`to_json`.

        Raises:
            CheckpointError: the text is no tokenizer, or one without start, end, truncation or padding.
        """
        return cls(backend_from_json(text))


def backend_from_json(text: str) -> tokenizers.Tokenizer:
    """A tokenizer of the library.

    Raises:
        CheckpointError: the text is no tokenizer.json.
    """
    try:
        return tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower; a panic of its Rust is no Exception
        raise CheckpointError(f"the tokenizer is not in the format of tokenizer.json: {first_line(error)}.") from None


class TokenizerConfig(Kind):
    """The family of tokenizers; ``build(captions)`` gives a :class:`Tokenizer`."""

    vocab_size: int
    context_length: int

    def build(self, captions: Iterable[str] = ()) -> Tokenizer:
        raise NotImplementedError


@dataclass(frozen=True)
class CLIPBPEConfig(TokenizerConfig, kind="clip_bpe"):
    """CLIP's byte-pair encoding of 49,408 tokens, as SD 1, SD 2 and SDXL use it; it is not trained."""

    context_length: int = config_field(77, "tokens of a caption, start and end among them")
    pad_id: int | None = config_field(
        None, "token after the end; null: the end token (SD 1); 0 for SD 2 and SDXL's second tokenizer"
    )

    def __post_init__(self) -> None:
        _check_context_length(self.context_length)
        if self.pad_id is not None and not 0 <= self.pad_id < CLIP_VOCAB_SIZE:
            raise ConfigError(f"the pad_id {self.pad_id} is not among the {CLIP_VOCAB_SIZE} tokens of CLIP.")

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return CLIP_VOCAB_SIZE

    def build(self, captions: Iterable[str] = ()) -> Tokenizer:
        """``captions`` are not looked at.

        Raises:
            MissingExtraError: open_clip, which brings the merges, is not installed.
        """
        return clip_bpe(clip_merges(), self.context_length, self.pad_id)


@dataclass(frozen=True)
class ByteBPEConfig(TokenizerConfig, kind="byte_bpe"):
    """Byte-level byte-pair encoding trained on the captions; any language, nothing is unknown."""

    vocab_size: int = config_field(2048, "most tokens; small sets of captions give fewer")
    context_length: int = config_field(32, "tokens of a caption, start and end among them")
    path: str | None = config_field(
        None, "file written by tools/prepare.py tokenizer; null: trained on the captions of the train split"
    )

    def __post_init__(self) -> None:
        _check_context_length(self.context_length)
        _check_vocab_size(self.vocab_size)

    def build(self, captions: Iterable[str] = ()) -> Tokenizer:
        """``captions`` are looked at only when there is no ``path``.

        Raises:
            DataError: ``path`` does not exist, or no captions.
            CheckpointError: ``path`` is no tokenizer.
            ConfigError: it has more tokens than ``vocab_size``.
        """
        if self.path is None:
            return train_byte_bpe(captions, self.vocab_size, self.context_length)
        path = Path(self.path)
        if not path.is_file():
            raise DataError(f"the tokenizer {path} does not exist; write it with tools/prepare.py tokenizer.")
        tokenizer = Tokenizer.from_json(path.read_text(encoding="utf-8"))
        if tokenizer.vocab_size > self.vocab_size:
            raise ConfigError(f"{path} has {tokenizer.vocab_size} tokens; set vocab_size to at least that.")
        return tokenizer.with_context_length(self.context_length)


def clip_bpe(
    merges: Sequence[tuple[str, str]],
    context_length: int = 77,
    pad_id: int | None = None,
    vocab: Mapping[str, int] | None = None,
    added: Sequence[AddedToken] = (),
    pad_in_text: bool = True,
) -> Tokenizer:
    """CLIP's tokenizer (OpenAI's ``simple_tokenizer.py``) from its merges, normalising as transformers does.

    Args:
        merges: pairs of entries, the first to be made first.
        context_length: tokens of a row.
        pad_id: token after the end; None: the end token.
        vocab: entries to ids; None: the 256 bytes, the same at the end of a word, one for each merge, start, end.
        added: entries of ``vocab`` that are found in a text before anything is merged.
        pad_in_text: whether a text's "!" is the token that SD 2 pads with, as in transformers; in open_clip it is not.
    """
    if vocab is None:
        alphabet = _byte_alphabet()
        entries = [*alphabet, *(byte + END_OF_WORD for byte in alphabet), *map("".join, merges), BOS, EOS]
        vocab = {entry: index for index, entry in enumerate(entries)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=dict(vocab), merges=list(merges), end_of_word_suffix=END_OF_WORD, unk_token=EOS)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(END_OF_WORD, " "), decoders.Strip(" ", 0, 1)]
    )
    backend.add_tokens(list(added))
    backend.add_special_tokens([BOS, EOS])
    if pad_id is not None and pad_in_text:
        backend.add_special_tokens([_token(backend, pad_id)])
    return finish(backend, context_length, pad_id)


def train_byte_bpe(captions: Iterable[str], vocab_size: int = 2048, context_length: int = 32) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019, GPT-2) of captions in NFC, in lower case and with single spaces.

    A merge must occur twice. The result depends on the captions and not on their order.
    Ids: the 256 bytes, one for each merge, start, end.

    Raises:
        ConfigError: ``vocab_size`` has no room for the bytes, start and end.
        DataError: there are no captions, or one is not a string.
    """
    _check_context_length(context_length)
    _check_vocab_size(vocab_size)
    texts = [_checked(caption, index) for index, caption in enumerate(captions)]
    if not texts:
        raise DataError("there are no captions to train a tokenizer on; check the train split.")
    backend = tokenizers.Tokenizer(models.BPE())
    one_space = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), one_space, normalizers.Strip()]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, min_frequency=2, initial_alphabet=_byte_alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([BOS, EOS])
    return finish(backend, context_length)


def finish(backend: tokenizers.Tokenizer, context_length: int, pad_id: int | None = None) -> Tokenizer:
    """Start and end around a text, truncation and padding to ``context_length``; they must be in the vocabulary."""
    ids = {token: backend.token_to_id(token) for token in (BOS, EOS)}
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=list(ids.items()))
    backend.enable_truncation(context_length)
    pad = EOS if pad_id is None else _token(backend, pad_id)
    backend.enable_padding(length=context_length, pad_id=backend.token_to_id(pad), pad_token=pad)
    return Tokenizer(backend)


def _token(backend: tokenizers.Tokenizer, index: int) -> str:
    token = backend.id_to_token(index)
    assert token is not None, f"{index} is no token"
    return token


def _starts(text: str, spans: Sequence[tuple[int, int]], capacity: int) -> list[int]:
    """The tokens, of those at ``spans`` of ``text``, with which the rows of ``capacity`` tokens begin."""
    starts = [0]
    while len(spans) - starts[-1] > capacity:
        full = starts[-1] + capacity
        near = range(full, full - capacity // 3, -1)
        commas = [token for token in near if text[spans[token - 1][1] - 1] in COMMAS]
        words = [token for token in near if re.search(r"\s", text[spans[token - 1][1] : spans[token][0] + 1])]
        starts.append((commas or words or [full])[0])
    return starts


@cache
def clip_merges() -> list[tuple[str, str]]:
    """The merges of CLIP, from the file that open_clip brings; to import open_clip would take seconds."""
    package = importlib.util.find_spec("open_clip")
    folders = (package.submodule_search_locations or []) if package else []
    for path in (Path(folder, "bpe_simple_vocab_16e6.txt.gz") for folder in folders):
        if path.is_file():
            lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
            count = CLIP_VOCAB_SIZE - 2 * BYTES - 2
            # The first line is a title, and there are more merges than CLIP uses.
            return [(first, second) for first, second in (line.split() for line in lines[1 : 1 + count])]
    raise MissingExtraError(
        "the tokenizer clip_bpe needs the file bpe_simple_vocab_16e6.txt.gz of open_clip; "
        "install it with pip install open_clip_torch."
    )


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character for each of the 256 bytes, in the order of the ids."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _checked(text: object, index: int) -> str:
    if not isinstance(text, str):
        kind = type(text).__name__
        raise DataError(f"text number {index} is {text!r} ({kind}); prompts and captions must be strings.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"text number {index}, {text!r}, is not valid Unicode; write it in UTF-8.") from None
    return text


def _check_context_length(context_length: int) -> None:
    if context_length < 3:
        raise ConfigError(f"a context_length of {context_length} has no room for text; use at least 3.")


def _check_vocab_size(vocab_size: int) -> None:
    if vocab_size < BYTES + 2:
        raise ConfigError(
            f"vocab_size {vocab_size} has no room for all bytes, start and end; use at least {BYTES + 2}."
        )
