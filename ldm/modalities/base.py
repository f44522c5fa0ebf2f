"""The record of a raw condition, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from ldm.errors import SamplingError
from ldm.modalities.crop import Crop

M = TypeVar("M", bound="Modality")


@dataclass(frozen=True)
class Modality:
    """A raw condition, such as a caption or an edge map: how it is stored, batched, given to a pipeline and shown.

    What this class does fits a condition that is only computed or only given to a pipeline; subclasses override what
    differs. A modality with a ``suffix`` overrides ``decode`` and ``encode``; one whose values refer to places in
    the image sets ``spatial`` and overrides ``crop``.

    Attributes:
        key: its name in batches, and among the inputs of conditioners.
        noun: its name in messages, such as ``semantic map``.
        plural: the same of several; an article and ``noun`` make one, unless both are equal.
        argument: argument of :class:`ldm.Pipeline` that gives it; None: an entry ``key`` of ``condition``.
        suffix: what follows the first dot in the names of its files, in shards and in folders of images; None: it has none.
        optional: whether samples of one set may lack its file where others have it.
        describes: whether a sample with an image and this alone is complete; a sample needs one such modality.
        spatial: whether its values refer to places in the image, so that they change when it is cropped or mirrored.
        ndim: dimensions of a tensor or array that is one entry, as opposed to a batch of entries; None: it is never one.
        from_crop: derives its value from the crop of a training image, for modalities that are stored nowhere.
    """

    key: str
    noun: str
    plural: str
    argument: str | None = None
    suffix: str | None = None
    optional: bool = False
    describes: bool = False
    spatial: bool = False
    ndim: int | None = None
    from_crop: Callable[[Crop], Any] | None = None

    @property
    def indefinite(self) -> str:
        """The noun with its article."""
        if self.noun == self.plural:
            return self.noun
        return f"{'an' if self.noun[0] in 'aeiou' else 'a'} {self.noun}"

    @property
    def file(self) -> str:
        """What a file of it is, for messages: ``a semantic map (.semantic.png)``."""
        return f"{self.indefinite} (.{self.suffix})"

    @property
    def missing(self) -> str:
        """The message for data that lack what the denoiser is conditioned on."""
        return (
            f"the denoiser is conditioned on {self.plural}, but the data has none; give each sample a .{self.suffix}."
        )

    # Stored

    def decode(self, data: bytes) -> Any:
        """The value that a stored file holds.

        Raises:
            DataError: the file is malformed; the message is a clause that follows the noun, such as "is not UTF-8".
        """
        raise NotImplementedError

    def encode(self, value: Any) -> bytes:
        """The inverse of :meth:`decode`."""
        raise NotImplementedError

    def to_member(self, data: bytes, size: tuple[int, int]) -> bytes:
        """The member of a shard for a file next to an image of ``size`` (width, height) in a folder.

        Raises:
            DataError: the file is malformed or does not fit the image.
        """
        return self.encode(self.decode(data))

    # Batched

    def crop(self, value: Any, crop: Crop) -> Any:
        """The value for a cropped and perhaps mirrored image, for modalities that are ``spatial``."""
        return value

    def collate(self, values: Sequence[Any]) -> Any:
        """The values of ``b`` samples as a batch has them: a tensor ``[b ...]`` or a list."""
        return list(values)

    # Given to a pipeline

    @property
    def request(self) -> str:
        """How a message names what to pass to a pipeline."""
        return f"a {self.argument}" if self.argument else f"condition={{{self.key!r}: [...]}}"

    def entries(self, value: Any) -> list[Any]:
        """A list of what a caller of :class:`ldm.Pipeline` gives: an entry for each image, or one for all.

        Raises:
            SamplingError: it is empty, or an entry is of the wrong type.
        """
        values = self.split(value)
        if not values:
            raise SamplingError(f"the list of {self.key} is empty; give one, or one for each image.")
        return [None if each is None else self.entry(each) for each in values]

    def split(self, value: Any) -> list[Any]:
        """The entries of a value that is a collection of them, or a list of one."""
        return [value] if self.ndim is not None and getattr(value, "ndim", None) == self.ndim else listed(value)

    def entry(self, value: Any) -> Any:
        """One entry as conditioners read it, checked and converted.

        Raises:
            SamplingError: it is of the wrong type.
        """
        return value

    # Shown

    def preview(self, values: Any, images: Tensor) -> Tensor | None:
        """Images of the conditions, to be shown with what a model makes of them.

        Args:
            values: of a batch.
            images: ``[b 3 h w]`` in [-1, 1], the images that the conditions belong to.

        Returns:
            ``[b 3 h w]`` in [-1, 1], or None for what is not shown as an image.
        """
        return None


MODALITIES: dict[str, Modality] = {}
"""All modalities by key."""


def register(modality: M) -> M:
    """Adds a modality to the registry and returns it."""
    assert modality.key not in MODALITIES, f"two modalities have the key {modality.key}"
    MODALITIES[modality.key] = modality
    return modality


def listed(value: Any) -> list[Any]:
    """A list of the items of a collection, or of the value itself if it is a string or not a collection."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
