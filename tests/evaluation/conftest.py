from __future__ import annotations

from pathlib import Path

import pytest

from ldm.evaluation.subject import Subject
from tests.evaluation.subjects import opened, write_subject


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of data, for :func:`tests.evaluation.subjects.opened`."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_subject(folder)
    return folder


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return opened(folder)
