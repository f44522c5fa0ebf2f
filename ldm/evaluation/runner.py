"""Runs metrics on a subject and makes their receipts; computes the numbers of receipts again."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import platform
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ldm import __version__
from ldm.config import to_dict
from ldm.diffusion import SPECS
from ldm.errors import CheckpointError, DataError, MissingExtraError, SamplingError, StorageError, warn
from ldm.evaluation.intervals import LEVEL
from ldm.evaluation.metric import Metric, Number, Part, chosen
from ldm.evaluation.opening import Request, open_subject
from ldm.evaluation.receipt import Conditions, Receipt, Receipts
from ldm.evaluation.subject import Subject

PACKAGES = ("torch", "numpy", "torchvision", "torchmetrics", "open_clip_torch", "lpips")
"""Packages whose versions a receipt records, where they are installed."""

STAGES: dict[Part, str] = {"samples": "denoiser", "denoiser": "denoiser", "vae": "vae", "clip": "clip"}
"""Stage that trains the weights that a metric measures."""


def measure(
    subject: Subject,
    metrics: Sequence[Metric],
    progress: Callable[[str], object] = lambda name: None,
    required: Container[str] = (),
) -> list[Receipt]:
    """Run metrics on a subject, and return a receipt for each of their numbers.

    Args:
        subject: the subject.
        metrics: the metrics.
        progress: called with the name of each metric before it runs.
        required: names of metrics that are needed. Others are left out with a warning if they cannot be measured, such as without
            networks, captions or labels, and without one if they do not apply to the subject.

    Raises:
        CheckpointError, DataError, MissingExtraError, SamplingError: a required metric cannot be measured.
    """
    receipts: list[Receipt] = []
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    for each in metrics:
        progress(each.name)
        try:
            found = [receipt(subject, each.part, number) for number in each.run(subject)]
        except (CheckpointError, DataError, MissingExtraError, SamplingError) as error:
            if each.name in required or isinstance(error, StorageError):
                raise
            left_out[str(error)].append(each.name)
            continue
        if not found and each.name in required:
            left_out["this run has nothing to measure with it."].append(each.name)
        receipts += found
    for reason, names in left_out.items():
        what = f"metric {names[0]} is" if len(names) == 1 else f"metrics {', '.join(names)} are"
        warn(f"the {what} left out: {reason}")
    return receipts


def receipt(subject: Subject, part: Part, number: Number) -> Receipt:
    """Return the receipt of a number that a metric yielded for a subject."""
    network, reference = number.network, subject.hashes(number.reference) if number.reference else None
    conditions = Conditions(
        metric=number.name,
        split=subject.split,
        n=number.n,
        data=subject.hashes(subject.split)[0],
        reference=reference[0] if reference else None,
        reference_n=reference[1] if reference else None,
        size=tuple(subject.experiment.data.image_shape[1:]),
        seed=subject.options.seed,
        network=network.name if network else None,
        network_hash=network.fingerprint if network else None,
        resize=network.resize if network else None,
        ema=_average(subject, part),
        dtype=_dtype(subject, part),
        device=_device(subject, part),
        backend=dict(subject.compiled or {}) if subject.pipe else {},
        parameters=_plain(number.parameters),
        interval=number.estimate.method,
        level=LEVEL,
        versions=dict(_versions()),
        **_sampling(subject, part),
    )
    value = number.estimate
    weights = weights_of(subject, part)
    if number.decoder is not None:
        weights = f"{weights}+{subject.hash_of(number.decoder)}"
    return Receipt(weights, value.value, value.low, value.high, number.unit, number.better, conditions)


def evaluate(
    request: Request,
    subject: Subject,
    progress: Callable[[str], object] = lambda name: None,
    required: Container[str] | None = None,
) -> Receipts:
    """Measure what a request names on its subject, and return the receipts; see :func:`measure`.

    ``required`` is None for the metrics that the request names.

    Raises:
        SamplingError: the sampler does not take a setting.
    """
    if subject.pipe is not None:
        subject.sampling_settings()  # before anything is computed
    required = request.metrics if required is None else required
    return receipts_of(request, subject, measure(subject, chosen(list(request.metrics)), progress, required))


def receipts_of(request: Request, subject: Subject, numbers: Sequence[Receipt]) -> Receipts:
    """Return the receipts of numbers that were measured on the subject of a request, with which they can be computed again."""
    name = request.model or str(subject.experiment.folder)
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Receipts(name, created, _plain(asdict(request)), numbers)


@dataclass(frozen=True)
class Verification:
    """Comparison of a receipt with the number computed again.

    Attributes:
        recorded: the receipt.
        again: receipt of the number computed again; None if it is not measured any more.
    """

    recorded: Receipt
    again: Receipt | None

    @property
    def inside(self) -> bool:
        """True if the number computed again is within the recorded interval."""
        return self.again is not None and self.recorded.contains(self.again.value)

    @property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        """Conditions that have changed, with both values; ``weights`` if these have."""
        if self.again is None:
            return {}
        weights = (self.recorded.weights, self.again.weights)
        found = {} if weights[0] == weights[1] else {"weights": weights}
        return found | self.recorded.conditions.differences(self.again.conditions)

    @property
    def sentence(self) -> str:
        """Result of the comparison, with the changed conditions."""
        if self.again is None:
            return "not measured any more"
        changed = "; ".join(f"{name} was {first}, is {second}" for name, (first, second) in self.changes.items())
        place = "inside" if self.inside else "OUTSIDE"
        return f"{self.again.value:.6g} is {place} of {self.recorded.text}" + (f" ({changed})" if changed else "")


def verify(recorded: Receipts, progress: Callable[[str], object] = lambda name: None) -> list[Verification]:
    """Compute the numbers of receipts again, and compare each with its interval."""
    request = Request.from_json(recorded.request)
    again = {each.key: each for each in evaluate(request, open_subject(request), progress).numbers}
    return [Verification(each, again.get(each.key)) for each in recorded.numbers]


def weights_of(subject: Subject, part: Part) -> str:
    """Return a hash of the evaluated weights: the fingerprint of a complete model, else of the network."""
    if subject.pipe is not None and part in ("samples", "denoiser"):
        return subject.pipe.model.fingerprint or subject.hash_of(subject.pipe.model)
    module = subject.clip[0] if part == "clip" and subject.clip else subject.first_stage
    assert module is not None
    return subject.hash_of(module)


def _average(subject: Subject, part: Part) -> str:
    length = subject.pipe.model.provenance.get("ema_length") if subject.pipe and STAGES[part] == "denoiser" else None
    if length is not None:
        return f"power profile, length {length:g}"
    section = getattr(subject.experiment, STAGES[part])
    train = getattr(section, "train", None)
    if not subject.own_weights or train is None:
        return "as stored"
    return f"EMA, decay {train.ema_decay:g}" if train.ema_decay else "none"


def _dtype(subject: Subject, part: Part) -> str:
    module = subject.clip[0] if part == "clip" and subject.clip else subject.first_stage
    if part in ("samples", "denoiser") and subject.pipe is not None:
        return str(subject.pipe.dtype).removeprefix("torch.")
    parameter = next(iter(module.parameters()), None) if module is not None else None
    return "float32" if parameter is None else str(parameter.dtype).removeprefix("torch.")


def _device(subject: Subject, part: Part) -> str:
    if part == "clip" and subject.clip:
        return next(subject.clip[0].parameters()).device.type
    return subject.device.type


def _sampling(subject: Subject, part: Part) -> dict[str, Any]:
    """Return the fields of :class:`Conditions` that say how images were generated."""
    if part != "samples" or subject.pipe is None:
        return {"sampler": None, "steps": None, "guidance_scale": None, "sampling": {}}
    model, settings = subject.pipe.model, subject.sampling_settings()
    assert settings.guidance is not None
    sampler, defaults, record = str(settings.sampler), model.config.sampling, settings.record()
    steps = record.pop("num_inference_steps", defaults.num_inference_steps)
    latent = subject.pipe.latent_shape(record.pop("height", None), record.pop("width", None))
    size = [side * model.config.first_stage.factor for side in latent[1:]]
    sampling = {
        **{name: each for name, each in to_dict(defaults).items() if name in ("spacing", "offset", "final", "shift")},
        **{name: each for name, each in record.items() if name != "sampler"},
        **{f"guidance_{name}": each for name, each in asdict(settings.guidance).items() if name != "scale"},
        "options": dict(settings.sampler_options or {}),
        **({} if size == list(subject.experiment.data.image_shape[1:]) else {"size": size}),
    }
    return {
        "sampler": sampler,
        "steps": None if SPECS[sampler].adaptive else steps,
        "guidance_scale": float(settings.guidance.scale),  # type: ignore[arg-type]  # one for all images
        "sampling": _plain(sampling),
    }


@functools.cache
def _versions() -> dict[str, str]:
    found = {"ldm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    """Return a value of JSON, as it is after writing and reading."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, str | int | float | bool | None) else str(value)
