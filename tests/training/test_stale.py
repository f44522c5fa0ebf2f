"""What was made from other settings or data is never used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ldm.clip.model import CLIPConfig
from ldm.clip.tokenizer import train_byte_bpe
from ldm.data.shards import Sample, Shards, write_shard
from ldm.errors import CheckpointError, TrainingError
from ldm.formats import load
from ldm.formats.native import CLIP, read_header
from ldm.training.stages import train_stage
from tests.data.pictures import encoded, noise_picture
from tests.experiments import CAPTIONS, SIZE, tiny_experiment

FAILS = ["clip.train.learning_rate=1e30", "clip.train.checkpoint_every=9", "clip.train.validate_every=9"]
ONE = "clip.train.max_steps=1"


def tokenizer_of(folder: Path, *overrides: str) -> Any:
    """The tokenizer in the result of a stage that is trained in ``folder``."""
    return read_header(train_stage(tiny_experiment(folder, ONE, *overrides), "clip"), CLIP, CLIPConfig).tokenizer


def recaptioned(folder: Path, captions: list[str]) -> None:
    shard = folder / "train.tar"
    shards = Shards([shard])
    samples = [Sample(key, captions[i], shards.image(i), "png") for i, key in enumerate(shards.keys)]
    write_shard(shard, samples)


@pytest.fixture
def tried(tmp_path: Path) -> Path:
    """A folder in which a first try ended before its first checkpoint, and left a tokenizer."""
    with pytest.raises(TrainingError, match="there is no checkpoint yet"):
        train_stage(tiny_experiment(tmp_path, *FAILS, "clip.train.max_steps=3"), "clip")
    assert (tmp_path / "run" / "clip" / "tokenizer.json").is_file()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value"), [("vocab_size", 270), ("context_length", 24), ("context_length", 6)], ids=str
)
def test_a_tokenizer_of_other_settings_is_made_again(tried: Path, name: str, value: int) -> None:
    found = tokenizer_of(tried, f"clip.tokenizer.{name}={value}", f"clip.model.text.{name}={value}")
    assert getattr(found, name) == min(value, getattr(found, name)) or name == "vocab_size"
    assert (
        found.to_json() == train_byte_bpe(CAPTIONS, **{"vocab_size": 300, "context_length": 12, name: value}).to_json()
    )


def test_a_tokenizer_of_other_captions_is_made_again(tried: Path) -> None:
    """Also if the captions are as long as before."""
    captions = [caption.replace("apple", "berry") for caption in CAPTIONS]
    recaptioned(tried, captions)
    assert tokenizer_of(tried).to_json() == train_byte_bpe(captions, 300, 12).to_json()


def test_a_tokenizer_of_another_file_is_read_again(tried: Path) -> None:
    path = tried / "mine.json"
    for captions in (CAPTIONS, ["one ship", "two ships", "one ship"]):
        path.write_text(train_byte_bpe(captions, 300, 12).to_json())
        overrides = [f"clip.tokenizer.path={path}", f"run_dir={tried / 'other'}"]
        with pytest.raises(TrainingError):
            train_stage(tiny_experiment(tried, *overrides, *FAILS, "clip.train.max_steps=3"), "clip")
        found = (tried / "other" / "clip" / "tokenizer.json").read_text()
        assert found == path.read_text()


def test_a_tokenizer_that_was_changed_or_has_no_record_is_made_again(tried: Path) -> None:
    path, record = (tried / "run" / "clip" / name for name in ("tokenizer.json", "tokenizer.source.json"))
    right = path.read_text()
    path.write_text(train_byte_bpe(["something else"], 300, 12).to_json())
    with pytest.raises(TrainingError):
        train_stage(tiny_experiment(tried, *FAILS, "clip.train.max_steps=3"), "clip")
    assert path.read_text() == right
    record.unlink()
    assert tokenizer_of(tried).to_json() == right
    assert json.loads(record.read_text())["config"]["vocab_size"] == 300


@pytest.mark.parametrize("name", ["vocab_size", "context_length"])
def test_the_tokenizer_of_a_trained_model_is_kept_and_other_settings_are_refused(tmp_path: Path, name: str) -> None:
    """Of a finished stage, and of one that is to be resumed."""
    right = tokenizer_of(tmp_path).to_json()
    smaller = {"vocab_size": 290, "context_length": 8}[name]
    for steps in (1, 2):
        with pytest.raises(CheckpointError, match=rf"clip\.tokenizer\.{name} was \d+ and is now {smaller}"):
            tokenizer_of(tmp_path, f"clip.tokenizer.{name}={smaller}", f"clip.train.max_steps={steps}")
    assert (tmp_path / "run" / "clip" / "tokenizer.json").read_text() == right


def test_the_tokenizer_of_a_denoiser_is_made_again_too(tmp_path: Path) -> None:
    def overrides(vocabulary: int) -> list[str]:
        return [
            *("vae.model.kind=identity", "denoiser.model.in_channels=3", "denoiser.model.out_channels=3", "clip=null"),
            *(
                "denoiser.conditioner.kind=transformer",
                "denoiser.conditioner.width=16",
                "denoiser.conditioner.layers=1",
            ),
            "denoiser.conditioner.heads=2",
            f"denoiser.conditioner.tokenizer={{kind: byte_bpe, vocab_size: {vocabulary}, context_length: 12}}",
            *("denoiser.model.vector_width=null", "denoiser.train.max_steps=2", "denoiser.train.validate_every=9"),
        ]

    first = [*overrides(300), "denoiser.train.learning_rate=1e30", "denoiser.train.checkpoint_every=9"]
    with pytest.raises(TrainingError):
        train_stage(tiny_experiment(tmp_path, *first), "denoiser")
    config: Any = load(train_stage(tiny_experiment(tmp_path, *overrides(262)), "denoiser")).config.conditioner
    assert json.loads(config.tokenizer_json) == json.loads(train_byte_bpe(CAPTIONS, 262, 12).to_json())


def test_the_fingerprint_of_shards_follows_content_of_equal_length(tmp_path: Path) -> None:
    """On which cached latents, tokenizers and resumed trainings depend."""
    pictures = [encoded(noise_picture(i, SIZE, SIZE), "BMP") for i in range(2)]
    assert len(pictures[0]) == len(pictures[1])
    fingerprints = set()
    for name, text, picture in (("a", "red", 0), ("b", "tan", 0), ("c", "red", 1), ("d", "red", 0)):
        write_shard(tmp_path / f"{name}.tar", [Sample("x", text, pictures[picture], "png")])
        fingerprints.add(Shards([tmp_path / f"{name}.tar"]).fingerprint)
    assert len(fingerprints) == 3
