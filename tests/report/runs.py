"""Run folders with everything that a training leaves but its checkpoints, without a training."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from ldm.config import to_yaml
from ldm.training.environment import SESSIONS
from ldm.training.metrics import MetricsFile
from tests.experiments import tiny_experiment


def write_metrics(folder: Path, steps: int = 40) -> None:
    file = MetricsFile(folder / "metrics.csv", 0)
    for step in range(1, steps + 1):
        levels = {f"train/loss_sigma_{name}": 1 / step for name in ("0_0.01", "0.1_0.32", "100_inf")}
        row = {"train/loss": 1 / step, "train/gradient_norm": 1.0, "train/gradient_norm_max": 2.0, "train/another": 3.0}
        file.write(step, {**row, **levels, "system/samples_per_second": 10.0})
    file.write(
        steps, {"val/loss": 0.25, "val/psnr": 20.0, "val/text_to_image_R@1": 0.5, "val/image_to_text_R@1": 0.125}
    )


def write_run(folder: Path, *overrides: str) -> Path:
    """A run whose three stages have metrics, images and sessions."""
    experiment = tiny_experiment(folder, *overrides)
    run = experiment.folder
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(experiment))
    for stage, name in (("vae", "reconstructions"), ("clip", "nearest"), ("denoiser", "samples")):
        write_metrics(run / stage)
        (run / stage / "images").mkdir()
        for step in range(1, 31):
            Image.new("RGB", (64, 64), (step, 0, 0)).save(run / stage / "images" / f"{name}_{step:07d}.png")
    sessions = [
        {"event": "start", "time": "2026-01-01T00:00:00+00:00", "pid": 1, "step": 0, "environment": {"torch": "2.99"}},
        {"event": "start", "time": "2026-01-01T02:00:00+00:00", "pid": 2, "step": 20, "environment": {"torch": "2.99"}},
        {"event": "end", "time": "2026-01-01T03:30:00+00:00", "pid": 2, "step": 40, "reason": "finished"},
    ]
    (run / "vae" / SESSIONS).write_text("".join(json.dumps(each) + "\n" for each in sessions) + '{"event": "sta')
    return run
