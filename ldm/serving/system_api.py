"""Health, metrics and generated files."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import FileResponse

from ldm import __version__
from ldm.serving.responses import service_of

router = APIRouter(tags=["system"])


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """Tell that the server works, and how much it has to do."""
    service = service_of(request)
    return {
        "status": "ok",
        "version": __version__,
        "loaded": list(service.models.loaded),
        "waiting": service.scheduler.waiting,
        "running": service.scheduler.running,
    }


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """Return the metrics, for Prometheus."""
    return Response(service_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/files/{name}", response_class=FileResponse, responses={404: {"description": "There is no such image."}})
async def file(name: str, request: Request) -> FileResponse:
    """Return a generated image, a PNG whose text chunks have its settings."""
    path = service_of(request).gallery.file(name)
    if path is None:
        raise HTTPException(404, "there is no image of this name.")
    return FileResponse(path, media_type="image/png")
