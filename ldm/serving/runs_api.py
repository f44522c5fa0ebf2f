"""Training runs: their list, metrics, images and reports, of runs that are being trained too."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, HTTPException, Query, Request, Response
from markupsafe import Markup
from pydantic import BaseModel

from ldm.report.metrics import read_rows
from ldm.report.page import page
from ldm.report.run import Run
from ldm.report.sections import PARTS, SECTIONS, curves, previews
from ldm.serving.runs import RunDescription, RunsFolder, RunSummary, readable
from ldm.training.tasks import TASKS

METRICS_BYTES = 2**20
"""Number of bytes of ``metrics.csv`` in one response."""

IMAGE_BYTES = 32 * 2**20
"""Size of the largest image that is sent."""

IMAGE_TYPES = {b"\x89PNG\r\n\x1a\n": "image/png", b"GIF89a": "image/gif", b"GIF87a": "image/gif"}
"""Media types by the first bytes of a file; others are not sent."""

MISSING: dict[int | str, dict[str, Any]] = {404: {"description": "There is no such run, stage or file."}}

router = APIRouter(prefix="/v1/runs", tags=["training runs"], responses=MISSING)

RENDERING = CapacityLimiter(1)
"""Bound on the reports that are made at once."""

T = TypeVar("T")


class RunList(BaseModel):
    """The runs: those that train, then the others, the last changed first."""

    runs: list[RunSummary]


class Curve(BaseModel):
    """A metric in a chart: its label, whether to smooth it, and whether to mark its points."""

    metric: str
    label: str
    smooth: bool
    marks: bool


class Chart(BaseModel):
    """A chart for metrics that belong together; ``log_y`` null means that the range of the values decides."""

    title: str
    y_label: str
    log_y: bool | None
    y_range: tuple[float, float] | None
    note: str
    curves: list[Curve]


class Rows(BaseModel):
    """Rows of metrics after a cursor; each has the step and a value for each column, null where there is none."""

    cursor: str
    restarted: bool
    more: bool
    columns: list[str]
    rows: list[tuple[int, list[float | None]]]
    charts: list[Chart] | None


class Section(BaseModel):
    """A section of the report, as HTML in which all values are escaped."""

    title: str
    html: str


class Report(BaseModel):
    """The report of a run, without curves and images."""

    sections: list[Section]


@router.get("", response_model=RunList)
def runs(request: Request) -> Response:
    """List the runs with the progress of their stages."""
    summaries = _folder(request).summaries()
    return _json(request, {"runs": [dataclasses.asdict(each) for each in summaries]})


@router.get("/{run:path}/stages/{stage}/metrics", response_model=Rows)
def metrics(
    run: str,
    stage: str,
    request: Request,
    after: Annotated[str, Query(description="Cursor of the last response; without one, from the first row on.")] = "",
) -> Response:
    """Return the rows of metrics that were appended after a cursor, and at the start the charts that show them.

    If ``restarted`` is true, the training has written its file again. If ``more`` is true, there are further rows.
    """
    rows = read_rows(_folder(request).stage(run, stage).metrics_file, after, METRICS_BYTES)
    charts = [_chart(group, found) for group, found in curves.grouped(rows.columns)] if rows.restarted else None
    return _json(request, {**vars(rows), "charts": charts})


@router.get("/{run:path}/stages/{stage}/images/{file}", response_class=Response)
def image(run: str, stage: str, file: str, request: Request) -> Response:
    """Return an image that was made during the training."""
    found = _folder(request).stage(run, stage)
    paths = [*(path for files in found.images.values() for _, path in files), *found.animations]
    path = next((path for path in paths if path.name == file), None)
    if path is None:
        raise HTTPException(404, "there is no image of this name.")
    with readable(run), path.open("rb") as opened:
        content = opened.read(IMAGE_BYTES + 1)
    media_type = next((kind for start, kind in IMAGE_TYPES.items() if content.startswith(start)), None)
    if media_type is None or len(content) > IMAGE_BYTES:
        raise HTTPException(404, f"the file is no PNG or GIF of at most {IMAGE_BYTES} bytes.")
    return _response(request, content, media_type)


@router.get("/{run:path}/report", response_model=Report)
async def report(run: str, request: Request) -> Response:
    """Return the report of a run without curves and images: tables, data, sessions, environment and provenance."""
    return _json(request, {"sections": await _rendered(request, run, _sections)})


@router.get("/{run:path}/report.html", response_class=Response)
async def report_file(run: str, request: Request) -> Response:
    """Return the report that ``tools/report.py`` writes, one HTML page that needs no other file."""
    headers = {"Content-Disposition": "attachment"}
    return Response(await _rendered(request, run, page), media_type="text/html", headers=headers)


@router.get("/{run:path}", response_model=RunDescription)
def run(run: str, request: Request) -> Response:
    """Return config, images and sessions of a run."""
    return _json(request, dataclasses.asdict(_folder(request).describe(run)))


def _folder(request: Request) -> RunsFolder:
    folder: RunsFolder = request.app.state.runs
    return folder


async def _rendered(request: Request, run: str, render: Callable[[Run], T]) -> T:
    """Return what ``render`` makes of a run; reports are made one at a time, in a thread that no other request waits for."""

    def rendered() -> T:
        with _folder(request).opened(run) as opened:
            return render(opened)

    return await to_thread.run_sync(rendered, limiter=RENDERING)


def _chart(group: curves.Group, found: list[curves.Curve]) -> dict[str, Any]:
    values = {**vars(group), "curves": [vars(each) for each in found]}
    del values["pattern"]
    return values


def _sections(run: Run) -> list[dict[str, Any]]:
    """Return the sections of the report that the page does not show in another way."""
    parts = [part for part in PARTS if part not in (previews.part, curves.part)]
    found = [(TASKS[stage.name].title, Markup("").join(part(stage) for part in parts)) for stage in run.stages]
    found += [(title, section(run)) for title, section in SECTIONS.items()]
    return [{"title": title, "html": html} for title, html in found if html]


def _json(request: Request, content: Any) -> Response:
    return _response(request, json.dumps(content, allow_nan=False).encode(), "application/json")


def _response(request: Request, content: bytes, media_type: str) -> Response:
    """Return the content, or status 304 if the client has it already."""
    tag = f'"{hashlib.blake2b(content, digest_size=16).hexdigest()}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)
