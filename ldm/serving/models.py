"""The models of a server: those of its list, loaded when they are first used and unloaded when memory is short."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ldm.errors import LdmError, unknown
from ldm.formats import Source
from ldm.formats.controlnet import ControlNetMismatch
from ldm.pipeline import Pipeline
from ldm.serving.batching import BatchedModel, BatchedPipeline, Batcher

LOG = logging.getLogger("ldm.serving")


class UnknownModelError(LdmError):
    """A model that is not in the list of the server."""


@dataclass
class _Loaded:
    pipe: BatchedPipeline
    bytes: int
    users: int = 0


class ModelStore:
    """The models that requests can name.

    Args:
        sources: source of each model by its name, as :meth:`Pipeline.from_pretrained` takes it; the first is the default.
        batcher: calls their networks.
        device, dtype, options: as for :meth:`Pipeline.from_pretrained`.
        lora_folder: folder of the LoRAs that prompts can name.
        controlnets: source of each ControlNet by its name; a model has those that are for its kind of model.
        memory: bytes of parameters, above which models that have not been used for longest are unloaded; None: no bound.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        batcher: Batcher,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        lora_folder: Path | None = None,
        controlnets: Mapping[str, Source] = MappingProxyType({}),
        memory: int | None = None,
        **options: Any,
    ):
        self.names, self.batcher = tuple(sources), batcher
        self._sources, self._memory = dict(sources), memory
        self._controlnets = dict(controlnets)
        self._options = {"device": device, "dtype": dtype, "lora_folder": lora_folder, **options}
        self._loaded: dict[str, _Loaded] = {}  # in the order of their last use
        self._names: dict[str | None, str] = {}  # of the models that have been loaded, by fingerprint
        self._lock = threading.Lock()
        self._loading = threading.Lock()

    def name(self, name: str | None) -> str:
        """Return the name of a model, that of the default for None.

        Raises:
            UnknownModelError: it is not in the list.
        """
        if not self.names:
            raise UnknownModelError("this server has no model; start it with --model NAME=SOURCE.")
        if name is not None and name not in self._sources:
            raise UnknownModelError(unknown("model", name, self._sources))
        return self.names[0] if name is None else name

    @property
    def lora_folder(self) -> Path | None:
        """Folder of the LoRAs that prompts can name."""
        return self._options["lora_folder"]

    @property
    def controlnets(self) -> tuple[str, ...]:
        """Names of the ControlNets that requests can use."""
        return tuple(self._controlnets)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The names of the models that are loaded."""
        with self._lock:
            return tuple(self._loaded)

    def peek(self, name: str) -> BatchedPipeline | None:
        """Return the pipeline of a model if it is loaded."""
        with self._lock:
            return self._loaded[name].pipe if name in self._loaded else None

    def name_of(self, fingerprint: str | None) -> str | None:
        """Return the name of a model that has been loaded by its fingerprint; None if there is none."""
        return self._names.get(fingerprint)

    @contextmanager
    def use(self, name: str) -> Iterator[BatchedPipeline]:
        """Yield the pipeline of a model, which is loaded if it is not, and stays loaded in the block.

        Raises:
            LdmError: the model cannot be loaded.
        """
        entry = self._enter(name)
        try:
            yield entry.pipe
        finally:
            with self._lock:
                entry.users -= 1
            self._unload()

    def load(self, name: str) -> None:
        """Load a model before it is used, if it is not loaded.

        Raises:
            LdmError: the model cannot be loaded.
        """
        with self.use(name):
            pass

    def _enter(self, name: str) -> _Loaded:
        if (entry := self._used(name)) is not None:
            return entry
        with self._loading:  # one at a time; another thread may have loaded it meanwhile
            if (entry := self._used(name)) is not None:
                return entry
            pipe = Pipeline.from_pretrained(self._sources[name], **self._options)
            self._load_controlnets(pipe)
            batched = BatchedPipeline(BatchedModel.of(pipe.model, self.batcher))
            batched.lora_folder = pipe.lora_folder
            weights = [*pipe.model.state_dict().values(), *pipe.model.controlnets.parameters()]
            size = sum(each.numel() * each.element_size() for each in weights)
            with self._lock:
                self._loaded[name] = entry = _Loaded(batched, size, users=1)
                if pipe.model.fingerprint is not None:
                    self._names.setdefault(pipe.model.fingerprint, name)
        self._unload()
        return entry

    def _load_controlnets(self, pipe: Pipeline) -> None:
        for name, source in self._controlnets.items():
            try:
                pipe.load_controlnet(source, name)
            except ControlNetMismatch as error:
                LOG.info("controlnet", extra={"record": {"controlnet": name, "left_out": str(error)}})

    def _used(self, name: str) -> _Loaded | None:
        with self._lock:
            entry = self._loaded.pop(name, None)
            if entry is not None:
                entry.users += 1
                self._loaded[name] = entry
            return entry

    def _unload(self) -> None:
        """Unload models that nobody uses until the others fit into the memory."""
        if self._memory is None:
            return
        removed = False
        with self._lock:
            for name in [name for name, entry in self._loaded.items() if not entry.users]:
                if sum(entry.bytes for entry in self._loaded.values()) <= self._memory or len(self._loaded) == 1:
                    break
                del self._loaded[name]
                removed = True
        if removed:
            gc.collect()
