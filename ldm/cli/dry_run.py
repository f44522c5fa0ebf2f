"""What a training would be, worked out without weights, data or a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.clip.tokenizer import Tokenizer, TokenizerConfig, train_byte_bpe
from ldm.conditioning import Conditioner, ConditionerConfig
from ldm.config import to_yaml
from ldm.experiment import Experiment, model_config
from ldm.formats.native import WithoutInit
from ldm.training.optim import TrainConfig

GIB = 2**30


def describe(experiment: Experiment, stages: Sequence[str]) -> str:
    """The resolved config, and for each stage its parameters, effective batch, learning rate and memory."""
    lines = [to_yaml(experiment).rstrip(), ""]
    parts = {"vae": _vae, "clip": _clip, "denoiser": _denoiser}
    for stage in stages:
        with torch.device("meta"):
            train, networks, step = parts[stage](experiment)
            saved = saved_bytes(step)
        precision = experiment.trainer.precision_of(train)
        counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
        trained = sum(p.numel() for network in networks.values() for p in network.parameters() if p.requires_grad)
        batch = train.batch_size * train.accumulate
        # weights of all; gradients, two moments of Adam and the average of what is trained
        state = 4 * sum(counts.values()) + (16 if train.ema_decay else 12) * trained
        activations = saved // (1 if precision == "fp32" else 2)
        lines += [
            f"stage {stage}",
            *(f"  {name}: {count:,} parameters" for name, count in counts.items()),
            f"  trained: {trained:,} parameters, for {train.max_steps:,} steps",
            f"  batch: {train.batch_size} x {train.accumulate} accumulated = {batch} a device",
            f"  learning rate: {train.learning_rate:g} after {train.warmup_steps} steps, then {train.decay}",
            f"  memory: about {(state + activations) / GIB:.2f} GiB a device in {precision} "
            f"({state / GIB:.2f} weights and optimizer, {activations / GIB:.2f} activations)",
        ]
    factor = experiment.vae.model.factor
    shape = (
        experiment.vae.model.latent_channels,
        *(side // factor for side in model_config(experiment).size),
    )
    lines.append(f"the stages fit each other: latents {' x '.join(map(str, shape))}")
    return "\n".join(lines)


def saved_bytes(step: Callable[[], object]) -> int:
    """Bytes that autograd keeps of ``step`` for its backward pass, parameters aside; runs on the meta device."""
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept.append(tensor)
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())


Part = tuple[TrainConfig, dict[str, nn.Module], Callable[[], object]]


def _vae(experiment: Experiment) -> Part:
    train = experiment.vae.train
    assert train is not None
    first_stage = experiment.vae.model.build()
    image = torch.empty(train.batch_size, *experiment.data.image_shape)
    return train, {"first stage": first_stage}, lambda: first_stage.decode(first_stage.encode(image).mode)


def _clip(experiment: Experiment) -> Part:
    assert experiment.clip is not None
    assert experiment.clip.train is not None
    train, clip = experiment.clip.train, experiment.clip.model.build()
    assert experiment.clip.model.image is not None, "it is to be trained"
    size = experiment.clip.model.image.image_size
    image = torch.empty(train.batch_size, 3, size, size)
    tokens = torch.zeros(train.batch_size, experiment.clip.tokenizer.context_length, dtype=torch.long)
    return train, {"text tower": clip.text, "image tower": clip.image}, lambda: clip(image, tokens)


def _denoiser(experiment: Experiment) -> Part:
    train, config = experiment.denoiser.train, model_config(experiment)
    denoiser = config.denoiser.build()
    networks: dict[str, nn.Module] = {
        "denoiser": denoiser,
        "first stage": config.first_stage.build().requires_grad_(False),
    }
    b = train.batch_size
    latent = torch.empty(
        b, config.first_stage.latent_channels, *(side // config.first_stage.factor for side in config.size)
    )
    conditioner = _conditioner(experiment, config.conditioner)
    if list(conditioner.parameters()):
        networks["conditioner"] = conditioner

    def step() -> Tensor:
        # Raw conditions are on the CPU; the weights, and what comes of them, on the meta device.
        with torch.device("cpu"):
            pictures = {"image": torch.zeros(b, config.first_stage.image_channels, *config.size)}
            made = conditioner.prepare_batch(pictures, lambda _: torch.zeros(latent.shape), torch.Generator())
            told: dict[str, Any] = dict.fromkeys(config.conditioner.input_keys, [None] * b)
            told |= {name: [pair] * b for name, pair in config.conditioner.defaults(*config.size).items()}
            cond = conditioner(told | {name: made[name] for name in made.keys() - pictures.keys()})
        return denoiser(latent, torch.empty(b), cond)

    return train, networks, step


def _conditioner(experiment: Experiment, kind: ConditionerConfig) -> Conditioner:
    """The conditioner without weights; its tokenizers are none of the experiment's, which may not be there yet."""
    clip = None if experiment.clip is None else _any_tokenizer(experiment.clip.tokenizer)
    with WithoutInit():
        return kind.with_tokenizer(lambda described, _: _any_tokenizer(described)).build(clip).to("meta")


def _any_tokenizer(kind: TokenizerConfig) -> Tokenizer:
    """One that makes as many tokens of a text."""
    return train_byte_bpe([""], kind.vocab_size, kind.context_length)
