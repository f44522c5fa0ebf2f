"""Recipes of stage 2 in trainings: gradient caching, locked towers, patch dropout, short captions, caption augmentation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.benchmarks.peaks import count_operations
from ldm.clip.loss import CrossEntropyConfig
from ldm.errors import CheckpointError, ConfigError
from ldm.formats import native
from ldm.formats.native import header_of
from ldm.formats.tensors import read_metadata
from ldm.training.costs import flops_per_sample, step_cost
from ldm.training.stages import build_module, train_stage
from ldm.training.tasks.task import Step
from tests.experiments import CAPTIONS, tiny_experiment, write_experiment
from tests.training.rank_training import record
from tests.training.rank_training import train as train_on_ranks

SHORT = [f"clip.train.{each}" for each in ("validate_every=2", "max_steps=2")]
ALL = [
    "clip.gradient_cache=2",
    "clip.patch_dropout=0.5",
    "clip.tokens={length: 4, choice: random}",
    "data.captions={drop_words: 0.3, templates: ['a photo of {}', '{}']}",
]


def train(folder: Path, *overrides: str) -> Path:
    folder.mkdir(exist_ok=True)
    return train_stage(tiny_experiment(folder, *SHORT, *overrides), "clip")


def assert_resumes_bitwise(tmp_path: Path, *overrides: str) -> dict[str, Tensor]:
    """Train two steps at once, and one after the other; return the tensors of the result."""
    final = train(tmp_path / "at_once", *overrides)
    train(tmp_path / "resumed", *overrides, "clip.train.max_steps=1")
    resumed = train(tmp_path / "resumed", *overrides)
    expected, found = load_file(final), load_file(resumed)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    states = [torch.load(each.with_name("last.ckpt"), weights_only=True)["state_dict"] for each in (final, resumed)]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    return expected


def write_clip(folder: Path, seed: int = 7) -> Path:
    """Write a CLIP of the tiny experiment with random weights, and a tokenizer of other captions than the experiment's."""
    task: Any = build_module(tiny_experiment(folder, f"seed={seed}"), "clip").task
    tokenizer = task.config.tokenizer.build(["one", "two"])
    path = folder / "clip.safetensors"
    native.save_state(path, native.CLIP, task.clip.state_dict(), task.config.model, tokenizer, {})
    return path


def test_all_recipes_train_together_and_resume_bitwise(tmp_path: Path) -> None:
    assert_resumes_bitwise(tmp_path, *ALL)


def gradients(task: Any) -> tuple[Tensor, ...]:
    """The loss of one batch and its gradients."""
    torch.manual_seed(0)
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"image": images, "text": CAPTIONS, "key": CAPTIONS}
    (loss,) = task.losses(batch, Step(0, 0, torch.Generator().manual_seed(0)))
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    return (loss.value.detach(), *torch.autograd.grad(loss.value, trained))


def test_gradient_caching_changes_no_gradient_of_the_task(tmp_path: Path) -> None:
    plain, cached = (
        build_module(tiny_experiment(tmp_path, f"clip.gradient_cache={chunk}"), "clip").task.train()
        for chunk in ("null", 3)
    )
    torch.testing.assert_close(gradients(cached), gradients(plain), rtol=1e-4, atol=1e-6)


def test_validation_encodes_as_many_samples_at_once_as_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task: Any = build_module(tiny_experiment(tmp_path, "clip.gradient_cache=3"), "clip").task.eval()
    counts, encode = [], task.clip.encode_image
    monkeypatch.setattr(task.clip, "encode_image", lambda image: (counts.append(len(image)), encode(image))[1])
    batch = {"image": torch.rand(8, 3, 16, 16), "text": ["a"] * 8, "key": list("abcdefgh")}
    with torch.no_grad():
        found = task.evaluate(batch, None)
    assert counts == [3, 3, 2]
    torch.testing.assert_close(found["image"], encode(batch["image"]))


def test_costs_count_what_the_recipes_save_and_compute_again(tmp_path: Path) -> None:
    def cost(*overrides: str) -> Any:
        return step_cost(tiny_experiment(tmp_path, *overrides), "clip")

    plain, cached, dropped, short = cost(), *(cost(each) for each in ("clip.gradient_cache=1", *ALL[1:3]))
    assert plain.flops < cached.flops < 1.5 * plain.flops
    large = "clip.train.batch_size=64"
    assert cost(large, "clip.gradient_cache=16").activations < 0.5 * cost(large).activations
    assert dropped.flops < plain.flops
    assert short.flops < plain.flops
    experiment = tiny_experiment(tmp_path, "clip.gradient_cache=1")
    assert flops_per_sample(experiment, "clip") == plain.flops / 4
    tasks: list[Any] = [build_module(each, "clip").task.train() for each in (experiment, tiny_experiment(tmp_path))]
    real = [count_operations(lambda task=task: gradients(task)).total for task in tasks]
    assert cached.flops / plain.flops == pytest.approx(real[0] / real[1], rel=0.02)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_frozen_tower_stays_as_it_is(tmp_path: Path, tower: str) -> None:
    source = write_clip(tmp_path)
    freeze = [f"clip.freeze={tower}", f"clip.frozen_source={source}"]
    after, before = assert_resumes_bitwise(tmp_path, *freeze), load_file(source)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    other = "text" if tower == "image" else "image"
    assert {name.split(".")[0] for name in changed} == {other, "logit_scale"}
    module = build_module(tiny_experiment(tmp_path, *freeze), "clip")
    assert {name.split(".")[2] for name, each in module.named_parameters() if each.requires_grad} == {
        other,
        "logit_scale",
    }
    path = tmp_path / "at_once" / "run" / "clip" / "final.safetensors"
    tokenizers = [
        header_of(read_metadata(each), each, native.CONFIG_BY_FORMAT[native.CLIP]).tokenizer for each in (source, path)
    ]
    assert tokenizers[0] is not None
    assert tokenizers[1] is not None
    assert (tokenizers[0].to_json() == tokenizers[1].to_json()) == (tower == "text")
    plain = step_cost(tiny_experiment(tmp_path), "clip")
    assert step_cost(tiny_experiment(tmp_path, *freeze), "clip").flops < plain.flops


def test_without_a_source_of_its_own_the_frozen_tower_is_that_of_init(tmp_path: Path) -> None:
    source = write_clip(tmp_path)
    final = train(tmp_path, "clip.freeze=image", f"clip.train.init={source}", "clip.train.max_steps=1")
    before, after = load_file(source), load_file(final)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("image."))
    assert (before["text.projection.weight"] - after["text.projection.weight"]).abs().max() < 0.01


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["clip.gradient_cache=0"], "gradient_cache must be at least 1 or null, not 0"),
        (["clip.patch_dropout=1"], r"patch_dropout must be in \[0, 1\), not 1"),
        (["clip.freeze=image"], "freeze is image, but neither frozen_source nor train.init names that tower"),
        (["clip.frozen_source=a"], "frozen_source is a, but freeze is null"),
        (
            ["clip.freeze=image", "clip.frozen_source=a", "clip.patch_dropout=0.5"],
            "patch_dropout changes the image tower, but freeze is image",
        ),
        (["clip.tokens.length=2"], "clip.tokens: length 2 leaves no room for text"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_experiment(tmp_path, *overrides)


def test_a_loss_that_reads_features_is_not_cached(tmp_path: Path) -> None:
    class Reading(CrossEntropyConfig):
        features = ("image",)

    stage = tiny_experiment(tmp_path, "clip.gradient_cache=2").clip
    assert stage is not None
    with pytest.raises(ConfigError, match="reads features of a complete batch, which gradient_cache divides"):
        replace(stage, loss=Reading())


def test_a_source_without_the_frozen_tower_is_refused(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, "clip.freeze=image", "clip.frozen_source=emoji")
    with pytest.raises(CheckpointError, match="holds no image_encoder"):
        build_module(experiment, "clip")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_with_gradient_caching_train_as_one_without(tmp_path: Path, strategy: str) -> None:
    config = write_experiment(tmp_path)
    common = ["clip.train.max_steps=4", "clip.train.validate_every=4", "clip.train.learning_rate=1e-4", *ALL[2:]]
    one = train_on_ranks(config, ["clip"], [*common, "clip.train.batch_size=6", f"run_dir={tmp_path / 'one'}"])
    both = [f"trainer.strategy={strategy}", "clip.train.batch_size=3", "clip.gradient_cache=2"]
    two = train_on_ranks(config, ["clip"], [*common, *both, f"run_dir={tmp_path / 'two'}"], 2)
    for row, wanted in zip(record(two, "clip")["rows"], record(one, "clip")["rows"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-6)
