from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.training.averages import UNREAD, Averages
from ldm.training.noise_level_bins import EDGES, NAMES

STEPS = UNREAD + 50


def batch(step: int) -> tuple[dict[str, Tensor | float], dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(step)
    metrics: dict[str, Tensor | float] = {
        "loss": float(torch.rand((), generator=generator)),
    }
    metrics["kl"] = torch.rand((), generator=generator)
    sigma = torch.randn(7, generator=generator).mul(3).exp()
    return (
        metrics,
        {"gradient_norm": torch.rand((), generator=generator)},
        {"loss": (torch.rand(7, generator=generator), sigma)},
    )


def filled(first: int, last: int, averages: Averages | None = None) -> Averages:
    averages = averages or Averages()
    for step in range(first, last):
        averages.add(*batch(step))
    return averages


def test_a_row_has_the_means_and_maxima_of_its_steps() -> None:
    row = filled(0, STEPS).row()
    batches = [batch(step) for step in range(STEPS)]
    assert row["loss"] == pytest.approx(np.mean([float(metrics["loss"]) for metrics, _, _ in batches]))
    assert row["kl"] == pytest.approx(np.mean([float(metrics["kl"]) for metrics, _, _ in batches]))
    norms = [float(norm["gradient_norm"]) for _, norm, _ in batches]
    assert row["gradient_norm"] == pytest.approx(np.mean(norms))
    assert row["gradient_norm_max"] == max(norms)


def test_losses_are_averaged_within_ranges_of_the_noise_level() -> None:
    row = filled(0, STEPS).row()
    loss, sigma = (torch.cat([batch(step)[2]["loss"][i] for step in range(STEPS)]).double() for i in (0, 1))
    limits = [0, *EDGES, math.inf]
    for name, low, high in zip(NAMES, limits, limits[1:], strict=False):
        inside = (sigma >= low) & (sigma < high)
        assert inside.any()
        assert row[f"loss_{name}"] == pytest.approx(float(loss[inside].mean()))


def test_a_range_without_samples_has_no_column() -> None:
    averages = Averages()
    averages.add({}, by_noise_level={"loss": (torch.ones(2), torch.tensor([0.5, 0.6]))})
    assert averages.row() == {"loss_sigma_0.32_1": 1.0}


@pytest.mark.parametrize("stop", [1, 10, UNREAD // 3, STEPS - 1])
def test_an_interrupted_average_continues_to_the_last_bit(stop: int) -> None:
    file = io.BytesIO()
    torch.save(filled(0, stop).state_dict(), file)
    file.seek(0)
    resumed = Averages()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert filled(stop, STEPS, resumed).row() == filled(0, STEPS).row()


def test_the_sums_of_a_checkpoint_of_an_earlier_version_continue() -> None:
    averages = Averages()
    averages.load_state_dict({"sums": {"loss": (1.0, 2)}, "rows": 3})
    averages.add({"loss": 5.0}, {"gradient_norm": torch.tensor(4.0)})
    assert averages.row() == {"loss": 2.0, "gradient_norm": 4.0, "gradient_norm_max": 4.0}


def test_saving_does_not_change_the_average() -> None:
    averages = filled(0, 5)
    averages.state_dict()
    assert filled(5, 9, averages).row() == filled(0, 9).row()


def test_a_row_starts_the_next() -> None:
    averages = filled(0, 3)
    averages.row()
    assert filled(3, 6, averages).row() == filled(3, 6).row()
    assert averages.row() == {}


def test_infinite_gradients_of_skipped_steps_do_not_count() -> None:
    averages = Averages()
    for value in (1.0, math.inf, 3.0, math.nan):
        averages.add({}, {"gradient_norm": torch.tensor(value)})
    assert averages.row() == {"gradient_norm": 2.0, "gradient_norm_max": 3.0}


def test_values_of_several_types_keep_their_precision() -> None:
    averages = Averages()
    averages.add({"a": torch.tensor(1 / 3, dtype=torch.float64), "b": torch.tensor(0.5, dtype=torch.bfloat16)})
    assert averages.row() == {"a": 1 / 3, "b": 0.5}
