"""Base class of the configs of denoising networks."""

from __future__ import annotations

from torch import nn

from ldm.config import Kind


class DenoiserConfig(Kind):
    """Config of F(x, noise level, conditioning), the network that a parametrization turns into a denoiser.

    ``build()`` returns a module ``forward(x [b c h w], noise_level [b], cond: Conditioning) -> [b out_channels h w]``; if
    one of the properties ``has_...`` is True, it also takes ``options``, a :class:`ldm.nn.attention.AttentionOptions`.
    """

    in_channels: int
    out_channels: int
    context_width: int | None
    vector_width: int | None
    num_timesteps: int | None = None
    """Number of timesteps that the network has embeddings for; None = it embeds any real number."""
    self_conditioning: float = 0.0
    """Share of the training batches with self-conditioning; above 0, the network uses ``Conditioning.estimate``."""

    @property
    def factor(self) -> int:
        """Downsampling of its coarsest features: sides that are multiples of it are not rounded."""
        return 1

    @property
    def has_perturbed_attention(self) -> bool:
        """True if there is a self-attention that ``AttentionOptions.identity`` can replace."""
        return False

    @property
    def has_deep_features(self) -> bool:
        """True if it can store and reuse ``AttentionOptions.deep_features``."""
        return False

    @property
    def has_token_merging(self) -> bool:
        """True if there are self-attentions on which ``AttentionOptions.token_merging`` acts."""
        return False

    @property
    def transformer_depths(self) -> tuple[int, ...]:
        """Number of transformer blocks that tokens can skip in training, at each level, the finest first; () if there are none.

        A network that has some takes the share of the tokens for each level by ``set_token_routing(shares)``.
        """
        return ()

    def with_width(self, factor: float) -> DenoiserConfig | None:
        """Return the config of a network ``factor`` times as wide, rounded to widths that it can have; None if it has none."""
        return None

    def build(self) -> nn.Module:
        raise NotImplementedError
