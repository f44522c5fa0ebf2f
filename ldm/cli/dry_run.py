"""Summary of a training, computed without weights, data or a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.config import to_yaml
from ldm.training.experiment import Experiment
from ldm.training.tasks import TASKS

GIB = 2**30


def describe(experiment: Experiment, stages: Sequence[str]) -> str:
    """Return the resolved config, and for each stage its parameters, effective batch size, learning rate and memory."""
    lines = [to_yaml(experiment).rstrip(), ""]
    for stage in stages:
        train = getattr(experiment, stage).train
        with torch.device("meta"):
            networks, forward = TASKS[stage].outline(experiment)
            saved = saved_bytes(forward)
        precision = experiment.trainer.precision_of(train)
        counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
        trained = sum(p.numel() for network in networks.values() for p in network.parameters() if p.requires_grad)
        batch = train.batch_size * train.accumulate
        # all weights; gradients, two Adam moments and the EMA of the trained ones
        state = 4 * sum(counts.values()) + (16 if train.ema_decay else 12) * trained
        activations = saved // (1 if precision == "fp32" else 2)
        lines += [
            f"stage {stage}",
            *(f"  {name}: {count:,} parameters" for name, count in counts.items()),
            f"  trained: {trained:,} parameters, for {train.max_steps:,} steps",
            f"  batch: {train.batch_size} x {train.accumulate} accumulated = {batch} per device",
            f"  learning rate: {train.learning_rate:g} after {train.warmup_steps} steps, then {train.decay}",
            f"  memory: about {(state + activations) / GIB:.2f} GiB per device in {precision} "
            f"({state / GIB:.2f} weights and optimizer, {activations / GIB:.2f} activations)",
        ]
    factor = experiment.vae.model.factor
    shape = (experiment.vae.model.latent_channels, *(side // factor for side in experiment.model_config.size))
    lines.append(f"the stages fit each other: latents {' x '.join(map(str, shape))}")
    return "\n".join(lines)


def saved_bytes(step: Callable[[], object]) -> int:
    """Return the bytes that autograd saves in ``step`` for its backward pass, without parameters, on the meta device."""
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept.append(tensor)
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(seen.values())
