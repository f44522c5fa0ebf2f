"""Choice of the caption of a sample: one of several, with its tags shuffled and dropped at each use in training.

The random numbers are a function of the jitter of the sample's position in the training sequence, thus of (seed, epoch,
position) alone: a resumed training makes the same choices, with any number of workers and ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ldm.config import config_field
from ldm.data.bad_samples import Reason, SampleError
from ldm.errors import ConfigError, DataError
from ldm.modalities.caption import CAPTION

MAX_BYTES = 65_536
"""Size of a caption member in bytes above which the sample is bad; no text encoder reads a fraction of it."""

Captions = tuple[tuple[str, float], ...]
"""The captions of a sample, each with its weight; weights are positive and need not add up to 1."""


@dataclass(frozen=True)
class CaptionConfig:
    """Captions of a sample: how they are stored, and what training makes of them. Validation uses the first, unchanged."""

    format: Literal["text", "lines", "json"] = config_field(
        "text",
        "Content of a .txt: text is one caption; lines has one per line; json has a caption, a list of captions or of "
        "{text, weight}, or an object of captions by name. One of several is chosen at each use in training, by weight.",
    )
    weights: Mapping[str, float] = config_field(
        help="Weights of the captions in a json object, by name; captions that are not named have weight 0. Empty: all 1.",
        factory=dict,
    )
    separator: str = config_field(",", "Text between the tags of a caption.")
    shuffle_tags: bool = config_field(False, "Whether the tags of a caption are put into random order.")
    drop_tags: float = config_field(0.0, "Probability with which each tag of a caption is left out.")
    keep_tags: int = config_field(0, "Number of tags at the beginning that are neither moved nor left out.")
    templates: tuple[str, ...] = config_field(
        (),
        "Texts such as 'a photo of {}', one of which is used for a caption, with {} replaced by it; none: the caption alone.",
    )
    drop_words: float = config_field(0.0, "Probability with which each word of a caption is left out; one word stays.")

    def __post_init__(self) -> None:
        if not 0 <= self.drop_tags <= 1:
            raise ConfigError(f"drop_tags must be from 0 to 1, but is {self.drop_tags}.")
        if self.keep_tags < 0:
            raise ConfigError(f"keep_tags must not be negative, but is {self.keep_tags}.")
        if not 0 <= self.drop_words <= 1:
            raise ConfigError(f"drop_words must be from 0 to 1, but is {self.drop_words}.")
        if wrong := [text for text in self.templates if "{}" not in text]:
            raise ConfigError(f"the template {wrong[0]!r} has no {{}}, which the caption replaces.")
        if not self.separator:
            raise ConfigError("separator must not be empty.")
        if self.weights and self.format != "json":
            raise ConfigError(f"weights need format: json, but format is {self.format}.")
        if any(weight < 0 for weight in self.weights.values()) or (self.weights and not any(self.weights.values())):
            raise ConfigError(f"weights must not be negative, and one must be positive, not {dict(self.weights)}.")

    @property
    def varies(self) -> bool:
        """True if the caption of a sample depends on the position in training."""
        return self.format != "text" or self.changes_text

    @property
    def changes_text(self) -> bool:
        """True if training changes the text of a caption, apart from the choice of one of several."""
        return self.changes_tags or self.drop_words > 0 or bool(self.templates)

    @property
    def changes_tags(self) -> bool:
        """True if the tags of a caption are shuffled or dropped."""
        return self.shuffle_tags or self.drop_tags > 0

    def in_templates(self, captions: list[str]) -> list[str]:
        """Return captions, and each template with one of them in it, from which a tokenizer learns the words of both."""
        return captions + [text.replace("{}", captions[0]) for text in self.templates] if captions else []

    def parse(self, data: bytes) -> Captions:
        """Return the captions in a member of a shard; of an empty member the empty caption.

        Raises:
            SampleError: the member is too long, not UTF-8, or not of the format.
        """
        if len(data) > MAX_BYTES:
            raise SampleError(Reason.CAPTION_TOO_LONG, f"the caption has {len(data)} bytes, more than {MAX_BYTES}")
        try:
            text = CAPTION.decode(data)
        except DataError as error:
            raise SampleError(Reason.CAPTION_NOT_UTF8, f"the caption {error}") from None
        if not text or self.format == "text":
            return ((text, 1.0),)
        if self.format == "lines":
            captions = [(line, 1.0) for line in text.split("\n")]
        else:
            captions = self._from_json(text)
        usable = tuple((each.strip(), weight) for each, weight in captions if each.strip() and 0 < weight < math.inf)
        if not usable:
            raise SampleError(
                Reason.MALFORMED_CAPTION, f"the caption {text[:50]!r} holds no caption of positive weight"
            )
        return usable

    def _from_json(self, text: str) -> list[tuple[str, float]]:
        try:
            value = json.loads(text)
            if isinstance(value, Mapping):
                weights = self.weights or dict.fromkeys(value, 1.0)
                captions = [(value[name], weight) for name, weight in weights.items() if name in value]
            else:
                entries = value if isinstance(value, list) else [value]
                pairs = [each if isinstance(each, Mapping) else {"text": each} for each in entries]
                captions = [(each["text"], float(each.get("weight", 1.0))) for each in pairs]
            if all(isinstance(caption, str) for caption, _ in captions):
                return captions
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise SampleError(
            Reason.MALFORMED_CAPTION, f"the caption {text[:50]!r} is not one of data.captions.format json"
        )

    def choose(self, captions: Captions, jitter: np.ndarray | None) -> str:
        """Return the caption of one use of a sample.

        Args:
            captions: as :meth:`parse` returns them.
            jitter: fp32 ``[k]``, the random numbers of the position in training; None: no augmentation.
        """
        if jitter is None or not self.varies:
            return captions[0][0]
        generator = np.random.default_rng(np.ascontiguousarray(jitter).view(np.uint32))
        edges = np.cumsum([weight for _, weight in captions])
        text = captions[int(np.searchsorted(edges, generator.random() * edges[-1], side="right"))][0]
        text = self._with_tags(text, generator) if self.changes_tags else text
        if self.drop_words:
            text = self._without_words(text, generator)
        if self.templates:
            text = self.templates[int(generator.integers(len(self.templates)))].replace("{}", text)
        return text

    def _without_words(self, text: str, generator: np.random.Generator) -> str:
        """Return a caption in which words are dropped (Wei & Zou 2019, arXiv 1901.11196, "random deletion")."""
        words = text.split()
        if not words:
            return text
        draws = generator.random(len(words))
        kept = [word for word, draw in zip(words, draws, strict=True) if draw >= self.drop_words]
        return " ".join(kept or [words[int(np.argmax(draws))]])

    def _with_tags(self, text: str, generator: np.random.Generator) -> str:
        """Return a caption with the tags behind the first ``keep_tags`` shuffled and dropped."""
        tags = [tag.strip() for tag in text.split(self.separator) if tag.strip()]
        kept, others = tags[: self.keep_tags], tags[self.keep_tags :]
        if self.shuffle_tags:
            others = [others[i] for i in generator.permutation(len(others))]
        stays = generator.random(len(others)) >= self.drop_tags
        joint = self.separator if self.separator.isspace() else f"{self.separator.strip()} "
        return joint.join([*kept, *(tag for tag, stay in zip(others, stays, strict=True) if stay)])
