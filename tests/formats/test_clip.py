from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.clip.image import ViTConfig
from ldm.clip.image_formats import MEAN, STD
from ldm.clip.model import CLIP, CLIPConfig
from ldm.clip.text import TextTowerConfig
from ldm.clip.tokenizer import CLIPBPEConfig, Tokenizer, train_byte_bpe
from ldm.errors import CheckpointError
from ldm.formats.clip import OPEN_CLIP as FORM
from ldm.formats.clip import load_clip, read_clip, save_clip
from ldm.formats.native import load_strictly
from tests.clip.peers import randomize

VOCAB, LENGTH, EMBED = 300, 16, 24
TEXT = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 40, "intermediate_size": 180, "num_hidden_layers": 3, "num_attention_heads": 4}
TRANSFORMERS = {
    "text_config": {**TEXT, "vocab_size": VOCAB, "max_position_embeddings": LENGTH, "eos_token_id": VOCAB - 1},
    "vision_config": {**VISION, "image_size": 24, "patch_size": 8},
    "projection_dim": EMBED,
}
OPEN_CLIP: dict[str, Any] = {
    "embed_dim": EMBED,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 24, "patch_size": 8, "width": 64, "layers": 3, "mlp_ratio": 4.9231},
    "text_cfg": {"context_length": LENGTH, "vocab_size": VOCAB, "width": 128, "heads": 2, "layers": 2},
}
OURS = CLIPConfig(
    TextTowerConfig(VOCAB, LENGTH, 32, 2, 4, 3.0, "quick_gelu"),
    ViTConfig(24, 8, 48, 2, 3, 4.0, "quick_gelu", mean=MEAN, std=STD),
    EMBED,
)


def transformers_clip(**vision: Any) -> nn.Module:
    config = transformers.CLIPConfig(**{**TRANSFORMERS, "vision_config": {**TRANSFORMERS["vision_config"], **vision}})
    return randomize(transformers.CLIPModel(config))


def open_clip_clip(custom: bool = False) -> nn.Module:
    return randomize((open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**OPEN_CLIP))


def inputs() -> tuple[Tensor, Tensor]:
    """Pictures of pixels in [0, 1], and captions with their end at different places."""
    tokens = torch.randint(1, VOCAB - 1, (3, LENGTH))
    for row in range(3):
        tokens[row, LENGTH - 1 - row :] = VOCAB - 1
    return torch.rand(3, 3, 24, 24), tokens


def normalized(pixels: Tensor, mean: Any = MEAN, std: Any = STD) -> Tensor:
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@torch.no_grad()
def embeddings(peer: nn.Module, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of unit length, of either library."""
    if isinstance(peer, transformers.CLIPModel):
        output = peer(input_ids=tokens, pixel_values=pixels)
        return output.image_embeds, output.text_embeds
    return peer.encode_image(pixels, normalize=True), peer.encode_text(tokens, normalize=True)


@torch.no_grad()
def assert_same(clip: CLIP, peer: nn.Module, mean: Any = MEAN, std: Any = STD) -> None:
    pixels, tokens = inputs()
    image, text = embeddings(peer, normalized(pixels, mean, std), tokens)
    torch.testing.assert_close(clip.encode_image(2 * pixels - 1), image, atol=1e-4, rtol=0)
    torch.testing.assert_close(clip.encode_text(tokens), text, atol=1e-4, rtol=0)
    assert clip.logit_scale == peer.logit_scale


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder of transformers' CLIPModel."""
    transformers_clip().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_transformers_clip_is_read_and_written_bit_for_bit(theirs: Path, tmp_path: Path) -> None:
    peer = transformers.CLIPModel.from_pretrained(theirs)
    clip, tokenizer = load_clip(theirs)
    assert (read_clip(theirs).layout, tokenizer) == ("transformers", None)
    assert_same(clip, peer)
    save_clip(clip, None, tmp_path / "again", "transformers")
    assert_equal(load_file(tmp_path / "again" / "model.safetensors"), load_file(theirs / "model.safetensors"))
    assert_same(clip, transformers.CLIPModel.from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize("custom", [False, True])
def test_open_clip_is_read_and_written_bit_for_bit(custom: bool, tmp_path: Path) -> None:
    """With bigG's mlp_ratio, of which the hidden width is rounded down."""
    peer, mean, std = open_clip_clip(custom), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    values = {"model_cfg": {**OPEN_CLIP, "custom_text": custom}, "preprocess_cfg": {"mean": mean, "std": std}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
    torch.save(peer.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    clip, tokenizer = load_clip(tmp_path)
    assert (read_clip(tmp_path).layout, tokenizer) == ("open_clip", None)
    assert_same(clip, peer, mean, std)
    save_clip(clip, None, tmp_path / "again", "open_clip")
    again = load_file(tmp_path / "again" / "open_clip_model.safetensors")
    own = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
    assert_equal(
        {f"text.{name}" if custom and name.startswith(own) else name: t for name, t in again.items()}, peer.state_dict()
    )
    opened = open_clip.create_model(f"local-dir:{tmp_path / 'again'}").eval()
    assert_same(clip, opened, mean, std)
    assert (opened.visual.preprocess_cfg["mean"], opened.visual.preprocess_cfg["std"]) == ([*mean], [*std])


@pytest.mark.parametrize("form", ["safetensors", "pt", "of several devices"])
def test_the_config_of_a_lone_open_clip_file_follows_from_its_shapes(form: str, tmp_path: Path) -> None:
    peer = open_clip_clip()
    path = tmp_path / ("epoch_1.safetensors" if form == "safetensors" else "epoch_1.pt")
    if form == "safetensors":
        save_file(peer.state_dict(), path)
    else:
        prefix = "module." if form == "of several devices" else ""
        state = {prefix + name: tensor for name, tensor in peer.state_dict().items()}
        torch.save({"epoch": 1, "name": "tiny", "state_dict": state}, path)
    assert_same(load_clip(path, quick_gelu=True)[0], peer)
    assert load_clip(path)[0].config.text.activation == "gelu"


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "ViT-H-14", "ViT-g-14", "ViT-bigG-14"])
def test_the_derived_config_is_the_published_one(name: str, tmp_path: Path) -> None:
    """Of weights that take no room."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        state = open_clip.CLIP(**config).state_dict()
    derived = FORM.read_config(FORM.infer_values(state, False, tmp_path), state, tmp_path)
    with torch.device("meta"):
        ours = derived.build()
    published = FORM.read_config(config, state, tmp_path)
    assert replace(derived.image, mlp_ratio=0) == replace(published.image, mlp_ratio=0)
    assert derived.text == published.text
    assert sum(p.numel() for p in ours.parameters()) == sum(t.numel() for t in state.values())


@pytest.mark.parametrize("kind", [transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection])
@torch.no_grad()
def test_a_text_tower_alone_is_read(kind: Callable[..., Any], tmp_path: Path) -> None:
    """With or without the name of the model before its names, as versions of transformers write them."""
    peer = randomize(kind(transformers.CLIPTextConfig(**TRANSFORMERS["text_config"], projection_dim=EMBED)))
    peer.save_pretrained(tmp_path)
    _, tokens = inputs()
    expected = peer(tokens)
    pooled = expected.text_embeds if hasattr(expected, "text_embeds") else expected.pooler_output
    state = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    infix = {name if name == "text_projection.weight" else f"text_model.{name}": t for name, t in bare.items()}
    for names in (bare, infix):
        extra = {"text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}
        save_file({**names, **extra}, tmp_path / "model.safetensors")
        found = read_clip(tmp_path)
        assert found.parts.keys() == {"text_encoder"}
        tower = found.parts["text_encoder"].config.build()
        load_strictly(tower, found.parts["text_encoder"].state, tmp_path)
        output = tower(tokens)
        torch.testing.assert_close(output.context, expected.last_hidden_state, atol=1e-4, rtol=0)
        torch.testing.assert_close(output.pooled, pooled, atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_image_tower_alone_is_read(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(**TRANSFORMERS["vision_config"], projection_dim=EMBED)
    peer = randomize(transformers.CLIPVisionModelWithProjection(config))
    peer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a single image encoder, not a complete CLIP"):
        load_clip(tmp_path)
    part = read_clip(tmp_path).part("image_encoder")
    tower = part.config.build(EMBED)
    load_strictly(tower, part.state, tmp_path)
    pixels, _ = inputs()
    expected = peer(normalized(pixels)).image_embeds
    torch.testing.assert_close(tower(2 * pixels - 1).embedding, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_pixels_are_normalised_as_the_preprocessor_does(name: str, theirs: Path) -> None:
    peer = transformers.CLIPModel.from_pretrained(theirs)
    for values, mean, std in (
        ({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
        ({"do_normalize": False}, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ({}, MEAN, STD),
    ):
        whole = values if name.startswith("pre") else {"image_processor": values}
        (theirs / name).write_text(json.dumps(whole))
        assert_same(load_clip(theirs)[0], peer, mean, std)


def test_what_we_write_is_normalised_alike_by_transformers(tmp_path: Path) -> None:
    save_clip(OURS.build(), None, tmp_path, "transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    picture = (255 * torch.rand(3, 24, 24)).to(torch.uint8)
    expected = processor(images=[picture], return_tensors="pt").pixel_values
    torch.testing.assert_close(normalized(picture[None] / 255), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("to", ["transformers", "open_clip"])
@pytest.mark.parametrize("end", [None, 90])
def test_a_clip_of_ours_opens_in_both_libraries_and_comes_back(to: Any, end: int | None, tmp_path: Path) -> None:
    clip = OURS.build() if end is None else replace(OURS, text=replace(OURS.text, eos_id=end)).build()
    randomize(clip)
    save_clip(clip, None, tmp_path, to)
    opened = (
        transformers.CLIPModel.from_pretrained(tmp_path)
        if to == "transformers"
        else open_clip.create_model(f"local-dir:{tmp_path}")
    )
    assert_same(clip, opened.eval())
    back, _ = load_clip(tmp_path)
    assert replace(back.config, text=replace(back.config.text, embed_dim=None)) == clip.config
    assert_equal(back.state_dict(), clip.state_dict())


@pytest.mark.parametrize("to", ["transformers", "open_clip"])
@pytest.mark.parametrize("name", ["clip", "byte_bpe"])
def test_the_tokenizer_goes_along(to: Any, name: str, tmp_path: Path) -> None:
    texts = ["a red apple", "two cats"]
    tokenizer: Tokenizer = CLIPBPEConfig(LENGTH).build() if name == "clip" else train_byte_bpe(texts * 2, VOCAB, LENGTH)
    text = replace(OURS.text, vocab_size=tokenizer.vocab_size)
    save_clip(replace(OURS, text=text).build(), tokenizer, tmp_path, to)
    _, again = load_clip(tmp_path)
    assert again is not None
    lengths = [5, 4] if name == "clip" else [len(row[row != tokenizer.pad_id]) + 1 for row in tokenizer(texts)]
    if to == "transformers":
        expected = transformers.AutoTokenizer.from_pretrained(tmp_path)(texts, padding="max_length", max_length=LENGTH)
        expected = torch.tensor(expected.input_ids)
    else:
        expected = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(texts)
    assert torch.equal(again(texts), expected)
    for row, theirs, length in zip(tokenizer(texts), expected, lengths, strict=True):
        assert torch.equal(row[:length], theirs[:length])


def test_open_clip_reads_exclamation_marks_and_padding_apart(tmp_path: Path) -> None:
    values = {**OPEN_CLIP, "text_cfg": {**OPEN_CLIP["text_cfg"], "vocab_size": 49408}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": values}))
    save_file(open_clip.CLIP(**values).state_dict(), tmp_path / "open_clip_model.safetensors")
    _, tokenizer = load_clip(tmp_path)
    assert tokenizer is not None
    texts = ["hello! wow!!", "a " * 30]
    assert torch.equal(tokenizer(texts), open_clip.get_tokenizer(f"local-dir:{tmp_path}")(texts))


def test_the_dtype_is_the_stored_one_unless_another_is_asked_for(theirs: Path) -> None:
    transformers.CLIPModel.from_pretrained(theirs).half().save_pretrained(theirs)
    for dtype, expected in ((None, torch.float16), (torch.float32, torch.float32)):
        clip, _ = load_clip(theirs, dtype=dtype)
        assert {parameter.dtype for parameter in clip.parameters()} == {expected}


def test_older_configs_say_a_section_twice(theirs: Path) -> None:
    values = json.loads((theirs / "config.json").read_text())
    values |= {"text_config": {}, "text_config_dict": values["text_config"], "vision_config_dict": None}
    (theirs / "config.json").write_text(json.dumps(values))
    assert_same(load_clip(theirs)[0], transformers.CLIPModel.from_pretrained(theirs))


@pytest.mark.parametrize(
    ("place", "value", "part"),
    [
        ("model_type", "siglip", "is not a CLIP"),
        ("text_config.hidden_act", "gelu_new", "hidden_act is 'gelu_new'"),
        ("text_config.num_attention_heads", 5, "5 heads do not divide"),
        ("text_config", [], "far more weights than the file holds"),
        ("text_config", [1], "is not a JSON object"),
        ("text_config.num_hidden_layers", 3, "missing"),
        ("vision_config.layer_norm_eps", 1e-6, "layer_norm_eps"),
        ("vision_config.num_channels", 1, "num_channels"),
        ("vision_config.patch_size", 7, "do not divide the image_size"),
        ("vision_config.num_hidden_layers", "many", "config.json"),
        ("projection_dim", 12, "shape that does not fit"),
        ("projection_dim", 0, "embed_dim"),
    ],
)
def test_what_is_no_clip_of_ours_is_told_with_its_file(place: str, value: Any, part: str, theirs: Path) -> None:
    values = json.loads((theirs / "config.json").read_text())
    *above, last = place.split(".")
    section = values[above[0]] if above else values
    section[last] = value
    (theirs / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=part) as error:
        load_clip(theirs)
    assert str(theirs) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "part"),
    [
        ("vision_cfg", "layers", [3, 4, 6, 3], "is a ResNet"),
        ("vision_cfg", "timm_model_name", "vit_base", "timm_model_name"),
        ("vision_cfg", "attentional_pool", True, "attentional_pool"),
        ("vision_cfg", "final_ln_after_pool", True, "final_ln_after_pool"),
        ("vision_cfg", "pool_type", "none", "pool_type"),
        ("vision_cfg", "image_size", [24, 32], "only encoders for square images"),
        ("vision_cfg", "norm_kwargs", {"eps": 1e-6}, "norm_kwargs"),
        ("vision_cfg", "head_width", 0, "ZeroDivisionError"),
        ("text_cfg", "proj_type", "none", "proj_type"),
        ("text_cfg", "hf_model_name", "roberta-base", "hf_model_name"),
        ("text_cfg", "no_causal_mask", True, "no_causal_mask"),
        ("text_cfg", "qk_norm", True, "qk_norm"),
        ("text_cfg", "pool_type", "last", "pool_type"),
        ("text_cfg", "layers", 5, "missing"),
    ],
)
def test_what_open_clip_has_and_we_have_not_is_refused(
    section: str, key: str, value: Any, part: str, tmp_path: Path
) -> None:
    values = {**OPEN_CLIP, section: {**OPEN_CLIP[section], key: value}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": values}))
    save_file(open_clip.CLIP(**OPEN_CLIP).state_dict(), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match=part) as error:
        load_clip(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_what_a_library_cannot_be_is_not_written(tmp_path: Path) -> None:
    mean = replace(OURS, image=replace(OURS.image, pool="mean"))
    mixed = replace(OURS, text=replace(OURS.text, activation="gelu"))
    with pytest.raises(CheckpointError, match="the mean of the patches"):
        save_clip(mean.build(), None, tmp_path, "transformers")
    with pytest.raises(CheckpointError, match="one activation"):
        save_clip(mixed.build(), None, tmp_path, "open_clip")
    with pytest.raises(CheckpointError, match="unknown layout"):
        save_clip(OURS.build(), None, tmp_path, "clip")  # type: ignore[arg-type]
    assert not [*tmp_path.iterdir()]


def test_files_that_are_no_clip_are_told(tmp_path: Path) -> None:
    save_file({"visual.layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="holds no open_clip CLIP"):
        load_clip(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="is not a CLIP"):
        load_clip(tmp_path)
    state = {name: tensor * torch.nan for name, tensor in open_clip.CLIP(**OPEN_CLIP).state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="NaN"):
        load_clip(tmp_path / "a.safetensors")
