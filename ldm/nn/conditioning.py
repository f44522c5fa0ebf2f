"""Conditioning: the encoded conditions that a denoiser takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = TypeVar("P")


@dataclass(frozen=True)
class Context:
    """A sequence that a denoiser attends to.

    Attributes:
        states: ``[b n d]``, the input of the key and value projections.
        mask: ``[b n]`` of bool, True where the states may be attended to; None = everywhere.
    """

    states: Tensor
    mask: Tensor | None = None

    def full_mask(self) -> Tensor:
        """Return ``mask``, or if it is None a mask that is True everywhere."""
        return self.states.new_ones(self.states.shape[:2], dtype=torch.bool) if self.mask is None else self.mask

    @staticmethod
    def cat(contexts: Sequence[Context]) -> Context:
        """Concatenate along the batch, in order; shorter ones are padded to the longest, and the padding masked."""
        lengths = {context.states.shape[1] for context in contexts}
        if len(lengths) > 1 or len({context.mask is None for context in contexts}) > 1:
            contexts = [context._padded(max(lengths)) for context in contexts]
        masks = [context.mask for context in contexts if context.mask is not None]
        return Context(torch.cat([context.states for context in contexts]), torch.cat(masks) if masks else None)

    def _padded(self, length: int) -> Context:
        """Pad to ``length`` states, with a mask that leaves the padding out."""
        added = length - self.states.shape[1]
        return Context(F.pad(self.states, (0, 0, 0, added)), F.pad(self.full_mask(), (0, added)))


@dataclass(frozen=True)
class Control:
    """An image, encoded, by which a ControlNet of the model changes the evaluations of a batch.

    Attributes:
        name: name of the ControlNet.
        hint: ``[b w h w']``, the embedding of the image by the ControlNet.
        scale: ``[b]``, factor of its outputs; 0 = none.
        least, most: ``[b]``, it acts at noise levels above ``least`` and up to ``most``.
    """

    name: str
    hint: Tensor
    scale: Tensor
    least: Tensor
    most: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Control:
        """Return the record with ``function`` applied to each tensor."""
        return Control(self.name, *map(function, (self.hint, self.scale, self.least, self.most)))

    def at(self, sigma: Tensor) -> Control:
        """Return the record for noise levels ``sigma [b]``: the scale is 0 where it does not act."""
        acts = (self.least < sigma) & (sigma <= self.most)
        return replace(self, scale=torch.where(acts, self.scale, 0.0))

    @staticmethod
    def cat(controls: Sequence[Control]) -> Control:
        """Concatenate records of one ControlNet along the batch, in order."""
        assert len({control.name for control in controls}) == 1, "the controls are of different ControlNets"
        parts = zip(*((each.hint, each.scale, each.least, each.most) for each in controls), strict=True)
        return Control(controls[0].name, *map(torch.cat, parts))


@dataclass(frozen=True)
class Conditioning:
    """Encoded conditions of a denoiser; any part may be absent.

    Attributes:
        context: ``[b n d]``, a sequence that the denoiser attends to (cross-attention); usually the text.
        mask: ``[b n]`` of bool, True where ``context`` may be attended to; None = everywhere.
        vector: ``[b d]``, added to the embedding of the noise level.
        concat: ``[b c h w]``, concatenated to the noisy latent along its channels.
        contexts: further sequences by name, for adapters with keys and values of their own (an image, as in IP-Adapter).
        controls: inputs of ControlNets, whose outputs add up.
        estimate: ``[b c h w]``, an estimate of the clean latent, for a denoiser with self-conditioning; None = zeros.
    """

    context: Tensor | None = None
    mask: Tensor | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None
    contexts: Mapping[str, Context] = field(default_factory=dict)
    controls: tuple[Control, ...] = ()
    estimate: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Return the record with ``function`` applied to each tensor."""

        def of(part: Tensor | None) -> Tensor | None:
            return None if part is None else function(part)

        contexts = {name: Context(function(each.states), of(each.mask)) for name, each in self.contexts.items()}
        controls = tuple(each.map(function) for each in self.controls)
        parts = of(self.context), of(self.mask), of(self.vector), of(self.concat)
        return Conditioning(*parts, contexts, controls, of(self.estimate))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Return the record on ``device``, its floating-point parts in ``dtype``."""
        return self.map(lambda part: part.to(device, dtype if part.is_floating_point() else None))

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        """Return some rows of the batch."""
        return self.map(lambda part: part[rows])

    def at_levels(self, sigma: Tensor) -> Conditioning:
        """Return the record for noise levels ``sigma [b]``, without the controls that act on no row there."""
        if not self.controls:
            return self
        controls = (control.at(sigma) for control in self.controls)
        return replace(self, controls=tuple(each for each in controls if bool(each.scale.any())))

    def whole_mask(self) -> Tensor:
        """Return ``mask``, or if it is None a mask that is True everywhere."""
        assert self.context is not None, "the record has no context"
        return Context(self.context, self.mask).full_mask()

    @staticmethod
    def cat(records: Sequence[Conditioning]) -> Conditioning:
        """Concatenate records along the batch, in order; shorter contexts are padded to the longest, and the padding masked."""

        def joined(name: str, parts: Sequence[P | None], cat: Callable[[list[P]], P]) -> P | None:
            present = [part for part in parts if part is not None]
            assert len(present) in (0, len(parts)), f"some records have {name} and some do not"
            return cat(present) if present else None

        texts = [None if each.context is None else Context(each.context, each.mask) for each in records]
        text = joined("context", texts, Context.cat)
        names = dict.fromkeys(name for record in records for name in record.contexts)
        contexts = {name: joined(name, [each.contexts.get(name) for each in records], Context.cat) for name in names}
        return Conditioning(
            context=None if text is None else text.states,
            mask=None if text is None else text.mask,
            vector=joined("vector", [record.vector for record in records], torch.cat),
            concat=joined("concat", [record.concat for record in records], torch.cat),
            contexts={name: each for name, each in contexts.items() if each is not None},
            controls=tuple(map(Control.cat, zip(*(record.controls for record in records), strict=True))),
            estimate=joined("estimate", [record.estimate for record in records], torch.cat),
        )
