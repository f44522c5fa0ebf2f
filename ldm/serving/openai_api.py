"""OpenAI's images API: generations, edits, variations and models, such that OpenAI's clients work unchanged."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, File, Form, HTTPException, Request, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ldm.errors import SamplingError
from ldm.serving.controls import ControlField
from ldm.serving.fields import SamplingFields, settings_of
from ldm.serving.jobs import FileFormat, Job
from ldm.serving.responses import client_of, file_url, finished, in_base64, service_of

router = APIRouter(prefix="/v1", tags=["OpenAI"])

WITHOUT_EFFECT = (
    "background",
    "input_fidelity",
    "moderation",
    "partial_images",
    "quality",
    "style",
)
"""Fields of OpenAI's API that have no effect here; a header says so."""

MISSING_MODEL: dict[int | str, dict[str, Any]] = {404: {"description": "There is no such model."}}

ResponseFormat = Literal["url", "b64_json"]

OutputFormat = Literal["png", "jpeg", "webp"]

OUTPUT_FORMAT = "Format of the files; default: png."
OUTPUT_COMPRESSION = "Quality of JPEG and WebP, 0 to 100; default: 95, and lossless for WebP."


class Extra(SamplingFields):
    """Settings that OpenAI's API has no fields for, the strength of an edit, and ControlNets."""

    strength: float | None = Field(None, description="Share of the steps that change the image of an edit, 0 to 1.")
    controlnets: list[ControlField] | None = Field(None, description="ControlNets that act, each with its image.")


class GenerationRequest(BaseModel):
    """A request to generate images; further fields of OpenAI's API are accepted, without effect."""

    model_config = ConfigDict(extra="allow", strict=True)

    prompt: str = Field(description="The prompt.", examples=["a red apple"])
    model: str | None = Field(None, description="Name of the model; default: the first of the server.")
    n: int | None = Field(None, description="Number of images.", examples=[1])
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto.", examples=["64x64"])
    response_format: ResponseFormat | None = Field(None, description="Default: url.")
    output_format: OutputFormat | None = Field(None, description=OUTPUT_FORMAT)
    output_compression: int | None = Field(None, description=OUTPUT_COMPRESSION, ge=0, le=100)
    extra: Extra | None = Field(None, description="Further settings of the sampling.", examples=[{"seed": 1}])


@dataclass
class FormOptions:
    """The fields that the forms of edits and variations have in common."""

    model: Annotated[str | None, Form(description="Name of the model; default: the first of the server.")] = None
    n: Annotated[int | None, Form(description="Number of images.")] = None
    size: Annotated[str | None, Form(description="WIDTHxHEIGHT in pixels to which the image is scaled first.")] = None
    response_format: Annotated[ResponseFormat | None, Form(description="Default: url.")] = None
    output_format: Annotated[OutputFormat | None, Form(description=OUTPUT_FORMAT)] = None
    output_compression: Annotated[int | None, Form(description=OUTPUT_COMPRESSION, ge=0, le=100)] = None
    extra: Annotated[str | None, Form(description="Further settings as JSON, or as fields extra[NAME].")] = None


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """List the models of the server."""
    return {"object": "list", "data": [_model(name) for name in service_of(request).models.names]}


@router.get("/models/{name}", responses=MISSING_MODEL)
async def model(name: str, request: Request) -> dict[str, Any]:
    """Describe a model."""
    return _model(service_of(request).models.name(name))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "ldm"}


@router.post("/images/generations", responses=MISSING_MODEL)
async def generations(body: GenerationRequest, request: Request, response: Response) -> dict[str, Any]:
    """Generate images."""
    others = body.model_extra or {}
    if others.get("stream"):
        raise HTTPException(400, "images are not streamed here; leave stream out, or use /v1/jobs.")
    _warn(response, others)

    def submit() -> Job:
        size = _size(body.size)
        more = {} if size is None else {"width": size[0], "height": size[1]}
        settings = settings_of(body.extra, prompt=body.prompt, num_images_per_prompt=body.n, **more)
        service, client = service_of(request), client_of(request)
        work = service.controlled(client, body.extra.controlnets if body.extra else None)
        return service.submit(client, body.model, settings, work, file_format=_file_format(body))

    return await _result(submit, request, body.response_format)


@router.post("/images/edits", responses=MISSING_MODEL)
async def edits(
    request: Request,
    response: Response,
    form: Annotated[FormOptions, Depends()],
    prompt: Annotated[str, Form(description="What the image should show.")],
    image: Annotated[UploadFile | None, File(description="The image, a PNG, JPEG or WebP.")] = None,
    image_list: Annotated[list[UploadFile] | None, File(alias="image[]", description="The image, in a list.")] = None,
    mask: Annotated[UploadFile | None, File(description="Transparent where the image is repainted.")] = None,
) -> dict[str, Any]:
    """Repaint an image where the mask (or the image itself) is transparent; without transparency, change all of it."""
    files = [image] if image is not None else image_list or []
    if len(files) != 1:
        raise HTTPException(400, f"{len(files)} images are given; give one as image.")
    given = await _extra(request, form.extra)
    _warn(response, await request.form())
    content, area = await files[0].read(), None if mask is None else await mask.read()

    def submit() -> Job:
        service, client = service_of(request), client_of(request)
        edit = service.edit(client, content, area, _size(form.size), mask_is_alpha=True, strength=given.strength)
        work = service.controlled(client, given.controlnets, edit)
        settings = settings_of(given, prompt=prompt, num_images_per_prompt=form.n)
        return service.submit(client, form.model, settings, work, edit.size, file_format=_file_format(form))

    return await _result(submit, request, form.response_format)


@router.post("/images/variations", responses=MISSING_MODEL)
async def variations(
    request: Request,
    response: Response,
    form: Annotated[FormOptions, Depends()],
    image: Annotated[UploadFile, File(description="The image, a PNG, JPEG or WebP.")],
) -> dict[str, Any]:
    """Vary an image."""
    given = await _extra(request, form.extra)
    _warn(response, await request.form())
    content = await image.read()

    def submit() -> Job:
        service, client = service_of(request), client_of(request)
        variation, sides = service.variation(content, _size(form.size))
        work = service.controlled(client, given.controlnets, variation)
        settings = settings_of(given, num_images_per_prompt=form.n)
        return service.submit(client, form.model, settings, work, sides, file_format=_file_format(form))

    return await _result(submit, request, form.response_format)


async def _extra(request: Request, text: str | None) -> Extra:
    """Return the object ``extra`` of a form: as JSON, or as OpenAI's client sends it, a field ``extra[name]`` for each value."""
    try:
        values: Any = json.loads(text or "{}")
        for name, value in (await request.form()).multi_items():
            if not name.startswith("extra["):
                continue
            match = re.fullmatch(r"extra\[(\w+)\]", name)
            if match is None or not isinstance(value, str):
                raise HTTPException(400, f"{name[:100]} is not read; write the whole of extra as JSON.")
            values[match[1]] = _plain(value)
    except (ValueError, TypeError):
        raise HTTPException(400, "extra is not a JSON object; write the settings as JSON.") from None
    try:
        return Extra.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in ("extra", *first["loc"]))
        raise HTTPException(422, f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}.") from None


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _size(size: str | None) -> tuple[int, int] | None:
    """Return width and height; None for the usual ones."""
    if size in (None, "", "auto"):
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size or "")
    if match is None:
        raise SamplingError(f"size is {(size or '')[:40]!r}; write WIDTHxHEIGHT in pixels, such as 64x64.")
    return int(match[1]), int(match[2])


def _file_format(given: GenerationRequest | FormOptions) -> FileFormat:
    return FileFormat(given.output_format or "png", given.output_compression)


def _warn(response: Response, given: Any) -> None:
    ignored = [name for name in WITHOUT_EFFECT if given.get(name) is not None]
    if ignored:
        response.headers["Warning"] = f'299 - "without effect here: {", ".join(ignored)}"'


async def _result(
    submit: Callable[[], Job], request: Request, response_format: ResponseFormat | None
) -> dict[str, Any]:
    """Submit a job, wait for its end, and return its images."""
    job = await finished(await run_in_threadpool(submit), request)
    data = []
    for task in job.tasks:
        if response_format == "b64_json":
            content = {"b64_json": await in_base64(request, task)}
        else:
            content = {"url": file_url(request, task.file or "")}
        data.append({**content, "seed": task.seed})
    return {"created": int(time.time()), "data": data}
