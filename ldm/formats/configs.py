"""The ``config.json`` of diffusers' and transformers' networks to configs of ours, and back.

Whatever such a file says that our networks cannot do is refused: a network that is nearly right makes wrong images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ldm.clip.image import ViTConfig
from ldm.clip.text import TextTowerConfig
from ldm.denoiser import LevelSpec, UNetConfig
from ldm.errors import CheckpointError, LdmError
from ldm.vae import AutoencoderKLConfig

Values = Mapping[str, Any]
"""Of a ``config.json``."""

UNET_DEFAULTS: Values = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "cross_attention_dim": 1280,
    "use_linear_projection": False,
    "norm_num_groups": 32,
    "dropout": 0.0,
    "class_embed_type": None,
    "addition_embed_type": None,
    "projection_class_embeddings_input_dim": None,
}
"""Of diffusers' ``UNet2DConditionModel``, for what a file leaves out."""

UNET_FIXED: Values = {
    "act_fn": ("silu",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "downsample_padding": (1,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "center_input_sample": (False,),
    "mid_block_scale_factor": (1,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "dual_cross_attention": (False,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "class_embed_type": (None, "projection"),
    "addition_embed_type": (None, "text_time"),
    **dict.fromkeys(
        (
            "cross_attention_norm",
            "encoder_hid_dim",
            "encoder_hid_dim_type",
            "mid_block_only_cross_attention",
            "num_class_embeds",
            "reverse_transformer_layers_per_block",
            "time_cond_proj_dim",
            "time_embedding_act_fn",
            "time_embedding_dim",
            "timestep_post_act",
        ),
        (None,),
    ),
}
"""What our U-Net is by construction; diffusers' one has to say the same, or nothing."""

VAE_DEFAULTS: Values = {
    "in_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
}
VAE_FIXED: Values = {"act_fn": ("silu",), "use_quant_conv": (True,), "use_post_quant_conv": (True,)}

TEXT_DEFAULTS: Values = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
}
TEXT_FIXED: Values = {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,)}

IMAGE_DEFAULTS: Values = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
}
IMAGE_FIXED: Values = {**TEXT_FIXED, "num_channels": (3,)}

LEGACY_EOS = 2
"""The ``eos_token_id`` that older versions of transformers wrote, which means the highest token."""


def read_unet(values: Values, where: object) -> UNetConfig:
    """The U-Net of a ``config.json`` of diffusers' ``UNet2DConditionModel``.

    Raises:
        CheckpointError: it is one that ours cannot be.
    """
    given = checked(values, UNET_DEFAULTS, UNET_FIXED, where)
    with reading(where):
        widths = list(given["block_out_channels"])
        attends = [name == "CrossAttnDownBlock2D" for name in given["down_block_types"]]
        known = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
        mirrored = [name == "CrossAttnUpBlock2D" for name in given["up_block_types"]][::-1]
        others = {*given["down_block_types"], *given["up_block_types"]} - known
        if others or attends != mirrored or len(attends) != len(widths) or _any(given.get("only_cross_attention")):
            raise CheckpointError(
                f"{where}: ldm's U-Net has blocks of {', '.join(sorted(known))} alone, the way up mirroring the way down, "
                f"not {', '.join([*given['down_block_types'], *given['up_block_types']])}; take another model."
            )
        blocks = _each(given["layers_per_block"], widths)
        depths = _each(given["transformer_layers_per_block"], widths)
        counts = _each(given["num_attention_heads"] or given["attention_head_dim"], widths)
        heard = [i for i in range(len(widths)) if attends[i] or i == len(widths) - 1]
        head_widths = {widths[i] // counts[i] for i in heard}
        counted = {counts[i] for i in heard}
        if len(counted) > 1 and len(head_widths) > 1:
            raise CheckpointError(
                f"{where}: attention_head_dim {counts} is neither one number of heads nor one width of heads; "
                "ldm's U-Net has the one or the other at all levels."
            )
        has_vector = given["class_embed_type"] or given["addition_embed_type"]
        return UNetConfig(
            levels=tuple(LevelSpec(width, blocks[i], depths[i] if attends[i] else 0) for i, width in enumerate(widths)),
            in_channels=given["in_channels"],
            out_channels=given["out_channels"],
            context_width=given["cross_attention_dim"],
            vector_width=given["projection_class_embeddings_input_dim"] if has_vector else None,
            middle_depth=depths[-1],
            heads=counts[-1] if len(counted) == 1 else None,
            head_width=head_widths.pop() if len(counted) > 1 else None,
            projection="linear" if given["use_linear_projection"] else "conv",
            groups=given["norm_num_groups"],
            dropout=given["dropout"],
        )


def write_unet(config: UNetConfig, sample_size: tuple[int, int], vector: str) -> dict[str, Any]:
    """The inverse of :func:`read_unet`.

    Args:
        config: of the U-Net.
        sample_size: height and width of the latents.
        vector: what the embedding of the conditioning vector is called; see :func:`ldm.formats.names.unet_diffusers`.

    Raises:
        CheckpointError: diffusers has no such U-Net.
    """
    levels = config.levels
    depths = [level.depth or config.middle_depth for level in levels]
    if config.middle_depth == 0 or levels[-1].depth not in (0, config.middle_depth):
        raise CheckpointError(
            f"diffusers' U-Net attends in the middle as often as at its last level, not {config.middle_depth} and "
            f"{levels[-1].depth} times; write an LDM file instead."
        )
    if config.context_width is None:
        raise CheckpointError("diffusers' U-Net attends to a context, but this one has none; write a native file.")
    heads = [config.heads or level.width // (config.head_width or 1) for level in levels]
    mark = {"add_embedding": "addition_embed_type", "class_embedding": "class_embed_type"}[vector]
    kind = {"add_embedding": "text_time", "class_embedding": "projection"}[vector]
    attends = [level.depth > 0 for level in levels]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size[0] if sample_size[0] == sample_size[1] else list(sample_size),
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": [level.width for level in levels],
        "down_block_types": ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)],
        "layers_per_block": _one(level.blocks for level in levels),
        "transformer_layers_per_block": _one(depths),
        "attention_head_dim": _one(heads),
        "cross_attention_dim": config.context_width,
        "use_linear_projection": config.projection == "linear",
        "norm_num_groups": config.groups,
        "dropout": config.dropout,
        **({mark: kind, "projection_class_embeddings_input_dim": config.vector_width} if config.vector_width else {}),
    }


def read_vae(values: Values, where: object) -> AutoencoderKLConfig:
    """The autoencoder of a ``config.json`` of diffusers' ``AutoencoderKL``.

    Raises:
        CheckpointError: it is one that ours cannot be.
    """
    given = checked(values, VAE_DEFAULTS, VAE_FIXED, where)
    with reading(where):
        kinds = {*given.get("down_block_types", ()), *given.get("up_block_types", ())}
        if kinds - {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
            raise CheckpointError(f"{where}: ldm's autoencoder has no {', '.join(sorted(kinds))}; take another model.")
        return AutoencoderKLConfig(
            widths=tuple(given["block_out_channels"]),
            blocks=given["layers_per_block"],
            latent_channels=given["latent_channels"],
            image_channels=given["in_channels"],
            groups=given["norm_num_groups"],
            middle_attention=given["mid_block_add_attention"],
        )


def write_vae(config: AutoencoderKLConfig, size: tuple[int, int], scaling_factor: float) -> dict[str, Any]:
    """The inverse of :func:`read_vae`, with the factor that normalises the latents; ``size`` in pixels."""
    levels = len(config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.middle_attention,
        "act_fn": "silu",
        "sample_size": max(size),
        "scaling_factor": scaling_factor,
    }


def read_text(values: Values, where: object, projected: bool) -> TextTowerConfig:
    """The text tower of a ``config.json`` of transformers' CLIP, its context the last hidden state, normed.

    ``projected`` says whether the weights have a projection.

    Raises:
        CheckpointError: it is one that ours cannot be.
    """
    given = checked(values, TEXT_DEFAULTS, TEXT_FIXED, where)
    with reading(where):
        eos = given["eos_token_id"]
        return TextTowerConfig(
            vocab_size=given["vocab_size"],
            context_length=given["max_position_embeddings"],
            **_read_transformer(given),
            embed_dim=given["projection_dim"] if projected else None,
            eos_id=None if eos in (None, LEGACY_EOS) or eos >= given["vocab_size"] - 1 else eos,
        )


def write_text(config: TextTowerConfig) -> dict[str, Any]:
    """The inverse of :func:`read_text`; which hidden state is the context is for the pipeline to know, not for this file."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if config.embed_dim else "CLIPTextModel"],
        "dtype": "float32",  # to load in by default, as diffusers loads all others; else transformers 5 takes the stored one
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        **_write_transformer(config),
        "projection_dim": config.embed_dim or config.width,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": LEGACY_EOS if config.eos_id is None else config.eos_id,
    }


def read_image(values: Values, where: object) -> ViTConfig:
    """The image tower of a ``config.json`` of transformers' CLIP, of pixels in [-1, 1].

    Raises:
        CheckpointError: it is one that ours cannot be.
    """
    given = checked(values, IMAGE_DEFAULTS, IMAGE_FIXED, where)
    with reading(where):
        return ViTConfig(
            image_size=given["image_size"],
            patch_size=given["patch_size"],
            **_read_transformer(given),
        )


def write_image(config: ViTConfig, embed_dim: int) -> dict[str, Any]:
    """The inverse of :func:`read_image`, for a projection to ``embed_dim``.

    Raises:
        CheckpointError: transformers has no such image tower.
    """
    if config.pool != "class":
        raise CheckpointError(
            f"transformers' image tower embeds the class token's state, not the {config.pool} of the patches; "
            "write an open_clip folder instead."
        )
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        **_write_transformer(config),
        "projection_dim": embed_dim,
    }


def _read_transformer(given: Values) -> dict[str, Any]:
    """What the configs of both towers of CLIP have in common."""
    return {
        "width": given["hidden_size"],
        "layers": given["num_hidden_layers"],
        "heads": given["num_attention_heads"],
        "mlp_ratio": ratio(given["intermediate_size"], given["hidden_size"]),
        "activation": given["hidden_act"],
    }


def _write_transformer(config: TextTowerConfig | ViTConfig) -> dict[str, Any]:
    """The inverse of :func:`_read_transformer`."""
    return {
        "hidden_size": config.width,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
    }


def checked(values: Values, defaults: Values, fixed: Values, where: object) -> dict[str, Any]:
    """The values over the defaults, if nothing among them is other than it has to be."""
    for name, allowed in fixed.items():
        if name in values and values[name] not in allowed:
            known = " or ".join(map(repr, allowed))
            raise CheckpointError(
                f"{where}: {name} is {values[name]!r}, but ldm knows {known} alone; take another model."
            )
    return {**defaults, **values}


def ratio(hidden: int, width: int) -> float:
    """``hidden / width``, rounded so that ``int(width * ratio)`` is ``hidden`` again."""
    quotient = hidden / width
    return quotient if int(width * quotient) == hidden else math.nextafter(quotient, math.inf)


def _each(value: Any, widths: list[int]) -> list[int]:
    """One whole number for each level."""
    values = [value] * len(widths) if isinstance(value, int) else list(value)
    if len(values) != len(widths) or not all(isinstance(each, int) for each in values):
        raise ValueError(f"{value!r} is not one whole number for each of {len(widths)} levels")
    return values


def _one(values: Any) -> Any:
    """A list, or what all of it is."""
    listed = list(values)
    return listed[0] if len(set(listed)) == 1 else listed


def _any(value: Any) -> bool:
    return any(value) if isinstance(value, list | tuple) else bool(value)


@contextmanager
def reading(where: object) -> Iterator[None]:
    """While a network is made of the values of a file, which may be anything, whatever goes wrong is told with its name.

    Raises:
        CheckpointError: in one sentence.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        told = str(error).rstrip(".") if isinstance(error, LdmError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{where} does not describe a network that ldm can be: {told}.") from None
