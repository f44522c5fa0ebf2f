from __future__ import annotations

import dataclasses
import inspect
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import Pipeline, editing
from ldm.checks import shown
from ldm.diffusion import Guidance, Projection
from ldm.errors import SamplingError
from ldm.nn.adapters import Adapter
from ldm.prompts import Blend
from ldm.sampling_settings import SamplingSettings
from tests.tiny import SIZE, tiny_model

FIELDS = {entry.name: entry for entry in dataclasses.fields(SamplingSettings)}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline(tiny_model())


def as_plain(settings: SamplingSettings) -> dict[str, Any]:
    """The fields, tensors as lists."""
    values = {name: getattr(settings, name) for name in FIELDS}
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"guidance_scale": np.float32(3)}, {"guidance_scale": 3.0}),
        ({"guidance_scale": np.int64(3)}, {"guidance_scale": 3}),
        ({"guidance_scale": torch.tensor(3.0)}, {"guidance_scale": 3.0}),
        ({"guidance_scale": np.array([3.0, 1.0])}, {"guidance_scale": [3.0, 1.0]}),
        ({"guidance_scale": [np.float32(3), torch.tensor(1)]}, {"guidance_scale": [3.0, 1]}),
        ({"guidance": Guidance(rescale=np.float32(0.5))}, {"guidance": Guidance(rescale=0.5)}),
        (
            {"guidance": Guidance(interval=(np.float32(0.5), torch.tensor(5)), projection=Projection(np.float64(0.5)))},
            {"guidance": Guidance(interval=(0.5, 5), projection=Projection(0.5))},
        ),
        ({"num_inference_steps": np.int32(3), "height": torch.tensor(16)}, {"num_inference_steps": 3, "height": 16}),
        ({"eta": np.float32(0.5)}, {"eta": 0.5}),
        ({"eta": Decimal("0.5")}, {"eta": 0.5}),
        ({"eta": Fraction(1, 2)}, {"eta": 0.5}),
        ({"guidance_scale": torch.tensor([3.0], requires_grad=True)}, {"guidance_scale": [3.0]}),
        ({"sampler_options": {"order": np.int64(2)}}, {"sampler_options": {"order": 2}}),
        ({"sigmas": np.array([3.0, 1.0])}, {"sigmas": [3.0, 1.0]}),
        ({"timesteps": torch.tensor([900, 100])}, {"timesteps": [900, 100]}),
        ({"seed": torch.tensor(3)}, {"seed": 3}),
        ({"seed": np.array([3, 5])}, {"seed": [3, 5]}),
        ({"label": np.array([3, 5])}, {"label": [3, 5]}),
        ({"latents": np.zeros((1, 2), np.float32)}, {"latents": torch.zeros(1, 2)}),
    ],
    ids=shown,
)
def test_numbers_of_numpy_and_torch_become_plain_ones(given: dict[str, Any], expected: dict[str, Any]) -> None:
    found, wanted = as_plain(SamplingSettings(**given)), as_plain(SamplingSettings(**expected))
    assert found == wanted
    assert repr(found) == repr(wanted)  # equal types, too


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": math.nan}, "guidance_scale is nan; it must be a finite number"),
        ({"guidance_scale": math.inf}, "guidance_scale is inf; it must be a finite number"),
        ({"guidance_scale": "7.5"}, "guidance_scale is '7.5'; it must be a finite number"),
        ({"guidance_scale": [1.0, math.nan]}, r"guidance_scale\[1\] is nan"),
        ({"guidance": Guidance(perturbed=math.nan)}, "guidance.perturbed is nan"),
        ({"guidance_scale": 10**400}, "it must be a finite number"),
        ({"guidance_scale": 1e39}, r"guidance_scale is 1e\+39; it must be a finite number"),
        ({"guidance_scale": b"7.5"}, "guidance_scale is b'7.5'; it must be a finite number"),
        ({"sampler": np.array(["ddim", "euler"])}, "unknown sampler"),
        ({"output_type": 3}, "unknown output_type 3"),
        ({"progress": "no"}, "progress is 'no'; give True or False"),
        ({"edit": 0.5}, "edit is 0.5; give an ldm.sampling_loop.Edit"),
        ({"seed": True}, "the seed True is no whole number"),
        ({"seed": "3"}, "the seed '3' is no whole number"),
        ({"prompt": b"a red apple"}, "prompt 0 is b'a red apple'; it must be a string"),
        (
            {"latents": np.zeros((1, 4, 8, 8), complex)},
            "latents is of type ndarray; give a tensor or an array of numbers",
        ),
        ({"latents": np.full((1, 4, 8, 8), 1e39)}, "latents holds NaN or infinite values"),
        ({"guidance": 3.0}, "guidance is 3.0; give an ldm.diffusion.Guidance"),
        ({"latents": torch.full((1, 4, 8, 8), math.nan)}, "latents holds NaN or infinite values"),
        ({"latents": "noise"}, "latents is of type str; give a tensor"),
        ({"num_inference_steps": True}, "num_inference_steps is True; it must be a whole number, 1 or more"),
        ({"num_images_per_prompt": None}, "num_images_per_prompt is None; it must be a whole number"),
        ({"sigmas": 3.0}, "sigmas is 3.0; give a list of numbers"),
        ({"sigmas": [3.0, "a"]}, r"sigmas\[1\] is 'a'"),
        ({"eta": math.nan}, "eta is nan"),
        ({"sampler_options": {"rtol": math.inf}}, "rtol is inf"),
        ({"sampler_options": [3]}, r"sampler_options is \[3\]; give a dict"),
        ({"condition": 3}, "condition is 3; give a dict"),
        ({"prompt_syntax": "wieghted"}, "unknown prompt_syntax 'wieghted'; did you mean 'weighted'"),
        ({"long_prompts": "cat"}, "unknown long_prompts 'cat'; did you mean 'cut'"),
        ({"callback": 3}, "callback is 3; give a function"),
        *(
            ({name: torch.ones(2, device="meta")}, f"{name} is tensor")
            for name in ("guidance_scale", "num_inference_steps", "height", "eta", "sigmas", "timesteps", "progress")
        ),
        ({"latents": torch.ones(2).to_sparse()}, "latents is of type Tensor; give a tensor or an array of numbers"),
        ({"shift": torch.ones(1).to_sparse()}, "shift is tensor"),
        ({"seed": torch.ones(2, device="meta")}, "the seed tensor"),
        ({"prompt": torch.ones(2, device="meta")}, "prompt 0 is tensor"),
        ({"guidance_scale": {3.0}}, "guidance_scale is {3.0}; it must be a finite number"),
        ({"sigmas": {3.0: 1}}, "sigmas is {3.0: 1}; give a list of numbers"),
        ({"prompt": {"a red apple": 1}}, "prompt 0 is {'a red apple': 1}; it must be a string"),
        ({"eta": Decimal("sNaN")}, "eta is Decimal.*; it must be a finite number"),
        *(
            ({name: 10**5000}, f"{name} is of type int; it must be a whole number from 1 to 1000000")
            for name in ("num_inference_steps", "height", "width", "num_images_per_prompt")
        ),
        ({"guidance_scale": 10**5000}, "guidance_scale is of type int; it must be a finite number"),
        ({"seed": 10**5000}, "the seed of type int is no whole number"),
        ({"guidence_scale": 3.0}, "unknown setting 'guidence_scale'; did you mean 'guidance_scale'"),
        (
            {"prompt_syntax": "weighted", "prompt": f"(red:{'9' * 60})"},
            r"the weight 1e\+60 of 'red' .* from -1000 to 1000",
        ),
    ],
    ids=shown,
)
def test_an_invalid_setting_is_named_before_any_work(pipe: Pipeline, settings: dict[str, Any], message: str) -> None:
    """Nothing of the model is called, be the images made at once or as a stream."""
    keywords = {"prompt": "a red apple", "progress": False} | settings
    calls: list[Any] = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: calls.append(module))
    try:
        for call in (pipe, pipe.stream):
            with pytest.raises(SamplingError, match=message):
                call(**keywords)
    finally:
        handle.remove()
    assert not calls


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (math.nan, "strength is nan; it must be a finite"),
        ("0.5", "strength is '0.5'"),
        (torch.tensor(1.5), "from 0 to 1"),
    ],
)
def test_strength_is_checked_as_settings_are(pipe: Pipeline, strength: Any, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        editing.image_to_image(pipe, "a red apple", Image.new("RGB", (SIZE, SIZE)), strength)


def test_settings_of_numpy_give_the_images_of_plain_ones(pipe: Pipeline) -> None:
    keywords: dict[str, Any] = {"sampler": "ddim", "progress": False}
    plain = pipe(["a", "b"], seed=[3, 4], guidance_scale=[3.0, 1.0], eta=0.5, num_inference_steps=2, **keywords)
    arrays: dict[str, Any] = {
        "seed": np.array([3, 4]),
        "guidance_scale": torch.tensor([3.0, 1.0]),
        "eta": np.float32(0.5),
    }
    other = pipe(np.array(["a", "b"]), num_inference_steps=np.int64(2), **arrays, **keywords)
    for a, b in zip(plain, other, strict=True):
        assert a.info == b.info
        assert a.tobytes() == b.tobytes()
    image, half = Image.new("RGB", (SIZE, SIZE), "teal"), np.float32(0.5)
    edited = [editing.image_to_image(pipe, "a", image, strength, seed=1, progress=False)[0] for strength in (0.5, half)]
    assert edited[0].info == edited[1].info


def test_the_arguments_of_the_pipeline_are_the_fields() -> None:
    for method in (Pipeline.__call__, Pipeline.stream):
        parameters = dict(list(inspect.signature(method).parameters.items())[1:])
        assert list(parameters) == list(FIELDS)
        assert {name: parameter.default for name, parameter in parameters.items()} == {
            name: entry.default for name, entry in FIELDS.items()
        }
        documentation = " ".join((method.__doc__ or "").split())
        for name, entry in FIELDS.items():
            assert f"{name}: {entry.metadata['help']}" in documentation


@pytest.mark.parametrize(
    "make",
    [
        lambda noise: noise.numpy(),
        lambda noise: noise.flip(-1).double().numpy()[..., ::-1],
        lambda noise: noise.numpy().astype(">f4"),
        lambda noise: noise.tolist(),
        list,
        lambda noise: noise.clone().requires_grad_(),
    ],
)
def test_latents_are_taken_from_any_array_of_numbers(make: Any) -> None:
    noise = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    taken = as_plain(SamplingSettings(latents=make(noise)))["latents"]
    assert taken == noise.tolist()


@pytest.mark.parametrize("cast", [np.float32, np.float64, torch.tensor, np.array])
def test_numbers_outside_of_the_settings_are_normalised_too(pipe: Pipeline, cast: Any) -> None:
    """Scales of guidance variants, shares of prompts, sizes of helpers and scales of LoRAs."""
    guidance = Guidance(rescale=cast(0.5), interval=(cast(0.5), cast(5)))
    assert repr(guidance) == repr(Guidance(rescale=0.5, interval=tuple(guidance.interval or ())))
    assert type(Blend("a", "b", cast(0.5)).share) is float
    assert type(Adapter("x", {}, scale=cast(0.5)).scale) is float
    assert pipe.latent_shape(np.int64(SIZE), torch.tensor(SIZE)) == pipe.latent_shape(SIZE, SIZE)


@pytest.mark.parametrize("value", ["0.5", math.nan, [1.0, 2.0], None])
def test_invalid_numbers_outside_of_the_settings_are_refused_in_a_sentence(value: Any) -> None:
    for make in (
        lambda: Guidance(rescale=value),
        lambda: Blend("a", "b", value),
        lambda: Adapter("x", {}, scale=value),
    ):
        with pytest.raises(SamplingError, match="it must be a"):
            make()


def test_a_result_that_is_not_finite_is_not_blamed_on_float32(pipe: Pipeline) -> None:
    with pytest.raises(
        SamplingError, match="not finite, though all weights and settings are: the guidance scale"
    ) as raised:
        pipe("a red apple", guidance_scale=1e38, seed=1, progress=False)
    assert "float32" not in str(raised.value)


def test_a_generator_stands_for_a_seed_that_the_record_names(pipe: Pipeline) -> None:
    given: dict[str, Any] = {"num_inference_steps": 1, "progress": False}
    generator = torch.Generator().manual_seed(3)
    fresh, used = (pipe("a red apple", generator=generator, **given)[0] for _ in range(2))
    assert fresh.tobytes() == pipe("a red apple", seed=3, **given)[0].tobytes()
    assert fresh.info["seed"] == "3"
    assert used.tobytes() != fresh.tobytes()
    assert used.tobytes() == pipe("a red apple", seed=int(used.info["seed"]), **given)[0].tobytes()
    several = pipe(["a", "b"], generator=[torch.Generator().manual_seed(seed) for seed in (5, 9)], **given)
    assert several.seeds == [5, 9]
    edited = editing.image_to_image(pipe, "a", fresh, generator=torch.Generator().manual_seed(4), **given)
    assert edited.seeds == [4]
    size = {"height": 2 * SIZE, "width": 2 * SIZE}
    assert editing.high_resolution(pipe, "a", generator=torch.Generator().manual_seed(4), **size, **given).seeds == [4]
    with pytest.raises(SamplingError, match="either a seed or a generator"):
        pipe("a", seed=3, generator=generator)
    with pytest.raises(SamplingError, match=r"generator is 3; give a torch\.Generator"):
        pipe("a", generator=3)
