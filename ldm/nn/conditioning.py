"""The record by which anything that a denoiser listens to reaches it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is conditioned on; any part may be absent.

    Attributes:
        context: ``[b n d]``, a sequence that the denoiser attends to (cross-attention).
        mask: ``[b n]`` of bool, True where ``context`` may be attended to; absent = everywhere.
        vector: ``[b d]``, added to the embedding of the noise level.
        concat: ``[b c h w]``, concatenated to the noisy latent along its channels.
        perturb: ``[b]`` of bool, True where the self-attention in the middle of the U-Net is to be the identity
            (perturbed-attention guidance, Ahn et al. 2024, arXiv 2403.17377).
    """

    context: Tensor | None = None
    mask: Tensor | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None
    perturb: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """The record with ``function`` applied to each part that is there."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Conditioning(**{name: None if part is None else function(part) for name, part in parts.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """The record on ``device``, its floating-point parts in ``dtype``."""
        return self.map(lambda part: part.to(device, dtype if part.is_floating_point() else None))

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        """Some rows of the batch."""
        return self.map(lambda part: part[rows])

    def whole_mask(self) -> Tensor:
        """``mask``, or if it is absent what that means: True for each place of the context."""
        assert self.context is not None, "there is no context to be masked"
        return self.context.new_ones(self.context.shape[:2], dtype=torch.bool) if self.mask is None else self.mask

    @staticmethod
    def cat(records: Sequence[Conditioning]) -> Conditioning:
        """Records as one batch, in order; shorter contexts are padded to the longest, and the padding masked."""
        lengths = {record.context.shape[1] for record in records if record.context is not None}
        if len(lengths) > 1 or len({record.mask is None for record in records}) > 1:
            records = [record._padded(max(lengths)) for record in records]

        def joined(name: str) -> Tensor | None:
            parts = [getattr(record, name) for record in records]
            assert len({part is None for part in parts}) == 1, f"some records have {name} and some do not"
            return None if parts[0] is None else torch.cat(parts)

        return Conditioning(**{field.name: joined(field.name) for field in fields(Conditioning)})

    def _padded(self, length: int) -> Conditioning:
        """With a context of that length, and a mask that leaves out what was added."""
        assert self.context is not None, "some records have context and some do not"
        added = length - self.context.shape[1]
        return replace(self, context=F.pad(self.context, (0, 0, 0, added)), mask=F.pad(self.whole_mask(), (0, added)))
