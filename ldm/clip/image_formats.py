"""The image encoder in transformers folders, alone or in a CLIP."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from ldm.clip import text_formats
from ldm.clip.image import ViTConfig
from ldm.clip.text_formats import canonical_transformers_name, read_transformer, transformers_table, write_transformer
from ldm.errors import CheckpointError
from ldm.nn.network_format import (
    FolderFormat,
    KeyTable,
    NetworkKind,
    Rules,
    Values,
    checked,
    reading,
    register,
)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of pixels in [0, 1] of OpenAI's CLIP; the default of both libraries."""

TRANSFORMERS: Rules = (
    (r"^(class_embedding|patch_embedding)", r"embeddings.\1"),
    (r"^norm_in", "pre_layrnorm"),
    (r"^final_norm", "post_layernorm"),
    *text_formats.TRANSFORMERS,
)
OPEN_CLIP: Rules = (
    (r"^patch_embedding", "conv1"),
    (r"^norm_in", "ln_pre"),
    (r"^final_norm", "ln_post"),
    (r"^projection\.weight", "proj"),
    *text_formats.OPEN_CLIP,
)

DEFAULTS: Values = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
}
"""Defaults of transformers' ``CLIPVisionConfig``, for keys that a file omits."""

FIXED: Values = {**text_formats.FIXED, "num_channels": (3,)}


class ImageFolder(FolderFormat):
    """Format of transformers' ``CLIPVisionModelWithProjection``."""

    component = "image_encoder"
    library = "transformers"
    classes = ("clip_vision_model",)
    marks = ("vision_model.", "embeddings.patch_embedding.")
    weights = ("model", "pytorch_model")

    def build(self, config: ViTConfig, values: Values) -> nn.Module:
        return config.build(values.get("projection_dim", DEFAULTS["projection_dim"]))

    def key_table(self, config: ViTConfig, names: Iterable[str], values: Values) -> KeyTable:
        return transformers_table(names, TRANSFORMERS, "vision_model.", "visual_projection")

    def canonical_name(self, name: str) -> str | None:
        return canonical_transformers_name(name, "vision_model.")

    def read_config(self, values: Values, names: Collection[str], where: object) -> ViTConfig:
        given = checked(values, DEFAULTS, FIXED, where)
        with reading(where):
            config = ViTConfig(
                image_size=given["image_size"],
                patch_size=given["patch_size"],
                **read_transformer(given),
            )
        return with_pixels(config, values.get("preprocessor", {}), where)

    def write_config(self, config: ViTConfig, size: tuple[int, int], extra: Values) -> dict[str, Any]:
        """Convert a config to JSON; ``extra`` has ``projection_dim``, the width of the projection."""
        if config.pool != "class":
            raise CheckpointError(
                f"transformers' image encoder embeds the class token's state, not the {config.pool} of the patches; "
                "write an open_clip folder instead."
            )
        return {
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            **write_transformer(config),
            **extra,
        }

    def write_preprocessor(self, config: ViTConfig) -> dict[str, Any]:
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": config.image_size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": config.image_size, "width": config.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(config.mean),
            "image_std": list(config.std),
            "do_convert_rgb": True,
        }


def with_pixels(config: ViTConfig, preprocessor: Any, where: object) -> ViTConfig:
    """Set mean and standard deviation of the pixels to those of transformers' image processor.

    Raises:
        CheckpointError: the processor does not scale pixels to [0, 1] first.
    """
    values = preprocessor.get("image_processor", preprocessor)
    if not isinstance(values, dict) or not values.get("do_rescale", True):
        raise CheckpointError(f"the image processor of {where} does not scale pixels to [0, 1], as ldm does.")
    if not values.get("do_normalize", True):
        return normalized(config, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), where)
    return normalized(config, values.get("image_mean") or MEAN, values.get("image_std") or STD, where)


def normalized(config: ViTConfig, mean: Any, std: Any, where: object) -> ViTConfig:
    """Set mean and standard deviation of the pixels to the values of a file."""
    with reading(where):
        (red, green, blue), (red_std, green_std, blue_std) = map(float, mean), map(float, std)
        return replace(config, mean=(red, green, blue), std=(red_std, green_std, blue_std))


register(NetworkKind(ViTConfig, "image encoder", folders=(ImageFolder(),)))
