"""Trainings that begin with a foreign model, and what becomes of them in the world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers

from ldm import Pipeline, load
from ldm.errors import CheckpointError, ConfigError
from ldm.formats import read, save
from ldm.formats.checkpoint import CLIP_COMPONENTS, joined
from ldm.formats.clip import save_clip
from ldm.formats.native import load_strictly
from ldm.training.experiment import Experiment, load_config
from ldm.training.stages import train_stage
from tests.experiments import EXPERIMENT, SIZE, TRAIN, write_experiment
from tests.formats import world
from tests.formats.test_parity import picture, picture_of_peer

UNET = {
    "kind": "unet",
    "levels": [{"width": 32, "blocks": 1, "depth": 1}, {"width": 64, "blocks": 1}],
    "heads": 8,
    "projection": "conv",
    "context_width": 32,
}
TEXT = {"width": 32, "layers": 3, "heads": 4, "mlp_ratio": 2.0, "activation": "quick_gelu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "sd1"
    world.pipeline("sd1", merges=None).save_pretrained(path)
    return path


def experiment(
    tmp_path: Path,
    source: Path,
    unet: dict[str, Any],
    text: dict[str, Any] = TEXT,
    parts: tuple[str, str] = (".", "."),
    **train: Any,
) -> Experiment:
    """Stage 3 alone, upon the VAE and the text tower of ``source``, or of its sub-folders ``parts``."""
    vae, clip = parts
    diffusion = {"schedule": "scaled_linear", "parametrization": "eps"}
    quick = {"max_steps": 1, "checkpoint_every": 1000, "validate_every": 1000, **train}
    stage = {"model": unet, "conditioner": {"kind": "text"}, "diffusion": diffusion, "train": TRAIN | quick}
    changes = {
        "vae": {
            "model": {"kind": "autoencoder_kl", "widths": [32, 64], "blocks": 1},
            "checkpoint": str(source / vae),
        },
        "clip": {
            "tokenizer": {"kind": "clip_bpe"},
            "model": {"embed_dim": None, "text": text},
            "checkpoint": str(source / clip),
        },
        "denoiser": EXPERIMENT["denoiser"] | stage,
    }
    return load_config(write_experiment(tmp_path, changes))


def test_a_training_goes_on_from_sd_and_diffusers_reads_what_comes_of_it(folder: Path, tmp_path: Path) -> None:
    source, trained = (
        load(folder),
        load(train_stage(experiment(tmp_path, folder, UNET, max_steps=2, init=str(folder)), "denoiser")),
    )
    before, after = source.state_dict(), trained.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved
    assert all(name.startswith("denoiser.") for name in moved)
    changes = torch.cat([(after[name] - before[name]).flatten() for name in moved]).abs()
    assert changes.max() <= 2 * 2 * TRAIN["learning_rate"]  # two steps of Adam from there, not from noise

    out = save(trained, tmp_path / "out", "diffusers")
    peer = diffusers.StableDiffusionPipeline.from_pretrained(out)
    peer.set_progress_bar_config(disable=True)
    settings = {"guidance_scale": 3.0, "num_inference_steps": 4}
    ours = Pipeline.from_pretrained(out, dtype=torch.float32)
    expected = picture_of_peer(peer, "red apple", (SIZE, SIZE), **settings)
    assert np.abs(picture(ours, "red apple", (SIZE, SIZE), **settings) - expected).max() < 1e-3


def test_an_own_unet_on_a_foreign_vae_and_text_encoder(folder: Path, tmp_path: Path) -> None:
    """By the sub-folders of the pipeline, which are sources by themselves."""
    own = UNET | {"levels": [{"width": 32, "blocks": 2, "depth": 1}], "head_width": 16, "heads": None}
    trained = load(train_stage(experiment(tmp_path, folder, own, parts=("vae", "text_encoder")), "denoiser"))
    source = load(folder)
    assert torch.equal(trained.first_stage.quant_conv.weight, source.first_stage.quant_conv.weight)
    assert torch.equal(trained.first_stage.latent_std, source.first_stage.latent_std)
    for name, tensor in source.conditioner.state_dict().items():
        assert torch.equal(trained.conditioner.state_dict()[name], tensor)
    assert trained.tokenizer is not None
    assert trained.tokenizer("a cat").tolist() == source.tokenizer("a cat").tolist()  # type: ignore[misc]


def test_a_foreign_part_of_another_config_is_refused_by_its_field(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"denoiser\.model\.heads is 4 here and 8 there"):
        train_stage(experiment(tmp_path, folder, UNET | {"heads": 4}, init=str(folder)), "denoiser")
    with pytest.raises(CheckpointError, match=r"clip\.model\.text\.activation is 'gelu' here and 'quick_gelu' there"):
        train_stage(experiment(tmp_path, folder, UNET, text=TEXT | {"activation": "gelu"}), "denoiser")


def test_a_text_encoder_alone_is_not_trained(tmp_path: Path) -> None:
    clip = EXPERIMENT["clip"]
    alone = {name: value for name, value in clip["model"].items() if name != "image"}
    with pytest.raises(ConfigError, match=r"model\.image is missing, and a CLIP is trained with both towers"):
        load_config(write_experiment(tmp_path, {"clip": clip | {"model": alone}}))


def test_stage_2_goes_on_from_a_clip_of_transformers(tmp_path: Path) -> None:
    """After a step of no length its weights are those of the source."""
    config = load_config(write_experiment(tmp_path))
    torch.manual_seed(5)
    clip = config.clip.model.build()  # type: ignore[union-attr]
    save_clip(clip, None, tmp_path / "clip", "transformers")
    found = read(tmp_path / "clip")
    assert found.kind == "CLIP"
    tiny = ["learning_rate=1e-30", "max_steps=1", "weight_decay=0", "ema_decay=0", f"init={tmp_path / 'clip'}"]
    config = load_config(tmp_path / "tiny.yaml", [f"clip.train.{each}" for each in tiny])
    again = config.clip.model.build()  # type: ignore[union-attr]
    left = read(train_stage(config, "clip"))
    load_strictly(again, joined(left.parts, CLIP_COMPONENTS), "what is left")
    for name, tensor in clip.state_dict().items():
        assert torch.allclose(again.state_dict()[name], tensor, rtol=0, atol=1e-20), name


def test_the_shipped_model_in_the_parts_of_diffusers(tmp_path: Path) -> None:
    """Its U-Net also hears the pooled state, which no pipeline of diffusers hands on: the parts make the same image."""
    model, prompts, scale = load(), ["", "red apple"], 3.0
    out = save(model, tmp_path / "out", "diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(out / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(out / "vae")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(out / "scheduler")
    text = transformers.CLIPTextModelWithProjection.from_pretrained(out / "text_encoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "tokenizer")
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert model.tokenizer is not None
    assert torch.equal(tokens, model.tokenizer(prompts))

    noise = torch.randn(1, *model.latent_shape(), generator=torch.Generator().manual_seed(1))
    shares = [0.999, 0.86, 0.71, 0.57, 0.43, 0.29, 0.14, 0.05]  # of noise
    scheduler.set_timesteps(sigmas=shares)
    x = shares[0] * noise
    with torch.no_grad():
        told = text(tokens)
        for t in scheduler.timesteps:
            both = torch.cat([x] * 2)
            answers = unet(both, t, encoder_hidden_states=told.last_hidden_state, class_labels=told.text_embeds).sample
            without, answer = answers.chunk(2)
            x = scheduler.step(without + scale * (answer - without), t, x).prev_sample
        expected = (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)

    timesteps = [round(1000 * each) - 1 for each in shares]  # the first of 1,000 levels has the number 0
    settings = {
        "sampler": "euler",
        "timesteps": timesteps,
        "guidance_scale": scale,
        "output_type": "pt",
        "progress": False,
    }
    for each in (model, load(save(model, tmp_path / "one.safetensors", "ldm")), load(out)):
        picture = Pipeline(each)("red apple", latents=noise, **settings)
        assert (picture - expected).abs().max() < 0.2 / 255
