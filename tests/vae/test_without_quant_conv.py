"""The autoencoder of SD 3 and FLUX, which has no 1 x 1 convolutions around the latents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from ldm import load
from ldm.config import from_dict, to_dict
from ldm.errors import CheckpointError
from ldm.formats import read, save
from ldm.formats.checkpoint import Part
from ldm.formats.folding import folded, scale_and_shift_of, with_scale
from ldm.formats.single_file import write_single_network
from ldm.model import LatentDiffusion
from ldm.vae import AutoencoderKL, AutoencoderKLConfig
from tests.tiny import tiny_model

SD3 = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
CONFIG = AutoencoderKLConfig(widths=(32, 64), blocks=1, latent_channels=16, quant_conv=False)


@pytest.fixture
def peer(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    network = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **SD3,
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # norms and biases start as constants, which hide a swap
    network.save_pretrained(tmp_path / "peer")
    return network


def network_of(part: Part) -> AutoencoderKL:
    network: AutoencoderKL = part.config.build()
    network.load_state_dict(dict(part.state))
    return network.eval()


def part_of(network: AutoencoderKL) -> Part:
    return Part(network.config, network.state_dict())


def fresh(mean: Any, std: Any) -> AutoencoderKL:
    torch.manual_seed(1)
    network = CONFIG.build().eval()
    network.latent_mean.copy_(torch.as_tensor(mean))
    network.latent_std.copy_(torch.as_tensor(std))
    return network


@torch.no_grad()
def test_it_computes_what_diffusers_does(peer: Any, tmp_path: Path) -> None:
    part = read(tmp_path / "peer").part("first_stage")
    assert part.config == replace(CONFIG, overflows_fp16=True)  # diffusers' default of force_upcast
    assert scale_and_shift_of(part) == (SD3["scaling_factor"], SD3["shift_factor"])
    ours, image, latent = network_of(part), torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 16, 8, 8)
    expected = peer.encode(image).latent_dist.mean
    torch.testing.assert_close(ours.encode(image).mean, expected, atol=1e-5, rtol=1e-5)
    normalized = (expected - SD3["shift_factor"]) * SD3["scaling_factor"]
    torch.testing.assert_close(ours.normalize(ours.encode(image).mean), normalized, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(latent), peer.decode(latent).sample, atol=1e-5, rtol=1e-5)


def test_diffusers_opens_a_whole_model_with_it(peer: Any, tmp_path: Path) -> None:
    model = with_first_stage(network_of(read(tmp_path / "peer").part("first_stage")))
    folder = save(model, tmp_path / "folder", "diffusers")
    again = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    assert again.config.use_quant_conv is False
    assert again.config.use_post_quant_conv is False
    assert {name: again.config[name] for name in SD3} == SD3
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in peer.state_dict().items())
    assert load(folder).config.first_stage == model.config.first_stage
    assert torch.equal(load(folder).first_stage.latent_mean, model.first_stage.latent_mean)


def with_first_stage(network: AutoencoderKL) -> LatentDiffusion:
    denoiser = {"kind": "unet", "levels": [{"width": 16, "blocks": 1, "depth": 1}], "heads": 2, "groups": 4}
    channels = {"in_channels": 16, "out_channels": 16, "context_width": 16}
    model = tiny_model(first_stage=to_dict(network.config), denoiser=denoiser | channels)
    model.first_stage.load_state_dict(network.state_dict())
    return model


def test_an_ldm_file_is_recognized_by_what_it_lacks(peer: Any, tmp_path: Path) -> None:
    """Its factors are assumed to be those of SD 3, unless the file has others."""
    part = read(tmp_path / "peer").part("first_stage")
    path = tmp_path / "vae.safetensors"
    write_single_network(path, "first_stage", part)
    assert not any("quant" in name or "scale" in name for name in load_file(path))
    again = read(path)
    assert again.part("first_stage").config == CONFIG
    assert again.part("first_stage").inferred
    assert any("shift 0.0609, as of SD 3" in note for note in again.notes)
    assert all(torch.equal(again.part("first_stage").state[name], each) for name, each in part.state.items())
    write_single_network(path, "first_stage", with_scale(part, 0.5))
    assert scale_and_shift_of(read(path).part("first_stage")) == (0.5, 0.0)
    with pytest.raises(CheckpointError, match="the format has no place for"):
        write_single_network(path, "first_stage", with_scale(part, 0.5, 0.1))


@torch.no_grad()
def test_deviations_are_folded_if_the_means_are_0() -> None:
    network = fresh(torch.zeros(16), torch.linspace(0.5, 2, 16))
    part = folded(part_of(network), 0.5)
    again, image, latent = network_of(part), torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 16, 8, 8)
    assert scale_and_shift_of(part) == (0.5, 0.0)
    posterior, posterior_again = network.encode(image), again.encode(image)
    expected = network.normalize(posterior.mean)
    torch.testing.assert_close(again.normalize(posterior_again.mean), expected, atol=1e-5, rtol=1e-5)
    for each, stage in ((posterior, network), (posterior_again, again)):
        torch.testing.assert_close(
            each.std / stage.latent_std[:, None, None], posterior.std / network.latent_std[:, None, None]
        )
    decoded = again.decode(again.denormalize(latent))
    torch.testing.assert_close(decoded, network.decode(network.denormalize(latent)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("to", ["ldm", "diffusers"])
def test_means_that_differ_are_refused(to: str, tmp_path: Path) -> None:
    model = with_first_stage(fresh(torch.linspace(-1, 1, 16), torch.ones(16)))
    with pytest.raises(CheckpointError, match=r"latents of this VAE have a mean .* write a native file"):
        save(model, tmp_path / "out", to)
    assert torch.equal(load(save(model, tmp_path / "native")).first_stage.latent_mean, model.first_stage.latent_mean)


def test_one_convolution_of_two_is_refused(peer: Any, tmp_path: Path) -> None:
    file = tmp_path / "peer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_quant_conv": True}))
    with pytest.raises(CheckpointError, match="use_quant_conv is True, but use_post_quant_conv is False"):
        read(tmp_path / "peer")


def test_the_field_is_left_out_of_configs_while_it_has_its_default() -> None:
    """Fingerprints of existing files cover the config."""
    assert "quant_conv" not in to_dict(AutoencoderKLConfig())
    assert to_dict(CONFIG)["quant_conv"] is False
    assert (
        from_dict(AutoencoderKLConfig, {key: each for key, each in to_dict(CONFIG).items() if key != "kind"}) == CONFIG
    )
