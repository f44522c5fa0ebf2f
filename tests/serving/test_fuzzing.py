"""Requests that schemathesis makes from the OpenAPI schema of the server, valid ones and others."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from ldm.serving.limits import Limits
from tests.report.runs import write_run
from tests.serving.servers import serving

LIMITS = Limits(max_steps=2, max_pixels=32 * 32, max_n=2, max_seconds=2.0)
EXAMPLES = 30  # of each operation and mode: about 800 requests


@pytest.mark.slow
def test_no_request_makes_the_server_fail(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = write_run(tmp_path_factory.mktemp("trained"))
    with serving(tmp_path, limits=LIMITS, runs=run) as server:
        api = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        statuses: dict[int, int] = {}
        for found in api.get_all_operations():
            operation = found.ok()
            for mode in GenerationMode:

                @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), database=None)
                @given(case=operation.as_strategy(generation_mode=mode))
                def request(case: schemathesis.Case) -> None:
                    response = case.call(base_url=server.url, timeout=60)
                    statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
                    assert response.status_code < 500 or response.status_code == 503, response.text
                    if response.status_code >= 400:
                        assert response.json()["error"]["message"]

                with contextlib.suppress(Unsatisfiable):  # an operation without parameters has no invalid request
                    request()
        assert server.http.get("/health").json()["status"] == "ok"
        assert sum(statuses.values()) > 500
        assert {200, 400, 404, 422} <= statuses.keys()
        written = {path.name for path in tmp_path.iterdir()}
        assert written == {"tiny.safetensors", "gallery"}
        assert all(server.service.gallery.file(path.name) for path in server.service.gallery.folder.iterdir())
