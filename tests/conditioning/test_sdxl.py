from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm import Pipeline, editing
from ldm.cli.dry_run import describe
from ldm.clip.tokenizer import CLIPBPEConfig
from ldm.conditioning import ConditionerConfig, SDXLConditioner, long_prompts
from ldm.config import from_dict, to_dict
from ldm.data.shards import Sample, write_shard
from ldm.errors import ConfigError, SamplingError
from ldm.formats.native import save_model
from ldm.nn.conditioning import Conditioning
from ldm.nn.embeddings import sinusoidal
from ldm.prompts import WeightedPrompt
from ldm.training.experiment import Experiment, load_config
from ldm.training.stages import train_stage
from tests.clip.peers import clip_tokenizer, from_transformers, randomize
from tests.data.pictures import encoded
from tests.experiments import EXPERIMENT, TRAIN, write_experiment
from tests.tiny import SIZE, TOKENIZER, TOWER, tiny_model

QUIET: dict[str, Any] = {"seed": 0, "progress": False}
SDXL = {"hidden_state": "penultimate", "context_norm": False}
TINY: dict[str, Any] = {
    "kind": "sdxl",
    "first": TOWER | SDXL,
    "second": TOWER | SDXL | {"width": 24, "embed_dim": 10},
    "size_embedding_width": 8,
}
CONTEXT, VECTOR = 16 + 24, 10 + 6 * 8
CAPTIONS = ["a red apple", "a blue sky", "two green cars"]


def sizes(n: int = 3, side: int = SIZE) -> dict[str, list[tuple[int, int]]]:
    whole = [(side, side)] * n
    return {"original_size": whole, "crops_coords_top_left": [(0, 0)] * n, "target_size": whole}


def tiny(**changes: Any) -> SDXLConditioner:
    conditioner = from_dict(ConditionerConfig, TINY | changes).build(TOKENIZER)
    assert isinstance(conditioner, SDXLConditioner)
    return conditioner


# Parity


WIDTHS = {"first": (16, "quick_gelu"), "second": (24, "gelu")}
PROJECTION = 12


def text_config(name: str) -> CLIPTextConfig:
    width, activation = WIDTHS[name]
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=PROJECTION,
        hidden_act=activation,
        eos_token_id=49407,
    )


@pytest.fixture(scope="module")
def peer() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=4),
        text_encoder=randomize(CLIPTextModel(text_config("first"))),
        text_encoder_2=randomize(CLIPTextModelWithProjection(text_config("second"))),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        unet=UNet2DConditionModel(
            block_out_channels=(8,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=16 + 24,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=PROJECTION + 6 * 256,
        ),
        scheduler=EulerDiscreteScheduler(),
    )


def ours(peer: StableDiffusionXLPipeline, **changes: Any) -> SDXLConditioner:
    """The same towers, by the settings of SDXL."""
    towers = {
        name: {"width": width, "layers": 3, "heads": 2, "activation": activation, **SDXL}
        for name, (width, activation) in WIDTHS.items()
    }
    towers["second"]["embed_dim"] = PROJECTION
    conditioner = from_dict(ConditionerConfig, {"kind": "sdxl", **towers, **changes}).build(CLIPBPEConfig().build())
    assert isinstance(conditioner, SDXLConditioner)
    conditioner.first.load_state_dict(from_transformers(peer.text_encoder))
    conditioner.second.load_state_dict(from_transformers(peer.text_encoder_2))
    return conditioner


@pytest.fixture(scope="module")
def own(peer: StableDiffusionXLPipeline) -> SDXLConditioner:
    return ours(peer)


@torch.no_grad()
def check_parity(
    peer: StableDiffusionXLPipeline,
    own: SDXLConditioner,
    prompts: list[str],
    negatives: list[str] | None,
    described: tuple[tuple[int, int], ...] = ((768, 512), (0, 64), (1024, 1024)),
) -> None:
    context, negative_context, pooled, negative_pooled = peer.encode_prompt(prompts, negative_prompt=negatives)
    ids = peer._get_add_time_ids(*described, torch.float32, PROJECTION)[0]
    embedded = peer.unet.add_time_proj(ids).reshape(1, -1).expand(len(prompts), -1)
    names = ("original_size", "crops_coords_top_left", "target_size")
    inputs = {"text": prompts, **{name: [pair] * len(prompts) for name, pair in zip(names, described, strict=True)}}
    wanted, unwanted = own(inputs), own.unconditional(inputs, negatives)
    for cond, states, pool in ((wanted, context, pooled), (unwanted, negative_context, negative_pooled)):
        torch.testing.assert_close(cond.context, states, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cond.vector, torch.cat([pool, embedded], dim=1), atol=1e-5, rtol=1e-5)
        assert cond.mask is None


PROMPTS = ["a red apple! wow!!", "", "Crème brûlée, naïve FAÇADE  ½", "a very long, long tale " * 30]


@pytest.mark.parametrize("negatives", [None, ["blurry", "", "häßlich", "worse than that, " * 40]])
def test_equals_diffusers(peer: StableDiffusionXLPipeline, own: SDXLConditioner, negatives: list[str] | None) -> None:
    check_parity(peer, own, PROMPTS, negatives)


def test_equals_diffusers_where_no_negative_prompt_is_the_empty_one(peer: StableDiffusionXLPipeline) -> None:
    peer.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        check_parity(peer, ours(peer, zeros_for_empty=False), PROMPTS, None)
    finally:
        peer.register_to_config(force_zeros_for_empty_prompt=True)


pairs = st.tuples(st.integers(0, 4096), st.integers(0, 4096))


@given(st.text(max_size=60), st.text(max_size=60), st.tuples(pairs, pairs, pairs))
def test_equals_diffusers_on_any_text_and_sizes(
    peer: StableDiffusionXLPipeline,
    own: SDXLConditioner,
    prompt: str,
    negative: str,
    described: tuple[tuple[int, int], ...],
) -> None:
    check_parity(peer, own, [prompt], [negative], described)


# The record


def test_the_config_knows_the_widths() -> None:
    config = tiny().config
    cond = tiny()({"text": CAPTIONS, **sizes()})
    assert (config.context_width, config.vector_width) == (CONTEXT, VECTOR)
    assert (cond.context.shape, cond.vector.shape) == ((3, 12, CONTEXT), (3, VECTOR))
    assert from_dict(ConditionerConfig, to_dict(config)) == config


@pytest.mark.parametrize("zeros", [True, False])
def test_a_dropped_caption_is_silent_in_both_towers_and_keeps_its_sizes(zeros: bool) -> None:
    conditioner = tiny(dropout=0.5, zeros_for_empty=zeros)
    inputs = {"text": CAPTIONS * 30, **sizes(90)}
    inputs["original_size"] = [(side, 2 * side) for side in range(90)]
    kept, silent = conditioner(inputs), conditioner.unconditional(inputs)
    cond = conditioner(inputs, torch.Generator().manual_seed(0))
    is_silent = (cond.context == silent.context).flatten(1).all(1)
    assert 25 < is_silent.sum() < 65  # of 90, five standard deviations
    assert torch.equal(cond.context[~is_silent], kept.context[~is_silent])
    assert torch.equal(cond.vector[is_silent], silent.vector[is_silent])
    assert torch.equal(cond.vector[~is_silent], kept.vector[~is_silent])
    assert torch.equal(silent.vector[:, 10:], kept.vector[:, 10:])
    if zeros:
        assert not silent.context.any()
        assert not silent.vector[:, :10].any()
    else:
        empty = conditioner(inputs | {"text": [""] * 90})
        assert torch.equal(silent.context, empty.context)
        assert torch.equal(silent.vector, empty.vector)


def test_the_towers_get_gradients_only_if_they_are_trained_along() -> None:
    inputs = {"text": CAPTIONS, **sizes()}
    assert not tiny()(inputs).context.requires_grad
    trained = tiny(trainable=True)
    cond = trained(inputs)
    (cond.context.sum() + cond.vector.square().sum()).backward()
    for _, tower in trained.pretrained_encoders():
        assert tower.token_embedding.weight.grad.any()
    assert [name for name, _ in trained.pretrained_encoders()] == ["text_encoder", "text_encoder_2"]


def test_a_long_prompt_has_as_many_windows_in_both_towers() -> None:
    conditioner = tiny()
    long = WeightedPrompt("a red apple, a green apple, a red car, a blue car", weights=[1.5] * 11 + [1.0] * 38)
    inputs = {"text": [long, WeightedPrompt("a blue sky"), None], **sizes()}
    cond = conditioner(inputs)
    texts = [long, WeightedPrompt("a blue sky"), ""]
    for tower, tokenizer, columns in (
        (conditioner.first, TOKENIZER, slice(0, 16)),
        (conditioner.second, TOKENIZER.with_padding(0), slice(16, None)),
    ):
        (states, pooled), mask = long_prompts.read(texts, tokenizer, tower)
        assert states.shape[1] > 12
        assert torch.equal(cond.context[:2, :, columns], states[:2])
        assert torch.equal(cond.mask, mask)
    assert torch.equal(cond.vector[:2, :10], pooled[:2])
    assert not cond.context[2].any()


def test_a_tower_that_needs_fewer_windows_is_silent_in_the_last(own: SDXLConditioner) -> None:
    """ "!!!!" is one token, or four where "!" is the padding."""
    inputs = {"text": [WeightedPrompt("!!!! " * 30), WeightedPrompt("a red apple")], **sizes(2)}
    with torch.no_grad():
        cond = own(inputs)
    assert cond.context is not None
    assert cond.mask is not None
    assert cond.context.shape == (2, 2 * 77, 40)
    assert not cond.context[:, 77:, :16].any()
    assert cond.context[:, 77:, 16:].any()
    assert cond.mask.sum(dim=1).tolist() == [2 * 77, 77]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size_embedding_width": 7}, "size_embedding_width must be even"),
        ({"pad_id": 300}, "pad_id 300 is not below second.vocab_size, "),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"second": TOWER | {"context_length": 10}}, "second.context_length is 10, but that of the first tower is 12"),
    ],
)
def test_impossible_conditioners_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


# Sampling


NETWORK = {"kind": "unet", "levels": [{"width": 16, "blocks": 1, "depth": 1}], "heads": 2, "groups": 4}


def tiny_pipe(conditioner: dict[str, Any] | None = None, vector: int = VECTOR) -> Pipeline:
    denoiser = NETWORK | {"context_width": CONTEXT, "vector_width": vector}
    return Pipeline(tiny_model("text", conditioner=conditioner or TINY, denoiser=denoiser))


def latents(pipe: Pipeline, *arguments: Any, **more: Any) -> Tensor:
    return pipe(*arguments, output_type="latent", **QUIET, **more)


def test_sizes_default_to_those_of_the_picture(tmp_path: Path) -> None:
    pipe = tiny_pipe()
    save_model(tmp_path / "model.safetensors", pipe.model, {})
    pipe = Pipeline.from_pretrained(tmp_path, "cpu", torch.float32)
    for height, width in ((16, 16), (24, 32)):
        given = {"original_size": [(height, width)], "crops_coords_top_left": [(0, 0)], "target_size": (height, width)}
        default = latents(pipe, CAPTIONS, height=height, width=width)
        assert torch.equal(default, latents(pipe, CAPTIONS, height=height, width=width, condition=given))
        none = latents(pipe, CAPTIONS, height=height, width=width, condition={"original_size": [None]})
        assert torch.equal(default, none)
        for name in given:
            other = latents(pipe, CAPTIONS, height=height, width=width, condition=given | {name: (7, 9)})
            assert not torch.allclose(default, other, atol=1e-4)


@pytest.mark.parametrize(
    "one", [(48, 32), [48, 32], [(48, 32)], [[48, 32]] * 2, torch.tensor([48, 32]), np.array([[48, 32]])]
)
def test_a_pair_is_for_all_pictures_or_there_is_one_for_each(one: Any) -> None:
    pipe = tiny_pipe()
    expected = [latents(pipe, CAPTIONS[0], condition={"original_size": [(48, 32)]})]
    expected += [
        pipe(CAPTIONS[1], seed=1, output_type="latent", progress=False, condition={"original_size": [(48, 32)]})
    ]
    both = latents(pipe, CAPTIONS[:2], condition={"original_size": one})
    torch.testing.assert_close(both, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_each_picture_has_its_own_sizes_and_tells_those_that_were_given() -> None:
    pipe = tiny_pipe()
    made = pipe(CAPTIONS[:2], condition={"original_size": [(48, 32), (16, 16)]}, **QUIET)
    told = [json.loads(picture.info["settings"]) for picture in made]
    assert told[0]["original_size"] == [48, 32]
    assert "original_size" not in told[1], "it is the image's"
    assert "target_size" not in told[0]
    alone = latents(pipe, CAPTIONS[0], condition={"original_size": told[0]["original_size"]})
    both = latents(pipe, CAPTIONS[:2], condition={"original_size": [(48, 32), None]})
    torch.testing.assert_close(both[:1], alone, atol=1e-4, rtol=1e-4)


def test_guidance_leads_away_from_no_text_of_the_same_sizes() -> None:
    pipe = tiny_pipe()
    shown: list[Conditioning] = []
    pipe.model.denoiser.register_forward_pre_hook(lambda _, arguments: shown.append(arguments[2]))
    latents(pipe, CAPTIONS[0], condition={"original_size": (48, 32)}, num_inference_steps=1)
    described = sinusoidal(torch.tensor([48, 32, 0, 0, 16, 16]), 8).flatten()
    rows = torch.cat([record.vector for record in shown])
    torch.testing.assert_close(rows[:, 10:], described.expand(len(rows), -1))
    assert sorted(bool(row.any()) for row in rows[:, :10]) == [False, True]


def test_an_edited_picture_is_told_its_sizes_too() -> None:
    pipe, picture = tiny_pipe(), Image.new("RGB", (24, 16), "red")
    settings: dict[str, Any] = {"output_type": "latent", **QUIET}
    default = editing.image_to_image(pipe, CAPTIONS[0], picture, **settings)
    for condition, equal in (({"original_size": (16, 24)}, True), ({"original_size": (64, 64)}, False)):
        made = editing.image_to_image(pipe, CAPTIONS[0], picture, condition=condition, **settings)
        assert torch.equal(made, default) == equal


def test_it_is_one_of_several() -> None:
    parts = {"caption": TINY, "number": {"kind": "class", "classes": 3, "width": 5}}
    pipe = tiny_pipe({"kind": "several", "parts": parts}, VECTOR + 5)
    assert pipe.model.config.conditioner.input_keys == ("text", "label")
    small, large = (latents(pipe, CAPTIONS[0], label=1, condition={"original_size": s}) for s in ((8, 8), (16, 16)))
    assert torch.equal(latents(pipe, CAPTIONS[0], label=1), large)
    assert not torch.allclose(small, large, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"condition": {"original_size": (16, 16)}}, "this model needs a prompt; give one or several"),
        ({"prompt": "a", "condition": {"original_size": 16}}, "original_size has .*16.*; give a pair"),
        ({"prompt": "a", "condition": {"original_size": (16, 16, 16)}}, "give a pair of non-negative integers"),
        ({"prompt": "a", "condition": {"original_size": [(16, 1.5)]}}, "give a pair of non-negative integers"),
        (
            {"prompt": "a", "condition": {"target_size": [(16, -1)]}},
            "target_size has .*; give a pair of non-negative integers",
        ),
        ({"prompt": "a", "condition": {"target_size": "large"}}, "give a pair of non-negative integers"),
        ({"prompt": "a", "condition": {"target_size": []}}, "the list of target_size is empty"),
        ({"prompt": ["a"] * 3, "condition": {"original_size": [(1, 2)] * 2}}, "2 of original_size do not fit 3 of pr"),
        ({"prompt": "a", "condition": {"boxes": []}}, "this model reads no boxes; give a prompt"),
    ],
)
def test_what_are_no_sizes_is_told_in_a_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        tiny_pipe()(**settings, **QUIET)


def test_other_models_read_no_sizes() -> None:
    with pytest.raises(SamplingError, match="reads no original_size; give a prompt"):
        Pipeline(tiny_model())("a red apple", condition={"original_size": (16, 16)}, **QUIET)


# Training


STEPS = 150
SMALL, LARGE = 8, 32


def sized_experiment(folder: Path) -> Experiment:
    """Pictures of 8 pixels that are black if their originals were small, and white if they were large."""
    pictures = [(SMALL, "black"), (LARGE, "white")] * 8
    files = [encoded(Image.new("RGB", (side, side), colour)) for side, colour in pictures]
    write_shard(folder / "train.tar", (Sample(f"{i}", "a red apple", file, "png") for i, file in enumerate(files)))
    tower = EXPERIMENT["clip"]["model"]["text"]
    conditioner = {"kind": "sdxl", "second": tower | {"embed_dim": 10}, "size_embedding_width": 8, "trainable": True}
    widths = {"in_channels": 3, "out_channels": 3, "context_width": 32, "vector_width": VECTOR}
    train = TRAIN | {"max_steps": STEPS, "batch_size": 16, "learning_rate": 3e-3, "validate_every": STEPS}
    rarely = {"images_every": STEPS, "checkpoint_every": STEPS, "log_every": 50}
    denoiser = EXPERIMENT["denoiser"] | {
        "model": NETWORK | widths,
        "conditioner": conditioner,
        "train": train | rarely,
        "sampling": {"num_inference_steps": 4, "guidance_scale": 1.0},
    }
    path = write_experiment(folder, {"vae": {"model": {"kind": "identity"}}, "denoiser": denoiser})
    config = yaml.safe_load(path.read_text())
    config["data"] |= {"size": SMALL, "sizes": True}
    path.write_text(yaml.safe_dump(config))
    return load_config(path)


@pytest.mark.slow
def test_the_original_size_steers_the_sample(tmp_path: Path) -> None:
    experiment = sized_experiment(tmp_path)
    assert re.search(r"conditioner: [\d,]+ parameters", describe(experiment, ["denoiser"]))
    train_stage(experiment, "clip")
    pipe = Pipeline.from_pretrained(train_stage(experiment, "denoiser"), device="cpu", dtype=torch.float32)
    made = pipe(
        "a red apple",
        condition={"original_size": [(SMALL, SMALL), (LARGE, LARGE)] * 4},
        output_type="pt",
        **QUIET,
    ).mean((1, 2, 3))
    assert made[0::2].max() < 0.3
    assert made[1::2].min() > 0.7
    grid = Image.open(tmp_path / "run" / "denoiser" / "images" / f"samples_{STEPS:07d}.png")
    assert grid.width > 64, "made of the config's prompts"
