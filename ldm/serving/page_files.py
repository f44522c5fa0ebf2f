"""The static files of the pages: HTML, stylesheet and JavaScript modules, in the folder ``page``."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import FileResponse, RedirectResponse

from ldm.serving.responses import service_of

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).with_name("page")

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Headers of every file. Nothing is loaded from elsewhere, no inline script or style runs, and browsers revalidate each time."""


@router.get("/", response_model=None)
async def index(request: Request) -> Response:
    """Return the page on which images are generated, or without a model that of the runs."""
    return _file("index.html") if service_of(request).models.names else RedirectResponse("/page/runs.html")


@router.get("/page/{name}")
async def page_file(name: str) -> FileResponse:
    """Return a file of the pages."""
    return _file(name)


def _file(name: str) -> FileResponse:
    path = FOLDER / name
    if path.suffix not in MEDIA_TYPES or path not in FOLDER.iterdir():
        raise HTTPException(404, "there is no page of this name.")
    return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers=HEADERS)
