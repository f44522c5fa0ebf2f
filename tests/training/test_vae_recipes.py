"""Recipes of stage 1 in trainings: additional terms of the loss, and a decoder that is trained for a frozen encoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch._functorch import config as functorch

from ldm.benchmarks.peaks import count_operations
from ldm.errors import CheckpointError, ConfigError
from ldm.nn.ranks import randn_rows
from ldm.training.costs import step_cost
from ldm.training.engine import StageModule
from ldm.training.stages import build_module, train_stage
from ldm.training.tasks.task import Step
from tests.experiments import tiny_experiment, write_clip, write_experiment
from tests.training.rank_training import record
from tests.training.rank_training import train as train_on_ranks

SHORT = [f"vae.train.{each}" for each in ("validate_every=2", "max_steps=2")]


def train(folder: Path, *overrides: str) -> Path:
    folder.mkdir(exist_ok=True)
    return train_stage(tiny_experiment(folder, *SHORT, *overrides), "vae")


def assert_resumes_bitwise(tmp_path: Path, *overrides: str) -> dict[str, Tensor]:
    """Train two steps at once, and one after the other; return the state of the first's checkpoint."""
    finals = [train(tmp_path / "at_once", *overrides)]
    train(tmp_path / "resumed", *overrides, "vae.train.max_steps=1")
    finals.append(train(tmp_path / "resumed", *overrides))
    expected, found = (load_file(final) for final in finals)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    states: list[dict[str, Tensor]] = [
        torch.load(final.with_name("last.ckpt"), weights_only=True)["state_dict"] for final in finals
    ]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    return states[0]


def test_all_terms_train_together_are_counted_and_resume_bitwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = [
        f"{{kind: perceptual, checkpoint: {write_clip(tmp_path)}, weight: 0.1}}",
        "{kind: ms_ssim, scales: 1}",
        "{kind: wavelet, levels: 2}",
        "{kind: equivariance, min_scale: 1, probability: 1}",
        "{kind: r1, weight: 0.5}",
        "{kind: lecam, weight: 0.1}",
    ]
    overrides = ["vae.loss.disc_start=0", f"vae.loss.terms=[{', '.join(terms)}]"]
    operations, plain = [], StageModule.training_step

    def counted(module: StageModule, batch: Mapping[str, Any], index: int) -> None:
        operations.append(count_operations(lambda: plain(module, batch, index)).total)

    with monkeypatch.context() as context:
        context.setattr(StageModule, "training_step", counted)
        state = assert_resumes_bitwise(tmp_path, *overrides)
    assert state["terms.lecam.updates"] == 2
    assert state["terms.lecam.mean_real"] != 0
    header = (tmp_path / "at_once" / "run" / "vae" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {f"train/{name}" for name in ("perceptual", "ms_ssim", "wavelet", "r1", "lecam")} <= {*header}

    experiment = tiny_experiment(tmp_path, *SHORT, *overrides)
    cost = step_cost(experiment, "vae")
    assert cost.flops == operations[-1]
    without = step_cost(tiny_experiment(tmp_path, *SHORT, "vae.loss.disc_start=0"), "vae")
    assert cost.flops > without.flops
    task = build_module(experiment, "vae").task
    tower = sum(tensor.nbytes for tensor in task.image_towers["vae.loss.terms.perceptual"].state_dict().values())
    assert not any(name.startswith("terms.perceptual.") for name in state)
    assert cost.weights == without.weights + tower + 2 * 4 + 8
    assert cost.trained == without.trained


def test_the_losses_are_the_weighted_sums_of_their_terms(tmp_path: Path) -> None:
    """Computed again from the formulas, divided by the number of values of an image; ``equivariance`` scales the batch."""
    terms = "{kind: wavelet, levels: 1, weight: 0.3}, {kind: r1, weight: 5}, {kind: lecam, weight: 0.7}"
    terms = f"[{terms}, {{kind: equivariance, min_scale: 0.5, probability: 1}}]"
    loss = (
        f"{{l1: 0.25, l2: 2, kl: 0.01, adversarial: 0.5, disc_start: 0, disc_width: 8, disc_layers: 1, terms: {terms}}}"
    )
    task: Any = build_module(tiny_experiment(tmp_path, f"vae.loss={loss}"), "vae").task.train()
    stage, discriminator = task.first_stage, copy.deepcopy(task.discriminator)
    image = torch.rand(4, 3, 16, 16) * 2 - 1
    batch = {"image": image, "key": list("abcd")}
    found = [each.value.item() for each in task.losses(batch, Step(0, 0, torch.Generator().manual_seed(3)))]

    generator = torch.Generator().manual_seed(3)
    posterior = stage.encode(image)
    latent = posterior.mode + posterior.variance.sqrt() * randn_rows(posterior.mode.shape, generator)
    target, latent = task.terms["equivariance"].transform(image, latent, generator)
    assert target.shape[2] < 16
    made = stage.decode(latent)
    difference = (target - made).flatten(1)
    reconstruction = (0.25 * difference.abs() + 2 * difference.square()).sum(1).mean()
    reconstruction = reconstruction + 0.3 * task.terms["wavelet"].distance(target, made).mean() * difference.shape[1]
    reconstruction = reconstruction * (image[0].numel() / difference.shape[1])
    mean, variance = posterior.mode.flatten(1), posterior.variance.flatten(1)
    kl = 0.5 * (mean.square() + variance - 1 - variance.log()).sum(1).mean()
    generated = -discriminator(made).mean()
    norms = [
        torch.autograd.grad(each, stage.last_layer, retain_graph=True)[0].norm() for each in (reconstruction, generated)
    ]
    weight = 0.5 * norms[0] / (norms[1] + 1e-4)
    first = (reconstruction + 0.01 * kl + weight * generated) / image[0].numel()
    assert found[0] == pytest.approx(first.item(), rel=1e-4)

    target = target.detach().requires_grad_()
    fake, real = discriminator(made.detach()), discriminator(target)
    hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    gradient = torch.autograd.grad(real.flatten(1).mean(1).sum(), target)[0]
    r1 = 0.5 * gradient.square().flatten(1).sum(1).mean()
    lecam = (real - fake.mean()).square().mean() + (fake - real.mean()).square().mean()
    assert found[1] == pytest.approx((hinge + 5 * r1 + 0.7 * lecam).item(), rel=1e-4)


@pytest.mark.slow
def test_compiled_networks_are_trained_on_images_of_several_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adaptive weight differentiates the decoder twice before the step does, also in a graph for all sizes."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled(network, backend="aot_eager"))
    monkeypatch.setattr(functorch, "donated_buffer", True)
    task = build_module(tiny_experiment(tmp_path, "vae.loss.disc_start=0"), "vae").task.train()
    task.compile_networks()
    for size in (16, 24):
        batch = {"image": torch.rand(2, 3, size, size) * 2 - 1, "key": ["a", "b"]}
        for loss in task.losses(batch, Step(0, 0, torch.Generator())):
            loss.value.backward()
    decoder = task.first_stage.decoder.conv_out.weight.grad  # type: ignore[union-attr]
    assert decoder is not None
    assert decoder.any()


def test_a_loss_without_terms_has_the_weights_of_earlier_checkpoints(tmp_path: Path) -> None:
    module = build_module(tiny_experiment(tmp_path), "vae")
    assert {name.split(".")[0] for name in module.state_dict()} == {"first_stage", "discriminator"}


def test_scaled_batches_train_the_encoder(tmp_path: Path) -> None:
    terms = "vae.loss.terms=[{kind: equivariance, min_scale: 0.5, probability: 1}]"
    final = load_file(train(tmp_path, terms, "vae.loss.adversarial=0"))
    plain = load_file(train(tmp_path / "plain", "vae.loss.adversarial=0"))
    assert not torch.equal(final["encoder.conv_in.weight"], plain["encoder.conv_in.weight"])


def test_the_decoder_is_trained_for_a_frozen_encoder(tmp_path: Path) -> None:
    """Its latents and their statistics stay as they are, bit by bit, in the weights in training and in their average."""
    source = train(tmp_path / "source", "vae.loss.adversarial=0")
    before = load_file(source)
    state = assert_resumes_bitwise(tmp_path, f"vae.train.init={source}", "vae.freeze=encoder", "vae.loss.disc_start=0")
    after = load_file(tmp_path / "at_once" / "run" / "vae" / "final.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"decoder", "post_quant_conv"}
    assert changed >= {name for name in before if name.startswith("decoder.") and name.endswith("weight")}
    assert before["latent_std"].min() > 0
    assert not torch.equal(before["latent_std"], torch.ones(4))
    assert all(torch.equal(state[f"first_stage.{name}"], before[name]) for name in before.keys() - changed)


def test_a_codebook_of_a_frozen_encoder_stays_as_it_is(tmp_path: Path) -> None:
    vq = ["vae.model={kind: vq, widths: [8, 16], blocks: 1, latent_channels: 4, groups: 4, codes: 8}"]
    source = train(tmp_path / "source", *vq, "vae.loss.adversarial=0")
    frozen = [*vq, f"vae.train.init={source}", "vae.freeze=encoder", "vae.loss.adversarial=0", "vae.train.max_steps=1"]
    before, after = load_file(source), load_file(train(tmp_path, *frozen))
    names = [name for name in before if name.startswith(("codebook.", "encoder.", "quant_conv."))]
    assert len(names) > 4
    assert all(torch.equal(before[name], after[name]) for name in names)
    assert not torch.equal(before["decoder.conv_out.weight"], after["decoder.conv_out.weight"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["vae.freeze=encoder"], "train.init does not name the first stage whose decoder is trained"),
        (
            ["vae.freeze=encoder", "vae.train.init=a", "vae.loss.terms=[equivariance]"],
            "equivariance, which trains the encoder, but freeze is encoder",
        ),
        (["vae.loss.terms=[ms_ssim]"], "vae.loss: terms: ms_ssim with 5 scales needs images of at least 176 pixels"),
        (["vae.freeze=decoder"], "freeze"),
        (["vae.train.ema_snapshots.every=2"], "vae.train.ema_snapshots cannot be used"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_experiment(tmp_path, *overrides)


def test_a_source_without_an_image_tower_is_refused(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, "vae.loss.terms=[{kind: perceptual, checkpoint: emoji}]")
    with pytest.raises(CheckpointError, match=r"vae\.loss\.terms: .* holds no image_encoder"):
        build_module(experiment, "vae")


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "freeze"), [("ddp", False), ("fsdp2", False), ("fsdp2", True)])
def test_two_ranks_train_as_one(tmp_path: Path, strategy: str, freeze: bool) -> None:
    """With all terms; the mean of the logits is near 0, so that its relative error is larger.

    The learning rate is small, since Adam moves a weight by it whatever the size of its gradient, also of one that rounds to
    another sign.
    """
    config, source = write_experiment(tmp_path), train(tmp_path / "source", "vae.loss.adversarial=0")
    terms = (
        f"{{kind: perceptual, checkpoint: {write_clip(tmp_path)}}}, {{kind: ms_ssim, scales: 1}}, wavelet, r1, lecam"
    )
    terms += "" if freeze else ", {kind: equivariance, min_scale: 0.7, probability: 0.7}"
    common = [
        "vae.train.max_steps=6",
        "vae.train.validate_every=3",
        "vae.train.learning_rate=2e-5",
        "vae.loss.disc_start=0",
    ]
    common.append(f"vae.loss.terms=[{terms if freeze else terms.replace('{kind: ms_ssim, scales: 1}, ', '')}]")
    common += ["vae.freeze=encoder", f"vae.train.init={source}"] if freeze else []
    one = train_on_ranks(config, ["vae"], [*common, "vae.train.batch_size=4", f"run_dir={tmp_path / 'one'}"])
    overrides = [f"trainer.strategy={strategy}", "vae.train.batch_size=2", f"run_dir={tmp_path / 'two'}"]
    two = train_on_ranks(config, ["vae"], [*common, *overrides], 2)
    for row, wanted in zip(record(two, "vae")["rows"], record(one, "vae")["rows"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=2e-5), row["step"]
