"""Weights of transformers' and open_clip's towers under our names, and transformers' tokenizer, for the tests of parity."""

from __future__ import annotations

import re

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from transformers import CLIPTokenizer

TRANSFORMERS = {
    r"^(text|vision)_model\.": "",
    r"^embeddings\.": "",
    r"^position_embedding\.weight": "position_embedding",
    r"^encoder\.layers": "blocks",
    r"self_attn\.([qkv])_proj": r"attn.to_\1",
    r"self_attn\.out_proj": "attn.to_out",
    r"layer_norm([12])": r"norm\1",
    r"mlp\.fc": "fc",
    r"^pre_layrnorm": "norm_in",
    r"^(post_layernorm|final_layer_norm)": "final_norm",
    r"^(text|visual)_projection": "projection",
}
OPEN_CLIP = {
    r"^positional_embedding": "position_embedding",
    r"^conv1": "patch_embedding",
    r"^transformer\.resblocks": "blocks",
    r"attn\.out_proj": "attn.to_out",
    r"ln_([12])": r"norm\1",
    r"mlp\.c_fc": "fc1",
    r"mlp\.c_proj": "fc2",
    r"^ln_pre": "norm_in",
    r"^ln_(final|post)": "final_norm",
    r"^(text_projection|proj)$": "projection.weight",
}


def randomize(peer: nn.Module) -> nn.Module:
    """Every parameter drawn anew: biases and layer norms start as constants, which would hide a swap."""
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=0.2)
    return peer.eval()


def renamed(name: str, table: dict[str, str]) -> str:
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


def from_transformers(peer: nn.Module) -> dict[str, Tensor]:
    return {renamed(name, TRANSFORMERS): tensor for name, tensor in peer.state_dict().items()}


def from_open_clip(peer: nn.Module) -> dict[str, Tensor]:
    """open_clip fuses the projections of queries, keys and values, and transposes the last projection."""
    state = {}
    for name, tensor in peer.state_dict().items():
        ours = renamed(name, OPEN_CLIP)
        if "in_proj_" in ours:
            prefix, suffix = ours.split("in_proj_")
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                state[f"{prefix}to_{part}.{suffix}"] = rows
        else:
            state[ours] = tensor.T if ours == "projection.weight" else tensor
    return state


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """transformers' tokenizer over the merges and ids of open_clip's."""
    source = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {names.get(token, token): index for token, index in source.encoder.items()}
    return CLIPTokenizer(vocab=vocab, merges=list(source.bpe_ranks), pad_token=pad_token, model_max_length=77)
