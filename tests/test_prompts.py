from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm import Pipeline, editing
from ldm.clip.tokenizer import CLIPBPEConfig
from ldm.conditioning import Conditioner, ConditionerConfig
from ldm.config import from_dict
from ldm.diffusion import SAMPLERS, SPECS, Guidance, Projection, Step, guided, seeded_noise
from ldm.errors import SamplingError
from ldm.inputs import request
from ldm.prompts import Blend, Piece, Prompt, PromptOptions, Scheduled, WeightedPrompt, escape, parse
from tests.tiny import TOKENIZER, TOWER, tiny_model

LENGTH = TOKENIZER.context_length
SHORT, OTHER = "a red apple", "a blue car"
LONG = "a red apple, a green car, a blue sky, two green cars"
QUIET: dict[str, Any] = {"seed": 1, "output_type": "latent", "progress": False}
WEIGHTED = PromptOptions("weighted")
WEIGHTS = st.integers(0, 300).map(lambda percent: percent / 100)


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline(tiny_model())


@pytest.fixture
def conditioner() -> Conditioner:
    config = from_dict(ConditionerConfig, {"kind": "text", "tower": TOWER | {"embed_dim": 6}, "pooled": True})
    return config.build(TOKENIZER).eval()


def text(prompt: str) -> WeightedPrompt:
    """What the weighted prompt says in a sampling of one step."""
    ((_, said),) = WEIGHTED.at(prompt, 0, 1)
    assert said is not None
    return said


# The syntax


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", []),
        ("a red apple", [("a red apple",)]),
        ("a (red:1.3) [apple]", [("a ",), ("red", 1.3), (" ",), ("apple", 1 / 1.1)]),
        ("(red)((hot))", [("red", 1.1), ("hot", 1.1 * 1.1)]),
        ("((red:2) apple:.5)", [("red", 1.0), (" apple", 0.5)]),
        ("(red: 1.)", [("red",)]),
        ("time 12:30", [("time 12:30",)]),
        ("(note: red)", [("note: red", 1.1)]),
        ("(a:b:2)", [("a:b", 2.0)]),
        (r"\(red:1.3\) \[\] \\ \: \a", [(r"(red:1.3) [] \ : \a",)]),
        (r"(red\:1.3)", [("red:1.3", 1.1)]),
        ("()[]", []),
        ("a [red:blue:0.4] car", [("a ",), ("red", 1.0, 0.0, 0.4), ("blue", 1.0, 0.4, 1.0), (" car",)]),
        ("[car:0.4][sky::0.3]", [("car", 1.0, 0.4, 1.0), ("sky", 1.0, 0.0, 0.3)]),
        ("([(red):blue:0.4]:2)", [("red", 2.2, 0.0, 0.4), ("blue", 2.0, 0.4, 1.0)]),
        ("[[a:b:0.2]:c:0.6]", [("a", 1.0, 0.0, 0.2), ("b", 1.0, 0.2, 0.6), ("c", 1.0, 0.6, 1.0)]),
        ("[a:[b:c:0.6]:0.2]", [("a", 1.0, 0.0, 0.2), ("b", 1.0, 0.2, 0.6), ("c", 1.0, 0.6, 1.0)]),
        ("[a:[b:c:0.2]:0.6]", [("a", 1.0, 0.0, 0.6), ("c", 1.0, 0.6, 1.0)]),
        ("[a:b:c:0.4]", [("a:b:c:0.4", 1 / 1.1)]),
    ],
)
def test_prompts_in_the_weighted_syntax(prompt: str, pieces: list[tuple[Any, ...]]) -> None:
    found = parse(prompt)
    assert [piece.text for piece in found] == [piece[0] for piece in pieces]
    expected = [Piece(*piece)[1:] for piece in pieces]
    assert [piece[1:] for piece in found] == [pytest.approx(values) for values in expected]


@given(st.text())
def test_an_escaped_text_is_that_text_with_weight_1(plain: str) -> None:
    assert parse(escape(plain)) == ([Piece(plain)] if plain else [])
    said = text(escape(plain))
    assert (said, said.weights) == (plain, ())


@given(st.text(min_size=1), st.lists(WEIGHTS, max_size=5))
def test_weights_of_nested_groups_multiply(plain: str, weights: list[float]) -> None:
    prompt = escape(plain)
    for weight in weights:
        prompt = f"({prompt}:{weight})"
    (piece,) = parse(prompt)
    assert piece == (plain, pytest.approx(math.prod(weights)), 0, 1)


@given(st.lists(st.tuples(st.text(min_size=1), WEIGHTS)))
def test_pieces_that_are_written_are_parsed_back(pieces: list[tuple[str, float]]) -> None:
    prompt = "".join(f"({escape(plain)}:{weight})" for plain, weight in pieces)
    merged = [
        ("".join(plain for plain, _ in run), weight) for weight, run in groupby(pieces, key=lambda piece: piece[1])
    ]
    assert [(piece.text, piece.weight) for piece in parse(prompt)] == merged


@given(st.text(alphabet="ab:([)]\\.1", max_size=12))
def test_any_string_is_parsed_or_rejected_in_a_sentence(prompt: str) -> None:
    pieces, message = [], repr(prompt)
    try:
        pieces = parse(prompt)
    except SamplingError as error:
        message = str(error)
    assert repr(prompt) in message
    assert all(piece.text and piece.since < piece.until for piece in pieces)


@given(st.floats(0, 1), st.integers(1, 30))
def test_a_schedule_in_brackets_is_a_scheduled_prompt(share: float, steps: int) -> None:
    share = round(share, 3)
    prompt, scheduled = f"a [red:blue:{share:.3f}] car", Scheduled("a red car", "a blue car", share)
    said = [WEIGHTED.at(prompt, step, steps) for step in range(steps)]
    assert said == [WEIGHTED.at(scheduled, step, steps) for step in range(steps)]
    assert sum(texts == [(1.0, "a red car")] for texts in said) == round(share * steps)
    changes = [step for step in range(1, steps) if said[step] != said[step - 1]]
    assert set(changes) <= WEIGHTED.changes(prompt, steps)
    assert set(changes) <= WEIGHTED.changes(scheduled, steps)


def test_objects_nest_and_what_has_no_share_is_left_out() -> None:
    prompt = Blend(Scheduled("a", "b", 0.5), Blend("c", "(d:2)", 0.25), 0.5)
    assert PromptOptions().at(prompt, 0, 2) == [(0.5, "a"), (0.375, "c"), (0.125, "(d:2)")]
    assert WEIGHTED.at(prompt, 1, 2) == [(0.5, "b"), (0.375, "c"), (0.125, "d")]
    assert PromptOptions().at(Blend("a", "b", 0), 0, 1) == [(1.0, "a")]
    assert PromptOptions().at(Blend("a", "b", 1), 0, 1) == [(1.0, "b")]
    assert repr(Scheduled("a", "b", 0.5)) == "Scheduled(first='a', second='b', share=0.5)"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (red", r"the \( at character 3 of the prompt 'a \(red' is never closed; close it, or write \\\( for"),
        ("([red)", r"the \) at character 6 of the prompt '\(\[red\)' closes nothing; remove it, or write \\\) for"),
        ("red]", r"the \] at character 4 of the prompt 'red\]' closes nothing"),
        ("a [red:blue:7]", r"the \[ at character 3 of the prompt .* after 7 of the steps; give a share from 0 to 1"),
    ],
)
def test_syntax_errors_are_reported_in_a_sentence(pipe: Pipeline, prompt: str, message: str) -> None:
    for arguments in ((prompt,), (SHORT, prompt), (Blend(SHORT, prompt, 0.5),)):
        with pytest.raises(SamplingError, match=message):
            pipe(*arguments, prompt_syntax="weighted", progress=False)
    pipe(prompt, num_inference_steps=1, progress=False)  # in the plain syntax a bracket is a character


def test_wrong_types_of_prompts_are_reported_in_a_sentence(pipe: Pipeline) -> None:
    with pytest.raises(SamplingError, match=r"the share of Blend is 1\.5; it must be a number from 0 to 1\."):
        Blend("a", "b", 1.5)
    with pytest.raises(SamplingError, match="Scheduled is given 3, which is no prompt; give two prompts and a share"):
        Scheduled("a", 3, 0.5)  # type: ignore[arg-type]
    with pytest.raises(SamplingError, match="unknown prompt_syntax 'weigthed'; did you mean 'weighted'"):
        pipe(SHORT, prompt_syntax="weigthed")
    with pytest.raises(SamplingError, match="unknown long_prompts 'chunk'; did you mean 'chunks'"):
        pipe(SHORT, long_prompts="chunk")


# Weights


def places(plain: str) -> torch.Tensor:
    """Where in the text the last character of each token stands, ``[n]``; -1 for start, end and padding."""
    return TOKENIZER.windows(plain)[1][0]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.75])
def test_a_weight_scales_the_states_of_its_tokens(conditioner: Conditioner, weight: float) -> None:
    plain = conditioner({"text": [SHORT]})
    cond = conditioner({"text": [text(f"a (red:{weight}) apple")]})
    factor = torch.where((places(SHORT) >= 2) & (places(SHORT) < 5), weight, 1.0)
    assert set(factor.tolist()) == {weight, 1.0}
    scaled = plain.context * factor[:, None]
    torch.testing.assert_close(cond.context, scaled * (plain.context.abs().mean() / scaled.abs().mean()))
    torch.testing.assert_close(cond.context.abs().mean(), plain.context.abs().mean())
    assert torch.equal(cond.vector, plain.vector)


def test_weights_of_1_change_no_bit(conditioner: Conditioner) -> None:
    plain = conditioner({"text": [SHORT, OTHER]})
    cond = conditioner({"text": [text("a (red:1.0) apple"), text(OTHER)]})
    assert torch.equal(cond.context, plain.context)
    beside = conditioner({"text": [text("a (red:2) apple"), text(OTHER)]})
    assert torch.equal(beside.context[1], plain.context[1])
    assert not torch.isclose(beside.context[0], plain.context[0]).all()


def test_weights_reach_the_image_of_prompts_and_negative_prompts(pipe: Pipeline) -> None:
    plain = pipe(SHORT, OTHER, **QUIET)
    options = QUIET | {"prompt_syntax": "weighted"}
    assert torch.equal(pipe("a (red:1.0) apple", OTHER, **options), plain)
    slight, strong = (pipe(f"a (red:{weight}) apple", OTHER, **options) for weight in (1.1, 2.0))
    assert 0 < (slight - plain).norm() < (strong - plain).norm()
    assert not torch.equal(pipe(SHORT, "a blue (car:2)", **options), plain)


# Long prompts


@given(st.text(alphabet="ab ,\té赤🍎", max_size=60))
def test_windows_hold_all_tokens_in_order(plain: str) -> None:
    tokens, places = TOKENIZER.windows(plain)
    assert tokens.shape == places.shape
    content = [
        token
        for row in tokens.tolist()
        for token in row[1 : row.index(TOKENIZER.eos_id)]
        if token not in (TOKENIZER.bos_id, TOKENIZER.eos_id)
    ]
    whole = TOKENIZER.with_context_length(500)(plain)[0].tolist()
    assert content == whole[1 : whole.index(TOKENIZER.eos_id)]
    assert (tokens[:, 0] == TOKENIZER.bos_id).all()
    assert ((places >= 0).sum(1) == (tokens < TOKENIZER.bos_id).sum(1)).all()
    assert torch.equal(TOKENIZER.windows(plain, cut=True)[0], TOKENIZER(plain))
    if len(tokens) == 1:
        assert torch.equal(tokens, TOKENIZER(plain))


def test_windows_end_behind_a_comma_or_a_word() -> None:
    tokenizer = CLIPBPEConfig(context_length=12).build()

    def shown(plain: str) -> list[str]:
        return [tokenizer.decode(row) for row in tokenizer.windows(plain)[0]]

    words = "one two three four five six seven eight"
    assert shown(f"{words}, nine ten eleven") == [f"{words} ,", "nine ten eleven"]
    assert shown(f"{words} nine ten eleven") == [f"{words} nine ten", "eleven"]
    assert shown(f"{words} nine 1001 nights") == [f"{words} nine", "1 0 0 1 nights"]
    assert shown("1" * 15) == [" ".join("1" * 10), " ".join("1" * 5)]


def test_a_long_prompt_is_read_window_by_window(conditioner: Conditioner) -> None:
    tokens, _ = TOKENIZER.windows(LONG)
    n = len(tokens)
    assert n > 2
    cond = conditioner({"text": [WeightedPrompt(LONG), WeightedPrompt(LONG)]})
    expected = conditioner.tower(tokens)
    assert cond.mask is None
    torch.testing.assert_close(cond.context[0], expected.context.flatten(0, 1))
    torch.testing.assert_close(cond.vector[0], expected.pooled[0])

    beside = conditioner({"text": [WeightedPrompt(LONG), WeightedPrompt(SHORT)]})
    assert beside.context.shape == (2, n * LENGTH, TOWER["width"])
    assert beside.mask.tolist() == [[True] * n * LENGTH, [True] * LENGTH + [False] * (n - 1) * LENGTH]
    alone = conditioner({"text": [SHORT]})
    torch.testing.assert_close(beside.context[1, :LENGTH], alone.context[0])
    torch.testing.assert_close(beside.vector[1], alone.vector[0])


def test_only_samplings_read_in_windows(conditioner: Conditioner) -> None:
    cut = conditioner({"text": [LONG]})
    assert cut.context.shape[1] == LENGTH
    assert torch.equal(conditioner({"text": [WeightedPrompt(LONG, cut=True)]}).context, cut.context)


def test_long_prompts_are_in_chunks_unless_they_are_to_be_cut(pipe: Pipeline) -> None:
    lengths: list[int] = []
    pipe.model.denoiser.register_forward_hook(lambda module, args, out: lengths.append(args[2].context.shape[1]))
    whole, cut = pipe(LONG, **QUIET), pipe(LONG, **QUIET, long_prompts="cut")
    n = len(TOKENIZER.windows(LONG)[0])
    assert lengths == [n * LENGTH] * 4 + [LENGTH] * 4  # conditional and unconditional are one batch
    assert not torch.isclose(whole, cut).all()
    first = TOKENIZER.decode(TOKENIZER(LONG)[0])
    torch.testing.assert_close(cut, pipe(first, **QUIET))


def test_a_short_prompt_is_the_same_in_a_batch_with_a_long_one(pipe: Pipeline) -> None:
    alone = pipe(SHORT, **QUIET)
    torch.testing.assert_close(pipe([SHORT, LONG], **QUIET)[:1], alone, rtol=1e-4, atol=1e-4)
    unguided = pipe(SHORT, guidance_scale=1, **QUIET)
    torch.testing.assert_close(pipe(SHORT, LONG, guidance_scale=1, **QUIET), unguided, rtol=1e-4, atol=1e-4)
    assert not torch.isclose(pipe(SHORT, LONG, **QUIET), alone).all()


# Blends and schedules


def denoiser(pipe: Pipeline, prompts: list[Prompt], levels: torch.Tensor, negative: Prompt | None = None) -> Any:
    told = request(("text",), {"prompt": prompts}, negative, Guidance(3.0), 1, 1, PromptOptions())
    return pipe.denoiser(told, levels)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_a_plain_prompt_is_sampled_bitwise_as_by_the_parts(pipe: Pipeline, sampler: str) -> None:
    prompts = ["(a) [b]", OTHER]
    model, levels = pipe.model, pipe.noise_levels()
    inputs = {"text": prompts}
    plain = guided(model.denoise, model.conditioner(inputs), model.conditioner.unconditional(inputs), 3.0)
    unit = seeded_noise([1, 2], model.latent_shape(), "cpu")(math.inf, 1.0)
    top = float(levels[0])
    # the solvers of k-diffusion start at sigma times the noise where the grid reaches up to the last timestep
    x = model.diffusion.start(unit, top) if SPECS[sampler].grid != "fractional" else top * unit
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        *_, last = SAMPLERS[sampler](plain, x, levels)
    assert torch.equal(pipe(prompts, sampler=sampler, **QUIET), last.x)


@pytest.mark.parametrize("kind", [Blend, Scheduled])
def test_the_ends_are_bitwise_the_pure_prompts(pipe: Pipeline, kind: Any) -> None:
    for sampler in ("heun", "dpmpp_2m"):
        # sigmas that end above 0, where heun evaluates too
        options = QUIET | {"sampler": sampler, "sigmas": [9.0, 3.0, 1.0]}
        first, second = pipe(SHORT, LONG, **options), pipe(LONG, SHORT, **options)
        zero, one = (0, 1) if kind is Blend else (1, 0)
        assert torch.equal(pipe(kind(SHORT, LONG, zero), kind(LONG, SHORT, zero), **options), first)
        assert torch.equal(pipe(kind(SHORT, LONG, one), kind(LONG, SHORT, one), **options), second)


@pytest.mark.parametrize("share", [0.25, 0.8])
def test_a_blend_is_the_mean_of_the_conditionings(conditioner: Conditioner, pipe: Pipeline, share: float) -> None:
    pipe.model.conditioner = conditioner
    seen: list[Any] = []
    pipe.model.denoise = lambda x, sigma, cond, options: seen.append(cond) or x  # type: ignore[method-assign, func-returns-value]
    x, sigma = torch.zeros(2, *pipe.model.latent_shape()), torch.ones(2)
    told = request(
        ("text",), {"prompt": [OTHER, Blend(SHORT, LONG, share)]}, None, Guidance(1.0), 1, 1, PromptOptions()
    )
    pipe.denoiser(told, pipe.noise_levels())(x, sigma)
    both = conditioner({"text": [WeightedPrompt(OTHER), WeightedPrompt(SHORT), WeightedPrompt(LONG)]})
    torch.testing.assert_close(seen[0].context[0], both.context[0])
    torch.testing.assert_close(seen[0].context[1], torch.lerp(both.context[1], both.context[2], share))
    torch.testing.assert_close(seen[0].vector[1], torch.lerp(both.vector[1], both.vector[2], share))
    assert seen[0].mask.tolist() == [both.mask[0].tolist(), both.mask[2].tolist()]


def test_a_schedule_switches_by_the_noise_level_of_each_row(pipe: Pipeline) -> None:
    levels = pipe.noise_levels(5)
    x, before, at = torch.randn(3, *pipe.model.latent_shape()), float(levels[1]) + 1e-3, float(levels[2])
    prompts: list[Prompt] = [Scheduled(SHORT, LONG, 0.4), Scheduled(OTHER, SHORT, 0.8), SHORT]
    with torch.inference_mode():
        scheduled = denoiser(pipe, prompts, levels, Scheduled("", OTHER, 0.4))
        for sigma, shown in (
            ([before, before, before], [SHORT, OTHER, SHORT]),
            ([at, at, at], [LONG, OTHER, SHORT]),
            ([at / 10, before, at / 100], [LONG, OTHER, SHORT]),
            ([at / 100, at / 100, before], [LONG, SHORT, SHORT]),
        ):
            rows = torch.tensor(sigma)
            actual = scheduled(x, rows)
            for row in range(3):
                avoided = "" if sigma[row] > at else OTHER
                pure = denoiser(pipe, [shown[row]], levels, avoided)
                expected = pure(x[row : row + 1], rows[row : row + 1])
                torch.testing.assert_close(actual[row : row + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_solver_follows_a_schedule(pipe: Pipeline, sampler: str) -> None:
    """Up to the switch it is the first prompt, to the bit, and the network is asked as often as for a plain one."""
    calls: list[int] = []
    pipe.model.denoiser.register_forward_hook(lambda module, args, out: calls.append(len(out)))

    def sampled(prompt: Prompt) -> tuple[list[Step], int]:
        steps: list[Step] = []
        calls.clear()
        pipe(prompt, sampler=sampler, num_inference_steps=5, callback=steps.append, **QUIET)
        return steps, len(calls)

    (first, evaluations), (scheduled, same) = sampled(SHORT), sampled(Scheduled(SHORT, OTHER, 0.6))
    agree = [torch.equal(a.x, b.x) for a, b in zip(first, scheduled, strict=False)]
    assert not agree[-1]
    if not SPECS[sampler].adaptive:
        assert evaluations == same
        assert agree[:2] == [True, True]  # in the third step some solvers look ahead to where it ends


def test_rows_with_schedules_of_their_own_are_as_they_are_alone(pipe: Pipeline) -> None:
    prompts = [SHORT, Scheduled(SHORT, OTHER, 0.5), "[a red:a blue:0.25] car", Blend(LONG, OTHER, 0.5)]
    options = QUIET | {"prompt_syntax": "weighted"}
    together = pipe(prompts, **options)
    for row, prompt in enumerate(prompts):
        alone = pipe(prompt, **options | {"seed": 1 + row})
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)


def test_momentum_of_the_guidance_goes_on_over_the_switch(pipe: Pipeline) -> None:
    guidance = Guidance(3.0, projection=Projection(momentum=-0.7))
    plain = pipe(SHORT, guidance=guidance, **QUIET)
    torch.testing.assert_close(pipe(Scheduled(SHORT, SHORT, 0.5), guidance=guidance, **QUIET), plain)
    forgetful = pipe(SHORT, guidance=Guidance(3.0, projection=Projection()), **QUIET)
    assert not torch.allclose(forgetful, plain, atol=1e-3)


def test_perturbed_guidance_takes_a_schedule(pipe: Pipeline) -> None:
    guidance = Guidance(3.0, perturbed=2.0)
    same = pipe(Scheduled(SHORT, SHORT, 0.5), guidance=guidance, **QUIET)
    torch.testing.assert_close(same, pipe(SHORT, guidance=guidance, **QUIET))
    assert not torch.allclose(pipe(Scheduled(SHORT, OTHER, 0.5), guidance=guidance, **QUIET), same, atol=1e-3)


def test_the_record_of_an_image_has_the_prompt_as_written(pipe: Pipeline) -> None:
    prompts: list[Prompt] = ["a (red:1.3) car", Blend("a", "b", 0.5)]
    images = pipe(prompts, Scheduled("c", "d", 0.5), prompt_syntax="weighted", seed=1, progress=False)
    assert images.prompts == ["a (red:1.3) car", "Blend(first='a', second='b', share=0.5)"]
    assert images[0].info["negative_prompt"] == "Scheduled(first='c', second='d', share=0.5)"
    assert '"prompt_syntax": "weighted"' in images[0].info["settings"]
    assert "prompt_syntax" not in pipe("a", progress=False)[0].info["settings"]


def test_a_row_can_lead_from_one_prompt_to_another(pipe: Pipeline) -> None:
    options = {name: value for name, value in QUIET.items() if name != "seed"}
    row = editing.interpolate(pipe, (SHORT, OTHER), seeds=(1, 1), frames=3, **options)
    for frame, prompt in enumerate((SHORT, Blend(SHORT, OTHER, 0.5), OTHER)):
        torch.testing.assert_close(row[frame : frame + 1], pipe(prompt, **QUIET), rtol=1e-4, atol=1e-4)
    with pytest.raises(SamplingError, match="3 prompts are given"):
        editing.interpolate(pipe, (SHORT, OTHER, LONG), seeds=(1, 2))  # type: ignore[arg-type]
