"""Trainings with `denoiser.token_routing`: what they train, write, count and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ldm
from ldm.benchmarks.peaks import count_operations
from ldm.denoiser import spatial_transformer
from ldm.diffusion.alignment import RepresentationAlignment
from ldm.errors import ConfigError
from ldm.nn.token_routing import route_tokens
from ldm.training.costs import step_cost
from ldm.training.engine import StageModule
from ldm.training.stages import train_stage
from tests.experiments import tiny_experiment, write_clip
from tests.training.test_recipes import PIXELS, trained

PLAIN = ["denoiser.train.checkpoint_every=1", "denoiser.train.validate_every=1"]
RECIPE = ["denoiser.token_routing=0.5", *PLAIN]


def test_it_resumes_bitwise_takes_over_another_share_and_leaves_no_trace_in_the_model(tmp_path: Path) -> None:
    at_once, resumed = trained(tmp_path / "at_once", RECIPE, 2), trained(tmp_path / "resumed", RECIPE, 1, 2)
    assert [name for name in at_once if not torch.equal(resumed[name], at_once[name])] == []
    plain = trained(tmp_path / "plain", PLAIN, 2)
    assert at_once.keys() == plain.keys()
    assert any(not torch.equal(at_once[name], plain[name]) for name in plain)
    files = [tmp_path / folder / "run/model.safetensors" for folder in ("at_once", "plain")]
    assert ldm.load(files[0]).config == ldm.load(files[1]).config
    assert b"token_routing" not in files[0].read_bytes()

    now = tiny_experiment(tmp_path / "resumed", *PIXELS, *PLAIN, "denoiser.train.max_steps=3")
    assert now.denoiser.token_routing == 0
    train_stage(now, "denoiser")


def test_training_alone_routes_and_its_operations_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    routed: list[Any] = []
    in_step: dict[str, tuple[int, int]] = {}  # transformers that routed, and operations
    steps = {name: getattr(StageModule, name) for name in ("training_step", "validation_step")}

    def counted(name: str, *args: Any) -> None:
        before = len(routed)
        operations = count_operations(lambda: steps[name](*args)).total
        in_step[name] = len(routed) - before, operations

    def route(*args: Any) -> torch.Tensor:
        routed.append(args)
        return route_tokens(*args)

    with monkeypatch.context() as context:
        context.setattr(StageModule, "training_step", lambda *args: counted("training_step", *args))
        context.setattr(StageModule, "validation_step", lambda *args: counted("validation_step", *args))
        context.setattr(spatial_transformer, "route_tokens", route)
        trained(tmp_path / "run", RECIPE, 1)
    transformers = 3  # of the level with attention, one on the way down and two on the way up
    assert {name: count for name, (count, _) in in_step.items()} == {
        "training_step": transformers,
        "validation_step": 0,
    }
    routes, dense = (tiny_experiment(tmp_path, *PIXELS, *recipe) for recipe in (RECIPE, PLAIN))
    assert step_cost(routes, "denoiser").flops == in_step["training_step"][1] < step_cost(dense, "denoiser").flops


def test_hidden_states_that_a_loss_aligns_have_all_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    aligned = RepresentationAlignment.forward

    def watched(self: RepresentationAlignment, *args: Any, **options: Any) -> Any:
        seen.append({name: each.shape[2:] for name, each in options["features"].items()})
        return aligned(self, *args, **options)

    monkeypatch.setattr(RepresentationAlignment, "forward", watched)
    repa = f"denoiser.loss={{kind: repa, hidden_width: 16, feature: down.2, checkpoint: {write_clip(tmp_path)}}}"
    trained(tmp_path / "run", [*RECIPE, repa], 1)
    assert {tuple(each["down.2"]) for each in seen if each} == {(8, 8)}, seen


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["denoiser.token_routing=1"], r"token_routing must be in \[0, 1\), not 1\.0"),
        (["denoiser.token_routing=[0, -0.5]"], r"token_routing must be in \[0, 1\), not -0\.5"),
        (["denoiser.token_routing=[0.5, 0.5]"], r"token_routing\[0\] is 0\.5, but the level has no transformer blocks"),
        (["denoiser.token_routing=half"], "token_routing: expected"),
        (
            ["denoiser.model={kind: mlp, in_channels: 3, out_channels: 3}", "denoiser.token_routing=0.5"],
            "token_routing needs a network with transformer blocks",
        ),
    ],
)
def test_shares_that_do_not_fit_are_refused_when_the_config_is_read(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    pixels = [each for each in PIXELS if "mlp" not in str(overrides) or not each.startswith("denoiser.model")]
    with pytest.raises(ConfigError, match=rf"denoiser[:.] ?{message}"):
        tiny_experiment(tmp_path, *pixels, *overrides)
