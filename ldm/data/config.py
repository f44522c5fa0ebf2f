"""The config section ``data``: where images come from and how they are resized."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from PIL import ImageColor

from ldm.config import Kind, config_field
from ldm.data.buckets import BucketConfig, Shape
from ldm.data.caption_choice import CaptionConfig
from ldm.data.encoded import EncodedConfig
from ldm.data.filters import FilterConfig, SubsetConfig
from ldm.data.images_in_memory import ImagesInMemory
from ldm.data.mixture import WeightedSource
from ldm.data.samples import Samples, SourceShare, StoredImages
from ldm.data.shard_cache import ShardCacheConfig
from ldm.data.shards import SPLITS, Shards, find_shards
from ldm.errors import ConfigError, DataError, unknown
from ldm.modalities.crop import FITS, Color


class DataConfig(Kind):
    """Family of data sets; ``open(split)`` gives the :class:`~ldm.data.samples.Samples` of a split."""

    cache_latents: bool = False
    encoded: EncodedConfig = EncodedConfig()
    shuffle_buffer: int | None = None
    made_for: int | None = None
    max_bad_fraction: float = 0.01
    mixture: tuple[WeightedSource, ...] = ()
    filters: FilterConfig = FilterConfig()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        raise NotImplementedError

    @property
    def bucket_shapes(self) -> tuple[Shape, ...]:
        """Height and width of the aspect buckets in pixels; empty if all images are of one size."""
        return ()

    def of_one_size(self) -> DataConfig:
        """Return a config of the same images without buckets, for networks that take one size."""
        return self

    def open(self, split: str) -> Samples:
        """Open the samples of ``train``, ``val`` or ``test``.

        Raises:
            DataError: they are missing or cannot be read.
        """
        raise NotImplementedError

    def has(self, split: str) -> bool:
        """Return True if there are data for a split."""
        return True

    @property
    def has_latents(self) -> bool:
        """True if the denoiser is trained on latents that were encoded before, which leave out the images."""
        return self.cache_latents or self.encoded.folder is not None

    def without_cache(self) -> DataConfig:
        """Return a config of the same data that keeps no images in memory, for reading them once."""
        return self

    def with_subset(self, images: int, seed: int) -> DataConfig | None:
        """Return a config that trains on a random subset of its images; None if there can be none."""
        return None


@dataclass(frozen=True)
class ShardsData(DataConfig, kind="shards"):
    """Images with captions in webdataset shards, as tools/prepare.py makes them."""

    train: str | tuple[str, ...] | None = config_field(
        None,
        "Shards to train on: a .tar, a folder of them, a pattern (a/{000..012}.tar), a list, or emoji; null: those of mixture.",
        changeable=True,
        path=True,
    )
    val: str | tuple[str, ...] | None = config_field(
        None, "Shards to validate on while training; null: no validation.", changeable=True, path=True
    )
    test: str | tuple[str, ...] | None = config_field(
        None, "Shards to test on; only tools/evaluate.py reads them.", changeable=True, path=True
    )
    caption_field: str | None = config_field(
        None,
        "Field of the samples' .json files that holds the caption, as in shards of img2dataset; null: .txt.",
        omit_default=True,
    )
    label_field: str | None = config_field(
        None, "Field of the samples' .json files that holds the class number; null: .cls.", omit_default=True
    )
    size: int | tuple[int, int] = config_field(64, "Size of an image in pixels: its side, or [height, width].")
    fit: Literal["crop", "pad", "stretch"] = config_field(
        "crop",
        "How an image of another aspect ratio becomes one of data.size: crop cuts off what is outside, pad adds borders, stretch "
        "distorts.",
    )
    crop: Literal["center", "random"] = config_field(
        "center",
        "Part of an image that fit: crop keeps in training, or position of the image within the borders of fit: pad.",
        changeable=True,
    )
    pad_color: str | Color | None = config_field(
        None, "Color of the borders of fit: pad, by name, as '#rrggbb' or [red, green, blue]; null: that of background."
    )
    background: str | Color = config_field(
        "white", "Color behind the transparent parts of images, written as pad_color."
    )
    flip: bool = config_field(
        False,
        "Horizontal flip of half of the training images; unsuitable if captions mention left or right.",
        changeable=True,
    )
    sizes: bool = config_field(
        False,
        "True original size and crop of each image for the conditioner sdxl; false: data.size, and a crop at (0, 0).",
        changeable=True,
    )
    cache: Literal["none", "ram"] = config_field(
        "none",
        "Cache of decoded images: ram decodes the set once (3 bytes per pixel); none decodes an image at each use.",
        changeable=True,
    )
    cache_latents: bool = config_field(
        False,
        "Cache of the posteriors of images, encoded once for the denoiser; needs crop center and flip false.",
        changeable=True,
    )
    workers: int = config_field(
        2, "Number of processes that decode images in advance (threads, while cache ram is filled).", changeable=True
    )
    shuffle_buffer: int | None = config_field(
        None,
        "Number of samples that are shuffled at a time, for slow disks and remote shards: shards are read in sequence; null "
        "shuffles all.",
    )
    shard_cache: ShardCacheConfig = config_field(
        ShardCacheConfig(),
        "Copies of remote shards, made while others are read; used with shuffle_buffer, or if all shards fit into it.",
        changeable=True,
        omit_default=True,
    )

    captions: CaptionConfig = config_field(
        CaptionConfig(), "Reading of captions, and the choice of one, with its tags, in training.", changeable=True
    )
    max_bad_fraction: float = config_field(
        0.01,
        "Fraction of the training samples seen so far that may be bad (skipped, replaced and listed in bad_samples.csv); more "
        "stop the training.",
        changeable=True,
    )
    made_for: int | None = config_field(
        None,
        "Number of training images that the config was made for; a warning is given if there are far fewer.",
        changeable=True,
    )
    encoded: EncodedConfig = config_field(
        EncodedConfig(),
        "Latents and text states of the data, encoded once; used instead of cache_latents.",
        changeable=True,
        omit_default=True,
    )
    filters: FilterConfig = config_field(
        FilterConfig(), "Conditions on the samples; others are left out of all stages.", omit_default=True
    )

    subset: SubsetConfig | None = config_field(
        None, "Random subset of the training samples that the filters leave; null: all.", omit_default=True
    )
    mixture: tuple[WeightedSource, ...] = config_field(
        (), "Sources to train on, each with its weight, instead of train.", omit_default=True
    )
    buckets: BucketConfig | None = config_field(
        None,
        "Shapes of about the area of data.size for images of different aspect ratios, in stages vae and denoiser; null: all "
        "images have data.size.",
        omit_default=True,
    )

    def __post_init__(self) -> None:
        if (self.train is None) == (not self.mixture):
            given = "neither is given" if self.train is None else "both are given; set one of them to null"
            raise ConfigError(f"the shards to train on are named by train or by mixture, but {given}.")
        if min(self._height_width) < 1:
            raise ConfigError(f"size must be positive, not {self.size}.")
        for name in ("background", "pad_color"):
            _rgb(name, getattr(self, name) or "white")
        if self.workers < 0:
            raise ConfigError(f"workers must not be negative, but is {self.workers}.")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"max_bad_fraction must be from 0 to 1, but is {self.max_bad_fraction}.")
        if self.shuffle_buffer is not None and self.shuffle_buffer < 1:
            raise ConfigError(f"shuffle_buffer must be at least 1 or null, not {self.shuffle_buffer}.")
        if self.cache == "ram" and self.crop == "random":
            raise ConfigError("cache: ram keeps one crop of each image; use crop: center with it, or cache: none.")
        if self.cache_latents and self.encoded.folder is None and (self.crop == "random" or self.flip):
            raise ConfigError("cache_latents keeps one latent of each image; use crop: center and flip: false with it.")
        if self.buckets is not None:
            _ = self.buckets.table(*self._height_width)  # raises if it is not a multiple of the step

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (3, *self._height_width)

    @property
    def _height_width(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def bucket_shapes(self) -> tuple[Shape, ...]:
        return () if self.buckets is None else tuple(self.buckets.table(*self._height_width))

    def of_one_size(self) -> ShardsData:
        return replace(self, buckets=None)

    def has(self, split: str) -> bool:
        return bool(self._sources.get(split))

    def without_cache(self) -> ShardsData:
        return replace(self, cache="none")

    def with_subset(self, images: int, seed: int) -> ShardsData | None:
        if self.encoded.folder is not None or self.mixture:  # latents of all images; a subset may lack a small source
            return None
        subset = SubsetConfig(images, seed if self.subset is None else self.subset.seed)
        return replace(self, subset=subset, made_for=None)

    @property
    def _sources(self) -> dict[str, str | tuple[str, ...] | None]:
        return {"train": self.train or self._mixed, "val": self.val, "test": self.test}

    @property
    def _mixed(self) -> tuple[str, ...]:
        """All shards of the mixture."""
        return tuple(name for each in self.mixture for name in _listed(each.source))

    def _shares(self, shards: Shards, split: str) -> list[SourceShare]:
        """Return the sources of a split by their files, if they are mixed.

        Raises:
            DataError: one has no samples.
        """
        shares, first = [], 0
        for each in self.mixture if split == "train" else ():
            files = len(find_shards(each.source, split))
            if not sum(shards.lengths[first : first + files]):
                raise DataError(
                    f"the source {each.source} of data.mixture has no usable samples; remove it, or change data.filters."
                )
            shares.append(SourceShare(files, each.weight))
            first += files
        return shares

    def open(self, split: str) -> Samples:
        source = require_split(split, self._sources)
        shards, selection = self.filters.select(
            Shards.open(
                source,
                split,
                caption_field=self.caption_field,
                label_field=self.label_field,
                cache=self.shard_cache.build(),
                sequential=split != "train" or self.shuffle_buffer is not None,
            ),
            split,
            caption_field=self.caption_field,
            caption_format=self.captions.format,
        )
        if self.subset is not None and split == "train":
            shards, selection = self.subset.select(shards, selection)
        stored = StoredImages(
            shards,
            FITS[self.fit](*self._height_width, _rgb("pad_color", self.pad_color or self.background)),
            background=_rgb("background", self.background),
            random_crop=self.crop == "random",
            flip=self.flip,
            sizes=self.sizes,
            captions=self.captions,
            workers=self.workers,
            mixture=self._shares(shards, split),
            shapes=self.bucket_shapes,
        )
        stored.selection = selection
        return ImagesInMemory(stored) if self.cache == "ram" else stored


def _listed(source: str | tuple[str, ...]) -> tuple[str, ...]:
    return (source,) if isinstance(source, str) else source


def _rgb(field: str, color: str | Color) -> Color:
    """Return a color of the config as numbers.

    Raises:
        ConfigError: there is no such color.
    """
    try:
        red, green, blue = ImageColor.getrgb(color)[:3] if isinstance(color, str) else color
    except ValueError:
        raise ConfigError(
            f"{field} is {color!r}, which is not a color; give a name, '#rrggbb' or [red, green, blue]."
        ) from None
    if not all(0 <= value <= 255 for value in (red, green, blue)):
        raise ConfigError(f"{field} is {list(color)}; its numbers must be from 0 to 255.")
    return red, green, blue


def require_split(split: str, sources: dict[str, str | tuple[str, ...] | None]) -> str | tuple[str, ...]:
    """Return the source of a split; raise a DataError if the config has none."""
    if split not in SPLITS:
        raise DataError(unknown("split", split, SPLITS))
    source = sources[split]
    if not source:
        raise DataError(f"there is no {split} data; give its shards as data.{split}.")
    return source
