"""The family of denoising networks."""

from __future__ import annotations

from torch import nn

from ldm.config import Kind


class DenoiserConfig(Kind):
    """F(x, noise level, conditioning), the network that a parametrization turns into a denoiser.

    ``build()`` gives a module ``forward(x [b c h w], noise_level [b], cond: Conditioning) -> [b out_channels h w]``.
    """

    in_channels: int
    out_channels: int
    context_width: int | None
    vector_width: int | None
    num_timesteps: int | None = None
    """Timesteps that it has embeddings of; None: it embeds any number."""

    @property
    def attends_in_the_middle(self) -> bool:
        """Whether there is a self-attention that ``Conditioning.perturb`` acts on."""
        return False

    def build(self) -> nn.Module:
        raise NotImplementedError
