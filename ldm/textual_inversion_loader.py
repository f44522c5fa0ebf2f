"""The methods of a pipeline that load and unload textual inversions."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.conditioning.textual_inversion import add_inversions, known_tokens, remove_inversions
from ldm.load_options import Source
from ldm.modalities.base import listed
from ldm.model import LatentDiffusion


class TextualInversionLoader:
    """Base of pipelines whose prompts can contain textual inversions."""

    model: LatentDiffusion

    def load_textual_inversion(self, source: Source, token: str | Sequence[str] | None = None) -> list[str]:
        """Add the tokens of a textual inversion, whose words prompts and negative prompts can then contain, and return them.

        The tokenizer and the token embeddings get the tokens, as in diffusers, and :meth:`save_pretrained` writes them.

        Args:
            source: a file of diffusers, Automatic1111 or kohya (SDXL), a folder written by diffusers, or a hub id of either.
            token: token in place of that of the file; a list gives each vector of the file a token of its own.

        Raises:
            CheckpointError: the file cannot be read or is for another model, or the token is in the vocabulary.
        """
        from ldm.formats.textual_inversion import read_inversions

        inversions = read_inversions(source, self.model, token)
        add_inversions(self.model, inversions)
        return [each.token for each in inversions]

    def unload_textual_inversion(self, token: str | Sequence[str] | None = None) -> None:
        """Remove one or several tokens, or all; the weights are restored bit for bit.

        Raises:
            SamplingError: no textual inversion with this token is loaded.
        """
        tokens = None if token is None else known_tokens(self.model, listed(token))
        remove_inversions(self.model, lambda each: tokens is None or each.token in tokens)
