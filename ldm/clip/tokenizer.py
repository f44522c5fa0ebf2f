"""Tokenizers: CLIP's byte-pair encoding, or a byte-level one trained on the captions of a data set.

A tokenizer is stored as a ``tokenizer.json`` of the ``tokenizers`` library, which contains normalisation, vocabulary, start
and end tokens, truncation and padding, so that a model file can hold all of it.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
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
"""Suffix of CLIP's tokens that end a word."""

COMMAS = frozenset(",;\N{FULLWIDTH COMMA}\N{IDEOGRAPHIC COMMA}")
"""Characters after which a long text is preferably split."""


class Tokenizer:
    """Maps texts to rows of token ids ``[start, ..., end, padding ...]``.

    An added token with several vectors (a textual inversion), such as ``<toy>`` where ``<toy>_1`` and ``<toy>_2`` are added
    tokens, too, stands for all of these in a text, as in diffusers.

    The end token has the highest id, in CLIP's vocabulary and in those trained here, as pooling at the highest id requires.

    Args:
        backend: with the start and end tokens in its vocabulary, truncation and padding set.

    Raises:
        CheckpointError: the backend lacks one of these.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        bos_id, eos_id = backend.token_to_id(BOS), backend.token_to_id(EOS)
        truncation, padding = backend.truncation, backend.padding
        if bos_id is None or eos_id is None or truncation is None or padding is None:
            raise CheckpointError(
                f"the tokenizer lacks the tokens {BOS} and {EOS}, truncation or padding; "
                "use one written by tools/prepare.py tokenizer."
            )
        self.backend = backend
        self.context_length: int = truncation["max_length"]
        self.vocab_size = backend.get_vocab_size()
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id: int = padding["pad_id"]
        added = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
        followers = {index: [*_followers(token, added)] for token, index in added.items()}
        self._followers = {index: rest for index, rest in followers.items() if rest}

    def __call__(self, texts: str | list[str] | tuple[str, ...], longest: bool = False) -> Tensor:
        """Return tokens ``[b context_length]`` of int64; a text that is too long is truncated, keeping the end token.

        Args:
            texts: one text (a batch of 1) or several.
            longest: pad only to the longest text of the batch, ``[b n]``; the pooled state of a causal tower is the same.

        Raises:
            DataError: a text that is not a string, or that is not valid Unicode.
        """
        batch = texts if isinstance(texts, (list, tuple)) else [texts]
        if self._followers:
            contents = [self._tokens(text, index)[: self.context_length - 2] for index, text in enumerate(batch)]
            rows = [self._row([token for token, _ in content]) for content in contents]
            most = max((len(content) for content in contents), default=-2) + 2
            return _table(rows, self.context_length)[:, : most if longest else None]
        encodings = [self.backend.encode(_checked(text, index)) for index, text in enumerate(batch)]
        tokens = _table([encoding.ids for encoding in encodings], self.context_length)
        if longest:
            return tokens[:, : max((sum(encoding.attention_mask) for encoding in encodings), default=0)]
        return tokens

    def windows(self, text: str, cut: bool = False) -> tuple[Tensor, Tensor]:
        """Split a text of any length into rows of tokens, each with its own start, end and padding.

        A row ends at the last comma in its last third, else at the last end of a word there; if there is neither, the row is
        filled.

        Args:
            cut: truncate the text to one filled row.

        Returns:
            Tokens ``[k context_length]`` of int64, and of the same shape the index in ``text`` of each token's last
            character, -1 for start, end and padding.

        Raises:
            DataError: the text is not a string, or not valid Unicode.
        """
        tokens = self._tokens(text)[: self.context_length - 2 if cut else None]
        starts = _starts(text, [span for _, span in tokens], self.context_length - 2)
        ids, places = [], []
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            ids.append(self._row([token for token, _ in tokens[start:end]]))
            padding = self.context_length - 1 - (end - start)
            places.append([-1, *(last - 1 for _, (_, last) in tokens[start:end]), *[-1] * padding])
        both = torch.tensor([ids, places], dtype=torch.int64, device="cpu")
        return both[0], both[1]

    def _tokens(self, text: str, index: int = 0) -> list[tuple[int, tuple[int, int]]]:
        """Return all tokens of a text, without start, end and padding, each with the place of its characters."""
        encoding = self._unlimited.encode(_checked(text, index))
        return [
            (each, span)
            for token, span, added in zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True)
            if not added
            for each in (token, *self._followers.get(token, ()))
        ]

    @cached_property
    def _unlimited(self) -> tokenizers.Tokenizer:
        """The backend without truncation and padding; its ``overflowing`` is incomplete in tokenizers 0.23.2."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.no_truncation()
        backend.no_padding()
        return backend

    def _row(self, tokens: Sequence[int]) -> list[int]:
        padding = self.context_length - 2 - len(tokens)
        return [self.bos_id, *tokens, self.eos_id, *[self.pad_id] * padding]

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Return the normalised text of one row of tokens, up to its end token."""
        ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        ids = ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids
        return self.backend.decode([token for token in ids if token != self.bos_id], skip_special_tokens=False)

    def with_context_length(self, context_length: int) -> Tokenizer:
        """Return the same tokenizer with another length of truncation and padding."""
        return finish(tokenizers.Tokenizer.from_str(self.to_json()), context_length, self.pad_id)

    def with_padding(self, pad_id: int) -> Tokenizer:
        """Return the same tokenizer with another padding token, which becomes a special token within texts, as in transformers.

        Raises:
            ConfigError: the vocabulary has no such token.
        """
        if not 0 <= pad_id < self.vocab_size:
            raise ConfigError(f"the pad_id {pad_id} is not among the {self.vocab_size} tokens of the tokenizer.")
        backend = tokenizers.Tokenizer.from_str(self.to_json())
        backend.add_special_tokens([_token(backend, pad_id)] if pad_id != self.pad_id else [])
        return finish(backend, self.context_length, pad_id)

    def with_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """Return the same tokenizer with further tokens, whose ids follow its own; each is matched before any merge.

        A token that begins and ends with a letter or digit is not matched within a word.

        Raises:
            CheckpointError: a token is in the vocabulary already.
        """
        backend = tokenizers.Tokenizer.from_str(self.to_json())
        for token in tokens:
            if backend.token_to_id(token) is not None:
                raise CheckpointError(
                    f"the token {token!r} is in the vocabulary already; give another token, such as '<{token}>'."
                )
            in_word, bytewise = re.fullmatch(r"\w(.*\w)?", token, re.DOTALL), not is_clip_bpe(self)
            backend.add_tokens([AddedToken(token, single_word=in_word is not None, lstrip=bytewise)])
        return finish(backend, self.context_length, self.pad_id)

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the meaning of any token, the length or the padding.

        They do not depend on the file format of a version of ``tokenizers``.
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
            CheckpointError: the text is not a tokenizer, or lacks start, end, truncation or padding.
        """
        return cls(backend_from_json(text))


def is_clip_bpe(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer is CLIP's byte-pair encoding, with any vocabulary."""
    return getattr(tokenizer.backend.model, "end_of_word_suffix", None) == END_OF_WORD


def backend_from_json(text: str) -> tokenizers.Tokenizer:
    """Parse a ``tokenizer.json`` of the ``tokenizers`` library.

    Raises:
        CheckpointError: the text is not a tokenizer.json.
    """
    try:
        return tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower; a Rust panic is not an Exception
        raise CheckpointError(f"the tokenizer is not in the format of tokenizer.json: {first_line(error)}.") from None


class TokenizerConfig(Kind):
    """Family of tokenizer configs; ``build(captions)`` returns a :class:`Tokenizer`."""

    vocab_size: int
    context_length: int

    def build(self, captions: Iterable[str] = ()) -> Tokenizer:
        raise NotImplementedError


@dataclass(frozen=True)
class CLIPBPEConfig(TokenizerConfig, kind="clip_bpe"):
    """CLIP's byte-pair encoding of 49,408 tokens, as used by SD 1, SD 2 and SDXL; it is not trained."""

    context_length: int = config_field(77, "tokens per caption, including start and end")
    pad_id: int | None = config_field(
        None, "padding token; null: the end token (SD 1); 0 for SD 2 and SDXL's second tokenizer"
    )

    def __post_init__(self) -> None:
        _check_context_length(self.context_length)
        if self.pad_id is not None and not 0 <= self.pad_id < CLIP_VOCAB_SIZE:
            raise ConfigError(f"the pad_id {self.pad_id} is not among the {CLIP_VOCAB_SIZE} tokens of CLIP.")

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return CLIP_VOCAB_SIZE

    def build(self, captions: Iterable[str] = ()) -> Tokenizer:
        """Build the tokenizer; ``captions`` are ignored.

        Raises:
            MissingExtraError: open_clip, which contains the merges, is not installed.
        """
        return clip_bpe(clip_merges(), self.context_length, self.pad_id)


@dataclass(frozen=True)
class ByteBPEConfig(TokenizerConfig, kind="byte_bpe"):
    """Byte-level byte-pair encoding trained on the captions; works for any language, without unknown tokens."""

    vocab_size: int = config_field(2048, "largest number of tokens; small sets of captions give fewer")
    context_length: int = config_field(32, "tokens per caption, including start and end")
    path: str | None = config_field(
        None, "file written by tools/prepare.py tokenizer; null: trained on the captions of the train split", path=True
    )

    def __post_init__(self) -> None:
        _check_context_length(self.context_length)
        _check_vocab_size(self.vocab_size)

    def build(self, captions: Iterable[str] = ()) -> Tokenizer:
        """Build the tokenizer; ``captions`` are used only if there is no ``path``.

        Raises:
            DataError: ``path`` does not exist, or there are no captions.
            CheckpointError: ``path`` is not a tokenizer.
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
    """Build CLIP's tokenizer (OpenAI's ``simple_tokenizer.py``) from its merges, with the normalisation of transformers.

    Args:
        merges: pairs of entries, in order of priority.
        context_length: tokens per row.
        pad_id: padding token; None: the end token.
        vocab: ids of entries; None: the 256 bytes, the same at the end of a word, one per merge, start, end.
        added: entries of ``vocab`` that are matched in a text before any merge.
        pad_in_text: if True, "!" in a text is the padding token of SD 2, as in transformers; in open_clip it is not.
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
    """Train byte-level BPE (Radford et al. 2019, GPT-2) on captions in NFC, lower case and with single spaces.

    A merge must occur at least twice. The result does not depend on the order of the captions.
    Ids: the 256 bytes, one per merge, start, end.

    Raises:
        ConfigError: ``vocab_size`` is too small for the bytes, start and end.
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
    """Add start and end tokens (which the vocabulary must have), truncation and padding to ``context_length``."""
    ids = {token: backend.token_to_id(token) for token in (BOS, EOS)}
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=list(ids.items()))
    backend.enable_truncation(context_length)
    pad = EOS if pad_id is None else _token(backend, pad_id)
    backend.enable_padding(length=context_length, pad_id=backend.token_to_id(pad), pad_token=pad)
    return Tokenizer(backend)


def _followers(token: str, ids: Mapping[str, int]) -> Iterator[int]:
    """Yield the ids of ``token_1``, ``token_2``, ... as far as they exist."""
    number = 1
    while (index := ids.get(f"{token}_{number}")) is not None:
        yield index
        number += 1


def _table(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), length)


def _token(backend: tokenizers.Tokenizer, index: int) -> str:
    token = backend.id_to_token(index)
    assert token is not None, f"there is no token {index}"
    return token


def _starts(text: str, spans: Sequence[tuple[int, int]], capacity: int) -> list[int]:
    """Return the indices of the tokens, located at ``spans`` of ``text``, with which rows of ``capacity`` tokens start."""
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
    """Return the merges of CLIP, read from open_clip's file without importing open_clip, which takes seconds."""
    package = importlib.util.find_spec("open_clip")
    folders = (package.submodule_search_locations or []) if package else []
    for path in (Path(folder, "bpe_simple_vocab_16e6.txt.gz") for folder in folders):
        if path.is_file():
            lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
            count = CLIP_VOCAB_SIZE - 2 * BYTES - 2
            # The first line is a title, and the file has more merges than CLIP uses.
            return [(first, second) for first, second in (line.split() for line in lines[1 : 1 + count])]
    raise MissingExtraError(
        "the tokenizer clip_bpe needs the file bpe_simple_vocab_16e6.txt.gz of open_clip; "
        "install it with pip install open_clip_torch."
    )


def _byte_alphabet() -> list[str]:
    """Return GPT-2's printable character for each of the 256 bytes, in the order of the ids."""
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
        raise ConfigError(f"a context_length of {context_length} leaves no room for text; use at least 3.")


def _check_vocab_size(vocab_size: int) -> None:
    if vocab_size < BYTES + 2:
        raise ConfigError(
            f"vocab_size {vocab_size} is too small for all bytes, start and end; use at least {BYTES + 2}."
        )
