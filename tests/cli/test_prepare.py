from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ldm.cli import prepare
from ldm.clip.tokenizer import Tokenizer
from ldm.data.shards import Shards, find_shards
from tests.commands import exit_code
from tests.data.pictures import encoded, noise_picture, write_shards, write_tar
from tests.experiments import write_experiment

ROOT = Path(__file__).parents[2]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the command in this process."""
    return exit_code(monkeypatch, prepare.main, "prepare.py", *arguments)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.png").write_bytes(encoded(noise_picture(i)))
        (folder / f"{i}.txt").write_text(f"picture {i}")
    (folder / "7.txt").unlink()
    return folder


def test_folder_prints_what_became_of_it_and_the_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pictures: Path
) -> None:
    shards = tmp_path / "shards"
    assert run(monkeypatch, "folder", pictures, shards, "--shard-size", 3, "--shares", "1,0,0") == 0
    printed = capsys.readouterr().out
    assert "7 train, 0 val, 0 test" in printed
    assert "left out, no caption: 1 (7.png)" in printed
    assert f"data: {{kind: shards, train: {shards / 'train'}}}" in printed
    assert Shards(find_shards(str(shards / "train"), "train")).lengths == [3, 3, 1]


def test_stamps_are_split_by_image(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, pictures: Path
) -> None:
    assert run(monkeypatch, "stamps", tmp_path / "shards", "--source", pictures, "--shares", "1,0,0") == 0
    assert "7 train, 0 val, 0 test" in capsys.readouterr().out


def test_tokenizer_reads_the_captions_of_the_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [4, 4])
    out = tmp_path / "tokenizer.json"
    arguments = ["--data", tmp_path / "shards", "--out", out, "--vocab-size", 270, "--context-length", 9]
    assert run(monkeypatch, "tokenizer", *arguments) == 0
    tokenizer = Tokenizer.from_json(out.read_text(encoding="utf-8"))
    assert tokenizer.context_length == 9
    assert tokenizer.vocab_size <= 270
    assert tokenizer.decode(tokenizer("Caption 3")[0]) == "caption 3"


def test_tokenizer_reads_captions_as_training_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = write_experiment(tmp_path)
    texts = [b'["first caption", "second one"]', b'{"alt": "unused", "good": "third"}']
    image = encoded(noise_picture(0))
    members = [(f"{i}.png", image) for i in range(3)]
    members += [(f"{i}.txt", text) for i, text in enumerate(texts)] + [("2.txt", b'["too short"]')]
    write_tar(tmp_path / "train.tar", members)
    settings = yaml.safe_load(config.read_text())
    settings["data"] |= {
        "captions": {"format": "json", "weights": {"good": 1}},
        "filters": {"min_caption_length": 5, "fields": {}},
    }
    config.write_text(yaml.safe_dump(settings))
    expected = {"--config": 4, "--data": 5}
    for option, count in expected.items():
        source = [config] if option == "--config" else [tmp_path / "train.tar", "--caption-format", "json"]
        out = tmp_path / f"{option}.json"
        assert run(monkeypatch, "tokenizer", option, *source, "--out", out, "--vocab-size", 300) == 0
        assert f"tokens from {count} captions" in capsys.readouterr().out
        tokenizer = Tokenizer.from_json(out.read_text(encoding="utf-8"))
        assert tokenizer.decode(tokenizer("second one")[0]) == "second one"
    fields = [(f"{i}.json", b'{"words": "from a field"}') for i in range(3)]
    write_tar(tmp_path / "train.tar", members + fields)
    source = [tmp_path / "train.tar", "--caption-field", "words"]
    assert run(monkeypatch, "tokenizer", "--data", *source, "--out", out) == 0
    assert "tokens from 3 captions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder", "{tmp}/none", "{tmp}/shards"], "none does not exist"),
        (["folder", "{tmp}", "{tmp}/shards", "--shares", "most,few"], "'most,few' are not numbers"),
        (["tokenizer", "--data", "{tmp}"], r"contains no .tar shards"),
        (["tokenizer", "--data", "{tmp}/a.tar"], r"a.tar does not exist"),
        (["tokenizer"], "come from --data or from --config; give one of them"),
        (["tokenizer", "--config", "a.yaml", "--caption-field", "text"], "are set by a.yaml; leave them out"),
        (["stamps", "{tmp}/shards", "--source", "{tmp}", "--language", "de"], "unknown language of the stamps 'de'"),
        (["emoji", "{tmp}", "--font", "{tmp}/none.ttf"], "none.ttf is missing"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, *(argument.format(tmp=tmp_path) for argument in arguments)) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    missing, out = str(tmp_path / "none"), str(tmp_path / "out")
    command = [sys.executable, "tools/prepare.py", "folder", missing, out, "--debug"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "DataError" in done.stderr
