from __future__ import annotations

import pytest
import torch

from ldm.config import from_dict, to_dict
from ldm.errors import ConfigError
from ldm.model import ModelConfig
from ldm.pipeline import Pipeline
from ldm.vae.autoencoder import AutoencoderKLConfig
from ldm.vae.autoencoder_formats import AutoencoderFolder
from tests.tiny import CHANNELS, FACTOR, SIZE, tiny_model


def test_latents_are_normalised_on_the_way_in_and_back_on_the_way_out() -> None:
    model, image = tiny_model(), torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    stage = model.first_stage
    with torch.no_grad():
        posterior = stage.encode(image)
        noise = torch.randn_like(posterior.mean)
        latent = model.encode(image, noise)
        torch.testing.assert_close(stage.denormalize(latent), posterior.sample(noise), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(stage.denormalize(model.encode(image)), posterior.mean, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            model.decode(latent), stage.decode(posterior.sample(noise)).clamp(-1, 1), atol=1e-5, rtol=1e-5
        )
    assert latent.shape[1:] == model.latent_shape() == (CHANNELS, SIZE // FACTOR, SIZE // FACTOR)
    assert model.latent_shape(24, 40) == (CHANNELS, 24 // FACTOR, 40 // FACTOR)


def test_only_the_networks_run_in_low_precision() -> None:
    model = tiny_model("none")
    x, sigma, image = torch.randn(2, *model.latent_shape()), torch.tensor([0.5, 3.0]), torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        cond = model.conditioner({"text": [None, None]})
        whole = model.denoise(x, sigma, cond), model.encode(image), model.decode(x)
        model.denoiser.to(torch.bfloat16)
        for module in (
            model.first_stage.encoder,
            model.first_stage.decoder,
            model.first_stage.quant_conv,
            model.first_stage.post_quant_conv,
        ):
            module.to(torch.bfloat16)
        low = model.denoise(x, sigma, cond), model.encode(image), model.decode(x)
    for a, b in zip(whole, low, strict=True):
        assert b.dtype == torch.float32
        assert (a - b).abs().max() < 0.1 * a.abs().max()


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (
            "denoiser",
            {"in_channels": 5},
            "in_channels 5 and out_channels 4, but the first stage's latents have 4 channels; set them to 4 and 4",
        ),
        ("denoiser", {"context_width": None}, "context_width is None, but the conditioner gives 16"),
        ("sampling", {"spacing": "trailin"}, "unknown spacing 'trailin'"),
        ("first_stage", {"widths": [8, 8, 8, 8, 8, 8]}, "size 16 x 16 is not divisible by the first stage's factor 32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(section: str, changes: dict[str, object], message: str) -> None:
    config = to_dict(tiny_model().config)
    config[section] |= changes
    with pytest.raises(ConfigError, match=message):
        from_dict(ModelConfig, config)


@pytest.mark.parametrize("is_told", [True, False])
def test_a_first_stage_that_overflows_in_fp16_runs_in_fp32(is_told: bool) -> None:
    """Its config marks it, as ``force_upcast`` of diffusers does, or an overflow shows it; an image is made in any case."""
    model, wide = tiny_model(), tiny_model()
    if is_told:
        object.__setattr__(model.config.first_stage, "overflows_fp16", True)
    for each in (model, wide):
        state = each.first_stage.state_dict()
        state["decoder.conv_in.weight"].mul_(1e6)
    pipe = Pipeline(model).to(dtype=torch.float16)
    model.first_stage.decoder.conv_in.weight.data.clamp_(-6e4, 6e4)
    wide.first_stage.load_state_dict({name: value.float() for name, value in model.first_stage.state_dict().items()})
    latents = 10 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model.decode(latents), wide.decode(latents))
    assert {parameter.dtype for parameter in model.first_stage.parameters()} == {torch.float32}
    assert pipe.dtype == torch.float16
    assert not any(parameter.is_inference() for parameter in model.parameters())


@pytest.mark.parametrize("overflows", [True, False])
def test_force_upcast_of_diffusers_is_read_and_written(overflows: bool) -> None:
    config = AutoencoderKLConfig(widths=(8, 8), groups=4, overflows_fp16=overflows)
    values = AutoencoderFolder().write_config(config, (SIZE, SIZE), {})
    assert values.get("force_upcast", False) == overflows
    assert AutoencoderFolder().read_config(values, (), "vae") == config
