"""What a network is, told from the names and shapes of its tensors alone.

Two things cannot be: how many heads its attention has, and what the U-Net estimates. Heads follow the rule that all
published models follow (8 of them where the projections are convolutions, else 64 channels each); for the other,
see :mod:`ldm.formats.single_file`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.clip.text import TextTowerConfig
from ldm.clip.transformer import Activation
from ldm.denoiser import LevelSpec, UNetConfig
from ldm.errors import CheckpointError
from ldm.vae import AutoencoderKLConfig

HEADS = 8
"""Of the U-Net of SD 1, at every level."""

HEAD_WIDTH = 64
"""Of the U-Net of SD 2 and SDXL, and of the text towers of all."""

Tensors = Mapping[str, Tensor]


def unet(tensors: Tensors, source: object) -> UNetConfig:
    """A U-Net by its names in an LDM file, after ``model.diffusion_model.``.

    Raises:
        CheckpointError: it is one that ours cannot be.
    """
    try:
        levels: list[list[tuple[int, int]]] = [[]]
        for number in range(1, _count(tensors, r"input_blocks\.(\d+)\.")):
            block = f"input_blocks.{number}"
            if f"{block}.0.op.weight" in tensors:
                levels.append([])
                continue
            depth = _count(tensors, rf"input_blocks\.{number}\.1\.transformer_blocks\.(\d+)\.")
            levels[-1].append((tensors[f"{block}.0.out_layers.3.weight"].shape[0], depth))
        if any(len(set(level)) != 1 for level in levels):
            raise CheckpointError(f"{source}: the blocks of a level of its U-Net differ, which ldm's cannot.")
        keys = [name for name in tensors if name.endswith("attn2.to_k.weight")]
        projections = {tensors[name].ndim for name in tensors if name.endswith(".proj_in.weight")}
        conv = 4 in projections
        vector = tensors.get("label_emb.0.0.weight")
        return UNetConfig(
            levels=tuple(LevelSpec(level[0][0], len(level), level[0][1]) for level in levels),
            in_channels=tensors["input_blocks.0.0.weight"].shape[1],
            out_channels=tensors["out.2.weight"].shape[0],
            context_width=tensors[keys[0]].shape[1] if keys else None,
            vector_width=None if vector is None else vector.shape[1],
            middle_depth=_count(tensors, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
            heads=HEADS if conv else None,
            head_width=None if conv else HEAD_WIDTH,
            projection="conv" if conv else "linear",
        )
    except Exception as error:  # names and shapes may be anything
        raise _strange(source, "U-Net", error) from None


def vae(tensors: Tensors, source: object) -> AutoencoderKLConfig:
    """An autoencoder by its names in an LDM file, after ``first_stage_model.``.

    Raises:
        CheckpointError: it is one that ours cannot be.
    """
    try:
        levels = _count(tensors, r"encoder\.down\.(\d+)\.block\.")
        return AutoencoderKLConfig(
            widths=tuple(tensors[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)),
            blocks=_count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
            latent_channels=tensors["post_quant_conv.weight"].shape[0],
            image_channels=tensors["encoder.conv_in.weight"].shape[1],
            middle_attention="encoder.mid.attn_1.q.weight" in tensors,
        )
    except Exception as error:  # names and shapes may be anything
        raise _strange(source, "VAE", error) from None


def text_of_transformers(tensors: Tensors, source: object) -> TextTowerConfig:
    """A text tower by transformers' names, from ``text_model.`` on; OpenAI's activation.

    Raises:
        CheckpointError: it is one that ours cannot be.
    """
    prefix = "text_model.encoder.layers"
    return _text(
        tensors,
        source,
        token_embedding="text_model.embeddings.token_embedding.weight",
        position_embedding="text_model.embeddings.position_embedding.weight",
        layers=_count(tensors, rf"{re.escape(prefix)}\.(\d+)\."),
        fc1=f"{prefix}.0.mlp.fc1.weight",
        activation="quick_gelu",
        projection=tensors.get("text_projection.weight"),
    )


def text_of_open_clip(tensors: Tensors, source: object) -> TextTowerConfig:
    """A text tower by open_clip's names; its activation is the exact gelu.

    Raises:
        CheckpointError: it is one that ours cannot be.
    """
    return _text(
        tensors,
        source,
        token_embedding="token_embedding.weight",
        position_embedding="positional_embedding",
        layers=_count(tensors, r"transformer\.resblocks\.(\d+)\."),
        fc1="transformer.resblocks.0.mlp.c_fc.weight",
        activation="gelu",
        projection=tensors["text_projection"].T if "text_projection" in tensors else None,
    )


def _text(
    tensors: Tensors,
    source: object,
    *,
    token_embedding: str,
    position_embedding: str,
    layers: int,
    fc1: str,
    activation: Activation,
    projection: Tensor | None,
) -> TextTowerConfig:
    try:
        vocab_size, width = tensors[token_embedding].shape
        return TextTowerConfig(
            vocab_size=vocab_size,
            context_length=tensors[position_embedding].shape[0],
            width=width,
            layers=layers,
            heads=width // HEAD_WIDTH,
            mlp_ratio=tensors[fc1].shape[0] / width,
            activation=activation,
            embed_dim=None if projection is None else projection.shape[0],
        )
    except Exception as error:  # names and shapes may be anything
        raise _strange(source, "text tower", error) from None


def _count(tensors: Tensors, pattern: str) -> int:
    """How many numbers there are that the pattern's group matches, which are 0, 1, ... in a whole network."""
    return len({found[1] for name in tensors if (found := re.match(pattern, name))})


def _strange(source: object, what: str, error: Any) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    told = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
    return CheckpointError(f"the {what} of {source} is not one that can be told from its names and shapes: {told}.")
