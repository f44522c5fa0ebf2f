"""Captions of images, and the prompts of a pipeline."""

from __future__ import annotations

from typing import Any

from ldm.checks import shown
from ldm.errors import DataError, SamplingError
from ldm.modalities.base import Modality, listed, register
from ldm.prompts import Prompt


class Caption(Modality):
    """A caption: stored as UTF-8, in batches a list of ``str``; a sample without one has the empty caption."""

    def decode(self, data: bytes) -> str:
        try:
            return data.decode().strip()
        except UnicodeDecodeError:
            raise DataError("is not UTF-8") from None

    def encode(self, value: str) -> bytes:
        return value.encode()

    def entries(self, value: Any) -> list[Any]:
        return prompts("prompt", value)


def prompts(argument: str, value: Any) -> list[Prompt]:
    """Return one or several prompts as a list; ``argument`` names them in messages.

    Raises:
        SamplingError: the list is empty, or an item is neither a string nor an object of :mod:`ldm.prompts`.
    """
    given = listed(value)
    for index, item in enumerate(given):
        if not isinstance(item, Prompt):
            raise SamplingError(f"{argument} {index} is {shown(item)}; it must be a string.")
    if not given:
        raise SamplingError(f"the list of {argument}s is empty; give one or several.")
    return given


CAPTION = register(
    Caption("text", "caption", "captions", argument="prompt", suffix="txt", optional=True, describes=True)
)
