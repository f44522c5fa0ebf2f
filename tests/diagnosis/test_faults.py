"""The diagnosis names the fault of each run that has one, and finds none in healthy runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.diagnosis.faults import FAULTS, HEALTHY, Bench, Fault, diagnosis_of, unscaled_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def known_data() -> Iterator[None]:
    with unscaled_data():
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The healthy run, trained once for all processes of the test."""
    shared = tmp_path_factory.getbasetemp().parent if "popen" in tmp_path_factory.getbasetemp().name else None
    folder = (shared or tmp_path_factory.getbasetemp()) / "diagnosis"
    made = Bench(folder)
    with FileLock(f"{folder}.lock"):
        made.prepare()
    return made


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_verdict_names_the_seeded_fault(fault: Fault, bench: Bench, tmp_path: Path) -> None:
    result = diagnosis_of(fault.make(bench, tmp_path))
    assert result.cause is not None, result.verdict
    assert result.cause.cause == fault.cause, result.verdict


@pytest.mark.parametrize("run", HEALTHY, ids=lambda run: run.name)
def test_nothing_is_found_in_a_healthy_run(run: Fault, bench: Bench, tmp_path: Path) -> None:
    result = diagnosis_of(run.make(bench, tmp_path))
    assert result.cause is None, result.verdict
    assert not [outcome.check.title for outcome in result.outcomes if outcome.check.stages == () and outcome.skipped]


def test_enough_faults_are_seeded() -> None:
    assert len({fault.cause for fault in FAULTS}) >= 20
    assert len(HEALTHY) >= 5
