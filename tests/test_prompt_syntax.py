"""What Automatic1111's prompts can say beyond weights: BREAK, AND, alternatives and LoRAs; and words that have no meaning."""

from __future__ import annotations

import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ldm import Pipeline, editing
from ldm.conditioning import Conditioner, ConditionerConfig
from ldm.config import from_dict
from ldm.diffusion import Guidance, Projection
from ldm.errors import CheckpointError, SamplingError
from ldm.prompt_syntax import composition, foreign_words, lora_tags
from ldm.prompts import Blend, PromptOptions, Scheduled, WeightedPrompt, escape
from tests.tiny import TOKENIZER, TOWER, tiny_lora, tiny_model

WEIGHTED = PromptOptions("weighted")
QUIET: dict[str, Any] = {
    "seed": 1,
    "num_inference_steps": 2,
    "output_type": "latent",
    "progress": False,
    "prompt_syntax": "weighted",
}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(tiny_model())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA files, one of them in a subfolder."""
    path = tmp_path_factory.mktemp("loras")
    (path / "inner").mkdir()
    for seed, name in enumerate(("style", "inner/round v2")):
        save_file(tiny_lora(seed), path / f"{name}.safetensors")
    return path


# Alternatives


def said(prompt: str, steps: int) -> list[str]:
    return [str(WEIGHTED.at(prompt, step, steps)[0][1]) for step in range(steps)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a [cat|dog] b", ["a cat b", "a dog b", "a cat b", "a dog b"]),
        ("[a|b|]", ["a", "b", "", "a"]),
        ("[a|[b|c]]", ["a", "c", "a", "c"]),  # nested alternatives count the steps of the sampling, as in Automatic1111
        ("[[a|b]:c:0.5]", ["a", "b", "c", "c"]),
        ("[x:[a|b]:0.25]", ["x", "b", "a", "b"]),
        ("(a|b)", ["a|b"] * 4),
        (r"[a\|b]", ["a|b"] * 4),
        ("a|b", ["a|b"] * 4),
        ("[12:30|b]", ["12:30", "b"] * 2),
    ],
)
def test_alternatives_take_turns(prompt: str, expected: list[str]) -> None:
    assert said(prompt, 4) == expected


@given(st.lists(st.text(), min_size=2, max_size=4), st.integers(1, 12))
def test_the_alternative_of_a_step_is_its_number_modulo_theirs(options: list[str], steps: int) -> None:
    prompt = f"[{'|'.join(map(escape, options))}]"
    assert said(prompt, steps) == [options[step % len(options)] for step in range(steps)]
    changes = {step for step in range(1, steps) if said(prompt, steps)[step] != said(prompt, steps)[step - 1]}
    assert changes <= WEIGHTED.changes(prompt, steps)


def test_alternatives_with_weights_are_sampled_as_the_prompts_of_their_steps(pipe: Pipeline) -> None:
    prompt = "a [(red:1.5)|blue] car"
    plain = Scheduled("a (red:1.5) car", "a blue car", 0.5)
    assert torch.equal(pipe(prompt, **QUIET), pipe(plain, **QUIET))


def test_each_different_text_is_encoded_once(pipe: Pipeline) -> None:
    calls: list[int] = []
    hook = pipe.model.conditioner.register_forward_hook(lambda module, args, out: calls.append(1))
    pipe("[red|blue] car", **{**QUIET, "num_inference_steps": 10})
    hook.remove()
    assert len(calls) == 4  # twice with the unconditional text


# BREAK


@pytest.fixture
def conditioner() -> Conditioner:
    config = from_dict(ConditionerConfig, {"kind": "text", "tower": TOWER | {"embed_dim": 6}, "pooled": True})
    return config.build(TOKENIZER).eval()


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a red BREAK apple", ["a red", "apple"]),
        ("BREAK apple", ["", "apple"]),
        ("apple BREAK ", ["apple"]),
        ("a BREAK BREAK b", ["a", "", "b"]),
        ("[a BREAK b:c:0.9] d", ["a", "b d"]),
        ("(a BREAK b:1.0)", ["a", "b"]),
        (r"a \BREAK b", ["a BREAK b"]),
        ("aBREAK", ["aBREAK"]),
    ],
)
@pytest.mark.parametrize("long_prompts", ["chunks", "cut"])
def test_break_begins_a_new_chunk(conditioner: Conditioner, prompt: str, chunks: list[str], long_prompts: str) -> None:
    ((_, text),) = PromptOptions("weighted", long_prompts).at(prompt, 0, 1)
    cond = conditioner({"text": [text]})
    alone = [conditioner({"text": [WeightedPrompt(chunk, cut=True)]}) for chunk in chunks]
    torch.testing.assert_close(cond.context, torch.cat([each.context for each in alone], dim=1))
    torch.testing.assert_close(cond.vector, alone[0].vector)


def test_weights_go_with_their_words_into_the_chunks(conditioner: Conditioner) -> None:
    ((_, text),) = WEIGHTED.at("a (red BREAK blue:1.5) car", 0, 1)
    ((_, second),) = WEIGHTED.at(" (blue:1.5) car", 0, 1)
    length = TOKENIZER.context_length
    expected = conditioner({"text": [second]})
    torch.testing.assert_close(conditioner({"text": [text]}).context[:, length:], expected.context)


# AND


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [(1.0, "a cat")]),
        ("a AND b :0.5 AND [c:d:0.5]:2", [(1.0, "a"), (0.5, " b"), (2.0, " [c:d:0.5]")]),
        ("a: 1.5 AND b:-1", [(1.5, "a"), (-1.0, " b")]),
        ("a AND", [(1.0, "a"), (1.0, "")]),
        (r"a \AND b", [(1.0, r"a \AND b")]),
        (r"a AND b\:0.5", [(1.0, "a"), (1.0, r" b\:0.5")]),
        ("aAND b and c", [(1.0, "aAND b and c")]),
        ("time 12:30", [(1.0, "time 12:30")]),
    ],
)
def test_prompts_are_split_at_and(prompt: str, parts: list[tuple[float, str]]) -> None:
    assert composition(prompt) == parts


@pytest.mark.parametrize(
    ("scale", "settings"),
    [(1.0, {}), (3.0, {"rescale": 0.5}), (3.0, {"perturbed": 2.0}), (3.0, {"projection": Projection(momentum=-0.5)})],
)
def test_joined_prompts_with_shares_of_one_prompt_are_that_prompt(
    pipe: Pipeline, scale: float, settings: dict[str, Any]
) -> None:
    guidance = Guidance(scale, **settings)
    plain = pipe("a red apple", "a car", guidance=guidance, **QUIET)
    joined = pipe("a red apple :0.25 AND a red apple :0.75", "a car", guidance=guidance, **QUIET)
    torch.testing.assert_close(joined, plain, rtol=1e-3, atol=1e-3)


def test_predictions_of_joined_prompts_are_added(pipe: Pipeline) -> None:
    """D = u + s sum_i w_i (c_i - u), the formula of Liu et al. 2206.01714."""
    seen: list[Any] = []
    options = {**QUIET, "num_inference_steps": 1, "guidance_scale": 3.0}
    pipe("a AND [b|c] :0.5", "n", callback=lambda step: seen.append(step.denoised), **options)
    for prompt, scale in (("n", 1.0), ("a", 1.0), ("b", 1.0)):
        pipe(prompt, callback=lambda step: seen.append(step.denoised), **options | {"guidance_scale": scale})
    joined, u, a, b = seen
    torch.testing.assert_close(joined, u + 3 * ((a - u) + 0.5 * (b - u)), rtol=1e-4, atol=1e-4)


def test_an_image_of_joined_prompts_is_as_it_is_alone(pipe: Pipeline) -> None:
    prompts = ["a red apple", "a AND b", "a blue car AND [red|blue] AND c :0.5"]
    guidance = Guidance([2.0, 3.0, 1.0], interval=(0.1, 5.0))
    together = pipe(prompts, "n", guidance=guidance, **QUIET)
    for row, prompt in enumerate(prompts):
        alone = pipe(
            prompt, "n", guidance=Guidance(guidance.scale[row], interval=(0.1, 5.0)), **QUIET | {"seed": 1 + row}
        )  # type: ignore[index]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)


# LoRAs


def test_a_lora_in_a_prompt_is_that_lora_for_one_call(pipe: Pipeline, folder: Path) -> None:
    plain = pipe("a red apple", **QUIET)
    state = {name: tensor.clone() for name, tensor in pipe.model.state_dict().items()}
    named = pipe("a red apple<lora:style:0.8>", lora_folder=folder, **QUIET)
    both = pipe("a red <lora:round v2>apple<lora:style:0.8>", lora_folder=str(folder), **QUIET)
    assert torch.equal(pipe("a red apple", **QUIET), plain)
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipe.model.state_dict().items())

    pipe.load_lora(folder / "style.safetensors", 0.8)
    assert torch.equal(pipe("a red apple", **QUIET), named)
    pipe.load_lora(folder / "inner" / "round v2.safetensors")
    assert torch.equal(pipe("a red apple", **QUIET), both)
    assert not torch.equal(both, named)
    # a loaded LoRA gets another scale for the call, and needs no folder
    changed = pipe("a red apple<lora:style:0.5>", **QUIET)
    assert torch.equal(pipe("a red apple", **QUIET), both)
    pipe.set_lora_scale("style", 0.5)
    assert torch.equal(pipe("a red apple", **QUIET), changed)
    pipe.unload_lora()
    assert torch.equal(pipe("a red apple", **QUIET), plain)


def test_each_image_of_a_call_has_the_loras_of_its_own_prompt(folder: Path) -> None:
    pipe = Pipeline(tiny_model())
    pipe.lora_folder = folder
    prompts = ["a <lora:style:0.8>", "a", "a <lora:style:0.5> <lora:style:0.3>", "a <lora:style:0.2:0.9>"]
    settings = QUIET | {"seed": [1] * 4, "batch_size": 2}
    together = pipe(prompts, **settings)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(together[row : row + 1], pipe(prompt, **QUIET), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together[2], together[0], rtol=1e-3, atol=1e-3)
    records = [json.loads(image.info["settings"]) for image in pipe(prompts, **settings | {"output_type": "pil"})]
    scales = [{each["name"]: each["scale"] for each in record.get("loras", ())} for record in records]
    assert scales == [{"style": 0.8}, {}, {"style": 0.8}, {"style": 0.9, "style (text encoders)": 0.2}]


def test_calls_of_several_threads_do_not_share_their_loras(folder: Path) -> None:
    pipe = Pipeline(tiny_model())
    pipe.lora_folder = folder
    prompts = ["a", "a<lora:style:1>", "a<lora:round v2:0.5>"]
    alone = [pipe(prompt, **QUIET) for prompt in prompts]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda prompt: pipe(prompt, **QUIET), prompts))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other)


def test_loras_in_prompts_act_in_streams_schedules_and_editing(folder: Path) -> None:
    pipe = Pipeline(tiny_model())
    pipe.lora_folder = folder
    expected = pipe("a<lora:style:0.8>", **QUIET)
    assert torch.equal(pipe.stream("a<lora:style:0.8>", **QUIET).result(), expected)
    assert torch.equal(pipe(Blend("a<lora:style:0.8>", "a", 0.0), **QUIET), expected)
    image = Pipeline(tiny_model())("a", seed=1, progress=False)[0]
    edited = [editing.image_to_image(pipe, f"a{tag}", image, **QUIET) for tag in ("", "<lora:style:0.8>")]
    assert not torch.allclose(*edited, atol=1e-2)


@pytest.mark.slow
def test_loras_in_prompts_act_on_compiled_networks(folder: Path) -> None:
    pipe = Pipeline(tiny_model())
    pipe.lora_folder = folder
    expected = pipe("a<lora:style:0.8>", **QUIET)
    pipe.model.denoiser.compile(backend="eager")
    plain = pipe("a", **QUIET)
    assert torch.equal(pipe("a<lora:style:0.8>", **QUIET), expected)
    assert torch.equal(pipe("a", **QUIET), plain)
    pipe.model.denoiser = torch.compile(pipe.model.denoiser, backend="eager")
    torch.testing.assert_close(pipe("a<lora:style:0.8>", **QUIET), expected)


def test_lora_tags_that_cannot_act_are_refused_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline(tiny_model())
    with pytest.raises(SamplingError, match="<lora:styel:1> in a prompt: unknown LoRA 'styel'; did you mean 'style'"):
        pipe.stream("a <lora:styel:1>", lora_folder=folder, **QUIET)
    with pytest.raises(SamplingError, match=r"the scale in <lora:style:big> is not a number; write <lora:name:0\.8>"):
        pipe.stream("a <lora:style:big>", lora_folder=folder, **QUIET)
    with pytest.raises(SamplingError, match=r"lora_folder is '.*nowhere', which is not a folder; name one that exists"):
        pipe.stream("a", lora_folder=tmp_path / "nowhere", **QUIET)
    save_file({"nothing": torch.zeros(1)}, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match="which is not a LoRA tensor"):
        pipe.stream("a <lora:broken>", lora_folder=tmp_path, **QUIET)
    name = pipe.load_lora(folder / "style.safetensors", merge=True)
    with pytest.raises(SamplingError, match="the LoRA 'style' is merged into the weights; load it without merge=True"):
        pipe.stream(f"a <lora:{name}:1>", **QUIET)


def test_a_name_that_several_loras_have_is_refused(folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline(tiny_model())
    for place in ("a/x.safetensors", "b/x.safetensors", "c/y.safetensors"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(folder / "style.safetensors", tmp_path / place)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "c" / "y.safetensors")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "y.safetensors").symlink_to(tmp_path / "c" / "y.safetensors")
    with pytest.raises(
        SamplingError, match=r"several LoRAs of this name \(a/x\.safetensors, b/x\.safetensors\); rename all but"
    ):
        pipe.stream("a <lora:x:1>", lora_folder=tmp_path, **QUIET)
    for name in ("y", "link"):
        pipe.stream(f"a <lora:{name}:1>", lora_folder=tmp_path, **QUIET).close()
    name = pipe.load_lora(tmp_path / "a" / "x.safetensors")
    assert name == "x"
    pipe.stream("a <lora:x:1>", lora_folder=tmp_path, **QUIET).close()


# What has no meaning


@given(st.text(alphabet="ABDEKNR<>:lora1|[](){}+- \\", max_size=20))
def test_any_string_is_parsed_or_refused_in_a_sentence(prompt: str) -> None:
    message = "."
    foreign_words(prompt, "plain")
    try:
        for _, part in composition(prompt):
            WEIGHTED.at(part, 0, 3)
        lora_tags(prompt)
        foreign_words(prompt, "weighted")
    except SamplingError as error:
        message = str(error)
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("syntax", "prompt", "negative", "word", "advice"),
    [
        ("plain", "a <lora:style:0.8>", "", "<lora:style:0.8>", "set prompt_syntax to 'weighted'"),
        ("plain", "a BREAK b", "", "BREAK", "set prompt_syntax to 'weighted'"),
        ("plain", "a AND b", "", "AND", "set prompt_syntax to 'weighted'"),
        ("plain", "a", "[b|c]", "[b|c]", "set prompt_syntax to 'weighted'"),
        ("plain", Scheduled("a [b:c:0.5]", "a", 0.5), "", "[b:c:0.5]", "set prompt_syntax to 'weighted'"),
        ("plain", "a (b:1.2)", "", "(b:1.2)", "set prompt_syntax to 'weighted'"),
        ("weighted", "a <lora:style:0.8>", "", "<lora:style:0.8>", "lora_folder is not given"),
        ("weighted", "a <hypernet:style:0.8>", "", "<hypernet:style:0.8>", "only <lora:name:0.8> is supported"),
        ("weighted", "a", "<lora:style:0.8>", "<lora:style:0.8>", "name LoRAs in the prompt"),
        ("weighted", "a", "b AND c", "AND", "join prompts by AND in a prompt that is a string"),
        ("weighted", Blend("a AND b", "c", 0.5), "", "AND", "join prompts by AND in a prompt that is a string"),
        ("weighted", "a {best} b", "", "{best}", r"write \(word:1\.1\)"),
        ("weighted", "a (best)++", "", ")++", r"write \(word:1\.1\)"),
        ("weighted", "a best++ b", "", "best++", r"write \(word:1\.1\)"),
        ("weighted", "a (best:1,3)", "", "(best:1,3)", r"write \(word:1\.1\)"),
        ("weighted", "a \uff08best\uff1a1.3\uff09", "", "\uff08best\uff1a1.3\uff09", r"write \(word:1\.1\)"),
        ("weighted", "a <lora:style:0.8", "", "<lora:style:0.8", "close the tag with >"),
    ],
)
def test_words_without_a_meaning_are_named_once(
    pipe: Pipeline, syntax: str, prompt: Any, negative: str, word: str, advice: str
) -> None:
    settings = QUIET | {"prompt_syntax": syntax}
    with pytest.warns(UserWarning, match=advice) as found:
        pipe.stream([prompt] * 2, [negative] * 2, **settings)
    (warning,) = found
    assert repr(word) in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "prompt",
    ["a well-known (semi)-realistic C++ logo <3 a:b", "a [red] (blue)", "ROCK AND ROLL", "<toy>", "word -- word"],
)
def test_plain_prompts_give_no_warning(pipe: Pipeline, prompt: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.stream(prompt, **QUIET | {"prompt_syntax": "plain"})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("(a AND b)", r"the AND at character 4 of the prompt '\(a AND b\)' is within brackets; put it outside"),
        ("a AND b :9999", "the weight 9999 of 'b' in the prompt 'a AND b :9999' is out of range"),
        ("[a|b:0.5]", r"the \[ at character 1 of the prompt .* has alternatives and the number 0\.5; write \[\[a\|b\]"),
        ("a<lora:x:9999>", "the weight 9999 of '<lora:x:9999>' in the prompt"),
    ],
)
def test_wrong_use_is_refused_in_a_sentence(pipe: Pipeline, prompt: str, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        pipe.stream(prompt, **QUIET)
