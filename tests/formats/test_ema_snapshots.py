from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import brentq
from scipy.stats import beta
from torch import nn

from ldm.cli.common import run
from ldm.cli.convert import app
from ldm.errors import CheckpointError
from ldm.formats.ema_snapshots import reconstructed, snapshots, write_snapshot
from ldm.formats.tensors import read_metadata
from ldm.pipeline import Pipeline
from ldm.training.ema import PowerEMA
from ldm.training.stages import train_stage
from tests.experiments import tiny_experiment
from tests.training.test_recipes import PIXELS

LENGTHS = (0.05, 0.1)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[float, torch.Tensor]]:
    """Snapshots of weights that drift towards a goal with noise, as in a training, and the true averages by length."""
    folder = tmp_path_factory.mktemp("walk")
    layer, generator = nn.Linear(8, 8, bias=False).double(), torch.Generator().manual_seed(0)
    goal = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    averages, weights = {length: PowerEMA(layer, length) for length in LENGTHS}, []
    for step in range(1, 1601):
        with torch.no_grad():
            noise = torch.randn(8, 8, generator=generator, dtype=torch.float64)
            layer.weight.add_(0.003 * (goal - layer.weight) + 0.02 * noise)
        weights.append(layer.weight.detach().clone())
        for average in averages.values():
            average.update()
        if step % 100 == 0:
            write_snapshot(folder, step, {length: averages[length].average for length in LENGTHS})
    ends = np.arange(1601) / 1600
    parts = {length: np.diff(ends ** (_exponent(length) + 1)) for length in (*LENGTHS, 0.07, 0.15, 0.2)}
    return folder, {
        length: torch.tensordot(torch.from_numpy(each), torch.stack(weights), dims=1) for length, each in parts.items()
    }


def _exponent(length: float) -> float:
    """The exponent g of a power-function profile whose standard deviation is ``length``, of Beta(g + 1, 1)."""
    return float(brentq(lambda g: beta(g + 1, 1).std() - length, 0.0, 100.0))


def test_the_exponents_are_those_of_the_paper() -> None:
    assert [_exponent(each) for each in LENGTHS] == pytest.approx([16.97, 6.94], abs=5e-3)


@pytest.mark.parametrize(("length", "limit"), [(0.05, 1e-6), (0.07, 1e-3), (0.1, 1e-6), (0.15, 1e-3), (0.2, 4e-3)])
def test_any_length_is_reconstructed_after_the_training(
    walk: tuple[Path, dict[float, torch.Tensor]], length: float, limit: float
) -> None:
    folder, true = walk
    average, step = reconstructed(folder, length)
    assert step == 1600
    error = (average["weight"] - true[length]).norm() / true[length].norm()
    assert error < limit
    others = [(true[other] - true[length]).norm() / true[length].norm() for other in LENGTHS if other != length]
    assert all(error < other / 20 for other in others)


def test_the_average_of_an_earlier_step(walk: tuple[Path, dict[float, torch.Tensor]]) -> None:
    stored = load_file(snapshots(walk[0])[6])["0.1/weight"]
    average, step = reconstructed(walk[0], 0.1, last=799)
    assert step == 700
    torch.testing.assert_close(average["weight"], stored.float(), rtol=1e-5, atol=1e-6)


def test_an_inexact_average_keeps_the_scale_and_is_warned_about(tmp_path: Path) -> None:
    weight = torch.randn(3, 2)
    for step in (1000, 2000, 2800):
        write_snapshot(tmp_path, step, {length: {"weight": weight} for length in LENGTHS})
    with pytest.warns(UserWarning, match=r"the average that 3 snapshots in .* 13% off that of length 0\.15"):
        average, _ = reconstructed(tmp_path, 0.15)
    torch.testing.assert_close(average["weight"], weight)


@pytest.mark.parametrize(("length", "message"), [(0.3, "above 0 and below 0.2887"), (0.1, "holds no snapshot")])
def test_what_cannot_be_reconstructed_is_one_sentence(tmp_path: Path, length: float, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        reconstructed(tmp_path, length)


def test_a_model_is_written_with_a_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the length of a stored average it has that average's weights; the pipeline loads it."""
    settings = ["max_steps=3", "validate_every=3", "ema_snapshots.every=2", "ema_decay=0"]
    train_stage(tiny_experiment(tmp_path, *PIXELS, *(f"denoiser.train.{each}" for each in settings)), "denoiser")
    target, stage = tmp_path / "short.safetensors", tmp_path / "run" / "denoiser"
    assert [path.name for path in snapshots(stage)] == ["step_0000002.safetensors", "step_0000003.safetensors"]
    monkeypatch.setattr("sys.argv", ["convert.py", str(tmp_path / "run"), str(target), "--ema-length", "0.1"])
    with pytest.raises(SystemExit) as end:
        run(app)
    assert end.value.code in (0, None)
    stored, written = load_file(snapshots(stage)[-1]), load_file(target)
    final = load_file(tmp_path / "run" / "model.safetensors")
    assert written.keys() == final.keys()
    for name in written:
        expected = stored.get(f"0.1/{name}", final[name])
        torch.testing.assert_close(written[name], expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(written[name], final[name]) for name in written)
    metadata = read_metadata(target)
    assert json.loads(metadata["provenance"])["steps"] == 3
    assert metadata["fingerprint"] not in ("", read_metadata(tmp_path / "run" / "model.safetensors")["fingerprint"])
    assert len(Pipeline.from_pretrained(target)(num_images_per_prompt=1, num_inference_steps=1, progress=False)) == 1
