"""Weights of diffusers' UNet2DConditionModel under our names, for the tests of parity."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

NAMES = {
    r"^time_embedding\.linear_1": "noise_embedding.mlp.0",
    r"^time_embedding\.linear_2": "noise_embedding.mlp.2",
    r"^(add|class)_embedding\.linear_1": "vector_embedding.0",
    r"^(add|class)_embedding\.linear_2": "vector_embedding.2",
    r"^conv_norm_out": "norm_out",
    r"^mid_block\.resnets\.(\d)": r"middle.\1.residual",
    r"^mid_block\.attentions\.0": "middle.0.transformer",
    r"time_emb_proj": "embedding",
    r"conv_shortcut": "shortcut",
    r"transformer_blocks": "blocks",
    r"to_out\.0": "to_out",
    r"ff\.net": "ff",
}
BLOCKS = {"resnets": "residual", "attentions": "transformer"}


def randomize(peer: nn.Module) -> nn.Module:
    """Every parameter moved at random: norms, biases and zeroed layers start as constants, which would hide a swap."""
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return peer.eval()


def from_diffusers(peer: nn.Module, blocks: int) -> dict[str, Tensor]:
    """The state of a U-Net of ``blocks`` residual blocks a level.

    diffusers counts blocks level by level, with the resampling at a level's end; here all of a way are one list, and an
    upsampling belongs to the block after it.
    """
    state = {}
    for name, tensor in peer.state_dict().items():
        if found := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
            way, part, rest = found[1], found[3], found[5]
            index = int(found[2]) * (blocks + 1) + int(found[4])
            if part == "downsamplers":
                name = f"down.{index + blocks}.{rest}"
            elif part == "upsamplers":
                name = f"up.{index + blocks + 1}.upsample.{rest}"
            else:
                name = f"{way}.{index}.{BLOCKS[part]}.{rest}"
        for pattern, replacement in NAMES.items():
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    return state
