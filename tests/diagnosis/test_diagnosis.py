"""The parts of a diagnosis that need no run which has learned anything."""

from __future__ import annotations

import hashlib
import html
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ldm.cli.diagnose import app
from ldm.diagnosis import runner
from ldm.diagnosis.association import caption_dependence
from ldm.diagnosis.check import Check, Clock, Finding, Item, Measured, Topic, checks_in_order
from ldm.diagnosis.checks.loss_history import loss_history
from ldm.diagnosis.features import distance, reference
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.pool import Pool, make_pool
from ldm.diagnosis.runner import diagnose
from ldm.diagnosis.short_training import falls, restarted, trained_names
from ldm.diagnosis.statistics import paired, unpaired
from ldm.errors import CheckpointError, DataError
from ldm.training.metrics import MetricsFile
from ldm.training.stages import train_stage
from tests.diagnosis.runs import rectangles
from tests.experiments import tiny_experiment


def content(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of change and hash of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps per stage."""
    folder = tmp_path_factory.mktemp("diagnosed")
    for stage in ("vae", "clip", "denoiser"):
        train_stage(tiny_experiment(folder), stage)
    return folder / "run"


# Statistics


def test_the_same_distribution_is_not_told_apart() -> None:
    """Of 2,000 comparisons of equal distributions none reaches four standard errors, as of 30,000 one would."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, 2, 64, generator=generator)
    assert not any(paired(first, second).is_greater or unpaired(first, second).is_greater for first, second in values)


def test_pairs_reveal_a_difference_that_the_spread_hides() -> None:
    generator = torch.Generator().manual_seed(0)
    common = 10 * torch.randn(64, generator=generator)
    first = common + 0.1 + 0.05 * torch.randn(64, generator=generator)
    assert paired(first, common).is_greater
    assert not unpaired(first, common).is_greater


def test_captions_depend_on_images_only_in_the_right_order() -> None:
    pictures = rectangles("train", 200)
    image = torch.from_numpy(pictures.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist()
    assert caption_dependence({"image": image, "text": pictures.captions}) > 10
    assert abs(caption_dependence({"image": image, "text": [pictures.captions[i] for i in order]})) < 4
    assert caption_dependence({"image": image, "text": ["a photo"] * 200}) == 0


def test_noise_fog_and_saturation_are_far_from_real_images() -> None:
    image = torch.from_numpy(rectangles("train", 128).images).permute(0, 3, 1, 2).float() / 127.5 - 1
    real = reference(image)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    assert distance(image, real).mean() == pytest.approx(1, rel=0.02)
    for wrong in (noise, image.mean((2, 3), keepdim=True).expand_as(image), image + 0.5):
        assert distance(wrong, real).mean() > 4


def test_a_loss_that_only_fluctuates_does_not_fall() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = 1 + 0.1 * torch.rand(30, 16, generator=generator)
    assert abs(falls(losses)) < 4
    assert falls(losses * torch.linspace(1, 0.8, 30)[:, None]) > 4
    assert falls(torch.full((30, 16), torch.nan)) == float("-inf")


# Runs


def test_a_diagnosis_changes_nothing_and_leaves_a_page(run: Path, tmp_path: Path) -> None:
    before = content(run)
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, [str(run), "--out", str(page), "--seconds", "20"])
    assert result.exit_code == 0, result.output
    assert content(run) == before
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert 'src="http' not in text
    verdict = re.search(r'<p class="verdict[^>]*>(.*?)</p>', text)
    assert verdict is not None
    assert html.unescape(verdict[1]) in result.output


def test_a_run_folder_may_be_moved(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.symlink_to(run)
    opened = OpenedRun(moved)
    assert opened.experiment.folder == moved
    assert list(opened.stages) == ["vae", "clip", "denoiser"]


@pytest.mark.parametrize("earlier", [False, True])
def test_the_history_is_read_from_metrics_of_this_and_of_earlier_versions(
    run: Path, tmp_path: Path, earlier: bool
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/denoiser/metrics.csv").unlink()
    file = MetricsFile(tmp_path / "run/denoiser/metrics.csv", 0)
    norms = {} if earlier else {"train/gradient_norm": 0.5, "train/gradient_norm_max": 2.0}
    speed = "train/images_per_second" if earlier else "system/samples_per_second"
    for step in range(1, 41):
        file.write(step, {"train/loss": 1 / step, **norms, "train/learning_rate": 1e-3, speed: 7.0})
    [item] = loss_history(OpenedRun(tmp_path / "run"), Clock(60))
    assert isinstance(item, Measured)
    assert "train/loss of stage denoiser from 0.521 to 0.026" in item.text
    assert ("gradient norm 0.5, at most 2, clipped at 1" in item.text) is not earlier


def test_a_folder_without_weights_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(CheckpointError, match=r"holds neither a last\.ckpt nor a result of a stage"):
        OpenedRun(tmp_path)


def test_a_new_network_shares_only_what_is_not_trained(run: Path) -> None:
    opened = OpenedRun(run, ["denoiser.conditioner.trainable=true"])
    new, own = restarted(opened), opened.averaged.state_dict()
    kept = [name for name, tensor in new.state_dict().items() if torch.equal(tensor, own[name])]
    assert {name for name in own if name.startswith(("first_stage.", "conditioner."))} <= set(kept)
    assert any(name.startswith("denoiser.") and name not in kept for name in own)
    assert not any(name.startswith("first_stage.") for name in trained_names(new))


def test_mismatched_conditions_are_those_of_other_samples(run: Path) -> None:
    opened = OpenedRun(run)
    pool = make_pool(opened.averaged, opened.images("train"), opened.device)
    other, changed = pool.mismatched()
    assert sorted(other.conditions["text"]) == sorted(pool.conditions["text"])
    assert all(other.conditions["text"][i] != pool.conditions["text"][i] for i in changed)
    same = Pool(pool.latents, pool.noise, {"text": ["a"] * len(pool)})
    assert len(same.mismatched()[1]) == 0


# The order of the checks


def found(cause: str, certain: bool = True) -> Finding:
    return Finding(cause, "it is wrong", "a number", "a.key", "change it", certain)


def checks_of(*items: tuple[Topic, Finding | Exception | str]) -> list[Check]:
    def make(topic: Topic, item: Finding | Exception | str) -> Check:
        def generate(run: OpenedRun, clock: Clock) -> Iterator[Item]:
            if isinstance(item, Exception):
                raise item
            yield Measured(item) if isinstance(item, str) else item

        return Check(topic, str(item), 1.0, generate, ())

    return [make(topic, item) for topic, item in items]


def test_the_first_certain_cause_is_the_verdict(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = checks_of(
        (Topic.DATA, found("few", certain=False)),
        (Topic.LATENTS, found("scale")),
        (Topic.LATENTS, "also measured"),
        (Topic.SAMPLING, found("guidance")),
    )
    monkeypatch.setattr(runner, "checks_in_order", lambda: checks)
    result = diagnose(OpenedRun(run))
    assert result.cause == found("scale")
    assert result.verdict == "It is wrong: a number; change it (a.key)."
    assert result.notes == [found("few", certain=False)]
    assert [bool(outcome.skipped) for outcome in result.outcomes] == [False, False, False, True]
    assert diagnose(OpenedRun(run), everything=True).notes[-1] == found("guidance")


def test_a_check_that_fails_is_reported_and_the_others_go_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = checks_of((Topic.DATA, DataError("the shard is gone.")), (Topic.EMA, found("ema_lags")))
    monkeypatch.setattr(runner, "checks_in_order", lambda: checks)
    result = diagnose(OpenedRun(run))
    assert result.outcomes[0].skipped == "the shard is gone"
    assert result.cause == found("ema_lags")


def test_every_cause_is_in_the_documentation() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "diagnose.md").read_text()
    sources = [*(root / "ldm/diagnosis/checks").glob("*.py"), root / "ldm/diagnosis/variants.py"]
    causes = {name for path in sources for name in _causes(path.read_text())}
    assert len(causes) > 20
    assert not [cause for cause in causes if f"`{cause}`" not in page]


def _causes(source: str) -> list[str]:
    """Identifiers that are the first argument of a finding or of what becomes one."""
    return re.findall(r'(?:Finding|Variant|Alternative)\(\s*"([a-z_]+)"', source)


def test_topics_are_checked_in_causal_order() -> None:
    topics = [each.topic for each in checks_in_order()]
    assert topics == sorted(topics)
    assert set(topics) == set(Topic)
