"""Reconstructions of the first stage against their originals, image by image: PSNR, SSIM and LPIPS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ldm.evaluation.intervals import mean_estimate
from ldm.evaluation.lpips import lpips_network
from ldm.evaluation.metric import Number, metric
from ldm.vae.metrics import WINDOW

if TYPE_CHECKING:
    from ldm.evaluation.subject import Subject


@metric("psnr", "vae")
def psnr(subject: Subject) -> Iterator[Number]:
    """Measure the mean PSNR of the decoded modes of the posteriors, also by the tiny decoder if there is one."""
    if subject.first_stage is None:
        return
    values = subject.reconstructions().values["psnr"]
    yield Number("psnr", mean_estimate(values), len(values), "higher", unit="dB")
    tiny = subject.pipe.model.tiny_decoder if subject.pipe is not None else None
    if tiny is not None:
        values = subject.reconstructions("tiny").values["psnr"]
        yield Number("psnr_tiny_decoder", mean_estimate(values), len(values), "higher", unit="dB", decoder=tiny)


@metric("ssim", "vae")
def ssim(subject: Subject) -> Iterator[Number]:
    """Measure the mean SSIM of the decoded modes of the posteriors."""
    if subject.first_stage is None:
        return
    values = subject.reconstructions().values["ssim"]
    if not np.isnan(values).any():
        yield Number(
            "ssim",
            mean_estimate(values).within(-1, 1),
            len(values),
            "higher",
            parameters={"sigma": 1.5, "window": WINDOW},
        )


@metric("lpips", "vae", by_default=False)
def lpips(subject: Subject) -> Iterator[Number]:
    """Measure the mean LPIPS of the decoded modes of the posteriors."""
    if subject.first_stage is None:
        return
    values = subject.reconstructions(further={"lpips": lpips_network(subject.device)}).values["lpips"]
    yield Number("lpips", mean_estimate(values), len(values), "lower", parameters={"network": "alex", "version": "0.1"})
