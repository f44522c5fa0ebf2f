"""The records of generated images as requests that make them again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ldm.diffusion import OPTIONS
from ldm.modalities import MODALITIES
from ldm.serving.edits import EditFields


def request_of(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the fields of the job that makes an image again; None if there is no record of one, or it is not valid.

    Args:
        record: the ``info`` of an image.
    """
    if "settings" not in record:
        return None
    try:
        if "request" in record:
            fields = json.loads(record["request"])
        else:
            fields = _sampling_fields(json.loads(record["settings"]))
            fields |= {name: record[name] for name in ("prompt", "negative_prompt") if name in record}
            fields |= {"label": int(record["label"])} if "label" in record else {}
        valid = EditFields.model_validate({**fields, "seed": int(record["seed"])})
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):  # pydantic's is a ValueError
        return None
    return valid.model_dump(exclude_none=True)


def is_complete(record: Mapping[str, Any]) -> bool:
    """Return whether the request makes the same image; it does not if an image that was given was not kept."""
    settings = record.get("settings", "")
    return "request" in record or not ('"task"' in settings or '"controlnets"' in settings)


def _sampling_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded settings of an image, with options of the sampler, of guidance and conditions apart."""
    fields = {name: value for name, value in settings.items() if name in EditFields.model_fields}
    groups = {
        "sampler_options": {name: value for name, value in settings.items() if name in OPTIONS},
        "guidance": {
            name.removeprefix("guidance_"): value
            for name, value in settings.items()
            if name.startswith("guidance_") and name != "guidance_scale"
        },
        "condition": {name: [value] for name, value in settings.items() if name in MODALITIES},
    }
    fields.pop("strength", None)  # without the image that it is about
    fields.pop("eta", None)  # an option of the sampler
    fields.pop("controlnets", None)  # without their images
    if "sigmas" in fields:
        fields.pop("num_inference_steps", None)
    return fields | {name: group for name, group in groups.items() if group}
