"""Base class of modalities (raw conditions), and their registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from ldm.checks import is_ordered, plain
from ldm.errors import SamplingError
from ldm.modalities.crop import Crop

M = TypeVar("M", bound="Modality")


@dataclass(frozen=True)
class Modality:
    """A raw condition, such as a caption or an edge map: how it is stored, batched, given to a pipeline and shown.

    The defaults of this class fit a condition that is only computed or only passed to a pipeline; subclasses override what
    differs. A modality with a ``suffix`` overrides ``decode`` and ``encode``; one whose values refer to positions in
    the image sets ``spatial`` and overrides ``crop``.

    Attributes:
        key: its name in batches, and among the inputs of conditioners.
        noun: its name in messages, such as ``semantic map``.
        plural: plural of ``noun``; equal to it for nouns that are used without an article.
        argument: its argument of :class:`ldm.Pipeline`; None: it is the entry ``key`` of ``condition``.
        suffix: what follows the first dot in the names of its files, in shards and in image folders; None: it has no files.
        optional: whether some samples of a dataset may lack its file.
        describes: whether an image with only this modality is a complete sample; each sample needs one such modality.
        spatial: whether its values refer to positions in the image, so that they change when it is cropped or mirrored.
        ndim: dimensions of a tensor or array that is one entry, as opposed to a batch; None: an entry is never one.
        from_crop: derives its value from the crop of a training image, for modalities that are not stored.
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
        """Description of a file of this modality, for messages: ``a semantic map (.semantic.png)``."""
        return f"{self.indefinite} (.{self.suffix})"

    @property
    def missing(self) -> str:
        """Error message for data without this modality, which the denoiser is conditioned on."""
        return (
            f"the denoiser is conditioned on {self.plural}, but the data has none; give each sample a .{self.suffix}."
        )

    # Stored

    def decode(self, data: bytes) -> Any:
        """Return the value of a stored file.

        Raises:
            DataError: the file is malformed; the message is a clause that follows the noun, such as "is not UTF-8".
        """
        raise NotImplementedError

    def encode(self, value: Any) -> bytes:
        """Return the contents of a file; the inverse of :meth:`decode`."""
        raise NotImplementedError

    def to_member(self, data: bytes, size: tuple[int, int]) -> bytes:
        """Return the shard member for a file next to an image of ``size`` (width, height) in a folder.

        Raises:
            DataError: the file is malformed or does not fit the image.
        """
        return self.encode(self.decode(data))

    # Batched

    def crop(self, value: Any, crop: Crop) -> Any:
        """Return the value for a cropped and possibly mirrored image, for modalities that are ``spatial``."""
        return value

    def collate(self, values: Sequence[Any]) -> Any:
        """Collate the values of ``b`` samples: a tensor ``[b ...]`` or a list."""
        return list(values)

    # Passed to a pipeline

    @property
    def request(self) -> str:
        """Description of the argument to pass to a pipeline, for messages."""
        return f"a {self.argument}" if self.argument else f"condition={{{self.key!r}: [...]}}"

    def entries(self, value: Any) -> list[Any]:
        """Return the entries of an argument of :class:`ldm.Pipeline`: one for each image, or one for all.

        Raises:
            SamplingError: the value is empty, or an entry has the wrong type.
        """
        values = self.split(value)
        if not values:
            raise SamplingError(f"the list of {self.key} is empty; give one, or one for each image.")
        return [None if each is None else self.entry(each) for each in values]

    def split(self, value: Any) -> list[Any]:
        """Return the entries of a collection, or a list of the value if it is a single entry."""
        return [value] if self.ndim is not None and getattr(value, "ndim", None) == self.ndim else listed(value)

    def entry(self, value: Any) -> Any:
        """Check one entry and convert it to the form that conditioners take.

        Raises:
            SamplingError: it has the wrong type.
        """
        return value

    # Shown

    def preview(self, values: Any, images: Tensor) -> Tensor | None:
        """Return images of the conditions, to be shown with the generated images.

        Args:
            values: the values of a batch.
            images: ``[b 3 h w]`` in [-1, 1], the images that the conditions belong to.

        Returns:
            ``[b 3 h w]`` in [-1, 1], or None if the modality is not shown as an image.
        """
        return None


MODALITIES: dict[str, Modality] = {}
"""All modalities by key."""


def register(modality: M) -> M:
    """Add a modality to the registry and return it."""
    assert modality.key not in MODALITIES, f"two modalities have the key {modality.key}"
    MODALITIES[modality.key] = modality
    return modality


def listed(value: Any) -> list[Any]:
    """Return the items of an ordered collection as a list; a string, a 0-d array or any other value becomes a list of one."""
    value = plain(value) if getattr(value, "ndim", None) == 0 else value
    return list(value) if is_ordered(value) else [value]
