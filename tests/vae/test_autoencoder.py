from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as Peer

from ldm.config import from_dict
from ldm.errors import ConfigError
from ldm.vae import AutoencoderKLConfig
from tests.denoiser.peers import randomize
from tests.vae.peers import from_diffusers


@pytest.mark.parametrize(
    ("widths", "blocks", "latent_channels", "attention", "size"),
    [
        ((8, 16, 32, 32), 2, 4, True, (48, 40)),  # the shape of KL-f8
        ((8, 16, 32, 32), 1, 4, True, (37, 50)),  # sides that no level divides
        ((16, 8), 1, 3, False, (12, 20)),
        ((8,), 2, 2, True, (9, 7)),
    ],
)
def test_equals_diffusers(
    widths: tuple[int, ...], blocks: int, latent_channels: int, attention: bool, size: tuple[int, int]
) -> None:
    peer = randomize(
        Peer(
            block_out_channels=widths,
            layers_per_block=blocks,
            down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths),
            latent_channels=latent_channels,
            norm_num_groups=4,
            mid_block_add_attention=attention,
        )
    )
    config = {"widths": widths, "blocks": blocks, "latent_channels": latent_channels, "groups": 4}
    vae = from_dict(AutoencoderKLConfig, config | {"middle_attention": attention}).build()
    statistics = {name: tensor for name, tensor in vae.state_dict().items() if name.startswith("latent_")}
    vae.load_state_dict(from_diffusers(peer) | statistics)
    image = torch.rand(3, 3, *size) * 2 - 1
    with torch.no_grad():
        expected, posterior = peer.encode(image).latent_dist, vae.encode(image)
        assert expected.mean.std() > 0.1
        assert (posterior.mean - expected.mean).abs().max() < 1e-4
        assert (posterior.logvar - expected.logvar).abs().max() < 1e-4
        noise = torch.randn_like(posterior.mean)
        latent = posterior.sample(noise)
        assert (latent - (expected.mean + expected.std * noise)).abs().max() < 1e-4
        decoded = peer.decode(latent).sample
        assert decoded.std() > 0.1
        assert (vae.decode(latent) - decoded).abs().max() < 1e-4


@pytest.mark.parametrize("levels", [1, 3, 5])
def test_the_factor_follows_from_the_widths(levels: int) -> None:
    config = from_dict(AutoencoderKLConfig, {"widths": [4] * levels, "blocks": 1, "groups": 2, "latent_channels": 5})
    vae, side = config.build(), 2 * config.factor
    assert config.factor == vae.factor == 2 ** (levels - 1)
    posterior = vae.encode(torch.zeros(1, 3, side, side))
    assert posterior.mean.shape == (1, 5, 2, 2)
    assert vae.decode(posterior.mean).shape == (1, 3, side, side)


def test_a_network_in_low_precision_gives_statistics_in_fp32() -> None:
    vae = from_dict(AutoencoderKLConfig, {"widths": [4], "blocks": 1, "groups": 2}).build().to(torch.bfloat16)
    posterior = vae.encode(torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16))
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": []}, "at least one width"),
        ({"widths": [16, 24]}, r"widths\[1\] = 24 is not divisible by 16 groups"),
        ({"width": [16]}, r"unknown key 'width'; did you mean 'widths'\?"),
        ({"widths": 16}, "widths: expected a list, found 16"),
    ],
)
def test_impossible_autoencoders_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(AutoencoderKLConfig, {"groups": 16} | changes)
