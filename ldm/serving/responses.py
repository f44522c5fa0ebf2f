"""What the handlers of all APIs need: the service, the client, the end of a job, and its images."""

from __future__ import annotations

import base64
from pathlib import Path

from fastapi import HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from ldm.serving.jobs import Job, Task
from ldm.serving.service import Service

POLL = 0.25
"""Seconds between two looks whether the client is still there."""


def service_of(request: Request) -> Service:
    """Return the service of the application."""
    service: Service = request.app.state.service
    return service


def client_of(request: Request) -> str:
    """Return the name of the client, by which the scheduler takes turns."""
    return str(request.state.client)


async def finished(job: Job, request: Request) -> Job:
    """Wait for the end of a job; if the client goes away, cancel it.

    Raises:
        HTTPException: it failed or was cancelled.
    """
    scheduler = service_of(request).scheduler
    try:
        while not job.ended:
            await job.changed(POLL)
            if await request.is_disconnected():
                break
    finally:
        if not job.ended:
            scheduler.cancel(job)
    if job.status != "succeeded":
        message, status = job.error or ("the job was cancelled.", 499)
        raise HTTPException(status, message)
    return job


def file_url(request: Request, name: str) -> str:
    """Return the address of a generated image."""
    return str(request.url_for("file", name=name))


async def in_base64(request: Request, task: Task) -> str:
    """Return the file of a finished image in base64."""
    path: Path | None = service_of(request).gallery.file(task.file or "")
    if path is None:
        raise HTTPException(500, "the image was deleted from the gallery.")
    return base64_of(await run_in_threadpool(path.read_bytes))


def base64_of(data: bytes) -> str:
    """Encode in base64."""
    return base64.b64encode(data).decode()
