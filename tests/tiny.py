"""Whole models of a few thousand random weights, for the tests of what samples from a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.clip.tokenizer import train_byte_bpe
from ldm.config import from_dict
from ldm.denoiser import ControlNetConfig
from ldm.denoiser.controlnet_formats import ControlNetFolder
from ldm.formats.checkpoint import Part
from ldm.formats.network_folder import network_files
from ldm.model import LatentDiffusion, ModelConfig

CAPTIONS = ["a red apple", "a green apple", "a red car", "a blue car", "two green cars", "a blue sky"]
TOKENIZER = train_byte_bpe(CAPTIONS, vocab_size=300, context_length=12)
FACTOR, CHANNELS, SIZE = 2, 4, 16

TOWER = {"vocab_size": TOKENIZER.vocab_size, "context_length": 12, "width": 16, "layers": 1, "heads": 2}
CONDITIONERS: dict[str, dict[str, Any]] = {
    "text": {"kind": "text", "tower": TOWER},
    "class": {"kind": "class", "classes": 3, "width": 8},
    "none": {"kind": "none"},
}
WIDTHS = {"text": {"context_width": 16}, "class": {"vector_width": 8}, "none": {}}


def tiny_model(reads: str = "text", seed: int = 0, **changes: Any) -> LatentDiffusion:
    """A model of 16-pixel images with latents of factor 2; ``changes`` are sections of its config."""
    network = {"kind": "unet", "levels": [{"width": 16, "blocks": 1, "depth": 1}], "heads": 2, "groups": 4}
    config = {
        "first_stage": {"kind": "autoencoder_kl", "widths": [8, 8], "blocks": 1, "groups": 4},
        "conditioner": CONDITIONERS[reads],
        "denoiser": network | WIDTHS[reads],
        "diffusion": {"schedule": "scaled_linear", "parametrization": "v"},
        "size": [SIZE, SIZE],
        "sampling": {"num_inference_steps": 4, "guidance_scale": 3.0},
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LatentDiffusion(from_dict(ModelConfig, config | changes), TOKENIZER if reads == "text" else None)
        for parameter in model.denoiser.parameters():
            if parameter.ndim > 1 and not parameter.any():  # a fresh U-Net answers 0 whatever it is asked
                torch.nn.init.normal_(parameter, std=0.1)
    if len(model.first_stage.latent_mean) == CHANNELS:
        model.first_stage.latent_mean.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
        model.first_stage.latent_std.copy_(torch.tensor([1.5, 0.5, 1.0, 0.7]))
    return model.eval()


def tiny_controlnet(folder: Path, seed: int = 0, is_trained: bool = True, model: Any = None, **changes: Any) -> Path:
    """Write a ControlNet for the tiny model as a folder of diffusers; an untrained one has zero convolutions."""
    config = ControlNetConfig((model or tiny_model()).config.denoiser, hint_widths=(4, 8), **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = config.build()
        for name, parameter in network.named_parameters():
            if is_trained or not name.startswith("zeros."):
                torch.nn.init.normal_(parameter, std=0.2)
    network_files(ControlNetFolder(), Part(config, network.state_dict()), (SIZE, SIZE)).write(folder)
    return folder


LORA_LAYERS: dict[str, tuple[int, ...]] = {
    "unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (16, 16),
    "unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": (128, 16),
    "unet_down_blocks_0_resnets_0_conv1": (16, 16, 3, 3),
    "unet_down_blocks_0_attentions_0_proj_in": (16, 16, 1, 1),
    "te_text_model_encoder_layers_0_mlp_fc1": (64, 16),
}
"""Some layers of the tiny model, as kohya spells them, and the shapes of their weights."""


def tiny_lora(seed: int = 0, layers: Mapping[str, tuple[int, ...]] = LORA_LAYERS, r: int = 2) -> dict[str, Tensor]:
    """What a LoRA file of kohya's naming holds for them."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for layer, (out, *inputs) in layers.items():
        tensors[f"lora_{layer}.lora_down.weight"] = 0.5 * torch.randn(r, *inputs, generator=draw)
        tensors[f"lora_{layer}.lora_up.weight"] = 0.5 * torch.randn(out, r, generator=draw)
        tensors[f"lora_{layer}.alpha"] = torch.tensor(1.0)
    return tensors
