"""Textual inversions and clip skip: files of every origin, compared with diffusers, and written with the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm import Pipeline
from ldm.conditioning import conditioning_schedules
from ldm.errors import CheckpointError, SamplingError
from ldm.prompts import PromptOptions
from tests.formats import world
from tests.tiny import tiny_lora, tiny_model

MERGES = 100
WIDTHS = {"sd1": (32,), "sdxl": (32, 64)}
QUIET: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "output_type": "latent", "progress": False}


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def peers() -> dict[str, Any]:
    return {kind: world.pipeline(kind, merges=MERGES) for kind in WIDTHS}


@pytest.fixture(scope="module")
def folders(peers: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("world")
    for kind, peer in peers.items():
        peer.save_pretrained(root / kind)
    return {kind: root / kind for kind in peers}


def with_tokens(kind: str, k: int) -> Any:
    """A pipeline of diffusers with a textual inversion of ``k`` vectors for each text encoder."""
    peer = world.pipeline(kind, merges=MERGES)
    for index, width in enumerate(WIDTHS[kind]):
        suffix = "_2" if index else ""
        tokenizer, encoder = getattr(peer, f"tokenizer{suffix}"), getattr(peer, f"text_encoder{suffix}")
        state = {"<toy>": vectors(k, width, seed=index)}
        peer.load_textual_inversion(state, tokenizer=tokenizer, text_encoder=encoder)
    return peer


def file_of(kind: str, k: int, path: Path) -> Path:
    """A file with the same vectors, as it is usual for such a model."""
    if kind == "sdxl":
        save_file({"clip_l": vectors(k, 32), "clip_g": vectors(k, 64, seed=1)}, path)
    else:
        save_file({"<toy>": vectors(k, *WIDTHS[kind])}, path)
    return path


def encoded(pipe: Pipeline, prompt: str, negative: str, clip_skip: int | None = None) -> list[Tensor]:
    """Contexts of the prompt and the negative prompt, and for SDXL their pooled states."""
    model = pipe.model
    sizes = {name: [pair] for name, pair in model.config.conditioner.defaults(32, 32).items()}
    options = PromptOptions(long_prompts="cut", clip_skip=clip_skip)
    conditions = {"text": [prompt], **sizes}
    with torch.no_grad():
        *both, _ = conditioning_schedules(model.conditioner, conditions, [negative], options, torch.tensor([1.0, 0.0]))
    records = [schedule.records[0] for schedule in both]
    pooled = [record.vector[:, :24] for record in records if record.vector is not None]
    return [record.context for record in records if record.context is not None] + pooled


def encoded_by_peer(peer: Any, prompt: str, negative: str, clip_skip: int | None = None) -> list[Tensor]:
    settings = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True, "clip_skip": clip_skip}
    with torch.no_grad():
        return [*peer.encode_prompt(prompt, device="cpu", negative_prompt=negative, **settings)]


@pytest.mark.parametrize(("kind", "k"), [("sd1", 1), ("sdxl", 3)])
def test_tokens_of_several_vectors_are_encoded_as_in_diffusers(
    kind: str, k: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    """In prompts and negative prompts; loaded from a file, a folder of diffusers and a native folder."""
    peer = with_tokens(kind, k)
    peer.save_pretrained(tmp_path / "peer")
    texts = "a photo of <toy> on a table", "<toy>, blurry"
    expected = encoded_by_peer(peer, *texts)

    pipe = Pipeline.from_pretrained(folders[kind], dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in pipe.model.state_dict().items()}
    assert not torch.allclose(encoded(pipe, *texts)[0], expected[0], atol=0.1)
    assert pipe.load_textual_inversion(file_of(kind, k, tmp_path / "toy.safetensors"), "<toy>") == ["<toy>"]
    pipe.save_pretrained(tmp_path / "ours", to="diffusers")
    pipe.save_pretrained(tmp_path / "native")
    again = [Pipeline.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("peer", "ours", "native")]
    for each in (pipe, *again):
        torch.testing.assert_close(encoded(each, *texts), expected, rtol=1e-4, atol=1e-4)
    written = type(peer).from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(encoded_by_peer(written, *texts), expected)

    pipe.unload_textual_inversion("<toy>")
    after = pipe.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "text", ["<toy>", "a <toy>, <toy> and<toy>s", "<toy>_1 <toy>", "<Toy> <toyy>", "word " * 74 + "<toy> end", "x"]
)
def test_tokens_of_a_folder_are_those_of_diffusers(text: str, tmp_path: Path) -> None:
    peer = with_tokens("sd1", 3)
    peer.save_pretrained(tmp_path)
    tokenizer = Pipeline.from_pretrained(tmp_path).model.tokenizer
    assert tokenizer is not None
    converted = text if "_1" in text else peer.maybe_convert_prompt(text, peer.tokenizer)
    if text == "<Toy> <toyy>":  # diffusers looks for the exact spelling, though its tokenizer reads any case
        converted = "<toy> <toy>_1 <toy>_2 <toyy>"
    if text == "<toy>_1 <toy>":
        converted = "<toy>_1 <toy> <toy>_1 <toy>_2"
    ids = peer.tokenizer(converted, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(tokenizer(text), ids)
    assert torch.equal(tokenizer.windows(text, cut=True)[0], ids)
    assert torch.equal(
        tokenizer([text, "a"], longest=True), tokenizer([text, "a"])[:, : int((ids != ids[0, -1]).sum()) + 1]
    )


def automatic1111(path: Path) -> Path:
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors(2, 16)}, "name": "toy", "step": 100}
    torch.save(content | {"sd_checkpoint": None, "sd_checkpoint_name": None}, path / "a.pt")
    return path / "a.pt"


def original_code(path: Path) -> Path:
    params = nn.ParameterDict({"*": nn.Parameter(vectors(2, 16))})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": params}, path / "toy.pt")
    return path / "toy.pt"


def automatic1111_safetensors(path: Path) -> Path:
    save_file({"emb_params": vectors(2, 16)}, path / "toy.safetensors")
    return path / "toy.safetensors"


def diffusers_bin(path: Path) -> Path:
    torch.save({"toy": vectors(2, 16)}, path / "learned_embeds.bin")
    return path


def diffusers_safetensors(path: Path) -> Path:
    save_file({"toy": vectors(2, 16)}, path / "learned_embeds.safetensors")
    return path


def clip_l_alone(path: Path) -> Path:
    save_file({"clip_l": vectors(2, 16)}, path / "toy.safetensors")
    return path / "toy.safetensors"


def bare_tensor(path: Path) -> Path:
    torch.save(vectors(2, 16), path / "toy.pt")
    return path / "toy.pt"


FILES = [
    automatic1111,
    original_code,
    automatic1111_safetensors,
    diffusers_bin,
    diffusers_safetensors,
    clip_l_alone,
    bare_tensor,
]


@pytest.mark.parametrize("written", FILES, ids=lambda written: written.__name__)
def test_files_of_every_origin_give_the_same_tokens(written: Any, tmp_path: Path) -> None:
    pipe = Pipeline(tiny_model())
    assert pipe.load_textual_inversion(written(tmp_path)) == ["toy"]
    tower, tokenizer = pipe.model.conditioner.tower, pipe.model.tokenizer
    assert tokenizer is not None
    ids = tokenizer.windows("a toy car")[0][0]
    assert torch.equal(tower.token_embedding(ids[2:4]), vectors(2, 16))
    assert torch.equal(tokenizer("a toyota"), tiny_model().tokenizer("a toyota"))  # type: ignore[misc]
    images = pipe("a toy", seed=1, progress=False)
    (entry,) = json.loads(images[0].info["settings"])["textual_inversions"]
    assert entry["name"] == "toy"
    assert len(entry["file"]) == 16


@pytest.mark.parametrize("token", ["style-v1.5", "<猫>", "a/b (x)"])
def test_any_text_can_be_a_token(token: str, tmp_path: Path) -> None:
    save_file({token: vectors(2, 16)}, tmp_path / "toy.safetensors")
    pipe = Pipeline(tiny_model())
    assert pipe.load_textual_inversion(tmp_path / "toy.safetensors") == [token]
    assert not torch.equal(pipe(f"a {token} b", **QUIET), Pipeline(tiny_model())(f"a {token} b", **QUIET))


def test_each_vector_can_have_a_token_of_its_own(tmp_path: Path) -> None:
    save_file({"text_encoders_0": vectors(2, 16)}, tmp_path / "emb.safetensors")
    pipe, joint = Pipeline(tiny_model()), Pipeline(tiny_model())
    assert pipe.load_textual_inversion(tmp_path / "emb.safetensors") == ["<s0>", "<s1>"]
    joint.load_textual_inversion(tmp_path / "emb.safetensors", ["<a>", "<b>"])
    assert torch.equal(pipe("a <s1><s0>", **QUIET), joint("a <b><a>", **QUIET))
    pipe.unload_textual_inversion("<s0>")
    joint.unload_textual_inversion("<a>")
    assert torch.equal(pipe("a <s1>", **QUIET), joint("a <b>", **QUIET))


@pytest.mark.parametrize("form", ["string_to_param.*", "emb_params", "clip_l"])
def test_textual_inversions_within_a_lora_come_and_go_with_it(form: str, tmp_path: Path) -> None:
    save_file(tiny_lora() | {f"bundle_emb.my.toy.{form}": vectors(2, 16)}, tmp_path / "style.safetensors")
    save_file(tiny_lora(), tmp_path / "alone.safetensors")
    pipe, apart = Pipeline(tiny_model()), Pipeline(tiny_model())
    plain = pipe("a my.toy", **QUIET)
    named = pipe("a my.toy<lora:style:0.5>", prompt_syntax="weighted", lora_folder=tmp_path, **QUIET)
    assert torch.equal(pipe("a my.toy", **QUIET), plain)

    name = pipe.load_lora(tmp_path / "style.safetensors", 0.5)
    apart.load_lora(tmp_path / "alone.safetensors", 0.5)
    torch.save(vectors(2, 16), tmp_path / "toy.pt")
    apart.load_textual_inversion(tmp_path / "toy.pt", "my.toy")
    assert torch.equal(pipe("a my.toy", **QUIET), apart("a my.toy", **QUIET))
    assert torch.equal(named, apart("a my.toy", **QUIET))
    pipe.unload_lora(name)
    assert torch.equal(pipe("a my.toy", **QUIET), plain)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (
            "sd1",
            {"<toy>": (1, 64)},
            "of width 64, but this model needs width 32; use one that was trained on this kind",
        ),
        ("sd1", {"clip_l": (1, 32), "clip_g": (1, 64)}, "of width 32 and 64, but this model needs width 32"),
        ("sdxl", {"<toy>": (1, 32)}, "of width 32, but this model needs width 32 and 64"),
        ("sdxl", {"clip_l": (1, 32), "clip_g": (2, 64)}, "different numbers of vectors for the two text encoders"),
        ("sd1", {"clip_l": (1, 32), "t5xxl": (1, 32)}, "for t5xxl too, a text encoder that ldm does not have; use one"),
        ("sdxl", {"clip_l": (1, 32), "clip_g": (1, 64), "t5xxl": (1, 9)}, "for t5xxl too, a text encoder"),
        ("sd1", {"<toy>": (2, 2, 32)}, "holds no textual inversion"),
        ("sd1", {"down.weight": (2, 32)}, "holds no textual inversion"),
        ("sd1", {"a</w>": (2, 32)}, "the token 'a</w>' is in the vocabulary already; give another token"),
    ],
)
def test_files_for_other_models_are_refused_in_a_sentence(
    kind: str, content: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    save_file({name: vectors(*shape) for name, shape in content.items()}, tmp_path / "toy.safetensors")
    pipe = Pipeline.from_pretrained(folders[kind], dtype=torch.float32)
    with pytest.raises(CheckpointError, match=message):
        pipe.load_textual_inversion(tmp_path / "toy.safetensors")
    assert pipe.model.textual_inversions.loaded == ()
    with pytest.raises(SamplingError, match="no textual inversion '<cat>' is loaded; loaded: none"):
        pipe.unload_textual_inversion("<cat>")


def test_a_single_file_with_further_tokens_is_written_with_a_warning(tmp_path: Path) -> None:
    pipe = Pipeline(tiny_model())
    pipe.load_textual_inversion(bare_tensor(tmp_path), "<toy>")
    with pytest.warns(UserWarning, match="has the tokens <toy>, which other programs do not read from an LDM file"):
        pipe.save_pretrained(tmp_path / "one.safetensors", to="ldm")
    again = Pipeline.from_pretrained(tmp_path / "one.safetensors", dtype=torch.float32)
    torch.testing.assert_close(again("a <toy>", **QUIET), pipe("a <toy>", **QUIET))


@pytest.mark.parametrize("kind", WIDTHS)
def test_clip_skip_is_that_of_diffusers(kind: str, folders: dict[str, Path], peers: dict[str, Any]) -> None:
    """Which leaves the negative prompt and the pooled state as they are."""
    peer, texts = peers[kind], ("a red apple", "blurry")
    object.__setattr__(peer.text_encoder, "text_model", peer.text_encoder)  # transformers 5 has no such part any more
    pipe = Pipeline.from_pretrained(folders[kind], dtype=torch.float32)
    for clip_skip in (None, 0, 1, 2):
        expected = encoded_by_peer(peer, *texts, clip_skip)
        torch.testing.assert_close(encoded(pipe, *texts, clip_skip), expected, rtol=1e-4, atol=1e-4)
        assert torch.allclose(encoded(pipe, *texts)[0], expected[0]) is (clip_skip in (None, 0))


def test_clip_skip_beyond_the_layers_is_refused_and_recorded_otherwise() -> None:
    pipe = Pipeline(tiny_model())
    with pytest.raises(SamplingError, match=r"clip_skip is 2; give at most 1\."):
        pipe.stream("a", clip_skip=2)
    with pytest.raises(SamplingError, match="clip_skip is 1; leave it out, since this model has no CLIP text encoder"):
        Pipeline(tiny_model("class")).stream(label=1, clip_skip=1)
    with pytest.raises(SamplingError, match="clip_skip is -1; it must be a whole number, 0 or more"):
        pipe.stream("a", clip_skip=-1)
    assert json.loads(pipe("a", clip_skip=1, progress=False)[0].info["settings"])["clip_skip"] == 1
