"""Metrics of the result of each stage, measured on validation data and with receipts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from ldm.errors import ConfigError, unknown
from ldm.evaluation.opening import Request, open_subject
from ldm.evaluation.receipt import Receipt
from ldm.evaluation.runner import evaluate
from ldm.evaluation.subject import Options


@dataclass(frozen=True)
class StageMetrics:
    """Metrics of a stage.

    Attributes:
        metrics: names of metrics.
        repeated: those of them that are measured with several seeds, and averaged.
        repeats: number of these seeds by default.
        numbers: names of the numbers that tables show, the main one first.
    """

    metrics: Sequence[str]
    repeated: Sequence[str]
    repeats: int
    numbers: Sequence[str]


LEVELS = "denoising_error"
"""Geometric mean of the numbers ``denoising_error@sigma``: a held-out loss that is measured alike for all losses and
parametrizations."""

METRICS = {
    "denoiser": StageMetrics(
        ("recall_by_image", "denoising", "fid", "kid"),
        ("recall_by_image", "fid", "kid"),
        4,
        ("recall_by_image@1", "recall_by_image@5", LEVELS, "fid", "kid"),
    ),
    "vae": StageMetrics(
        ("psnr", "ssim", "rfid", "latents", "probe"),
        ("probe",),
        1,
        ("probe_fid", "probe_error", "psnr", "ssim", "rfid"),
    ),
    "clip": StageMetrics(
        ("retrieval",),
        (),
        1,
        ("text_to_image_R@1", "image_to_text_R@1", "text_to_image_R@5", "image_to_text_R@5"),
    ),
}
"""Metrics by stage."""

SEED_STEP = 100_000
"""Distance of the seeds of a metric that is measured several times; image i of each has the seed plus i."""


@dataclass(frozen=True)
class Measured:
    """A number of a run: the mean over the seeds of the metric.

    Attributes:
        value: the number.
        better: ``higher``, ``lower`` or ``neither``.
        unit: its unit; empty for none.
    """

    value: float
    better: str
    unit: str = ""


def main_number(stage: str, by: str | None) -> str | None:
    """Return the number by which recipes are judged; None for the first of the stage that was measured.

    Raises:
        ConfigError: the stage has no number of this name.
    """
    known = METRICS[stage].numbers
    if by is not None and by not in known:
        raise ConfigError(f"--by: {unknown('number', by, known)}")
    return by


def measure(config: Path, stage: str, features: Sequence[str], repeats: int, folder: Path) -> dict[str, Measured]:
    """Measure the result of a run on the validation split, and write the receipts into its folder.

    Args:
        config: YAML of the run.
        stage: the trained stage.
        features: feature networks.
        repeats: number of seeds of the metrics that are measured several times.
        folder: folder of the run.
    """
    found: dict[str, list[Receipt]] = {}
    first = Request(str(config), stage=stage, features=features, metrics=METRICS[stage].metrics)
    subject = open_subject(first, say=lambda sentence: None)
    for i in range(repeats):
        options = Options(seed=i * SEED_STEP)
        request = first if i == 0 else replace(first, metrics=METRICS[stage].repeated, options=options)
        if not request.metrics:
            break
        receipts = evaluate(request, replace(subject, options=options, _made={}), required=())
        receipts.write(folder / ("receipts-val" + (f"-seed{options.seed}" if i else "") + ".json"))
        for each in receipts.numbers:
            found.setdefault(each.conditions.metric, []).append(each)
    return {
        name: Measured(fmean(each.value for each in values), values[0].better, values[0].unit)
        for name, values in found.items()
    }


def mean_error(runs: Sequence[Mapping[str, Measured]]) -> list[Measured | None]:
    """Return the geometric mean of the errors of the denoiser of each run, over the noise levels that all runs have."""
    names = [{name for name in run if name.startswith(f"{LEVELS}@")} for run in runs]
    common = set.intersection(*names) if names else set()
    if not common:
        return [None] * len(runs)
    return [Measured(_geometric_mean([run[name].value for name in sorted(common)]), "lower") for run in runs]


def _geometric_mean(values: Sequence[float]) -> float:
    return geometric_mean(values) if all(map(math.isfinite, values)) else math.nan


def to_json(numbers: Mapping[str, Measured]) -> dict[str, Any]:
    """Return numbers as values of JSON; what is not finite becomes null."""
    return {
        name: {**asdict(each), "value": each.value if math.isfinite(each.value) else None}
        for name, each in numbers.items()
    }


def from_json(values: Mapping[str, Any]) -> dict[str, Measured]:
    """Invert :func:`to_json`."""
    return {
        name: Measured(**{**each, "value": math.nan if each["value"] is None else each["value"]})
        for name, each in values.items()
    }
