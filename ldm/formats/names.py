"""Where the tensors of our networks lie in foreign files: a table of names for each network and format.

A table maps each name of a state of ours to a :class:`Place`. It follows from the config by rule, so that depths and
widths of our own map like those of Stable Diffusion. Blocks are numbered differently:

|                  | ours                      | LDM file                        | diffusers folder                    |
|------------------|---------------------------|---------------------------------|-------------------------------------|
| U-Net, down      | one list                  | ``input_blocks``, one later     | by level, downsampling at its end   |
| U-Net, up        | upsampling before a block | upsampling at the end of a block| by level, upsampling at its end     |
| VAE, decoder.up  | the coarsest level first  | the finest first                | the coarsest first                  |

What is called differently inside of a block stands in the lists of rules below.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.denoiser import UNetConfig
from ldm.errors import CheckpointError, counted
from ldm.vae import AutoencoderKLConfig

Rules = Sequence[tuple[str, str]]
"""Patterns of our names, and what stands in their place in another's; applied in order."""


@dataclass(frozen=True)
class Layout:
    """How a tensor of theirs becomes ours (``read``), and all of ours that share it become theirs (``write``)."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[list[Tensor]], Tensor]


SAME = Layout(lambda theirs: theirs, lambda ours: ours[0])
TRANSPOSED = Layout(lambda theirs: theirs.T, lambda ours: ours[0].T)
MATRIX = Layout(
    lambda theirs: theirs[:, :, None, None] if theirs.ndim == 2 else theirs, lambda ours: ours[0].flatten(1)
)
"""A 1 x 1 convolution of ours, and a linear layer of theirs (or already a convolution)."""

THIRDS = tuple(Layout(lambda theirs, i=i: theirs.tensor_split(3)[i], torch.cat) for i in range(3))  # type: ignore[misc]
"""Queries, keys and values of ours, one tensor of theirs."""


class Place(NamedTuple):
    """Where a tensor of ours lies in a foreign file."""

    name: str
    layout: Layout = SAME


Table = Mapping[str, Place]
"""Our names to their places."""


def gather(
    tensors: Mapping[str, Tensor], table: Table, wanted: Mapping[str, Tensor], source: object
) -> dict[str, Tensor]:
    """The state of ours that foreign ``tensors`` hold, by views.

    Args:
        tensors: by their names; all of them have to have a place in the table.
        wanted: the state of the network on the meta device, for the shapes.
        source: named in errors.

    Raises:
        CheckpointError: listing the first of their names that are missing, unexpected or of another shape.
    """
    expected = {place.name for place in table.values()}
    missing = [name for name in dict.fromkeys(place.name for place in table.values()) if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    state, misshapen = {}, {}
    for ours, place in table.items():
        if place.name in tensors:
            theirs = tensors[place.name]
            state[ours] = place.layout.read(theirs)
            if state[ours].shape != wanted[ours].shape:
                misshapen[place.name] = list(theirs.shape)
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "of a shape that does not fit": [f"{name} {shape}" for name, shape in misshapen.items()],
    }
    if any(problems.values()):
        details = (f"{what:<30} {name}" for what, listed in problems.items() for name in listed)
        raise CheckpointError(f"{source} does not hold what its config says: {counted(problems)}.", details)
    return state


def scatter(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The inverse of :func:`gather`: a state of ours under their names."""
    shared: dict[str, list[str]] = {}
    for ours, place in table.items():
        shared.setdefault(place.name, []).append(ours)
    return {name: table[ours[0]].layout.write([state[each] for each in ours]) for name, ours in shared.items()}


def renamed(name: str, rules: Rules) -> str:
    """A name with all rules applied in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


# The U-Net


RESIDUAL_LDM: Rules = (
    (r"\bnorm1", "in_layers.0"),
    (r"\bconv1", "in_layers.2"),
    (r"\bembedding", "emb_layers.1"),
    (r"\bnorm2", "out_layers.0"),
    (r"\bconv2", "out_layers.3"),
    (r"\bshortcut", "skip_connection"),
)
RESIDUAL_DIFFUSERS: Rules = ((r"\bembedding", "time_emb_proj"), (r"\bshortcut", "conv_shortcut"))
TRANSFORMER: Rules = ((r"\bblocks\.", "transformer_blocks."), (r"\bto_out", "to_out.0"), (r"\bff\.", "ff.net."))
UNET_LDM: Rules = (
    (r"^noise_embedding\.mlp", "time_embed"),
    (r"^vector_embedding", "label_emb.0"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^norm_out", "out.0"),
    (r"^conv_out", "out.2"),
)
UNET_DIFFUSERS: Rules = (
    (r"^noise_embedding\.mlp\.0", "time_embedding.linear_1"),
    (r"^noise_embedding\.mlp\.2", "time_embedding.linear_2"),
    (r"^norm_out", "conv_norm_out"),
)


def unet_ldm(config: UNetConfig, state: Iterable[str]) -> Table:
    """Names of a U-Net in an LDM file, after ``model.diffusion_model.``; ``state`` are those of ours."""
    blocks = {"middle.0.residual": "middle_block.0"}
    if config.middle_depth:
        blocks |= {"middle.0.transformer": "middle_block.1", "middle.1.residual": "middle_block.2"}
    else:
        blocks |= {"middle.1.residual": "middle_block.1"}
    down = [depth for level in config.levels for depth in [None, *[level.depth] * level.blocks]][1:]
    for i, depth in enumerate(down):
        if depth is None:
            blocks[f"down.{i}.conv"] = f"input_blocks.{i + 1}.0.op"
        else:
            blocks[f"down.{i}.residual"] = f"input_blocks.{i + 1}.0"
            blocks[f"down.{i}.transformer"] = f"input_blocks.{i + 1}.1"
    up = [level.depth for level in reversed(config.levels) for _ in range(level.blocks + 1)]
    for j, _ in enumerate(up):
        blocks[f"up.{j}.residual"] = f"output_blocks.{j}.0"
        blocks[f"up.{j}.transformer"] = f"output_blocks.{j}.1"
        if j:
            blocks[f"up.{j}.upsample"] = f"output_blocks.{j - 1}.{2 if up[j - 1] else 1}"
    return _unet(state, blocks, RESIDUAL_LDM, UNET_LDM)


def unet_diffusers(config: UNetConfig, state: Iterable[str], vector: str) -> Table:
    """Names of a U-Net in a diffusers folder.

    ``vector`` is what the embedding of the conditioning vector is called: ``add_embedding`` (SDXL) or ``class_embedding``.
    """
    blocks = {
        "middle.0.residual": "mid_block.resnets.0",
        "middle.0.transformer": "mid_block.attentions.0",
        "middle.1.residual": "mid_block.resnets.1",
    }
    i = j = 0
    for number, level in enumerate(config.levels):
        if number:
            blocks[f"down.{i}.conv"] = f"down_blocks.{number - 1}.downsamplers.0.conv"
            i += 1
        for block in range(level.blocks):
            blocks[f"down.{i}.residual"] = f"down_blocks.{number}.resnets.{block}"
            blocks[f"down.{i}.transformer"] = f"down_blocks.{number}.attentions.{block}"
            i += 1
    for number, level in enumerate(reversed(config.levels)):
        if number:
            blocks[f"up.{j}.upsample"] = f"up_blocks.{number - 1}.upsamplers.0"
        for block in range(level.blocks + 1):
            blocks[f"up.{j}.residual"] = f"up_blocks.{number}.resnets.{block}"
            blocks[f"up.{j}.transformer"] = f"up_blocks.{number}.attentions.{block}"
            j += 1
    embedding = ((r"^vector_embedding\.0", f"{vector}.linear_1"), (r"^vector_embedding\.2", f"{vector}.linear_2"))
    return _unet(state, blocks, RESIDUAL_DIFFUSERS, (*UNET_DIFFUSERS, *embedding))


def _unet(state: Iterable[str], blocks: Mapping[str, str], residual: Rules, others: Rules) -> Table:
    inside = {"residual": residual, "transformer": TRANSFORMER}
    table = {}
    for name in state:
        block = re.match(r"(?:down|middle|up)\.\d+\.(\w+)", name)
        if block is None:
            table[name] = Place(renamed(name, others))
        else:
            rest = renamed(name[block.end() :], inside.get(block[1], ()))
            table[name] = Place(blocks[block[0]] + rest)
    return table


# The autoencoder


VAE_DIFFUSERS: Rules = (
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


def vae_ldm(config: AutoencoderKLConfig, state: Iterable[str]) -> Table:
    """Names of an autoencoder in an LDM file, after ``first_stage_model.``."""
    table = {}
    for name in state:
        way = "down" if name.startswith("encoder") else "up"
        theirs = renamed(name, (("resample", f"{way}sample"), ("shortcut", "nin_shortcut")))
        level = re.match(r"decoder\.up\.(\d+)", theirs)
        if level is not None:
            theirs = f"decoder.up.{len(config.widths) - 1 - int(level[1])}{theirs[level.end() :]}"
        table[name] = Place(theirs, MATRIX_OF_LDM if _is_attention(name) else SAME)
    return table


def vae_diffusers(config: AutoencoderKLConfig, state: Iterable[str]) -> Table:
    """Names of an autoencoder in a diffusers folder."""
    table = {}
    for name in state:
        way = "down" if name.startswith("encoder") else "up"
        theirs = renamed(name, (("resample", f"{way}samplers.0"), *VAE_DIFFUSERS))
        table[name] = Place(theirs, MATRIX if _is_attention(name) else SAME)
    return table


MATRIX_OF_LDM = Layout(MATRIX.read, SAME.write)
"""The attention of the autoencoder in an LDM file: 1 x 1 convolutions, but matrices in files that came from elsewhere."""


def _is_attention(name: str) -> bool:
    return re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name) is not None


# CLIP


TEXT_TRANSFORMERS: Rules = (
    (r"^token_embedding", "embeddings.token_embedding"),
    (r"^position_embedding$", "embeddings.position_embedding.weight"),
    (r"^blocks\.", "encoder.layers."),
    (r"\battn\.to_([qkv])", r"self_attn.\1_proj"),
    (r"\battn\.to_out", "self_attn.out_proj"),
    (r"\bnorm([12])", r"layer_norm\1"),
    (r"\bfc([12])", r"mlp.fc\1"),
    (r"^final_norm", "final_layer_norm"),
)
TOWER_OPEN_CLIP: Rules = (
    (r"^position_embedding$", "positional_embedding"),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\battn\.to_[qkv]\.(weight|bias)", r"attn.in_proj_\1"),
    (r"\battn\.to_out", "attn.out_proj"),
    (r"\bnorm([12])", r"ln_\1"),
    (r"\bfc1", "mlp.c_fc"),
    (r"\bfc2", "mlp.c_proj"),
    (r"^final_norm", "ln_final"),
    (r"^projection\.weight", "text_projection"),
)
IMAGE_TRANSFORMERS: Rules = (
    (r"^(class_embedding|patch_embedding)", r"embeddings.\1"),
    (r"^norm_in", "pre_layrnorm"),
    (r"^final_norm", "post_layernorm"),
    *TEXT_TRANSFORMERS,
)
IMAGE_OPEN_CLIP: Rules = (
    (r"^patch_embedding", "conv1"),
    (r"^norm_in", "ln_pre"),
    (r"^final_norm", "ln_post"),
    (r"^projection\.weight", "proj"),
    *TOWER_OPEN_CLIP,
)


def of_one_tower(tensors: Mapping[str, Tensor], model: str) -> dict[str, Tensor]:
    """Tensors of a file of one tower of transformers, which has ``model`` (``text_model``) before its names, or leaves it out."""
    known = (f"{model}.", "text_projection.", "visual_projection.")
    return {
        name if name.startswith(known) else f"{model}.{name}": tensor
        for name, tensor in tensors.items()
        if not name.endswith("position_ids")
    }


def text_transformers(state: Iterable[str]) -> Table:
    """Names of a text tower in transformers' CLIP: ``text_model.`` before all but the projection."""
    return _tower_transformers(state, "text_model", "text_projection", TEXT_TRANSFORMERS)


def image_transformers(state: Iterable[str]) -> Table:
    """Names of an image tower in transformers' CLIP, likewise."""
    return _tower_transformers(state, "vision_model", "visual_projection", IMAGE_TRANSFORMERS)


def _tower_transformers(state: Iterable[str], model: str, projection: str, rules: Rules) -> Table:
    return {
        name: Place(f"{projection}.weight" if name == "projection.weight" else f"{model}.{renamed(name, rules)}")
        for name in state
    }


def tower_open_clip(state: Iterable[str], rules: Rules = TOWER_OPEN_CLIP) -> Table:
    """Names of a tower in open_clip's CLIP: queries, keys and values are one, the projection is transposed."""
    table = {}
    for name in state:
        part = re.search(r"\battn\.to_([qkv])\.", name)
        layout = THIRDS["qkv".index(part[1])] if part else TRANSPOSED if name == "projection.weight" else SAME
        table[name] = Place(renamed(name, rules), layout)
    return table


def clip_transformers(state: Iterable[str]) -> Table:
    """Names of both towers in transformers' ``CLIPModel``."""
    return _towers([*state], text_transformers, image_transformers)


def clip_open_clip(state: Iterable[str], text: str = "") -> Table:
    """Names of both towers in open_clip's ``CLIP``; ``text`` is ``text.`` in a ``CustomTextCLIP``."""
    return _towers(
        [*state],
        lambda names: _below(text, tower_open_clip(names)),
        lambda names: _below("visual.", tower_open_clip(names, IMAGE_OPEN_CLIP)),
    )


def _below(prefix: str, table: Table) -> Table:
    return {ours: place._replace(name=prefix + place.name) for ours, place in table.items()}


def _towers(
    state: Sequence[str], text: Callable[[Iterable[str]], Table], image: Callable[[Iterable[str]], Table]
) -> Table:
    table = {"logit_scale": Place("logit_scale")}
    for tower, places in (("text.", text), ("image.", image)):
        names = [name.removeprefix(tower) for name in state if name.startswith(tower)]
        table |= {tower + ours: place for ours, place in places(names).items()}
    return table
