"""Optimization: the loss and the learning rate in metrics.csv."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

import torch

from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.statistics import unpaired

WINDOWS = 10
"""Number of equal parts of the history that are compared."""


@check(Topic.OPTIMIZATION, "history of the loss")
def loss_history(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Look for a loss that has risen, and describe the history.

    The mean of the last tenth of the history is compared with the lowest mean of a tenth; fluctuations within each tell whether
    the difference is one. The loss of a denoiser or a CLIP never rises by half of itself in a training that goes well. That
    of a first stage does when its discriminator starts, so that its reconstruction error is used.
    """
    stage = run.newest
    name = "train/error" if stage == "vae" else "train/loss"
    rows = [row for row in run.metrics(stage) if name in row]
    losses = torch.tensor([row[name] for row in rows], dtype=torch.float64)
    if len(losses) < 2 * WINDOWS or not losses.isfinite().all():
        if len(losses) and not losses.isfinite().all():
            yield Finding(
                "learning_rate_too_high",
                "the loss was not finite",
                f"at step {rows[int((~losses.isfinite()).nonzero()[0])]['step']:.0f} of stage {stage}",
                f"{stage}.train.learning_rate",
                "resume from an earlier checkpoint with a lower learning rate",
            )
        return
    parts = losses.tensor_split(WINDOWS)
    best = min(range(WINDOWS), key=lambda i: float(parts[i].mean()))
    compared = unpaired(parts[-1], parts[best])
    first, last = float(parts[0].mean()), float(parts[-1].mean())
    rates = [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]
    slope = _slope(torch.tensor([row["step"] for row in rows]), losses)
    text = (
        f"{name} of stage {stage} from {first:.3g} to {last:.3g}, lowest {float(parts[best].mean()):.3g}; in its second half it "
        f"changes as step^{slope:.2f}; largest learning rate {max(rates, default=math.nan):g}"
    )
    with_norm = [row for row in rows if "train/gradient_norm" in row]  # earlier versions have not logged it
    if with_norm:
        clip = getattr(run.experiment, stage).train.gradient_clip
        typical = median(row["train/gradient_norm"] for row in with_norm)
        largest = max(row.get("train/gradient_norm_max", row["train/gradient_norm"]) for row in with_norm)
        text += f"; gradient norm {typical:.3g}, at most {largest:.3g}, clipped at {clip}"
    yield Measured(text)
    if compared.is_greater and compared.ratio > 1.5:
        yield Finding(
            "learning_rate_too_high",
            "the training has diverged",
            text,
            f"{stage}.train.learning_rate",
            "resume from a checkpoint before the loss rose, with a lower learning rate",
        )


def _slope(steps: torch.Tensor, losses: torch.Tensor) -> float:
    """Return the exponent of the power of the step that fits the second half of the losses."""
    half = len(losses) // 2
    x, y = steps[half:].double().log(), losses[half:].clamp(min=1e-12).log()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum().clamp(min=1e-12))
