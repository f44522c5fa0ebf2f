"""The ControlNets of a model, by the names under which they were loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.denoiser.controlnet import ControlNet
from ldm.errors import SamplingError, unknown
from ldm.nn.adapters import keep_out_of_state_dict
from ldm.nn.conditioning import Conditioning, Control


class LoadedControlNet(nn.Module):
    """A ControlNet of a model.

    Args:
        name: name by which calls use it.
        network: the network.
        fingerprint: hash of its config and weights.

    Raises:
        SamplingError: the name is not a string, or empty.
    """

    def __init__(self, name: str, network: ControlNet, fingerprint: str):
        super().__init__()
        if not isinstance(name, str) or not name:
            raise SamplingError(f"the name of a ControlNet is {name!r}; give a string that is not empty.")
        self.name, self.fingerprint, self.network = name, fingerprint, network

    def embed(self, images: Tensor) -> Tensor:
        """Embed hint images ``[b 3 fh fw]`` in [0, 1], one at a time, bitwise the same in any batch: ``[b w h w']``."""
        first = self.network.conv_in.weight
        if self.network.controlnet_config.hint_channels == 1:
            images = images.mean(1, keepdim=True)
        images = images.to(first.device, first.dtype).contiguous(memory_format=torch.channels_last)
        return torch.cat([self.network.hint(image) for image in images.split(1)])


class ControlNets(nn.ModuleList):
    """The ControlNets of a model, a child of that model whose state dict leaves them out."""

    def __init__(self) -> None:
        super().__init__()
        keep_out_of_state_dict(self)

    @property
    def loaded(self) -> dict[str, LoadedControlNet]:
        """All ControlNets by name, in the order in which they were loaded."""
        return {each.name: each for each in cast(Any, self)}

    def add(self, controlnet: LoadedControlNet) -> str:
        """Add a ControlNet, and return its name.

        Raises:
            SamplingError: its name is taken.
        """
        if controlnet.name in self.loaded:
            raise SamplingError(
                f"a ControlNet {controlnet.name!r} is loaded; unload it, or give this one another name."
            )
        self.append(controlnet)
        return controlnet.name

    def named(self, name: str) -> LoadedControlNet:
        """Return a ControlNet by its name.

        Raises:
            SamplingError: no ControlNet has this name.
        """
        loaded = self.loaded
        if not loaded:
            raise SamplingError(f"no ControlNet {name!r} is loaded into this model; load it with load_controlnet.")
        if name not in loaded:
            raise SamplingError(unknown("ControlNet", name, loaded))
        return loaded[name]

    def remove(self, name: str | None = None) -> None:
        """Remove a ControlNet, or all.

        Raises:
            SamplingError: no ControlNet has this name.
        """
        for controlnet in list(self.loaded.values()) if name is None else [self.named(name)]:
            del self[[each is controlnet for each in self].index(True)]

    def residuals(
        self, x: Tensor, noise_level: Tensor, cond: Conditioning, controls: Sequence[Control]
    ) -> tuple[Tensor, ...]:
        """Evaluate the ControlNets of ``controls``, and return the sum of their outputs times their scales.

        Args:
            x, noise_level, cond: of the evaluation of the U-Net; see :meth:`ControlNet.forward`.
            controls: their inputs; the scales are fp32, whatever the precision of the networks.

        Returns:
            The ``residuals`` of :meth:`ldm.denoiser.UNet.forward`; empty without controls.

        Raises:
            SamplingError: no ControlNet has the name of a control.
        """
        total: list[Tensor] = []
        for control in controls:
            outputs = self.named(control.name).network(x, noise_level, cond, control.hint.to(x.dtype))
            scale = control.scale[:, None, None, None]
            scaled = [(scale * output).to(output.dtype) for output in outputs]
            total = [a + b for a, b in zip(total, scaled, strict=True)] if total else scaled
        return tuple(total)
