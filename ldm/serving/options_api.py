"""Options of requests: models, samplers, LoRAs, ControlNets and further settings, with defaults and limits."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from ldm.diffusion import SPACINGS, SPECS
from ldm.prompt_loras import lora_names
from ldm.prompts import LONG_PROMPTS, SYNTAXES
from ldm.sampling_settings import DECODERS, SamplingSettings
from ldm.serving.edits import enlarging_factor
from ldm.serving.fields import SamplingFields
from ldm.serving.responses import service_of

router = APIRouter(prefix="/v1", tags=["options"])

CHOICES = {
    "sampler": tuple(SPECS),
    "spacing": tuple(SPACINGS),
    "prompt_syntax": SYNTAXES,
    "long_prompts": LONG_PROMPTS,
    "decoder": DECODERS,
}
"""Values of settings that have a name each."""

TYPES = {str: "text", int: "integer", float: "number"}
"""Names of the types of settings that have a single value; others are not listed."""


@router.get("/options")
async def options(request: Request) -> dict[str, Any]:
    """List what requests can choose from. Defaults of a model are null until it is loaded."""
    service = service_of(request)
    folder = service.models.lora_folder
    return {
        "models": [_model(name, request) for name in service.models.names],
        "samplers": [
            {"name": name, "order": spec.order, "evaluations": spec.evaluations, "noise": spec.noise}
            for name, spec in SPECS.items()
        ],
        "loras": [] if folder is None else await run_in_threadpool(lora_names, folder),
        "controlnets": list(service.models.controlnets),
        "settings": _settings(),
        "limits": dataclasses.asdict(service.limits),
        "runs": hasattr(request.app.state, "runs"),
    }


def _model(name: str, request: Request) -> dict[str, Any]:
    pipe = service_of(request).models.peek(name)
    if pipe is None:
        return {"name": name, "defaults": None}
    config = pipe.model.config
    sampling = dataclasses.asdict(config.sampling)
    return {
        "name": name,
        "conditions": list(config.conditioner.input_keys),
        "divisor": config.first_stage.factor,
        "enlarge": enlarging_factor(pipe),
        "controlnets": list(pipe.model.controlnets.loaded),
        "defaults": {
            **{name: value for name, value in sampling.items() if name in SamplingFields.model_fields},
            "height": config.size[0],
            "width": config.size[1],
        },
    }


def _settings() -> list[dict[str, Any]]:
    """Describe the settings with a single value: name, type, help sentence, and the choices if there are any."""
    described = []
    for entry in dataclasses.fields(SamplingSettings):
        field = SamplingFields.model_fields.get(entry.name)
        kind = (
            None if field is None else next((TYPES[each] for each in TYPES if field.annotation == (each | None)), None)
        )
        if kind is not None:
            choices = CHOICES.get(entry.name)
            help_text = entry.metadata["help"]
            described.append({"name": entry.name, "type": kind, "help": help_text, "choices": choices})
    return described
