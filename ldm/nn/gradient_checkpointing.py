"""Gradient checkpointing: blocks whose activations are computed again in the backward pass instead of being kept.

See Chen et al. 2016 (arXiv 1604.06174). Memory falls to the inputs of the blocks and the activations of one of them; a step
computes the forward pass of these blocks twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class CheckpointedBlock(nn.Module):
    """Base class of the blocks of a network that :func:`set_gradient_checkpointing` applies to.

    Hooks of the block run within what is computed again. Random numbers, such as those of dropout, are the same both times.
    """

    gradient_checkpointing = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)
        return super().__call__(*args, **kwargs)


def set_gradient_checkpointing(module: nn.Module, enabled: bool) -> None:
    """Turn gradient checkpointing on or off for all blocks of a module; of nested blocks, for the outermost.

    Blocks are the instances of :class:`CheckpointedBlock`, and those of encoders of transformers that support it.
    """
    if isinstance(module, CheckpointedBlock):
        module.gradient_checkpointing = enabled
    elif getattr(module, "supports_gradient_checkpointing", False):  # a model of transformers
        own: Any = module
        if enabled:
            own.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            own.gradient_checkpointing_disable()
    else:
        for child in module.children():
            set_gradient_checkpointing(child, enabled)
