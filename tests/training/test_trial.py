"""Settings are tried before the first step, and images made during a training never cost it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm.data.shards import Sample, Shards, write_shard
from ldm.errors import ConfigError, LdmError, TrainingError
from ldm.training.engine import StageModule
from ldm.training.experiment import load_config
from ldm.training.stages import build_module, train_stage
from ldm.training.tasks.vae import VAETask
from ldm.vae.discriminator import PatchDiscriminator, largest_number_of_layers
from tests.data.pictures import encoded, noise_picture
from tests.experiments import EXPERIMENT, tiny_experiment, write_experiment

PIXELS: dict[str, Any] = {"vae": {"model": {"kind": "identity"}}, "clip": None}
MODEL = EXPERIMENT["denoiser"]["model"] | {"in_channels": 3, "out_channels": 3, "context_width": None}
LABELS = {
    "denoiser": EXPERIMENT["denoiser"]
    | {
        "model": MODEL | {"vector_width": 8},
        "conditioner": {"kind": "class", "classes": 3, "width": 8},
        "prompts": [],
        "classes": [0, 2],
    }
}


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches that a training began."""
    begun: list[int] = []
    start = StageModule.on_train_batch_start

    def started(module: StageModule, batch: Any, index: int) -> None:
        begun.append(index)
        start(module, batch, index)

    monkeypatch.setattr(StageModule, "on_train_batch_start", started)
    return begun


def test_all_stages_train_in_mixed_precision_with_cached_latents(tmp_path: Path) -> None:
    steps = [f"{stage}.train.max_steps=1" for stage in ("vae", "clip", "denoiser")]
    experiment = tiny_experiment(tmp_path, *steps, "data.cache_latents=true", "trainer.precision=bf16")
    for stage in experiment.stages:
        assert train_stage(experiment, stage).is_file()


@pytest.mark.parametrize("size", range(1, 40))
def test_the_largest_number_of_layers_of_a_discriminator_is_that_which_torch_can_compute(size: int) -> None:
    most = largest_number_of_layers(size)
    for layers in {most, most + 1} - {0}:
        network = PatchDiscriminator(3, 2, layers).eval()
        if layers <= most:
            assert network(torch.zeros(1, 3, size, size)).numel() > 0
        else:
            with pytest.raises(RuntimeError):
                network(torch.zeros(1, 3, size, size))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "vae.loss.disc_layers=3",
            "vae.loss: disc_layers is 3, which is too many for images of 16 x 16 pixels; set it to 2",
        ),
        ("denoiser.sampling.num_inference_steps=5000", "denoiser.sampling: "),
        ("denoiser.sampling.num_inference_steps=0", "denoiser.sampling: num_inference_steps is 0"),
        ("denoiser.sampling.guidance_scale=.nan", "denoiser.sampling.guidance_scale: expected a number, found nan"),
        ("denoiser.sampling.shift=2", "denoiser.sampling: the shift 2.0 needs a flow schedule"),
        ("denoiser.sampling.offset=2000", "denoiser.sampling: "),
    ],
)
def test_settings_that_cannot_be_used_are_refused_when_the_config_is_read(
    tmp_path: Path, override: str, message: str
) -> None:
    extra = ["denoiser.sampling.spacing=leading"] if "offset" in override else []
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        tiny_experiment(tmp_path, override, *extra)
    assert "\n" not in str(raised.value)


def test_a_discriminator_that_is_not_trained_may_be_too_large(tmp_path: Path) -> None:
    tiny_experiment(tmp_path, "vae.loss.disc_layers=3", "vae.loss.adversarial=0")
    tiny_experiment(tmp_path, "vae.loss.disc_layers=3", "vae.train=null", "vae.checkpoint=any")


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("losses", "its losses cannot be computed"),
        ("evaluate", "its validation cannot be computed"),
        ("metrics", "its validation cannot be computed"),
        ("previews", "its previews cannot be made"),
    ],
)
@pytest.mark.parametrize("error", [RuntimeError("a late fault"), ConfigError("a late fault.")])
def test_what_a_training_computes_later_is_tried_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began: list[int], method: str, problem: str, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(VAETask, method, fail)
    with pytest.raises(LdmError, match=f"stage vae cannot be trained, since {problem}.*a late fault"):
        train_stage(tiny_experiment(tmp_path), "vae")
    assert not began
    assert not (tmp_path / "run" / "config.yaml").exists()


def relabelled(folder: Path, labels: list[int]) -> Path:
    shard = write_experiment(folder, PIXELS | LABELS).parent / "train.tar"
    shards = Shards([shard])
    samples = [
        Sample(key, shards.text(i), shards.image(i), "png", {"label": labels[i]}) for i, key in enumerate(shards.keys)
    ]
    write_shard(shard, samples)
    return folder


def labelled_experiment(folder: Path, *overrides: str) -> Any:
    from ldm.training.experiment import load_config

    return load_config(write_experiment(folder, PIXELS | LABELS), ["denoiser.train.max_steps=2", *overrides])


def test_a_label_that_is_no_class_is_found_before_the_first_step(tmp_path: Path, began: list[int]) -> None:
    """Wherever it is in the training or the validation set."""
    relabelled(tmp_path, [0, 1, 2, 0, 1, 2, 0, 1])
    good = (tmp_path / "train.tar").rename(tmp_path / "good.tar")
    relabelled(tmp_path, [0, 1, 2, 0, 1, 2, 0, 3])
    for override in (f"data.val={good}", f"data.train={good}"):
        with pytest.raises(LdmError, match=r"its annotations do not fit: label 3 is not one of the 3 classes, 0 to 2"):
            train_stage(labelled_experiment(tmp_path, override), "denoiser")
    assert not began


@pytest.mark.parametrize(
    ("name", "member", "problem"),
    [
        (
            "semantic",
            encoded(Image.new("L", (16, 16), 7)),
            "has a semantic map with the value 7, but the classes are 0",
        ),
        ("boxes", b"[[7, 0, 0, 1, 1]]", "has a box of class 7, but the classes are 0"),
    ],
    ids=["semantic", "boxes"],
)
def test_a_condition_that_the_model_does_not_support_is_named_with_its_sample(
    tmp_path: Path, began: list[int], name: str, member: bytes, problem: str
) -> None:
    """At the batch that has it: to check all before would take as long as to decode the set."""
    good = {"semantic": encoded(Image.new("L", (16, 16), 2)), "boxes": b"[[2, 0, 0, 1, 1]]"}[name]
    samples = [Sample(f"{i}", "", encoded(noise_picture(i, 16, 16)), "png", {name: good}) for i in range(30)]
    write_shard(
        tmp_path / "train.tar", [*samples[:20], replace(samples[20], annotations={name: member}), *samples[21:]]
    )
    model = MODEL | ({"context_width": 8} if name == "boxes" else {"in_channels": 6})
    model |= {"vector_width": None}
    conditioner = {"kind": name, "classes": 3} | ({"width": 8} if name == "boxes" else {})
    stage = EXPERIMENT["denoiser"] | {"model": model, "conditioner": conditioner, "prompts": []}
    write_experiment(tmp_path, PIXELS | {"denoiser": stage})
    experiment = load_config(tmp_path / "tiny.yaml", ["data.val=null", "denoiser.train.max_steps=8"])
    with pytest.raises(
        TrainingError, match=f"the sample '20' {problem} to 2; correct the data or denoiser.conditioner"
    ):
        train_stage(experiment, "denoiser")
    assert began, "found before the training"


def test_preview_classes_that_the_model_or_the_data_lack_are_named(tmp_path: Path, began: list[int]) -> None:
    relabelled(tmp_path, [0, 1, 0, 1, 0, 1, 0, 1])
    with pytest.warns(UserWarning, match=r"denoiser\.classes contains 7, of which there is no image"):  # noqa: SIM117
        with pytest.raises(LdmError, match=r"its previews cannot be made: label 7 is not one of the 3 classes"):
            train_stage(labelled_experiment(tmp_path, "denoiser.classes=[7]"), "denoiser")
    assert not began
    with pytest.warns(UserWarning, match=r"denoiser\.classes contains 2, of which there is no image"):
        train_stage(labelled_experiment(tmp_path), "denoiser")


BERT = [
    *("denoiser.conditioner.kind=transformer", "denoiser.conditioner.width=16", "denoiser.conditioner.layers=1"),
    *(
        "denoiser.conditioner.heads=2",
        "denoiser.conditioner.tokenizer={kind: byte_bpe, vocab_size: 300, context_length: 12}",
    ),
    *("denoiser.model.vector_width=null", "clip=null"),
]


@pytest.mark.parametrize("conditioner", [["clip.train.max_steps=1"], BERT])
def test_a_prompt_longer_than_the_context_is_named_before_the_first_step(
    tmp_path: Path, conditioner: list[str]
) -> None:
    pixels = ["vae.model.kind=identity", "denoiser.model.in_channels=3", "denoiser.model.out_channels=3"]
    prompt = "a red apple beside a green apple and a blue car under a blue sky"
    overrides = [*pixels, *conditioner, f"denoiser.prompts=[red apple, {prompt}]", "denoiser.train.max_steps=1"]
    experiment = tiny_experiment(tmp_path, *overrides)
    if experiment.clip is not None:
        train_stage(experiment, "clip")
    with pytest.warns(UserWarning, match=rf"the prompt '{prompt}' .* more tokens than the context") as caught:
        train_stage(experiment, "denoiser")
    assert not any("'red apple'" in str(each.message) for each in caught)


@pytest.mark.parametrize("stage", ["vae", "clip"])
@pytest.mark.parametrize("error", [RuntimeError("no memory\nat all"), OSError("no space")])
def test_images_that_cannot_be_made_are_a_warning_and_the_checkpoint_is_written_nevertheless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: Exception
) -> None:
    last, seen = tmp_path / "run" / stage / "last.ckpt", []

    def fail(module: StageModule, splits: Any) -> Any:
        seen.append(torch.load(last, weights_only=True)["completed_steps"] if last.is_file() else 0)
        raise error

    monkeypatch.setattr(StageModule, "previews", fail)
    changes = [f"{stage}.train.{each}" for each in ("max_steps=2", "images_every=1", "checkpoint_every=1")]
    with pytest.warns(UserWarning, match=rf"the images of stage {stage} at step 1 could not be made \(\w+: no \w+\)"):
        assert train_stage(tiny_experiment(tmp_path, *changes), stage).is_file()
    assert seen == [0, 1]
    assert torch.load(last, weights_only=True)["completed_steps"] == 2


@pytest.mark.parametrize("kind", ["autoencoder", "vq"])
def test_a_trial_leaves_the_networks_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Statistics of batch norms and codebooks, which a forward pass in training changes."""
    vq = ["vae.model={kind: vq, widths: [8, 16], blocks: 1, latent_channels: 4, groups: 4, codes: 8}"]
    experiment = tiny_experiment(tmp_path, "vae.train.max_steps=1", *(vq if kind == "vq" else []))
    expected = {name: tensor.clone() for name, tensor in build_module(experiment, "vae").state_dict().items()}
    attempt = StageModule.try_settings

    def tried(module: StageModule) -> None:
        attempt(module)
        state = module.state_dict()
        assert [name for name in expected if not torch.equal(state[name], expected[name])] == []

    monkeypatch.setattr(StageModule, "try_settings", tried)
    train_stage(experiment, "vae")
