"""Settings that trade quality for time: what they need of a model, and the options of the denoiser that they stand for."""

from __future__ import annotations

from ldm.errors import SamplingError
from ldm.model import LatentDiffusion
from ldm.nn.attention import AttentionOptions
from ldm.nn.deep_features import DeepFeatures
from ldm.sampling_settings import SamplingSettings


def check_shortcuts(model: LatentDiffusion, settings: SamplingSettings) -> None:
    """Check that a model can be sampled with the settings that trade quality for time.

    Raises:
        SamplingError: it cannot.
    """
    model.check_decoder(settings.decoder)
    denoiser = model.config.denoiser
    given = {
        "cache_interval": (settings.cache_interval > 1, denoiser.has_deep_features, "stores no deep features"),
        "token_merging": (
            settings.token_merging > 0,
            denoiser.has_token_merging,
            "has no self-attention outside of its middle",
        ),
    }
    for name, (used, possible, lack) in given.items():
        if used and not possible:
            raise SamplingError(f"the denoiser {denoiser.kind} of this model {lack}; leave {name} out.")
        if used and model.accelerator is not None:
            raise SamplingError(f"compiled networks take no {name}; leave it out, or call pipe.decompile().")


def evaluation_options(settings: SamplingSettings) -> AttentionOptions | None:
    """Return the options of the denoiser for one sampling, which has deep features of its own; None if there are none."""
    if settings.cache_interval == 1 and not settings.token_merging:
        return None
    deep_features = DeepFeatures(settings.cache_interval) if settings.cache_interval > 1 else None
    return AttentionOptions(token_merging=settings.token_merging or None, deep_features=deep_features)
