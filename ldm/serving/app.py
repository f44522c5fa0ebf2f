"""The application: its APIs, its error responses, and what guards it. Each API is a router in a file of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ldm import __version__
from ldm.errors import LdmError
from ldm.serving import (
    a1111_api,
    gallery_api,
    jobs_api,
    openai_api,
    options_api,
    page_files,
    system_api,
)
from ldm.serving.models import UnknownModelError
from ldm.serving.scheduler import QueueFullError, ShuttingDownError
from ldm.serving.security import Guard, error_body
from ldm.serving.service import Service

DESCRIPTION = """Generates images. `/v1/images/...` is OpenAI's images API, `/sdapi/v1/...` that of AUTOMATIC1111's web UI, and
`/v1/jobs` shows steps and previews and can be cancelled."""


def create_app(
    service: Service,
    keys: Collection[str] = (),
    hosts: Collection[str] | None = None,
    origins: Collection[str] = (),
    runs: Path | None = None,
) -> FastAPI:
    """Return the application of a service, which ends the service at its shutdown.

    Args:
        keys, hosts, origins: see :class:`Guard`.
        runs: folder of training runs to show.

    Raises:
        ConfigError: ``runs`` is not a folder.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="ldm",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        responses={400: ERROR, 422: ERROR, 429: ERROR, 503: ERROR},
    )
    app.state.service = service
    for api in (openai_api, jobs_api, gallery_api, options_api, a1111_api, system_api, page_files):
        app.include_router(api.router)
    if runs is not None:  # these modules import the packages of training
        from ldm.serving import runs_api
        from ldm.serving.runs import RunsFolder, UnknownRunError

        app.state.runs = RunsFolder(runs)
        app.include_router(runs_api.router)

        @app.exception_handler(UnknownRunError)
        async def of_runs(request: Request, error: UnknownRunError) -> JSONResponse:
            return _error(str(error), 404)

    @app.exception_handler(LdmError)
    async def of_ldm(request: Request, error: LdmError) -> JSONResponse:
        if isinstance(error, QueueFullError):
            return _error(str(error), 429, headers={"Retry-After": str(error.retry_after)})
        if isinstance(error, ShuttingDownError):
            return _error(str(error), 503)
        if isinstance(error, UnknownModelError):
            return _error(str(error), 404, "model_not_found")
        return _error(str(error), 400)

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        message = str(first["msg"])
        return _error(f"{place}: {message[:1].lower()}{message[1:]}.", 422)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        return _error(str(error.detail), error.status_code, headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def of_defect(request: Request, error: Exception) -> JSONResponse:
        return _error("the server has failed; its log has the cause.", 500)

    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Guard, limits=service.limits, keys=keys, hosts=hosts, origins=origins, metrics=service.metrics)
    return app


ERROR: dict[str, Any] = {
    "description": "One sentence: what is wrong, and what to do.",
    "content": {
        "application/json": {
            "example": error_body("num_inference_steps is 0; it must be a whole number, 1 or more.", 400)
        }
    },
}
"""Description of an error response in the documentation of the APIs."""


def _error(message: str, status: int, code: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error_body(message, status, code), status, headers)
