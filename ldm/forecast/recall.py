"""Recall of generated images: measured for the runs of a ladder, and forecast from the loss.

R@k is how often the true image of a held-out caption is among the k nearest to the generated one
(:func:`ldm.evaluation.metrics.caption_match.recall_by_image`). It lies between chance and 1 and saturates, so no power law of
steps or images fits it. The runs show instead that it depends on the quantities through the loss: above chance c,

    R = c + (1 - c) sigmoid(u - v log L),

with binomial noise, overdispersed by what the runs miss, is fitted to all runs; the bands of the loss are carried through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.devices import default_device, default_dtype
from ldm.diffusion import SPECS
from ldm.evaluation.metrics.caption_match import KS, recall_by_image
from ldm.evaluation.subject import Options, Subject
from ldm.formats import read
from ldm.pipeline import Pipeline
from ldm.training.experiment import Experiment

GALLERY = 20_000
"""Most true images of train and val together for which both are searched; with more, val alone."""

FEWEST_CAPTIONS, MOST_CAPTIONS = 32, 256
"""Least and largest number of captions; fewer are too few for a curve."""

PART = 0.0015
"""Largest part of the time of the full run that measuring the recall of a model of its size takes: of a ladder of twelve runs,
less than a tenth."""

ITERATIONS = 50

SPREAD = (3.0, 2.0)
"""Prior standard deviations of u, and of v in units of one standard deviation of log L over the runs."""


class RecallMeasure:
    """Measurement of the recall of checkpoints, all on the same captions, seeds and true images.

    Args:
        experiment: the full experiment, whose images all runs are compared with.
        captions: number of captions; 0 = nothing is measured.
    """

    def __init__(self, experiment: Experiment, captions: int):
        self.experiment, self.captions = experiment, captions
        self._subject: Subject | None = None

    def __call__(self, checkpoint: Path) -> Mapping[str, Any]:
        """Return the captions recognised for each k, their number ``of``, and the number of images ``among``."""
        if not self.captions:
            return {}
        on_cpu = self.experiment.trainer.accelerator == "cpu"
        device = torch.device("cpu") if on_cpu else default_device()
        pipe = Pipeline(read(checkpoint).build(default_dtype(device))).to(device, default_dtype(device))
        subject = replace(self._opened(), pipe=pipe, first_stage=pipe.model.first_stage, _made={})
        numbers = list(recall_by_image(subject))
        found: dict[str, Any] = {str(each.parameters["k"]): round(each.estimate.value * each.n) for each in numbers}
        return {**found, "of": numbers[0].n, "among": numbers[0].parameters["among"]}

    def _opened(self) -> Subject:
        """Open the true images, once; copies of the subject share what is collected of them."""
        if self._subject is None:
            data = self.experiment.data.without_cache()
            sets = {split: data.open(split) for split in ("train", "val")}
            if sum(map(len, sets.values())) > GALLERY:
                sets = {"val": sets["val"]}
            options = Options(images=self.captions)
            self._subject = Subject(
                self.experiment.folder, self.experiment, None, None, None, sets, "val", options=options
            )
        return self._subject


def captions_measured(experiment: Experiment, held_out: int, forward: float, full_seconds: float) -> tuple[int, int]:
    """Return the number of captions to measure the recall with, 0 for none, and of passes through the network for that.

    Args:
        experiment: the experiment.
        held_out: number of validation samples.
        forward: seconds in which a sample goes through the network.
        full_seconds: seconds of the full run.
    """
    sampling = experiment.denoiser.sampling
    evaluations = sampling.num_inference_steps * SPECS[sampling.sampler].evaluations
    each = evaluations * (2 if sampling.guidance_scale != 1 else 1)
    count = min(held_out, MOST_CAPTIONS, int(PART * full_seconds / (each * forward)))
    if count < FEWEST_CAPTIONS or experiment.denoiser.conditioner.input_keys != ("text",):
        return 0, 0
    return count, count * each


@dataclass(frozen=True)
class RecallCurve:
    """Curve of R@k by the loss, with draws of its parameters.

    Attributes:
        chance: recall of images that have nothing to do with their captions.
        centre, scale: mean and standard deviation of -log L over the runs.
        draws: u and v at these units, ``[d 2]``.
    """

    chance: float
    centre: float
    scale: float
    draws: np.ndarray

    def recall(self, losses: np.ndarray) -> np.ndarray:
        """Return draws of the recall ``[d m]`` for draws of losses ``[d m]``, of which there are as many."""
        x = (-np.log(losses) - self.centre) / self.scale
        u, v = (self.draws[: len(losses), i, None] for i in (0, 1))
        recall: np.ndarray = self.chance + (1 - self.chance) / (1 + np.exp(-np.clip(u + v * x, -50, 50)))
        return recall


def fit_recall(
    losses: Sequence[float], hits: Sequence[int], of: Sequence[int], chance: float, draws: int, seed: int = 0
) -> RecallCurve:
    """Fit the recall of runs by their losses: the mode of the posterior by Newton's method, and draws of Laplace's approximation.

    Args:
        losses: loss of each run.
        hits: captions recognised, of ``of`` of each run.
        of: number of captions of each run.
        chance: recall by chance, in [0, 1).
        draws: number of draws.
        seed: seed of the draws.
    """
    logs = -np.log(np.asarray(losses, float))
    centre, scale = float(logs.mean()), float(logs.std()) or 1.0
    x, count = (logs - centre) / scale, np.asarray(of, float)
    share = (np.asarray(hits, float) + 0.5) / (count + 1)
    inputs, precision = np.stack([np.ones_like(x), x], 1), np.diag(np.array(SPREAD) ** -2.0)
    # What lies above chance is what the curve is about; runs at chance leave the logit open downwards.
    start = np.clip((share.mean() - chance) / (1 - chance), 0.01, 0.99)
    mean = np.array([np.log(start / (1 - start)), 1.0])
    theta = mean.copy()
    dispersion = 1.0
    for _ in range(ITERATIONS):
        part = 1 / (1 + np.exp(-np.clip(inputs @ theta, -30, 30)))
        recall = chance + (1 - chance) * part
        slope = (1 - chance) * part * (1 - part)  # d recall / d logit
        variance = recall * (1 - recall) / count
        weight = slope**2 / variance / dispersion
        information = inputs.T @ (inputs * weight[:, None]) + precision
        towards = inputs.T @ (slope * (share - recall) / variance / dispersion) + precision @ (mean - theta)
        theta = theta + np.clip(np.linalg.solve(information, towards), -1, 1)
        squares = float((np.square(share - recall) / variance).sum())
        dispersion = max(1.0, squares / max(1, len(x) - 2))
    spread = np.linalg.cholesky(np.linalg.inv(information))
    noise = np.random.default_rng(seed).standard_normal((draws, 2))
    return RecallCurve(chance, centre, scale, theta + noise @ spread.T)


RECALLS = KS
"""Numbers of nearest images."""
