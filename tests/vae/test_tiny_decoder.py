"""The tiny decoder: its shape, its place in files, and that pipelines use it where they are asked to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm import load
from ldm.errors import ConfigError, SamplingError
from ldm.formats import save
from ldm.formats.native import save_model
from ldm.model import LatentDiffusion
from ldm.nn.conv import Conv3x3
from ldm.pipeline import Pipeline
from ldm.vae import TinyDecoderConfig
from tests.tiny import CHANNELS, tiny_model

CONFIG = {"widths": [8], "blocks": 1, "patch": 2}


def with_tiny_decoder() -> LatentDiffusion:
    return tiny_model(tiny_decoder=CONFIG)


@pytest.mark.parametrize(("widths", "patch", "factor"), [((8,), 1, 1), ((8, 4), 1, 2), ((4, 8, 8), 2, 8)])
def test_an_image_is_larger_than_its_latent_by_the_factor(widths: tuple[int, ...], patch: int, factor: int) -> None:
    config = TinyDecoderConfig(widths, 1, patch, latent_channels=5, image_channels=1)
    assert config.factor == factor
    assert config.build()(torch.zeros(2, 5, 3, 4)).shape == (2, 1, 3 * factor, 4 * factor)


def test_the_default_has_the_size_of_taesd_and_neither_norms_nor_attention() -> None:
    decoder = TinyDecoderConfig().build()
    assert 0.9e6 < sum(each.numel() for each in decoder.parameters()) < 2e6
    layers = {type(each) for each in decoder.modules() if not [*each.children()]}
    assert layers == {nn.Conv2d, Conv3x3, nn.ReLU, nn.PixelShuffle}


def test_an_image_does_not_depend_on_its_batch() -> None:
    model, latents = with_tiny_decoder(), torch.randn(3, CHANNELS, 8, 8)
    with torch.inference_mode():
        together = model.decode(latents, "tiny")
        torch.testing.assert_close(together[:1], model.decode(latents[:1], "tiny"), atol=1e-6, rtol=1e-5)
    assert together.abs().max() <= 1


def test_a_native_file_keeps_the_tiny_decoder_and_one_without_it_is_as_before(tmp_path: Path) -> None:
    model = with_tiny_decoder()
    save(model, tmp_path / "with.safetensors")
    loaded = load(tmp_path / "with.safetensors")
    assert loaded.config == model.config
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())

    plain = tiny_model()
    save_model(tmp_path / "without.safetensors", plain, {})
    content = (tmp_path / "without.safetensors").read_bytes()
    assert b"tiny_decoder" not in content
    added = load(tmp_path / "without.safetensors", tiny_decoder=tmp_path / "with.safetensors")
    assert added.tiny_decoder is not None
    assert added.fingerprint not in (loaded.fingerprint, load(tmp_path / "without.safetensors").fingerprint)


def test_foreign_formats_leave_the_tiny_decoder_out_with_a_warning(tmp_path: Path) -> None:
    model = with_tiny_decoder()
    for to, path in (("ldm", tmp_path / "ldm.safetensors"), ("diffusers", tmp_path / "diffusers")):
        with pytest.warns(
            UserWarning, match=r"has no place for the tiny decoder, which is left out; write a native file"
        ):
            save(model, path, to)
        assert load(path).tiny_decoder is None
    assert model.tiny_decoder is not None


def test_a_pipeline_decodes_with_it_and_records_it() -> None:
    pipe = Pipeline(with_tiny_decoder())
    latents = pipe("a red apple", seed=1, output_type="latent", progress=False)
    tiny = pipe("a red apple", seed=1, decoder="tiny", output_type="pt", progress=False)
    with torch.inference_mode():
        torch.testing.assert_close(tiny, (pipe.model.decode(latents, "tiny") + 1) / 2)
    image = pipe("a red apple", seed=1, decoder="tiny", progress=False)[0]
    assert json.loads(image.info["settings"])["decoder"] == "tiny"
    with torch.inference_mode():
        expected = (pipe.model.decode(latents, "tiny") + 1) / 2
    assert pipe.preview(latents)[0].tobytes() == image.tobytes()  # previews use it too
    assert expected.shape[-2:] == (16, 16)


def test_a_model_without_one_says_how_to_get_one() -> None:
    pipe = Pipeline(tiny_model())
    with pytest.raises(
        SamplingError, match=r"^this model has no tiny decoder; train one with tools/train.py --stage decoder"
    ):
        pipe.stream("a red apple", decoder="tiny")
    with pytest.raises(SamplingError, match="decoder"):
        pipe("a red apple", decoder="small")


def test_a_tiny_decoder_of_another_factor_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"the tiny decoder's factor is 4, but the first stage's is 2; choose widths"):
        tiny_model(tiny_decoder=CONFIG | {"patch": 4})
    with pytest.raises(ConfigError, match=r"blocks must be at least 1, not 0\."):
        TinyDecoderConfig(blocks=0)
