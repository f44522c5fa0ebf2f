"""Our own API: jobs, whose steps and previews are sent as they are computed, and which can be cancelled."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import Field

from ldm.serving.edits import EditFields, edit_arguments
from ldm.serving.fields import settings_of
from ldm.serving.jobs import Job, Work
from ldm.serving.responses import base64_of, client_of, file_url, service_of

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

HEARTBEAT = 10.0
"""Seconds after which a comment is sent if nothing has changed, so that connections stay open."""

MISSING: dict[int | str, dict[str, Any]] = {404: {"description": "There is no such job."}}


class JobRequest(EditFields):
    """A job: a model, its settings, and for an edit the image and what is done with it."""

    model: str | None = Field(None, description="Name of the model; default: the first of the server.")
    previews: bool = Field(True, description="Whether to make previews.")


@router.post("", status_code=202, responses={404: {"description": "There is no such model."}})
async def create(body: JobRequest, request: Request) -> dict[str, Any]:
    """Add a job to the queue."""

    def submit() -> Job:
        service, client = service_of(request), client_of(request)
        given = edit_arguments(body, service.gallery)
        edit = None if given is None else service.edit(client, **given)
        size = None if edit is None else edit.size
        work: Work | None = edit
        if body.controlnets:
            work = service.controlled(client, body.controlnets, edit)
        return service.submit(client, body.model, settings_of(body), work, size, body.previews)

    return state(await run_in_threadpool(submit), request)


@router.get("/{job_id}", responses=MISSING)
async def read(job_id: str, request: Request) -> dict[str, Any]:
    """Return the state of a job: status, steps, and the addresses of its finished images."""
    return state(_job(job_id, request), request)


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    responses={**MISSING, 200: {"content": {"text/event-stream": {}}, "description": "Events."}},
)
async def events(job_id: str, request: Request) -> StreamingResponse:
    """Send the state of a job whenever it changes, with previews, as server-sent events.

    Events are named ``progress``, and the last one ``end``. If a client is slower than the steps, it gets the newest state.
    """
    job = _job(job_id, request)

    async def stream() -> AsyncIterator[str]:
        last = ""
        while True:
            ended = job.ended
            current = json.dumps(state(job, request, previews=True))
            if current != last or ended:
                yield f"event: {'end' if ended else 'progress'}\ndata: {current}\n\n"
            else:
                yield ": nothing new\n\n"
            if ended:
                return
            last = current
            await job.changed(HEARTBEAT)

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


@router.delete("/{job_id}", responses=MISSING)
async def cancel(job_id: str, request: Request) -> dict[str, Any]:
    """Cancel a job: its images that run end before their next evaluation of the network."""
    job = _job(job_id, request)
    service_of(request).scheduler.cancel(job)
    return state(job, request)


def _job(job_id: str, request: Request) -> Job:
    job = service_of(request).scheduler.job(job_id)
    if job is None or job.client != client_of(request):
        raise HTTPException(404, "there is no job of this id.")
    return job


def state(job: Job, request: Request, previews: bool = False) -> dict[str, Any]:
    """Return the state of a job as JSON values."""
    status, images = job.status, []  # in this order: a job that has succeeded has all of its images
    for task in job.tasks:
        image: dict[str, Any] = {"seed": task.seed, "done": task.done, "total": task.total}
        if task.file is not None:
            image["url"] = file_url(request, task.file)
        if previews and (preview := task.preview) is not None:
            image["preview"] = f"data:image/png;base64,{base64_of(preview)}"
        images.append(image)
    result = {"id": job.id, "status": status, "model": job.model, "created": int(job.created), "images": images}
    return result | ({} if job.error is None else {"error": job.error[0]})
