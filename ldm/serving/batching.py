"""Continuous batching: evaluations of the denoiser that several samplings wait for are computed in one call of the network.

Each sampling runs the pipeline's own loop in a thread of its own, with its own prompt, seed, solver, guidance and number of
steps; only the calls of the networks go to one common thread. So a sampling joins and leaves at any evaluation.

>>> batcher = Batcher()
>>> pipe = BatchedPipeline(BatchedModel.of(Pipeline.from_pretrained().model, batcher))
>>> with batcher.sampling():  # in several threads at once
...     images = pipe("a red apple", seed=1)
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ldm import inputs
from ldm.diffusion import Denoiser
from ldm.model import LatentDiffusion
from ldm.nn.attention import AttentionOptions
from ldm.nn.conditioning import Conditioning
from ldm.pipeline import Pipeline

R = TypeVar("R")

PATIENCE = 0.02
"""Seconds for which a call waits for samplings that are between two evaluations, which takes about a millisecond."""


@dataclass(frozen=True)
class _Evaluation:
    """One call of a denoiser that a sampling waits for."""

    model: BatchedModel
    x: Tensor
    sigma: Tensor
    cond: Conditioning
    options: AttentionOptions | None
    result: Future[Tensor] = field(default_factory=Future)

    @property
    def signature(self) -> Hashable:
        """All shapes and types but the number of images; evaluations of one model and signature fit into one call."""
        identity = None if self.options is None else self.options.identity
        tensors = [self.x, self.sigma, identity]
        tensors += [self.cond.context, self.cond.mask, self.cond.vector, self.cond.concat, self.cond.estimate]
        for name in sorted(self.cond.contexts):
            tensors += [self.cond.contexts[name].states, self.cond.contexts[name].mask]
        tensors += [control.hint for control in self.cond.controls]
        shapes = (None if each is None else (each.shape[1:], each.dtype) for each in tensors)
        names = (*sorted(self.cond.contexts), *(control.name for control in self.cond.controls))
        return (len(self.x), self.options is None, *names, *shapes)


@dataclass(frozen=True)
class _Call:
    """Any other computation, which no other is joined with."""

    function: Callable[[], Any]
    result: Future[Any] = field(default_factory=Future)


class Batcher:
    """The thread in which all networks are called, and the queue of the calls that samplings wait for.

    In exact mode, evaluations are joined only in numbers for which each image is bitwise the one that its sampling would get
    alone. Whether that holds depends on the libraries that multiply matrices, on the shapes and on the number of
    threads, so it is measured: the first time that a number of evaluations of some signature is computed, it is computed
    both ways and compared; later calls have the numbers that were found equal.

    Args:
        max_rows: largest number of rows of the network's batch; a guided image has two.
        exact: True for the exact mode; False to join what waits, equal to rounding.
        observe: called with the number of rows of each call of a denoiser.
    """

    def __init__(self, max_rows: int = 32, exact: bool = True, observe: Callable[[int], object] = lambda rows: None):
        self.max_rows, self.exact, self._observe = max_rows, exact, observe
        self._changed = threading.Condition()
        self._waiting: deque[_Evaluation | _Call] = deque()
        self._samplings = 0
        self._closed = False
        self._equal: WeakKeyDictionary[LatentDiffusion, dict[Hashable, dict[int, bool]]] = WeakKeyDictionary()
        self._of_thread = threading.local()
        self._thread = threading.Thread(target=self._work, name="ldm-networks", daemon=True)
        self._thread.start()

    @contextmanager
    def sampling(self, check: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Context of a thread that samples: a call waits, for a moment, until all of them have their next evaluation.

        Args:
            check: called before each call of a network; an exception that it raises ends the sampling.
        """
        with self._changed:
            self._samplings += 1
        self._of_thread.check = check
        try:
            yield
        finally:
            self._of_thread.check = lambda: None
            with self._changed:
                self._samplings -= 1
                self._changed.notify_all()

    def denoise(
        self, model: BatchedModel, x: Tensor, sigma: Tensor, cond: Conditioning, options: AttentionOptions | None
    ) -> Tensor:
        """Evaluate :meth:`LatentDiffusion.denoise`, together with what other samplings wait for."""
        return self._submit(_Evaluation(model, x, sigma, cond, options))

    def run(self, function: Callable[[], R]) -> R:
        """Call a function in the thread of the networks, in inference mode, and return its result."""
        if threading.current_thread() is self._thread:
            return function()
        return self._submit(_Call(function))

    def close(self) -> None:
        """End the thread; calls that still wait raise a RuntimeError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _submit(self, call: Any) -> Any:
        getattr(self._of_thread, "check", lambda: None)()
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._waiting.append(call)
            self._changed.notify_all()
        return call.result.result()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._changed.wait_for(lambda: len(self._waiting) >= self._samplings or self._closed, PATIENCE)
                if self._closed:
                    for each in self._waiting:
                        each.result.set_exception(RuntimeError("the batcher is closed"))
                    return
                calls = self._take()
            try:
                with torch.inference_mode():
                    results = self._compute(calls)
                for call, result in zip(calls, results, strict=True):
                    call.result.set_result(result)
            except BaseException as error:
                for call in calls:
                    if not call.result.done():
                        call.result.set_exception(error)
            del calls  # no model is kept while the thread waits

    def _take(self) -> Sequence[Any]:
        """Remove the call that waits longest from the queue, with all that can be joined with it; return them."""
        first = self._waiting[0]
        if isinstance(first, _Call):
            return [self._waiting.popleft()]
        joined = [
            each
            for each in self._waiting
            if isinstance(each, _Evaluation) and each.model is first.model and each.signature == first.signature
        ]
        joined = joined[: self._number(first, len(joined))]
        self._waiting = deque(each for each in self._waiting if not any(each is other for other in joined))
        return joined

    def _number(self, first: _Evaluation, waiting: int) -> int:
        """Return how many of ``waiting`` evaluations to compute in the next call: the same number in each, as far as possible."""
        equal = self._equal.setdefault(first.model, {}).setdefault(first.signature, {})
        most = min(waiting, max(1, self.max_rows // len(first.x)))
        usable = [n for n in range(1, most + 1) if n == 1 or not self.exact or equal.get(n, True)]
        balanced = math.ceil(waiting / math.ceil(waiting / usable[-1]))
        return min(n for n in usable if n >= balanced)

    def _compute(self, calls: Sequence[Any]) -> Sequence[Any]:
        first, n = calls[0], len(calls)
        if isinstance(first, _Call):
            return [first.function()]
        equal = self._equal[first.model][first.signature]
        if self.exact and n > 1 and n not in equal:
            alone = [self._evaluate([each])[0] for each in calls]
            together = self._evaluate(calls)
            equal[n] = all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
            return alone
        return self._evaluate(calls)

    def _evaluate(self, calls: Sequence[_Evaluation]) -> Sequence[Tensor]:
        """Compute some evaluations in one call of the network."""
        first, options = calls[0], calls[0].options
        rows = [len(each.x) for each in calls]
        self._observe(sum(rows))
        if len(calls) == 1:
            return [first.model.denoise_at_once(first.x, first.sigma, first.cond, options)]
        if options is not None:
            options = AttentionOptions(torch.cat([each.options.identity for each in calls]))  # type: ignore[union-attr,misc]
        return first.model.denoise_at_once(
            torch.cat([each.x for each in calls]),
            torch.cat([each.sigma for each in calls]),
            Conditioning.cat([each.cond for each in calls]),
            options,
        ).split(rows)


class BatchedModel(LatentDiffusion):
    """A model whose networks are called by a :class:`Batcher`; it shares all its parts with the model that it is made of."""

    batcher: Batcher

    @classmethod
    def of(cls, model: LatentDiffusion, batcher: Batcher) -> BatchedModel:
        """Return ``model`` with its calls going to ``batcher``."""
        new = cls.__new__(cls)
        new.__dict__.update(vars(model), batcher=batcher)
        return new

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning, options: AttentionOptions | None = None) -> Tensor:
        if options is not None and (options.deep_features is not None or options.token_merging is not None):
            return self.batcher.run(lambda: self.denoise_at_once(x, sigma, cond, options))
        return self.batcher.denoise(self, x, sigma, cond.at_levels(sigma), options)

    def denoise_at_once(self, *inputs: Any) -> Tensor:
        """Evaluate the denoiser in the current thread."""
        return super().denoise(*inputs)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        return self.batcher.run(lambda: super(BatchedModel, self).encode(image, noise))

    def decode(self, latent: Tensor, decoder: str = "full") -> Tensor:
        return self.batcher.run(lambda: super(BatchedModel, self).decode(latent, decoder))


class BatchedPipeline(Pipeline):
    """A pipeline of a :class:`BatchedModel`; it encodes prompts in the thread of the networks, too."""

    def denoiser(self, request: inputs.Request, levels: Tensor, options: AttentionOptions | None = None) -> Denoiser:
        model = self.model
        assert isinstance(model, BatchedModel)
        return model.batcher.run(lambda: super(BatchedPipeline, self).denoiser(request, levels, options))
