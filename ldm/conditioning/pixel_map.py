"""Base of the conditioners for maps with a value for each pixel, which are concatenated to the latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm.conditioning.conditioner import Conditioner, input_of
from ldm.errors import SamplingError
from ldm.modalities.pixel_map import PixelMap
from ldm.nn.conditioning import Conditioning


class PixelMapConditioner(Conditioner):
    """Conditioner for maps, which it downsamples to the size of the latents; a subclass implements ``shrunk`` and ``forward``.

    Args:
        size: height and width of an absent map, if no map is given with it.
        factor: downsampling factor, that of the first stage.
        absent: value of an absent map after downsampling.
    """

    modality: ClassVar[PixelMap]

    def __init__(self, size: tuple[int, int] | None, factor: int | None, absent: float):
        super().__init__()
        assert size is not None, "the size comes from the experiment's latents"
        assert factor is not None, "the factor comes from the experiment's first stage"
        self.size, self.factor, self.absent = size, factor, absent

    def check(self, maps: Tensor, first: int = 0) -> None:
        """Check the values of the maps ``[b h w]`` of images ``first``, ``first + 1``, ...

        Raises:
            ConditionError: one is invalid.
        """

    def shrunk(self, maps: Tensor) -> Tensor:
        """Downsample maps ``[b h w] -> [b h/f w/f]``."""
        raise NotImplementedError

    def maps(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the downsampled maps of a batch, ``[b h/f w/f]``.

        Raises:
            SamplingError: the maps differ in size, or have invalid values.
        """
        given: Tensor | Sequence[Any] = input_of(inputs, self.modality.key)
        if isinstance(given, Tensor):
            self.check(given)
            return self.shrunk(given)
        entries = [None if each is None else self.modality.entry(each)[None] for each in given]
        for number, entry in enumerate(entries):
            if entry is not None:
                self.check(entry, number)
        maps = [None if entry is None else self.shrunk(entry)[0] for entry in entries]
        present = [each for each in maps if each is not None]
        sizes = {each.shape for each in present}
        if len(sizes) > 1:
            raise SamplingError(
                f"the {self.modality.noun}s differ in size ({len(sizes)} sizes); give maps of one size at a time."
            )
        filler = torch.full_like(present[0], self.absent) if present else torch.full(self.size, self.absent)
        return torch.stack([filler if each is None else each for each in maps])

    def unconditional(self, inputs: Mapping[str, Any], negative: Sequence[str] | None = None) -> Conditioning:
        """Compute the conditioning of absent maps, in the size of the given ones."""
        return Conditioning(concat=torch.zeros_like(self(inputs).concat))
