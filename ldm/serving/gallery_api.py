"""The gallery: generated images with their settings, and the settings of an image that is sent."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, File, Query, Request, UploadFile
from fastapi.concurrency import run_in_threadpool
from PIL import Image

from ldm.errors import SamplingError
from ldm.serving.records import is_complete, request_of
from ldm.serving.responses import client_of, file_url, service_of
from ldm.serving.uploads import read_upload

router = APIRouter(prefix="/v1/gallery", tags=["gallery"])


@router.get("")
async def newest(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100, description="Number of images.")] = 24,
    before: Annotated[str | None, Query(description="Name of an image; those before it are returned.")] = None,
) -> dict[str, Any]:
    """List the images of the client, the newest first; ``request`` of an image is the job that makes it again."""
    service, client = service_of(request), client_of(request)

    def read() -> dict[str, Any]:
        paths, more = service.gallery.newest(client, limit, before)
        described = [_described(path, request) for path in paths]
        return {"images": [each for each in described if each is not None], "more": more}

    return await run_in_threadpool(read)


@router.post("/read")
async def read(
    request: Request, image: Annotated[UploadFile, File(description="A PNG, JPEG or WebP.")]
) -> dict[str, Any]:
    """Return the settings of a generated image, which is not kept."""
    content = await image.read()

    def settings() -> dict[str, Any]:
        read_upload(content, service_of(request).limits)
        described = _settings(io.BytesIO(content), request)
        if described is None or described["request"] is None:
            raise SamplingError("the image has no settings of ldm; choose one that was generated here.")
        return described

    return await run_in_threadpool(settings)


def _described(path: Path, request: Request) -> dict[str, Any] | None:
    settings = _settings(path, request)
    return None if settings is None else {"name": path.name, "url": file_url(request, path.name), **settings}


def _settings(file: Path | io.BytesIO, request: Request) -> dict[str, Any] | None:
    """Return size, model and request of an image; ``complete`` tells whether the request makes the same image.

    None if the file was removed, or is damaged.
    """
    try:
        with Image.open(file) as image:
            (width, height), record = image.size, {str(name): value for name, value in image.info.items()}
    except (OSError, SyntaxError, ValueError):
        return None
    return {
        "width": width,
        "height": height,
        "model": service_of(request).models.name_of(record.get("model")),
        "request": request_of(record),
        "complete": is_complete(record),
    }
