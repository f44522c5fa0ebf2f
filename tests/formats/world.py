"""Small random models of the kinds that the world has, made and saved by diffusers itself."""

from __future__ import annotations

import functools
import json
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from ldm.clip.tokenizer import clip_bpe, clip_merges

KINDS = ("sd1", "sd2", "sdxl")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "ddim": {"steps_offset": 1, "timestep_spacing": "leading", "set_alpha_to_one": False, "clip_sample": False},
    "plms": {"steps_offset": 1, "skip_prk_steps": True},
    "euler": {"steps_offset": 1, "timestep_spacing": "leading"},
    "heun": {},
    "dpmpp_2m": {},
    "unipc": {},
}
CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "plms": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
SCALE = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
FACTOR = 2
MERGES = 2000
"""Of CLIP's 48,894, most of which would do nothing here but take time."""


def scheduler(name: str, kind: str) -> Any:
    """A scheduler with settings as such models come with."""
    prediction = "v_prediction" if kind == "sd2" else "epsilon"
    return CLASSES[name](**BETAS, prediction_type=prediction, **SCHEDULERS[name])


def pipeline(kind: str, name: str = "ddim", merges: int | None = MERGES) -> Any:
    """A pipeline of random weights; its tokenizer knows the first ``merges`` of CLIP (None: all)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {"unet": _unet(kind), "vae": _vae(kind), "scheduler": scheduler(name, kind)}
        parts |= _texts(kind, merges)
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.eval()
    if kind == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        nothing = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
        pipe = diffusers.StableDiffusionPipeline(**parts, **nothing, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(kind: str) -> nn.Module:
    attends = ("DownBlock2D", "CrossAttnDownBlock2D") if kind == "sdxl" else ("CrossAttnDownBlock2D", "DownBlock2D")
    settings: dict[str, Any] = {
        "sd1": {"attention_head_dim": 8, "cross_attention_dim": 32},
        "sd2": {"attention_head_dim": (2, 4), "cross_attention_dim": 64, "use_linear_projection": True},
        "sdxl": {
            "attention_head_dim": (2, 4),
            "cross_attention_dim": 96,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 24,
        },
    }[kind]
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=attends,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(attends)),
        sample_size=16,
        **settings,
    )
    return _shaken(unet)


def _vae(kind: str) -> nn.Module:
    return _shaken(
        diffusers.AutoencoderKL(
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=32,
            scaling_factor=SCALE[kind],
        )
    )


def _shaken(network: nn.Module) -> nn.Module:
    """Norms and biases start as constants, which would hide a swap."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def _texts(kind: str, merges: int | None) -> dict[str, Any]:
    shapes = {"sd1": [(32, "quick_gelu")], "sd2": [(64, "gelu")], "sdxl": [(32, "quick_gelu"), (64, "gelu")]}[kind]
    parts: dict[str, Any] = {}
    for index, (width, activation) in enumerate(shapes):
        words = tokenizer("!" if index or kind == "sd2" else None, merges)
        config = transformers.CLIPTextConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_act=activation,
            projection_dim=24,
            vocab_size=len(words),
            eos_token_id=words.eos_token_id,
        )
        classes = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
        suffix = "_2" if index else ""
        parts[f"text_encoder{suffix}"] = _shaken(classes[index](config))
        parts[f"tokenizer{suffix}"] = words
    return parts


@functools.cache
def vocabulary(merges: int | None) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's, of its first merges."""
    known = clip_merges()[:merges]
    return json.loads(clip_bpe(known).to_json())["model"]["vocab"], known


def tokenizer(pad: str | None, merges: int | None) -> Any:
    """CLIP's tokenizer as transformers has it."""
    vocab, known = vocabulary(merges)
    settings = {} if pad is None else {"pad_token": pad}
    return transformers.CLIPTokenizer(vocab=vocab, merges=known, model_max_length=77, **settings)
