"""Interface of the backends, and the accelerator, through which a model calls its compiled networks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from tqdm import tqdm

from ldm.config import Kind, config_field
from ldm.errors import SamplingError
from ldm.nn.adapters import unwrapped
from ldm.nn.views import view
from ldm.vae import FirstStage


@dataclass(frozen=True)
class Backend(Kind):
    """Family of backends; the fields of a backend are the options of :meth:`ldm.pipeline.Pipeline.compile`.

    Attributes:
        priority: the backend with the greatest is the default, among those whose :meth:`is_default` is True.
    """

    priority: ClassVar[int] = 0

    progress: bool = config_field(True, "print a line when a network is compiled")

    @classmethod
    def is_default(cls, device: torch.device) -> bool:
        """Return True if the backend is installed and may be the default for this device."""
        return False

    @property
    def takes_prompt_loras(self) -> bool:
        """True if LoRAs that are named in prompts, and act in a single call, can be used."""
        return True

    def check(self, device: torch.device) -> None:
        """Check that the backend can be used on a device.

        Raises:
            SamplingError: it cannot.
            MissingExtraError: it needs a package that is not installed.
        """

    def compile(self, network: nn.Module, name: str) -> nn.Module:
        """Return a module that computes what ``network`` does, with its present weights whatever happens to them.

        Args:
            network: the network, which must not be changed, nor kept alive.
            name: name of the network for messages.
        """
        raise NotImplementedError

    def announce(self, line: str) -> None:
        """Print a line on standard error, above progress bars, if ``progress`` is True."""
        if self.progress:
            tqdm.write(line, file=sys.stderr)


class Accelerator:
    """The compiled networks of one model, made when they are first called.

    A copy, deep copy or pickle holds the backend alone, and compiles its networks again.
    """

    def __init__(self, backend: Backend):
        self.backend = backend
        self._compiled: WeakKeyDictionary[nn.Module, tuple[torch.device, nn.Module]] = WeakKeyDictionary()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Accelerator], tuple[Backend]]:
        return Accelerator, (self.backend,)

    def denoiser(self, network: nn.Module) -> nn.Module:
        """Return the compiled counterpart of a denoiser."""
        return self._get(network, lambda network: self.backend.compile(network, "denoiser"))

    def first_stage(self, stage: FirstStage) -> FirstStage:
        """Return a view of a first stage whose encoder and decoder are compiled."""
        return cast(FirstStage, self._get(stage, self._first_stage))

    def check_weights(self) -> None:
        """Find out which weights have changed, also by means that leave no trace, before a sampling."""
        with self._lock:
            for _, compiled in self._compiled.values():
                for module in compiled.modules():
                    if isinstance(module, ChecksWeights):
                        module.check_weights()

    def check_prompt_loras(self) -> None:
        """Check that LoRAs named in prompts can act.

        Raises:
            SamplingError: they cannot.
        """
        if not self.backend.takes_prompt_loras:
            raise SamplingError(
                f"a LoRA named in a prompt cannot act in networks that the backend {self.backend.kind!r} has compiled with "
                "their weights; load it with load_lora, or compile with the backend 'inductor'."
            )

    def _get(self, network: nn.Module, make: Callable[..., nn.Module]) -> nn.Module:
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
        with self._lock:
            known = self._compiled.get(network)
            if known is None or known[0] != device:
                self.backend.check(device)
                self._compiled[network] = known = (device, make(network))
            return known[1]

    def _first_stage(self, stage: FirstStage) -> nn.Module:
        plain = unwrapped(stage)
        names = {module: name for name, module in plain.named_modules()}
        networks = {names[unwrapped(network)]: network for network in plain.called_modules}
        compiled = view(plain, networks)
        for name, network in networks.items():
            compiled.set_submodule(name, self.backend.compile(network, f"{name} of the first stage"))
        return compiled


class ChecksWeights(nn.Module):
    """Base of compiled networks that hold weights of their own, and have to notice when those of the network change."""

    def check_weights(self) -> None:
        """Compare the values of the weights with those that were compiled."""
        raise NotImplementedError
