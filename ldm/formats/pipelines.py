"""Supported diffusers pipelines, each for one conditioner: the settings that it assumes and those in its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning import ConditionerConfig
from ldm.conditioning.sdxl import SDXLConditionerConfig
from ldm.conditioning.text import TextConditionerConfig
from ldm.formats.schedulers import GUIDANCE_SDXL
from ldm.formats.tokenizer import read_tokenizer
from ldm.model import SamplingConfig
from ldm.nn.network_format import Values


class StableDiffusion:
    """``StableDiffusionPipeline``: one text encoder.

    Attributes:
        name: beginning of the pipeline's class name.
        conditioner: class of the conditioner's config.
        encoders: for each text encoder, the values of its config that the pipeline assumes.
        unread: weights of the text encoders that the pipeline does not use, by the field of the config.
        latent_size: height and width of the latents if a folder does not give them.
    """

    name = "StableDiffusion"
    conditioner: type[ConditionerConfig] = TextConditionerConfig
    encoders: ClassVar[Mapping[str, Values]] = {"text_encoder": {"hidden_state": "last", "context_norm": True}}
    unread: ClassVar[Mapping[str, Values]] = {}
    latent_size = 64

    def family(self, denoiser: Values) -> str:
        """Return the family of published models, from the JSON config of the denoiser."""
        return "SD 2" if denoiser.get("use_linear_projection") else "SD 1"

    def scheduler_values(self, values: Values) -> dict[str, Any]:
        """Return the JSON of a scheduler with the changes that the pipeline makes to any scheduler."""
        return {**values, "steps_offset": 1, "clip_sample": False}

    def sampling(self, sampling: SamplingConfig) -> SamplingConfig:
        """Return the sampling defaults, with the pipeline's own changes."""
        return sampling

    def conditioner_fields(self, path: Path, index: Values, denoiser: Values) -> dict[str, Any]:
        """Return fields of the conditioner, from the index and the JSON config of the denoiser."""
        return {"pooled": denoiser.get("class_embed_type") == "projection"}

    def component_values(self, conditioner: Any) -> Mapping[str, Values]:
        """Return JSON values of components that follow from the conditioner."""
        return {}

    def tokenizers(self, tokenizer: Tokenizer, conditioner: Any) -> dict[str, Tokenizer]:
        """Return the tokenizers by folder, one for each text encoder."""
        return {"tokenizer": tokenizer}

    def index_values(self, conditioner: Any) -> dict[str, Any]:
        """Return further values of the index."""
        absent = {part: [None, None] for part in ("safety_checker", "feature_extractor", "image_encoder")}
        return {**absent, "requires_safety_checker": False}


class StableDiffusionXL(StableDiffusion):
    """``StableDiffusionXLPipeline``: two text encoders, and sizes of the image in the conditioning vector."""

    name = "StableDiffusionXL"
    conditioner = SDXLConditionerConfig
    encoders: ClassVar = {
        name: {"hidden_state": "penultimate", "context_norm": False} for name in ("text_encoder", "text_encoder_2")
    }
    unread: ClassVar = {"text_encoder": {"embed_dim": None}}
    latent_size = 128

    def family(self, denoiser: Values) -> str:
        return "SDXL"

    def scheduler_values(self, values: Values) -> dict[str, Any]:
        return dict(values)

    def sampling(self, sampling: SamplingConfig) -> SamplingConfig:
        return replace(sampling, guidance_scale=GUIDANCE_SDXL)

    def conditioner_fields(self, path: Path, index: Values, denoiser: Values) -> dict[str, Any]:
        return {
            "pad_id": read_tokenizer(path / "tokenizer_2").pad_id,
            "zeros_for_empty": bool(index.get("force_zeros_for_empty_prompt", True)),
            "size_embedding_width": denoiser.get("addition_time_embed_dim", 256),
        }

    def component_values(self, conditioner: SDXLConditionerConfig) -> Mapping[str, Values]:
        width = conditioner.size_embedding_width
        return {"denoiser": {"addition_embed_type": "text_time", "addition_time_embed_dim": width}}

    def tokenizers(self, tokenizer: Tokenizer, conditioner: SDXLConditionerConfig) -> dict[str, Tokenizer]:
        return {"tokenizer": tokenizer, "tokenizer_2": tokenizer.with_padding(conditioner.pad_id)}

    def index_values(self, conditioner: SDXLConditionerConfig) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": conditioner.zeros_for_empty}


PIPELINES = (StableDiffusionXL(), StableDiffusion())
"""Known pipelines; a folder is read as the first whose text encoders it has."""
