"""Requests made by schemathesis from the server's own OpenAPI schema, and by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from ldm.serving.limits import Limits
from tests.serving.servers import Running, serving

LIMITS = Limits(max_steps=2, max_pixels=64 * 64, max_n=2, max_waiting=4)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("fuzzing"), limits=LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def api(server: Running) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_no_request_makes_the_server_fail(case: schemathesis.Case, server: Running) -> None:
    response = case.call(timeout=60)
    assert response.status_code != 500, response.text
    assert server.http.get("/health").status_code == 200
