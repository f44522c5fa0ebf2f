"""Facts about a sample, from its members: size of the image, length and language of the caption, fields of its JSON file.

They are the further columns of an index (:mod:`ldm.data.shard_index`), and what filters select by.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from safetensors.torch import load

from ldm.data.bad_samples import SampleError
from ldm.data.caption_choice import CaptionConfig
from ldm.data.shard_format import IMAGE, LATENTS, ORIGINAL_SIZE, SIDECAR
from ldm.errors import DataError, missing_extra, unknown
from ldm.image_files import image_size
from ldm.modalities import Modality
from ldm.modalities.caption import CAPTION

CAPTION_LENGTH = "caption_length"
"""Column of the number of characters of the caption."""

NUMBERS = ("width", "height", CAPTION_LENGTH)
"""Columns of numbers that are computed from image and caption."""

LANGUAGE = "language"
"""Column of the language of the caption, an ISO 639-1 code."""

LEFT_OUT = {"key", "caption", "status", "error_message", "exif", "sha256", "md5"}
"""Fields of JSON files that are not copied to the index unless they are named: what img2dataset records of its own work."""

LONGEST = 2048
"""Characters of a text of a JSON file above which it is not copied to the index."""

ALL_LANGUAGES = ("all",)

_NOT_LANGUAGE = "zxx"  # py3langid's class of codes and numbers


@dataclass(frozen=True)
class IndexOptions:
    """Facts that are collected of each sample.

    Attributes:
        fields: fields of the samples' JSON files; None: all that are numbers, booleans or short texts.
        caption_field: field that holds the caption; None: it is in ``.txt``.
        caption_format: ``data.captions.format``; of several captions the first one is measured.
        languages: ISO 639-1 codes of the languages that captions may have, of which the column ``language`` gets the most
            probable one; ``("all",)`` for all that are known; empty: no such column.
    """

    fields: tuple[str, ...] | None = None
    caption_field: str | None = None
    caption_format: Literal["text", "lines", "json"] = "text"
    languages: tuple[str, ...] = ()


def measured(column: str, data: bytes, options: IndexOptions) -> dict[str, Any]:
    """Return the facts that a member of a sample contains, by column; without those that are not known."""
    if column == IMAGE:
        return image_facts(data)
    if column == CAPTION.suffix and options.caption_field is None:
        return caption_facts(data, options)
    if column == LATENTS:
        width, height = load(data)[ORIGINAL_SIZE].tolist()
        return {"width": width, "height": height}
    if column == SIDECAR:
        return field_facts(data, options)
    return {}


def image_facts(data: bytes) -> dict[str, Any]:
    """Return width and height of an image in pixels."""
    try:
        width, height = image_size(data)
    except DataError:  # which training notices and counts
        return {}
    return {"width": width, "height": height}


def caption_facts(data: bytes, options: IndexOptions) -> dict[str, Any]:
    """Return length and language of a caption."""
    if options.caption_format == "text":
        text = data.decode(errors="replace").strip()
    else:
        try:
            text = CaptionConfig(format=options.caption_format).parse(data)[0][0]
        except SampleError:  # which training notices and counts
            return {}
    facts: dict[str, Any] = {CAPTION_LENGTH: len(text)}
    if options.languages and text:
        facts[LANGUAGE] = language_identifier(options.languages)(text)
    return facts


def field_facts(data: bytes, options: IndexOptions) -> dict[str, Any]:
    """Return the chosen fields of a JSON file, and the facts about a caption in it."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    chosen = {name: value for name, value in values.items() if _is_chosen(name, value, options)}
    caption = values.get(options.caption_field)
    if caption is not None and not isinstance(caption, str) and options.caption_format == "json":
        caption = json.dumps(caption)
    if isinstance(caption, str):
        chosen |= caption_facts(caption.encode(errors="replace"), options)
    return chosen


def _is_chosen(name: str, value: Any, options: IndexOptions) -> bool:
    computed = (*NUMBERS, "key", *([LANGUAGE] if options.languages else []))
    if name in computed or name.endswith((".offset", ".size")):
        return False
    if options.fields is not None:
        return name in options.fields
    scalar = isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= LONGEST)
    return scalar and name not in LEFT_OUT and name != options.caption_field


def field_member(sidecar: bytes, modality: Modality, field: str) -> bytes:
    """Return the value of a field of a JSON file as a member of its own would hold it.

    Raises:
        DataError: there is none; the message is a clause.
    """
    try:
        values = json.loads(sidecar)
        value = values[field] if isinstance(values, dict) else None
    except (ValueError, RecursionError):
        raise DataError(f"is not readable, since its .{SIDECAR} is not valid JSON") from None
    except KeyError:
        raise DataError(f"is missing, since its .{SIDECAR} has no field {field!r}") from None
    if isinstance(value, str):
        return value.encode(errors="replace")
    return b"" if value is None and modality.optional else json.dumps(value).encode()


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return facts of samples as columns for :func:`ldm.data.shard_index.table_of`: a value or None for each sample."""
    names = dict.fromkeys([*NUMBERS, *(name for row in rows for name in row)])
    columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
    for name in NUMBERS:
        known = np.array([value is not None for value in columns[name]], bool)
        values = np.array([value or 0 for value in columns[name]], np.int32)
        columns[name] = np.ma.array(values, mask=~known)
    return columns


@functools.lru_cache(maxsize=1)
def language_identifier(languages: tuple[str, ...]) -> Callable[[str], str | None]:
    """Return a function from a text to the ISO 639-1 code of its language; None if it has no words.

    Args:
        languages: codes of the languages to choose from; ``("all",)`` for all.

    Raises:
        MissingExtraError: py3langid is not installed.
        DataError: a language is not known.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise missing_extra("py3langid", "the language of captions", "language") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    if languages != ALL_LANGUAGES:
        known = [each for each in identifier.labels if each != _NOT_LANGUAGE]
        for each in languages:
            if each not in known:
                raise DataError(unknown("language", each, known))
        identifier.set_languages(list(languages))

    def identify(text: str) -> str | None:
        if not any(map(str.isalpha, text)):
            return None
        language, _ = identifier.classify(text)
        return None if language == _NOT_LANGUAGE else str(language)

    return identify
