"""The autoencoder in LDM files and diffusers folders.

``decoder.up`` begins with the finest level in LDM files, and with the coarsest in ldm's network.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm.errors import CheckpointError
from ldm.nn.network_format import (
    MATRIX,
    SAME,
    FolderFormat,
    KeyMapping,
    KeyTable,
    Layout,
    NetworkKind,
    Rules,
    SingleFileFormat,
    State,
    Values,
    attention_names,
    checked,
    count,
    inferring,
    reading,
    register,
    renamed,
)
from ldm.vae.autoencoder import AutoencoderKLConfig

PREFIX = "first_stage_model."

SD3_LATENTS = (1.5305, 0.0609)
"""Scaling and shift factor of SD 3. FLUX (0.3611, 0.1159) has an autoencoder of the same names and shapes."""

MATRIX_OR_CONV = Layout(MATRIX.read, SAME.write)
"""Layout of attention weights in LDM files: 1 x 1 convolutions, but matrices in files converted by other tools."""

DIFFUSERS: Rules = (
    (r"\.down\.", ".down_blocks."),
    (r"\.up\.", ".up_blocks."),
    (r"\.block\.", ".resnets."),
    (r"\bshortcut", "conv_shortcut"),
    (r"\bnorm_out", "conv_norm_out"),
    (r"\.mid\.block_1", ".mid_block.resnets.0"),
    (r"\.mid\.block_2", ".mid_block.resnets.1"),
    (r"\.mid\.attn_1\.norm", ".mid_block.attentions.0.group_norm"),
    (r"\.mid\.attn_1\.([qkv])\b", r".mid_block.attentions.0.to_\1"),
    (r"\.mid\.attn_1\.proj_out", ".mid_block.attentions.0.to_out.0"),
)
NAMES_LDM: Rules = (
    *attention_names(r"attn_1", "q", "k", "v", "proj_out"),
    (r"\battn_1\.group_norm\.", "attn_1.norm."),
)
NAMES_DIFFUSERS: Rules = (
    *attention_names(r"attentions\.0", "to_q", "to_k", "to_v", "to_out.0"),
    (r"\battentions\.0\.norm\.", "attentions.0.group_norm."),
)
"""Names of the attention layer as other versions of diffusers (before 0.15) and other tools have them."""

UNDOTTED: Rules = (
    (r"^(encoder|decoder)", r"\1."),
    (r"\.(down|up)(\d+)(block|attn)(\d+)", r".\1.\2.\3.\4."),
    (r"\.(down|up)(\d+)((?:down|up)sample)", r".\1.\2.\3."),
    (r"\.mid(block_\d|attn_\d)", r".mid.\1."),
    (r"(weight|bias)$", r".\1"),
    (r"\.+", "."),
)
"""Rules that restore the dots of a name in an LDM file; the names of EMA weights omit them."""

DEFAULTS: Values = {
    "in_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
FIXED: Values = {"act_fn": ("silu",)}


class AutoencoderSingleFile(SingleFileFormat):
    """Format of the autoencoder in LDM files."""

    prefixes: ClassVar = {PREFIX: "first_stage"}
    marks = ("encoder.down.",)

    def key_table(self, config: AutoencoderKLConfig, names: Iterable[str], values: Values) -> KeyTable:
        table = {}
        for name in names:
            way = "down" if name.startswith("encoder") else "up"
            theirs = renamed(name, (("resample", f"{way}sample"), ("shortcut", "nin_shortcut")))
            level = re.match(r"decoder\.up\.(\d+)", theirs)
            if level is not None:
                theirs = f"decoder.up.{len(config.widths) - 1 - int(level[1])}{theirs[level.end() :]}"
            table[name] = KeyMapping(theirs, MATRIX_OR_CONV if _is_attention(name) else SAME)
        return table

    def canonical_name(self, name: str) -> str | None:
        """Return the canonical name; training checkpoints also hold the discriminator, under ``loss.``, which is not used."""
        if name.startswith("loss."):
            return None
        return renamed(name if "." in name else renamed(name, UNDOTTED), NAMES_LDM)

    def infer_config(self, tensors: State, source: object) -> AutoencoderKLConfig:
        with inferring("VAE", source):
            return _inferred(tensors, "down", "block", "mid.attn_1.q")

    def latents(self, config: AutoencoderKLConfig) -> tuple[float, float] | None:
        return None if config.quant_conv else SD3_LATENTS


class AutoencoderDiffusersFile(AutoencoderSingleFile):
    """Format of the autoencoder in single files with the names of a diffusers folder, which are only read."""

    marks = ("encoder.down_blocks.",)

    def key_table(self, config: AutoencoderKLConfig, names: Iterable[str], values: Values) -> KeyTable:
        return AutoencoderFolder().key_table(config, names, values)

    def canonical_name(self, name: str) -> str:
        return renamed(name, NAMES_DIFFUSERS)

    def infer_config(self, tensors: State, source: object) -> AutoencoderKLConfig:
        with inferring("VAE", source):
            return _inferred(tensors, "down_blocks", "resnets", "mid_block.attentions.0.to_q")

    def prefix(self, config: AutoencoderKLConfig, component: str, components: Collection[str]) -> str | None:
        return None


class AutoencoderFolder(FolderFormat):
    """Format of diffusers' ``AutoencoderKL``."""

    component = "first_stage"
    library = "diffusers"
    folders: ClassVar = {"vae": "first_stage"}
    marks = ("encoder.down_blocks.",)
    classes = ("AutoencoderKL",)
    weights = ("diffusion_pytorch_model",)

    def key_table(self, config: AutoencoderKLConfig, names: Iterable[str], values: Values) -> KeyTable:
        table = {}
        for name in names:
            way = "down" if name.startswith("encoder") else "up"
            theirs = renamed(name, (("resample", f"{way}samplers.0"), *DIFFUSERS))
            table[name] = KeyMapping(theirs, MATRIX if _is_attention(name) else SAME)
        return table

    def canonical_name(self, name: str) -> str:
        return renamed(name, NAMES_DIFFUSERS)

    def read_config(self, values: Values, names: Collection[str], where: object) -> AutoencoderKLConfig:
        given = checked(values, DEFAULTS, FIXED, where)
        with reading(where):
            kinds = {*given.get("down_block_types", ()), *given.get("up_block_types", ())}
            if kinds - {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
                raise CheckpointError(
                    f"{where}: ldm's autoencoder has no {', '.join(sorted(kinds))}; use another model."
                )
            if given["use_quant_conv"] != given["use_post_quant_conv"]:
                raise CheckpointError(
                    f"{where}: use_quant_conv is {given['use_quant_conv']}, but use_post_quant_conv is "
                    f"{given['use_post_quant_conv']}; ldm's autoencoder has both convolutions or none; use another model."
                )
            return AutoencoderKLConfig(
                widths=tuple(given["block_out_channels"]),
                blocks=given["layers_per_block"],
                latent_channels=given["latent_channels"],
                image_channels=given["in_channels"],
                groups=given["norm_num_groups"],
                middle_attention=given["mid_block_add_attention"],
                quant_conv=given["use_quant_conv"],
                overflows_fp16=bool(values.get("force_upcast")),
            )

    def write_config(self, config: AutoencoderKLConfig, size: tuple[int, int], extra: Values) -> dict[str, Any]:
        levels = len(config.widths)
        return {
            "_class_name": self.classes[0],
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
            **({"force_upcast": True} if config.overflows_fp16 else {}),
            **({} if config.quant_conv else {"use_quant_conv": False, "use_post_quant_conv": False}),
            **extra,
        }


def fold(config: AutoencoderKLConfig, state: State, mean: Tensor, factor: Tensor) -> State | None:
    """Return weights that encode to ``(z - mean) / factor`` and decode that, with ``mean`` and ``factor [c]`` in fp64.

    Of the last convolution of the encoder, the rows of the mean get bias - mean and are divided by the factor; the biases of
    the log-variance get - 2 ln(factor). The first convolution of the decoder gets W diag(factor) and b + W mean. Without quant
    convolutions it is padded by zeros, which would have to be -mean / factor: then only a mean of 0 can be folded.
    """
    if not config.quant_conv and mean.any():
        return None
    last, first = ("quant_conv", "post_quant_conv") if config.quant_conv else ("encoder.conv_out", "decoder.conv_in")
    folded = dict(state)
    weight, bias = (state[f"{last}.{name}"].double() for name in ("weight", "bias"))
    (weight_mean, weight_var), (bias_mean, bias_var) = weight.chunk(2), bias.chunk(2)
    folded[f"{last}.weight"] = torch.cat([weight_mean / factor[:, None, None, None], weight_var])
    folded[f"{last}.bias"] = torch.cat([(bias_mean - mean) / factor, bias_var - 2 * factor.log()])
    weight, bias = (state[f"{first}.{name}"].double() for name in ("weight", "bias"))
    folded[f"{first}.weight"] = weight * factor[:, None, None]
    folded[f"{first}.bias"] = bias + weight.sum((2, 3)) @ mean
    return {name: tensor.to(state[name].dtype) for name, tensor in folded.items()}


def _inferred(tensors: State, level: str, block: str, query: str) -> AutoencoderKLConfig:
    """Infer a config from shapes and the names of levels, their blocks, and the attention's query in the encoder."""
    levels = count(tensors, rf"encoder\.{level}\.(\d+)\.{block}\.")
    return AutoencoderKLConfig(
        widths=tuple(tensors[f"encoder.{level}.{i}.{block}.0.conv2.weight"].shape[0] for i in range(levels)),
        blocks=count(tensors, rf"encoder\.{level}\.0\.{block}\.(\d+)\."),
        latent_channels=tensors["decoder.conv_in.weight"].shape[1],
        image_channels=tensors["encoder.conv_in.weight"].shape[1],
        middle_attention=f"encoder.{query}.weight" in tensors,
        quant_conv="quant_conv.weight" in tensors,
    )


def _is_attention(name: str) -> bool:
    return re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) is not None


register(
    NetworkKind(
        AutoencoderKLConfig,
        "VAE",
        (AutoencoderSingleFile(), AutoencoderDiffusersFile()),
        (AutoencoderFolder(),),
        fold=fold,
    )
)
