"""Subject of an evaluation: the networks of a run or a model, its data, and the passes over images that metrics share.

Images are read, generated and reconstructed one batch after the other; a pass keeps features and values of images, but no images.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.conditioning.conditioner import input_of
from ldm.data.bad_samples import BAD, summary
from ldm.data.samples import Batch, BatchIndices, Samples, captions_of, take
from ldm.data.stream import EvaluationLoader
from ldm.errors import CheckpointError, ConfigError, SamplingError, warn
from ldm.evaluation.collected import Collected, GeneratedImages, Reconstructions, TrueImages
from ldm.evaluation.features import FeatureNetwork, weights_hash
from ldm.sampling_settings import SamplingSettings

if TYPE_CHECKING:
    from ldm.clip.model import CLIP
    from ldm.clip.tokenizer import Tokenizer
    from ldm.pipeline import Pipeline
    from ldm.training.experiment import Experiment
    from ldm.vae import FirstStage, Posterior

BATCH = 32
"""Number of images that are computed at once, by default."""

GALLERY = 20_000
"""Most true images of all splits in which that of a caption is searched; of more, the evaluated split alone."""

TRAINING_CAPTIONS = 125
"""Number of training captions for which the summary generates images, by default."""

SHOWN = 24
"""Number of generated images that are kept for the sheet."""

READER = "the evaluation of generated images"

Measure = Callable[[Tensor, Tensor], Tensor]
"""Function of images and their reconstructions ``[b 3 h w]`` in [-1, 1] that returns a value for each, ``[b]``."""

OWN_SETTINGS = (
    "prompt",
    "label",
    "num_images_per_prompt",
    "seed",
    "generator",
    "output_type",
    "batch_size",
    "progress",
)
"""Settings of the pipeline that the evaluation gives itself."""


@dataclass(frozen=True)
class Options:
    """Options of the metrics, recorded in the receipts where a metric depends on them.

    Attributes:
        images: number of the first good samples of the split that are measured; None for all.
        reference: split whose images generated ones are compared with; None for the evaluated split.
        seed: seed of the first generated image, and of noise and training in other metrics.
        repeats: for the diversity, number of captions and number of images for each.
        templates: templates of zero-shot classification, each with ``{}``.
        classes: names of the classes by label; none = each distinct caption is a class.
        probe_steps: number of steps that the probe of a first stage is trained for.
        batch_size: number of images that are computed at once, without effect on the numbers but for rounding.

    Raises:
        ConfigError: a template has no ``{}``.
    """

    images: int | None = None
    reference: str | None = None
    seed: int = 0
    repeats: tuple[int, int] = (8, 8)
    templates: tuple[str, ...] = ("{}",)
    classes: tuple[str, ...] = ()
    probe_steps: int = 300
    batch_size: int = BATCH

    def __post_init__(self) -> None:
        for template in self.templates:
            if "{}" not in template:
                raise ConfigError(
                    f"the template {template!r} has no {{}} for the name of a class; write it as 'a photo of a {{}}'."
                )


@dataclass
class Subject:
    """Subject of the measurements, and the folder of their results; networks that have not been trained are None.

    Attributes:
        folder: where results are written.
        experiment: experiment whose data it is measured on.
        sets: samples by split.
        split: evaluated split.
        train_every: captions of the training set for which the summary generates images: every n-th; None for about
            :data:`TRAINING_CAPTIONS`.
        settings: sampling settings; values of None are the model's.
        further: further sampling settings, whose effect the summary measures.
        compiled: arguments of ``Pipeline.compile``.
        networks: feature networks.
        own_weights: whether the weights are those that the experiment trains.
        notes: sentences on unfinished trainings.
        options: options of the metrics.
        pairs: embeddings of CLIP, kept for the metrics that share them.
    """

    folder: Path
    experiment: Experiment
    pipe: Pipeline | None
    first_stage: FirstStage | None
    clip: tuple[CLIP, Tokenizer] | None
    sets: Mapping[str, Samples]
    split: str
    train_every: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    further: Mapping[str, Any] = field(default_factory=dict)
    compiled: Mapping[str, Any] | None = None
    networks: Sequence[FeatureNetwork] = ()
    own_weights: bool = True
    notes: Sequence[str] = ()
    options: Options = field(default_factory=Options)
    pairs: Any = field(default=None, repr=False)
    _true: dict[str, TrueImages] = field(default_factory=dict, repr=False)
    _hashed: dict[str, tuple[str, int]] = field(default_factory=dict, repr=False)
    _weights: dict[int, str] = field(default_factory=dict, repr=False)
    _made: dict[str, GeneratedImages] = field(default_factory=dict, repr=False)
    _reconstructed: dict[tuple[str, frozenset[str]], Reconstructions] = field(default_factory=dict, repr=False)

    @property
    def samples_text(self) -> bool:
        """True if there is a model whose one condition is the caption."""
        return self.pipe is not None and self.pipe.model.config.conditioner.input_keys == ("text",)

    @property
    def generates(self) -> bool:
        """True if there is a model of captions, of classes, or without a condition, whose images can be compared as a set."""
        keys = None if self.pipe is None else self.pipe.model.config.conditioner.input_keys
        return keys in ((), ("text",), ("label",)) and self.experiment.data.image_shape[0] == 3

    @property
    def reference(self) -> str:
        """Split whose images generated ones are compared with."""
        return self.options.reference or self.split

    @property
    def feature_networks(self) -> Sequence[FeatureNetwork]:
        """Feature networks for a metric that compares features; none for data without colors.

        Raises:
            CheckpointError: there is none.
        """
        if not self.networks and self.experiment.data.image_shape[0] == 3:
            raise CheckpointError(
                "there is no feature network; train stage clip, or give --features, such as inception=FILE or clip=SOURCE."
            )
        return self.networks

    @property
    def device(self) -> torch.device:
        """Device of the first stage."""
        assert self.first_stage is not None
        return self.pipe.device if self.pipe else next(self.first_stage.parameters(), torch.empty(0)).device

    def batches(self, split: str, most: int | None = None, every: int = 1) -> Iterator[Batch]:
        """Yield the batches of a split in order, without its bad samples, of which a warning gives the number.

        Args:
            split: name of the split.
            most: number of samples after which to stop; None for all.
            every: every how many samples one is read.
        """
        reasons: Counter[str] = Counter()
        numbers = np.arange(0, len(self.sets[split]), every)
        left = len(numbers) if most is None else most
        for batch in EvaluationLoader(self.sets[split], self.options.batch_size, numbers=numbers):
            reasons.update(bad.reason.value for bad in batch.get(BAD, ()))
            if left <= 0:
                break
            count = len(batch["key"])
            yield batch if count <= left else take(_without_bad(batch), np.arange(left))
            left -= count
        if reasons:
            warn(f"{sum(reasons.values())} samples of {split} cannot be used and are left out: {summary(reasons)}.")

    def measured(self) -> Iterator[Batch]:
        """Yield the batches that are measured: those of the evaluated split, up to ``options.images``."""
        return self.batches(self.split, self.options.images)

    def true(self, split: str, every: int = 1) -> TrueImages:
        """Collect the true images of a split, or every n-th of them, once."""
        name = _name(split, every)
        if name not in self._true:
            bad: list[int] = []
            reduce = split in self.searched or (split == "train" and every == self.interval)
            found = TrueImages(self.networks, reduce=reduce)
            for batch in self.batches(split, every=every):
                found.add(*_contents(batch))
                bad += [each.index for each in batch.get(BAD, ())]
            found.rows = np.setdiff1d(np.arange(0, len(self.sets[split]), every), bad)
            self._true[name] = found
        return self._true[name]

    @property
    def interval(self) -> int:
        """Number n such that the summary generates images for every n-th caption of the training set."""
        return self.train_every or max(1, math.ceil(len(self.sets["train"]) / TRAINING_CAPTIONS))

    @property
    def searched(self) -> tuple[str, ...]:
        """Splits in which the true image of a caption is searched: all; of more than :data:`GALLERY` images, that measured."""
        return tuple(self.sets) if sum(map(len, self.sets.values())) <= GALLERY else (self.split,)

    def gallery(self) -> tuple[Tensor, dict[str, int]]:
        """Return the reduced true images of the searched splits, ``[m d]``, and the row of the first one of each split."""
        reduced = [self.true(name).reduced for name in self.searched]
        starts = np.cumsum([0, *map(len, reduced)]).tolist()
        return torch.cat(reduced), dict(zip(self.searched, starts, strict=False))

    def hashes(self, splits: str) -> tuple[str, int]:
        """Return the hash and the number of the true images and captions of a split, or of several, joined by ``+``."""
        found = [self._hash(name) for name in splits.split("+")]
        return "+".join(each for each, _ in found), sum(count for _, count in found)

    def _hash(self, split: str) -> tuple[str, int]:
        if split not in self._hashed:
            collected = self._true.get(split)
            if collected is None:  # no features are needed
                collected = TrueImages((), reduce=False)
                for batch in self.batches(split):
                    collected.add(*_contents(batch))
            self._hashed[split] = collected.fingerprint, len(collected)
        return self._hashed[split]

    def hash_of(self, module: nn.Module) -> str:
        """Return the hash of the weights of a module, computed once."""
        if id(module) not in self._weights:
            self._weights[id(module)] = weights_hash(module)
        return self._weights[id(module)]

    def given_settings(self, swept: Mapping[str, Any] = MappingProxyType({})) -> SamplingSettings:
        """Return the sampling settings that are given, with the values of a combination of a sweep.

        Raises:
            SamplingError: a setting is unknown, has an invalid value, or is one that the evaluation gives itself.
        """
        given = {**self.settings, **swept, **self.further}
        if own := [name for name in given if name in OWN_SETTINGS]:
            raise SamplingError(f"the evaluation gives {own[0]} itself; leave it out.")
        return SamplingSettings.of(**{name: each for name, each in given.items() if each is not None})

    def sampling_settings(self, swept: Mapping[str, Any] = MappingProxyType({})) -> SamplingSettings:
        """Return :meth:`given_settings` with the defaults of the model.

        Raises:
            SamplingError: as there, or the sampler does not take a setting.
        """
        assert self.pipe is not None
        return self.given_settings(swept).resolved(self.pipe.model.config.sampling)

    def generate(self, captions: Sequence[str], seed: int | Sequence[int], settings: Mapping[str, Any]) -> Tensor:
        """Generate an image for each caption, ``[n 3 h w]`` in [-1, 1] on the CPU; image i has the seed ``seed + i``."""
        return self._generate({"prompt": captions}, seed, settings)

    def _generate(
        self, conditions: Mapping[str, Any], seed: int | Sequence[int], settings: Mapping[str, Any]
    ) -> Tensor:
        assert self.pipe is not None
        made = self.pipe(
            **conditions, seed=seed, output_type="pt", batch_size=self.options.batch_size, progress=False, **settings
        )
        return made.cpu() * 2 - 1

    def _conditions(self, split: str, numbers: np.ndarray) -> dict[str, Any]:
        """Return the conditions of samples as arguments of the pipeline."""
        assert self.pipe is not None
        keys = self.pipe.model.config.conditioner.input_keys
        if not keys:
            return {"num_images_per_prompt": len(numbers)}
        annotations = self.sets[split].annotations(BatchIndices(numbers))
        if keys == ("text",):
            return {"prompt": captions_of(annotations, READER)}
        return {"label": input_of(annotations, "label").tolist()}

    def generated(self, every: int | None = None) -> GeneratedImages:
        """Collect images for the conditions of the evaluated split, or for every n-th of the training set, once.

        Conditions are captions or classes; without a condition there are as many images.
        The i-th image has the seed ``options.seed + i``.
        """
        import time

        of, name = (self.split, self.split) if every is None else ("train", _name("train", every))
        if name in self._made:
            return self._made[name]
        true = self.true(of, every or 1)
        rows = np.arange(len(true))[: self.options.images]
        shown = rows[np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int)] if every is None else rows[:0]
        found, images, seconds = GeneratedImages(self.networks), [], 0.0
        at_once = self.options.batch_size
        starts = range(0, len(rows), at_once)
        for start in tqdm(starts, f"generating for {name}", unit="batch", leave=False):
            numbers = rows[start : start + at_once]
            conditions = self._conditions(of, true.rows[numbers])
            begin = time.perf_counter()
            made = self._generate(conditions, self.options.seed + start, {**self.settings, **self.further})
            seconds += time.perf_counter() - begin
            found.add(made, conditions.get("prompt", ()))
            images.append(made[np.flatnonzero(np.isin(numbers, shown))])
        found.rows, found.places = rows, shown
        found.shown = torch.cat(images)
        found.seconds = seconds / len(rows)
        self._made[name] = found
        return found

    def encode(self, image: Tensor) -> Posterior:
        """Return the posteriors ``[b z h/f w/f]`` of images ``[b c h w]`` in [-1, 1], as many at once as memory is spared for."""
        from ldm.vae import Tiling

        assert self.first_stage is not None, "only a first stage encodes images"
        dtype = next(self.first_stage.parameters(), torch.empty(0)).dtype
        return Tiling().encode(self.first_stage, image.to(self.device, dtype))

    def reconstruct(self, image: Tensor, decoder: str = "full") -> Tensor:
        """Return the decoded modes of the posteriors of images ``[b c h w]`` in [-1, 1]."""
        if self.pipe is not None:
            return self.pipe.model.decode(self.pipe.model.encode(image), decoder)
        from ldm.vae import Tiling

        assert self.first_stage is not None, "only a first stage decodes latents"
        return Tiling().decode(self.first_stage, self.encode(image).mode).clamp(-1, 1)

    @torch.inference_mode()
    def reconstructions(
        self, decoder: str = "full", further: Mapping[str, Measure] = MappingProxyType({})
    ) -> Reconstructions:
        """Measure the reconstructions of the evaluated split by a decoder, once: ``psnr``, ``ssim``, and ``further`` values."""
        from ldm.vae.metrics import psnr, ssim

        for (kept, names), found in self._reconstructed.items():
            if kept == decoder and further.keys() <= names:
                return found
        measures = {"psnr": psnr, "ssim": ssim, **further}
        networks = self.networks if decoder == "full" else ()
        originals, made = Collected(networks, reduce=False), Collected(networks, reduce=False)
        values: dict[str, list[Tensor]] = {name: [] for name in measures}
        for batch in self.measured():
            image = batch["image"].to(self.device)
            result = self.reconstruct(image, decoder)
            for name, measure in measures.items():
                values[name].append(measure(image, result).double().cpu())
            originals.add(*_contents(batch))
            made.add(result.float())
        found = Reconstructions(
            {name: torch.cat(each).numpy() for name, each in values.items()},
            made.features if networks else {},
            originals.features if networks else {},
        )
        self._reconstructed[decoder, frozenset(further)] = found
        return found


def _contents(batch: Batch) -> tuple[Tensor, Sequence[Any], Batch]:
    """Return the arguments of :meth:`Collected.add` for a batch of true images."""
    further = {name: value for name, value in batch.items() if name not in ("image", "text", "key", BAD)}
    return batch["image"], batch.get("text", ()), further


def _name(split: str, every: int) -> str:
    """Return the name of every n-th sample of a split, as they are chosen in Python."""
    return split if every == 1 else f"{split}[::{every}]"


def _without_bad(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != BAD}
