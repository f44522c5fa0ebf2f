"""Calls of a pipeline that differ in what they give to the networks: conditioners, samplers, kinds of guidance."""

from __future__ import annotations

from typing import Any

import torch

from ldm.conditioning import ConditionerConfig
from ldm.config import from_dict, to_dict
from ldm.diffusion import Guidance, Projection
from ldm.model import LatentDiffusion
from tests.conditioning.test_image import image
from tests.conditioning.test_transformer import SCRATCH, resolved
from tests.tiny import TOWER, tiny_model

BOXES = {"kind": "boxes", "classes": 2, "max_boxes": 2, "width": 16}
MAP = {"kind": "semantic", "classes": 2, "size": [8, 8], "latent_factor": 2}
SDXL = {"kind": "sdxl", "first": TOWER | {"width": 8}, "second": TOWER | {"width": 8, "embed_dim": 6}}

CONDITIONERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({"kind": "none"}, {}),
    "text": ({"kind": "text", "tower": TOWER}, {"prompt": "a red car"}),
    "class": ({"kind": "class", "classes": 3, "width": 8}, {"label": 1}),
    "boxes": (BOXES, {"condition": {"boxes": [[(1, 0.0, 0.0, 0.5, 0.5)]]}}),
    "semantic": (MAP, {"condition": {"semantic": torch.ones(1, 16, 16, dtype=torch.long)}}),
    "edges": ({"kind": "edges", "size": [8, 8], "latent_factor": 2}, {"condition": {"edges": torch.ones(1, 16, 16)}}),
    "inpaint": ({"kind": "inpaint"}, {"condition": {"inpaint": torch.ones(1, 5, 8, 8)}}),
    "low_res": (
        {"kind": "low_res", "factor": 2, "latent_factor": 2, "width": 8},
        {"condition": {"low_res": torch.zeros(1, 3, 8, 8)}},
    ),
    "several": (
        {"kind": "several", "parts": {"caption": {"kind": "text", "tower": TOWER}, "places": BOXES, "map": MAP}},
        {"prompt": "a red car", "condition": {"boxes": [[(1, 0.0, 0.0, 0.5, 0.5)]]}},
    ),
    "sdxl": (SDXL | {"size_embedding_width": 8}, {"prompt": "a red car"}),
    "image": (to_dict(image().config), {"condition": {"image": torch.zeros(1, 3, 8, 8)}}),
    "transformer": (to_dict(resolved(**SCRATCH)), {"prompt": "a red car"}),
}
"""A conditioner of each kind, and the conditions of an image."""

GUIDANCE: dict[str, Guidance] = {
    "none": Guidance(1.0),
    "classifier-free": Guidance(3.0),
    "rescaled": Guidance(3.0, rescale=0.7),
    "in an interval": Guidance(3.0, interval=(0.5, 3.0)),
    "thresholded": Guidance(3.0, threshold=0.95),
    "perturbed attention": Guidance(1.0, perturbed=2.0),
    "both": Guidance(3.0, perturbed=2.0),
    "projected": Guidance(3.0, projection=Projection(momentum=-0.5, norm_threshold=1.0)),
}


def model_with(conditioner: dict[str, Any]) -> LatentDiffusion:
    """A tiny model with this conditioner."""
    config = from_dict(ConditionerConfig, conditioner)
    network = {"kind": "unet", "levels": [{"width": 16, "blocks": 1, "depth": 1}], "heads": 2, "groups": 4}
    widths = {"context_width": config.context_width, "vector_width": config.vector_width}
    return tiny_model(conditioner=conditioner, denoiser=network | widths | {"in_channels": 4 + config.concat_channels})
