"""Encoded data of an experiment: what latents and text states depend on, and the check that stored ones are the same."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from ldm.conditioning import Conditioner
from ldm.conditioning.text_states import TEXT_STATES, TextStates
from ldm.data.config import ShardsData
from ldm.data.encoded import EncodedImages
from ldm.data.mixture import source_sizes
from ldm.data.samples import Batch, Samples, SourceShare, StoredImages
from ldm.data.shard_format import LATENTS
from ldm.data.shard_index import ShardIndex
from ldm.data.shard_set import INDEX
from ldm.data.shards import Shards
from ldm.data.storage import Location, exists, joined, located, read_range, shown, size_of
from ldm.data.teacher import Teacher
from ldm.errors import ConfigError, DataError
from ldm.formats.tensors import fingerprint
from ldm.modalities.caption import CAPTION
from ldm.vae import FirstStage

EMPTY = "empty.safetensors"
"""File next to the splits with the text states of the empty caption, which stands for dropped ones."""

PLAN = ("batch_size", "shard_size")
"""Entries of an encoding that do not matter to those who read it."""


@dataclass
class EncodedSource:
    """Encoded samples of an experiment, in the folder ``data.encoded.folder``.

    Args:
        data: the config section.
        first_stage: frozen first stage.
        fingerprint: fingerprint of its weights.
        conditioner: conditioner of the denoiser, whose frozen text encoders may be used.
        teacher: network whose features of the training images are stored as well; None for none.
    """

    data: ShardsData
    first_stage: FirstStage
    fingerprint: str
    conditioner: Conditioner
    teacher: Teacher | None = None
    _states: dict[str, Tensor] = field(default_factory=dict)  # of the empty caption, on the device that was used last

    @property
    def folder(self) -> Location:
        assert self.data.encoded.folder is not None
        return located(self.data.encoded.folder)

    @property
    def has_text(self) -> bool:
        """True if the outputs of text encoders are stored.

        Raises:
            ConfigError: they are asked for, but the captions change at each use.
        """
        if self.data.encoded.text is None or not any(True for _ in self.conditioner.text_encoders()):
            return False
        if self.data.captions.changes_text:
            raise ConfigError(
                "data.captions shuffles or drops tags, drops words or has templates, so that text states of the captions cannot "
                "be stored; set data.encoded.text to null."
            )
        return True

    def images(self, split: str) -> StoredImages:
        """Open the images of a split, to be read once and in sequence."""
        samples = replace(self.data.without_cache(), shuffle_buffer=self.data.shuffle_buffer or 1).open(split)
        assert isinstance(samples, StoredImages)
        return samples

    def crops(self, split: str) -> int:
        """Return the number of crops of each image of a split; validation uses the center."""
        return self.data.encoded.crops if split == "train" and self.data.crop == "random" else 1

    def teacher_of(self, split: str) -> Teacher | None:
        """Return the teacher of the images of a split; validations need none."""
        return self.teacher if split == "train" else None

    def flips(self, split: str) -> bool:
        """Return True if the images of a split are mirrored too."""
        return split == "train" and self.data.flip

    def encoding(self, split: str, images: StoredImages) -> dict[str, Any]:
        """Return all that the encoded samples of a split depend on, as JSON values by names to show."""
        data = self.data
        entries: dict[str, Any] = {
            "vae": self.fingerprint,
            "size": list(data.image_shape[1:]),
            "fit": data.fit,
            "background": str(data.background),
            "pad_color": str(data.pad_color or data.background),
            "crops": self.crops(split),
            "flip": self.flips(split),
            "latents": data.encoded.latents,
            "precision": data.encoded.precision,
            "data": images.fingerprint,
        }
        if (teacher := self.teacher_of(split)) is not None:
            entries["teacher"] = teacher.fingerprint
        if data.bucket_shapes:
            entries["buckets"] = [list(shape) for shape in data.bucket_shapes]
        if images.mixture:
            entries["samples of each source"] = source_sizes(images)
        if self.has_text and CAPTION.key in images.shards.modalities:
            names = [name for name, weight in data.captions.weights.items() if weight > 0]
            entries |= {"text": data.encoded.text, "captions": [data.captions.format, *sorted(names)]}
            if len(names) > 1:  # text states are stored in that order
                entries["order of captions"] = names
            for encoder in self.conditioner.text_encoders():
                entries[encoder.name] = fingerprint(encoder.network.state_dict(), encoder.config)
                entries[f"tokenizer of {encoder.name}"] = hashlib.sha256(encoder.tokenizer.encode()).hexdigest()[:16]
        return entries

    def open(self, split: str, samples: Samples, device: torch.device | str) -> EncodedImages:
        """Open the encoded samples of a split.

        Args:
            split: ``train``, ``val`` or ``test``.
            samples: its images.
            device: unused.

        Raises:
            DataError: they do not exist, or were made from other data, with other models or settings.
        """
        folder = joined(self.folder, split)
        images = samples if isinstance(samples, StoredImages) else self.images(split)
        if not exists(joined(folder, INDEX)):
            raise DataError(
                f"there are no encoded samples in {shown(folder)} (data.encoded.folder); run tools/encode.py with the same "
                "config."
            )
        found, expected = ShardIndex(joined(folder, INDEX)), self.encoding(split, images)
        check_encoding(folder, expected, found.encoding)
        cache = self.data.shard_cache.build()
        sequential = split != "train" or self.data.shuffle_buffer is not None
        shards = Shards.open(str(folder), split, cache=cache, sequential=sequential, content=LATENTS)
        mixture = [
            SourceShare(math.ceil(size / (found.encoding or {})["shard_size"]), share.weight)
            for size, share in zip(source_sizes(images), images.mixture, strict=False)
        ]
        return EncodedImages(
            images,
            shards,
            self.first_stage.posterior_type.cached,
            crops=self.crops(split),
            flips=self.flips(split),
            text="text" in expected,
            teacher="teacher" in expected,
            mixture=mixture,
        )

    def complete(self, batch: Batch, device: torch.device) -> Batch:
        """Return a batch with its text states as conditioners take them."""
        prefix = f"{TEXT_STATES}."
        stored = {name.removeprefix(prefix): each for name, each in batch.items() if name.startswith(prefix)}
        if not stored:
            return batch
        if not self._states:
            self._states = read_empty(self.folder)
        self._states = {name: each.to(device) for name, each in self._states.items()}
        others = {name: each for name, each in batch.items() if not name.startswith(prefix)}
        return {**others, TEXT_STATES: TextStates(batch[CAPTION.key], stored, self._states)}


def check_encoding(folder: Location, expected: Mapping[str, Any], found: Mapping[str, Any] | None) -> None:
    """Raise a DataError if the samples in a folder are not encoded as expected; further entries that they have may differ."""
    if found is None:
        raise DataError(f"{shown(folder)} holds images instead of encoded samples; correct data.encoded.folder.")
    differing = [name for name, value in expected.items() if found.get(name) != value]
    if len(differing) > 1 and "data" in differing:
        differing.remove("data")  # whose fingerprint includes the size
    if differing:
        phrases = (f"{name} is {found.get(name)} there and {expected[name]} here" for name in differing)
        raise DataError(
            f"the encoded samples in {shown(folder)} do not fit the config: {'; '.join(phrases)}; encode the data into another "
            "folder (data.encoded.folder)."
        )


def read_empty(folder: Location) -> dict[str, Tensor]:
    """Return the text states of the empty caption, ``[1 ...]`` each, from the folder of an encoded set."""
    path = joined(folder, EMPTY)
    data = read_range(path, 0, size_of(path) or 0) if isinstance(path, str) else path.read_bytes()
    return load(data)
