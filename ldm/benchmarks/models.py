"""Models of published sizes with random weights, and the same networks of other libraries with the same weights.

The other libraries' networks are built from the config and the weights that our file formats write for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ldm.benchmarks.case import Setup
from ldm.clip.text import TextTowerConfig
from ldm.clip.tokenizer import CLIPBPEConfig, Tokenizer, train_byte_bpe
from ldm.conditioning.text import TextConditionerConfig
from ldm.denoiser import LevelSpec, UNetConfig
from ldm.diffusion import Diffusion
from ldm.errors import LdmError
from ldm.formats.checkpoint import Part
from ldm.formats.families import SAMPLED
from ldm.formats.native import WithoutInit
from ldm.model import LatentDiffusion, ModelConfig
from ldm.nn.network_format import FolderFormat
from ldm.pipeline import Pipeline
from ldm.vae import AutoencoderKLConfig

SCALE = 0.18215
"""Scaling factor of SD's latents."""


def sd15_unet(small: bool = False) -> UNetConfig:
    """Return the config of the U-Net of SD 1.5."""
    widths, context, groups = ((32, 64, 64, 64), 32, 8) if small else ((320, 640, 1280, 1280), 768, 32)
    levels = tuple(LevelSpec(width, 2, int(i < 3)) for i, width in enumerate(widths))
    return UNetConfig(levels=levels, context_width=context, heads=8, projection="conv", groups=groups)


def sdxl_unet(small: bool = False) -> UNetConfig:
    """Return the config of the U-Net of SDXL."""
    widths, depths = ((32, 64, 64), (0, 1, 2)) if small else ((320, 640, 1280), (0, 2, 10))
    levels = tuple(LevelSpec(width, 2, depth) for width, depth in zip(widths, depths, strict=True))
    return UNetConfig(
        levels=levels,
        context_width=32 if small else 2048,
        vector_width=48 if small else 2816,
        middle_depth=depths[-1],
        head_width=16 if small else 64,
        groups=8 if small else 32,
    )


def sd_vae(small: bool = False) -> AutoencoderKLConfig:
    """Return the config of the autoencoder of SD 1.5 and SDXL."""
    return AutoencoderKLConfig(widths=(8, 16, 16, 16), groups=4) if small else AutoencoderKLConfig()


def sd15_text(small: bool = False) -> TextTowerConfig:
    """Return the config of the text encoder of SD 1.5."""
    if small:
        return TextTowerConfig(width=32, layers=2, heads=4, activation="quick_gelu")
    return TextTowerConfig(activation="quick_gelu")


def initialized(built: Any, setup: Setup) -> Any:
    """Give a network on the meta device random weights, as a loaded model has them: in evaluation mode, channels_last.

    Raises:
        LdmError: the memory of the machine does not suffice for the weights.
    """
    size = sum(parameter.numel() for parameter in built.parameters()) * setup.dtype.itemsize
    require_memory(size + size // 2, setup)
    built.to(setup.dtype, memory_format=torch.channels_last).to_empty(device=setup.device).eval().requires_grad_(False)
    for name, buffer in built.named_buffers():
        buffer.data = torch.full_like(buffer, 1 / SCALE if name.endswith("latent_std") else 0, dtype=torch.float32)
    block = torch.randn(1 << 20, generator=setup.generator()).to(setup.device, setup.dtype)
    for name, parameter in built.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(float(name.endswith("weight")))
            continue
        for values in parameter.as_strided((parameter.numel(),), (1,)).split(len(block)):  # without temporary tensors
            values.copy_(block[: len(values)])
        parameter.mul_(parameter[0].numel() ** -0.5)
    return built


def require_memory(needed: int, setup: Setup) -> None:
    """Check that the device has so many bytes of free memory.

    Raises:
        LdmError: it has less.
    """
    free = _free_memory(setup.device)
    if free is not None and needed > free:
        raise LdmError(
            f"this case needs about {needed / 1e9:.0f} GB of memory, but only {free / 1e9:.0f} GB are free; use a machine with "
            "more, or another dtype."
        )


def sd15(setup: Setup, *, whole: bool = True, **parts: Any) -> LatentDiffusion:
    """Build a model of the sizes of SD 1.5.

    Args:
        setup: device, dtype and whether it is a small one.
        whole: False to make all parts tiny but those that are given.
        parts: configs of ``first_stage``, ``denoiser`` or ``tower`` (the text encoder).
    """
    tiny = setup.small or not whole
    first_stage = parts.get("first_stage") or sd_vae(tiny)
    denoiser: Any = parts.get("denoiser") or sd15_unet(tiny)
    tower: TextTowerConfig = parts.get("tower") or replace(sd15_text(tiny), width=denoiser.context_width, heads=8)
    if whole is False and "tower" not in parts:
        tower = replace(tower, vocab_size=300, layers=1, embed_dim=denoiser.vector_width)
    denoiser = replace(denoiser, context_width=tower.width)
    config = ModelConfig(
        first_stage=first_stage,
        conditioner=TextConditionerConfig(tower=tower, pooled=denoiser.vector_width is not None),
        denoiser=denoiser,
        diffusion=Diffusion(),
        size=(64, 64) if setup.small else (512, 512),
        sampling=SAMPLED,
    )
    with torch.device("meta"), WithoutInit():
        model = LatentDiffusion(config, _tokenizer(tower))
    initialized(model, setup)
    return model


def pipeline(model: LatentDiffusion, setup: Setup) -> Pipeline:
    """Return the pipeline of a model, compiled if the run is."""
    pipe: Pipeline = Pipeline(model)
    if setup.compile is not None:
        pipe.compile(setup.compile)
    return pipe


def peer_of(
    ours: Any, form: FolderFormat, build: Callable[[Mapping[str, Any]], nn.Module], copied: bool = False
) -> Any:
    """Build another library's network with our weights.

    Args:
        ours: network with a ``config``.
        form: format of the folder that the other library opens.
        build: builds the network from the JSON config.
        copied: False to share the weights whose layout is the same, True to copy them.
    """
    state = ours.state_dict()
    part = Part(ours.config, {name: tensor.clone() for name, tensor in state.items()} if copied else state)
    values = form.write_config(part.config, (64, 64), {})
    peer = build(values)
    names = peer.state_dict()
    weights = form.export(part.config, part.weights, values).items()
    # transformers 5 has no "text_model." before the names of a text encoder
    shared = {name if name in names else name.removeprefix("text_model."): tensor for name, tensor in weights}
    peer.load_state_dict(shared, assign=True)
    return peer.to(next(ours.parameters()).device).eval().requires_grad_(False)


def diffusers_unet(ours: nn.Module, copied: bool = False) -> Any:
    """Build diffusers' ``UNet2DConditionModel`` with our weights; see :func:`peer_of`."""
    from diffusers import UNet2DConditionModel

    from ldm.denoiser.unet_formats import UNetFolder

    return peer_of(ours, UNetFolder(), lambda values: _on_meta(UNet2DConditionModel, values), copied)


def diffusers_vae(ours: nn.Module, copied: bool = False) -> Any:
    """Build diffusers' ``AutoencoderKL`` with our weights; see :func:`peer_of`."""
    from diffusers import AutoencoderKL

    from ldm.vae.autoencoder_formats import AutoencoderFolder

    return peer_of(ours, AutoencoderFolder(), lambda values: _on_meta(AutoencoderKL, values), copied)


def transformers_text(ours: Any) -> Any:
    """Build transformers' ``CLIPTextModel`` with our weights, or the class with projection if ours has one."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from ldm.clip.text_formats import TextFolder

    kind = CLIPTextModelWithProjection if ours.config.embed_dim else CLIPTextModel
    return peer_of(ours, TextFolder(), lambda values: kind(CLIPTextConfig(**values)))


def _on_meta(kind: Any, values: Mapping[str, Any]) -> Any:
    with torch.device("meta"), WithoutInit():
        return kind.from_config({name: value for name, value in values.items() if name != "_class_name"})


def _tokenizer(tower: TextTowerConfig) -> Tokenizer:
    if tower.vocab_size == TextTowerConfig().vocab_size:
        return CLIPBPEConfig().build()
    return train_byte_bpe(["a"], tower.vocab_size, tower.context_length)


def _free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on the device; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    from ldm.processes import available_bytes

    return available_bytes()
