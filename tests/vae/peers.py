"""Weights of diffusers' AutoencoderKL under our names, for the tests of parity."""

from __future__ import annotations

import re

from torch import Tensor, nn

NAMES = {
    r"^encoder\.down_blocks": "encoder.down",
    r"^decoder\.up_blocks": "decoder.up",
    r"resnets": "block",
    r"(down|up)samplers\.0": "resample",
    r"conv_shortcut": "shortcut",
    r"conv_norm_out": "norm_out",
    r"mid_block\.block\.0": "mid.block_1",
    r"mid_block\.block\.1": "mid.block_2",
    r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
    r"mid_block\.attentions\.0\.to_([qkv])": r"mid.attn_1.\1",
    r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
}


def from_diffusers(peer: nn.Module) -> dict[str, Tensor]:
    """Its attention is of linear layers, ours (as LDM's) of 1 x 1 convolutions."""
    state = {}
    for name, tensor in peer.state_dict().items():
        for pattern, replacement in NAMES.items():
            name = re.sub(pattern, replacement, name)
        state[name] = tensor[:, :, None, None] if "attn_1" in name and tensor.ndim == 2 else tensor
    return state
