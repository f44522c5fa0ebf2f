"""Adapters: small sets of weights that change some layers of a trained model, such as LoRA.

An adapter is live, adding to what its layers return, or merged into their weights. Merged weights are always computed from the
original ones, which are kept, so unloading restores them bit for bit in whatever order adapters were loaded. A state dict that is
loaded meanwhile replaces the original weights, to which the adapters are then applied, unless it is the present one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldm.checks import number
from ldm.errors import SamplingError, unknown
from ldm.nn.wrappers import innermost

M = TypeVar("M", bound=nn.Module)


class AdapterLayer(nn.Module):
    """The change that an adapter makes to one layer; base class of the kinds of adapter.

    A kind that changes the weight of linear layers or convolutions implements :meth:`delta`; :meth:`forward` follows from it and
    is overridden where there is a cheaper way. A kind that adds to the output of any other module (a second cross-attention)
    implements :meth:`forward` alone, and cannot be merged.

    Attributes:
        scale: factor of the change; 0 is the layer without it.
    """

    scale: float = 1.0

    def delta(self, weight: Tensor) -> Tensor:
        """Return the change of ``weight`` at scale 1, in its shape, dtype and device."""
        raise NotImplementedError(f"{type(self).__name__} does not change weights and cannot be merged")

    def bias_delta(self, bias: Tensor) -> Tensor | None:
        """Return the change of ``bias`` at scale 1, which is zeros for a layer without one; None, the default: no change."""
        return None

    def forward(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """Return what is added to the output of ``layer`` for the same inputs, times ``scale``."""
        (x,) = inputs
        change = self.delta(layer.get_parameter("weight"))
        bias = self.bias_delta(change.new_zeros(len(change)))
        if isinstance(layer, nn.Conv2d):
            return self.scale * F.conv2d(x, change, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return self.scale * F.linear(x, change, bias)


class Adapter(nn.Module):
    """The layers that one file, or one training run, adds to a model.

    Its parameters keep the precision of the file and are cast to that of the layer's input where they are used.

    Args:
        name: name by which it is scaled and unloaded.
        layers: adapter layers by the names of the model's layers that they change.
        fingerprint: hash of the file's contents; None if it was not read from a file.
        scale: factor of all changes.
        merged: True to merge it into the weights, False to keep it live.

    Raises:
        SamplingError: the name is not a string, or the scale is not a finite number.
    """

    _scale: float

    def __init__(
        self,
        name: str,
        layers: Mapping[str, AdapterLayer],
        fingerprint: str | None = None,
        scale: float = 1.0,
        merged: bool = False,
    ):
        super().__init__()
        if not isinstance(name, str):  # names are sorted
            raise SamplingError(f"the name of a LoRA is {name!r}; give a string.")
        self.name, self.fingerprint, self.merged = name, fingerprint, merged
        self.layers = dict(layers)
        for path, layer in layers.items():
            self.add_module(path.replace(".", "/"), layer)
        self.scale = scale

    @property
    def scale(self) -> float:
        """Factor of all changes; 0 is the model without the adapter."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scale = _checked(scale)
        for layer in self.layers.values():
            layer.scale = self._scale


class Adapters(nn.ModuleList):
    """The adapters of a model, a child of that model; any number act at once, live and merged ones mixed.

    Each method takes the model. A model's state dict leaves its adapters out: that of an :class:`Adapter` holds its weights.

    Attributes:
        originals: weights and biases of layers with merged adapters as they are without any, on the CPU, by their names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.originals: dict[str, Tensor] = {}
        self._watched: dict[str, RemovableHandle] = {}  # hooks that notice new weights of layers, by their names
        keep_out_of_state_dict(self)

    @property
    def loaded(self) -> dict[str, Adapter]:
        """All adapters by name, in the order of their names: sums depend, in their last bits, on the order."""
        return {each.name: each for each in sorted(cast(Any, self), key=lambda adapter: adapter.name)}

    def add(self, model: nn.Module, adapter: Adapter) -> str:
        """Add an adapter to the model, and return its name.

        Raises:
            SamplingError: its name is taken, or it cannot be merged.
        """
        if adapter.name in self.loaded:
            raise SamplingError(f"a LoRA {adapter.name!r} is loaded; unload it, or give this one another name.")
        for path, change in adapter.layers.items() if adapter.merged else ():
            layer = unwrapped(model).get_submodule(path)
            weight = layer.get_parameter("weight")
            if getattr(layer, "bias", None) is None and change.bias_delta(weight.new_zeros(len(weight))) is not None:
                raise SamplingError(
                    f"the LoRA {adapter.name!r} adds a bias to {path}, which has none to merge it into; load it without merging."
                )
        self.append(adapter)
        self._update(model, adapter)
        return adapter.name

    def set_scale(self, model: nn.Module, name: str, scale: float) -> None:
        """Change the scale of an adapter.

        Raises:
            SamplingError: no adapter has this name, or the scale is not a finite number.
        """
        adapter = self._get(name)
        adapter.scale = scale
        if adapter.merged:
            self._update(model, adapter)

    def remove(self, model: nn.Module, name: str | None = None) -> None:
        """Remove an adapter, or all; weights without merged adapters are bit for bit what they were.

        Raises:
            SamplingError: no adapter has this name.
        """
        for adapter in list(self.loaded.values()) if name is None else [self._get(name)]:
            del self[[each is adapter for each in self].index(True)]
            self._update(model, adapter)

    def merge(self, model: nn.Module) -> None:
        """Merge all merged adapters again, into original weights of the model's dtype, after that dtype has changed."""
        for path in dict.fromkeys(name.rpartition(".")[0] for name in self.originals):
            self._merge(unwrapped(model).get_submodule(path), path)

    def record(self) -> dict[str, Any]:
        """Return the adapters' entry in the record of a generated image."""
        entries = [{"name": each.name, "file": each.fingerprint, "scale": each.scale} for each in self.loaded.values()]
        return {"loras": entries} if entries else {}

    def _get(self, name: str) -> Adapter:
        if name not in self.loaded:
            raise SamplingError(unknown("LoRA", name, self.loaded))
        return self.loaded[name]

    def _update(self, model: nn.Module, adapter: Adapter) -> None:
        """Bring the layers that ``adapter`` changes up to date with the list."""
        network = unwrapped(model)
        for path, change in adapter.layers.items():
            layer = network.get_submodule(path)
            if adapter.merged:
                self._merge(layer, path)
            else:
                change.to(next(layer.parameters()).device)
                attach(layer, *(changes for each, changes in self._changes(path) if not each.merged))

    def _changes(self, path: str) -> list[tuple[Adapter, AdapterLayer]]:
        """Return the adapters that change a layer, each with its adapter layer, in the order of their names."""
        return [(each, each.layers[path]) for each in self.loaded.values() if path in each.layers]

    def _merge(self, layer: nn.Module, path: str) -> None:
        """Write the parameters of a layer: the original ones plus all merged changes, summed in fp32."""
        for name, parameter in layer.named_parameters(recurse=False):
            known = f"{path}.{name}" in self.originals
            original = self.originals.pop(f"{path}.{name}") if known else parameter.detach().cpu()
            original = original.to(parameter.dtype)
            value = self._merged(path, name, parameter, original)
            if value is not None:
                self.originals[f"{path}.{name}"] = original
            if known or value is not None:
                # never in place: the weight may be the original tensor, or memory-mapped from a file
                parameter.data = torch.empty_like(parameter).copy_(original if value is None else value)
        if any(each.rpartition(".")[0] == path for each in self.originals):
            if path not in self._watched:
                self._watched[path] = layer.register_load_state_dict_pre_hook(partial(self._replace, path))
        elif path in self._watched:
            self._watched.pop(path).remove()

    def _merged(self, path: str, name: str, parameter: Tensor, original: Tensor) -> Tensor | None:
        """Return a parameter with all merged changes, in fp32 or its own dtype on its device; None if there are none."""
        value = base = original.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
        for each in (change for adapter, change in self._changes(path) if adapter.merged):
            delta = each.delta(base) if name == "weight" else each.bias_delta(base)
            value = value if delta is None else value + each.scale * delta.detach()
        return None if value is base else value

    def _replace(self, path: str, layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Take the parameters of a state dict that a layer is about to load as its original ones, and merge into these."""
        for name, parameter in layer.named_parameters(recurse=False):
            new = state.get(prefix + name)
            if f"{path}.{name}" not in self.originals or not isinstance(new, Tensor) or new.shape != parameter.shape:
                continue
            new = new.detach().to(parameter)
            if not torch.equal(new, parameter):  # else it is the state of this model
                self.originals[f"{path}.{name}"] = original = new.to("cpu", copy=True)
                value = self._merged(path, name, parameter, original)
                state[prefix + name] = torch.empty_like(parameter).copy_(original if value is None else value).detach()


class Adapted:
    """A layer with live adapters: a mixin before the layer's own class, which is ``plain``."""

    plain: ClassVar[type[nn.Module]]
    adapters: tuple[AdapterLayer, ...]

    def forward(self, *inputs: Any) -> Tensor:
        output = self.plain.forward(cast(Any, self), *inputs)
        for adapter in self.adapters:
            output = output + adapter(self, *inputs)
        return cast(Tensor, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _new, (self.plain,), self.__dict__


def attach(layer: nn.Module, *adapters: AdapterLayer) -> None:
    """Make ``layer`` add what ``adapters``, and no others, return; without adapters, its original class is restored.

    This changes the class of the layer. A network that was compiled checks classes and attributes of its layers, and is
    recompiled where they have changed; forward hooks that are added after compiling would be ignored.
    """
    plain: Any = layer.plain if isinstance(layer, Adapted) else type(layer)
    layer.__class__ = _adapted(plain) if adapters else plain
    layer.__dict__["adapters"] = adapters  # a tuple is not a submodule: the keys of the state dict do not change
    if not adapters:
        del layer.__dict__["adapters"]


@cache
def _adapted(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{plain.__name__}", (Adapted, plain), {"plain": plain})


def _new(plain: Any) -> Any:
    """Make an empty adapted layer, for copies and pickles."""
    return _adapted(plain).__new__(_adapted(plain))


def unwrapped(module: M) -> M:
    """Return a view of ``module`` without the wrappers around it and its submodules, which add to parameter names."""
    module = innermost(module)
    children = {name: child if child is None else unwrapped(child) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    view = copy.copy(module)
    view._modules = children
    return view


def _checked(scale: object) -> float:
    return float(number("the scale of a LoRA", scale))


def keep_out_of_state_dict(module: nn.Module) -> None:
    """Keep a module out of the state dicts of the modules that contain it; loading one leaves the module as it is."""
    module.register_state_dict_post_hook(_leave_out)
    module.register_load_state_dict_pre_hook(_keep)


def _leave_out(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Remove a module from a state dict."""
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]


def _keep(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Add a module to the copy of a state dict that is being loaded, so that it stays as it is."""
    for name, parameter in module.named_parameters():
        state[prefix + name] = parameter
