from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.conditioning import CompositeConditioner, ConditionerConfig
from ldm.conditioning.composite import side_by_side
from ldm.config import from_dict, to_dict
from ldm.denoiser import LevelSpec, UNetConfig
from ldm.errors import ConfigError
from ldm.formats.native import save_model
from ldm.model import LatentDiffusion, ModelConfig
from ldm.nn.conditioning import Conditioning, Context
from ldm.pipeline import Pipeline
from tests.tiny import TOKENIZER, TOWER, tiny_model

BOX = (0, 0.0, 0.0, 0.5, 0.5)
PARTS: dict[str, dict[str, Any]] = {
    "caption": {"kind": "text", "tower": TOWER, "pooled": True},
    "layout": {"kind": "boxes", "classes": 3, "max_boxes": 4, "width": 16},
    "number": {"kind": "class", "classes": 3, "width": 5},
    "ground": {"kind": "semantic", "classes": 2, "size": [4, 4], "latent_factor": 2},
    "colours": {"kind": "semantic", "classes": 3, "size": [4, 4], "latent_factor": 2},
}
INPUTS: dict[str, list[Any]] = {
    "text": ["a red apple", "a blue car"],
    "boxes": [[BOX], [BOX, BOX]],
    "label": [1, 2],
    "semantic": [[[0, 0, 1, 1]] * 4, [[1, 1, 1, 1]] * 4],
}


def several(*names: str, **changes: Any) -> CompositeConditioner:
    parts = {name: PARTS[name] | changes for name in names or PARTS}
    conditioner = from_dict(ConditionerConfig, {"kind": "several", "parts": parts}).build(TOKENIZER)
    assert isinstance(conditioner, CompositeConditioner)
    return conditioner


def test_what_each_says_is_laid_side_by_side() -> None:
    conditioner = several()
    config, cond = conditioner.config, conditioner(INPUTS)
    parts = {name: part(INPUTS) for name, part in conditioner.parts.items()}
    assert config.input_keys == ("text", "boxes", "label", "semantic")
    assert torch.equal(cond.context, torch.cat([parts["caption"].context, parts["layout"].context], dim=1))
    assert torch.equal(cond.vector, torch.cat([parts["caption"].vector, parts["number"].vector], dim=1))
    assert torch.equal(cond.concat, torch.cat([parts["ground"].concat, parts["colours"].concat], dim=1))
    assert cond.mask[:, :12].all(), "the caption has no mask"
    assert torch.equal(cond.mask[:, 12:], parts["layout"].mask)
    widths = (config.context_width, config.vector_width, config.concat_channels)
    assert widths == (cond.context.shape[2], cond.vector.shape[1], cond.concat.shape[1])


def test_parts_that_fill_nothing_leave_it_absent() -> None:
    cond = several("number")({"label": [0]})
    assert (cond.context, cond.mask, cond.concat) == (None, None, None)
    config = several("number").config
    assert (config.context_width, config.vector_width, config.concat_channels) == (None, 5, 0)


def test_each_part_is_dropped_by_itself() -> None:
    inputs = {"text": ["a red apple"] * 200, "boxes": [[BOX, BOX]] * 200}
    conditioner = several("caption", "layout", dropout=0.5)
    cond, empty = conditioner(inputs, torch.Generator().manual_seed(0)), conditioner.unconditional(inputs)
    caption = (cond.context[:, :12] != empty.context[:, :12]).flatten(1).any(1)
    layout = cond.mask[:, 14]
    counts = torch.stack([caption & layout, caption & ~layout, ~caption & layout, ~caption & ~layout]).sum(1)
    assert (counts > 25).all()  # of 50 each


def test_a_negative_prompt_replaces_the_caption_alone() -> None:
    conditioner = several("caption", "layout")
    cond = conditioner.unconditional(INPUTS, ["a blue sky"] * 2)
    expected = conditioner({"text": ["a blue sky"] * 2, "boxes": [None, None]})
    assert torch.equal(cond.context, expected.context)
    assert torch.equal(cond.mask, expected.mask)


def test_masks_survive_the_common_batch_of_guidance() -> None:
    """Whoever reads the two records in one batch sees what he would see of each alone."""
    conditioner = several("caption", "layout")
    levels = (LevelSpec(width=16, blocks=1, depth=1),)
    network = UNetConfig(levels, context_width=16, vector_width=16, heads=2, groups=4).build().eval()
    torch.nn.init.normal_(network.conv_out.weight)
    for transformer in (module for module in network.modules() if hasattr(module, "proj_out")):
        torch.nn.init.normal_(transformer.proj_out.weight)
    inputs = {name: INPUTS[name] for name in ("text", "boxes")}
    records = [conditioner(inputs), conditioner.unconditional(inputs)]
    x, level = torch.randn(2, 4, 4, 4), torch.tensor([3.0, 5.0])
    both = network(torch.cat([x, x]), torch.cat([level, level]), Conditioning.cat(records))
    alone = torch.cat([network(x, level, record) for record in records])
    torch.testing.assert_close(both, alone)
    assert both.isfinite().all()
    unmasked = torch.cat([network(x, level, Conditioning(record.context, None, record.vector)) for record in records])
    assert not torch.allclose(both, unmasked)


def test_a_model_in_low_precision_hears_all_of_them(tmp_path: Path) -> None:
    """It is saved, loaded and sampled, in another size than that of its training too."""
    parts = PARTS | {name: PARTS[name] | {"size": [8, 8]} for name in ("ground", "colours")}
    network = {"kind": "unet", "levels": [{"width": 16, "blocks": 1, "depth": 1}], "heads": 2, "groups": 4}
    widths = {"in_channels": 9, "context_width": 16, "vector_width": 21}
    sections = {"conditioner": {"kind": "several", "parts": parts}, "denoiser": network | widths}
    config = from_dict(ModelConfig, to_dict(tiny_model("none").config) | sections)
    model = LatentDiffusion(config, TOKENIZER)
    torch.nn.init.normal_(model.denoiser.conv_out.weight, std=0.1)
    save_model(tmp_path / "model.safetensors", model, {})
    pipe = Pipeline.from_pretrained(tmp_path, "cpu", torch.bfloat16)
    settings: dict[str, Any] = {"seed": 0, "num_inference_steps": 2, "progress": False, "output_type": "pt"}
    for size in (16, 24):
        conditions = {
            "boxes": INPUTS["boxes"],
            "semantic": torch.tensor(INPUTS["semantic"]).repeat(1, size // 4, size // 4),
        }
        pictures = pipe(
            INPUTS["text"], label=INPUTS["label"], condition=conditions, height=size, width=size, **settings
        )
        assert pictures.shape == (2, 3, size, size)
        assert pictures.isfinite().all()
    unseen = {**conditions, "semantic": 1 - conditions["semantic"]}
    changed = pipe(INPUTS["text"], label=INPUTS["label"], condition=unseen, height=24, width=24, **settings)
    assert not torch.allclose(changed, pictures)
    with pytest.raises(
        ConfigError, match="first stage's latents have 4 channels and the conditioner adds 5; set them to 9"
    ):
        replace(config, denoiser=replace(config.denoiser, in_channels=4))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "parts is empty"),
        (
            {"a": PARTS["caption"], "b": PARTS["layout"] | {"width": 8}},
            r"widths of the parts differ \(16 of a, 8 of b\)",
        ),
        ({"a.b": PARTS["layout"]}, "a part cannot be named 'a.b'"),
        ({"keys": PARTS["layout"]}, "a part cannot be named 'keys'"),
    ],
)
def test_impossible_parts_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(ConditionerConfig, {"kind": "several", "parts": parts})


def test_the_config_survives_the_round_trip() -> None:
    config = several().config
    assert from_dict(ConditionerConfig, to_dict(config)) == config


def test_further_contexts_keep_their_names() -> None:
    image, depth = Context(torch.ones(2, 3, 4)), Context(torch.zeros(2, 5, 6), torch.ones(2, 5, dtype=torch.bool))
    joined = side_by_side([Conditioning(contexts={"image": image}), Conditioning(contexts={"depth": depth})])
    assert joined.context is None
    assert list(joined.contexts) == ["image", "depth"]
    assert torch.equal(joined.contexts["image"].states, image.states)
    assert torch.equal(joined.contexts["depth"].full_mask(), depth.full_mask())
