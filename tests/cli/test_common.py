from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ldm.cli.common import new_app, options_from, run, values_of
from ldm.config import config_field
from ldm.errors import ConfigError, SamplingError
from ldm.formats.tensors import write_atomically


@dataclass(frozen=True)
class Cooking:
    """Any record of config fields."""

    minutes: int = config_field(10, "cooking time in minutes")
    salt_share: float | None = config_field(None, "salt, 0 to 1")
    dish: str | None = config_field(None, "name of the dish")
    lid: bool = config_field(True, "close the lid")
    weights: Sequence[float] | None = config_field(None, "weights in kilograms")
    plates: Sequence[int] | None = config_field(None, "numbers of plates")
    note: str | None = config_field(None)


@dataclass(frozen=True)
class Serving:
    """A second record."""

    guests: int = config_field(2, "number of guests")


def given(*arguments: str) -> Any:
    """Return what a command with the options of both records receives, or the error."""
    app, received = new_app(), []

    @app.command()
    @options_from(Cooking, into="cooking")
    @options_from(Serving, into="serving")
    def cook(name: str, cooking: dict[str, Any], serving: dict[str, Any]) -> None:
        received.append((name, cooking, serving))

    result = CliRunner().invoke(app, arguments)
    return received[0] if received else result.exception if isinstance(result.exception, SamplingError) else result


def test_the_fields_of_records_are_options() -> None:
    defaults = {"minutes": 10, "lid": True}
    assert given("soup") == ("soup", defaults, {"guests": 2})
    arguments = "soup --minutes 5 --salt-share 0.5 --dish pan --no-lid --weights 1,2.5 --plates 3 --plates 4 --guests 7"
    expected = {"minutes": 5, "salt_share": 0.5, "dish": "pan", "lid": False, "weights": [1.0, 2.5], "plates": [3, 4]}
    assert given(*arguments.split()) == ("soup", expected, {"guests": 7})


@pytest.mark.parametrize("arguments", [["soup", "--minutes", "x"], ["soup", "--note", "x"]])
def test_wrong_types_and_fields_without_help_are_wrong_usage(arguments: list[str]) -> None:
    assert given(*arguments).exit_code == 2


def test_a_list_that_holds_no_numbers_is_named() -> None:
    assert "--weights is '1;2'" in str(given("soup", "--weights", "1;2"))


def test_the_help_has_the_sentences_of_the_fields() -> None:
    output = " ".join(given("--help").output.split())
    assert "cooking time in minutes [default: 10]" in output
    assert "number of guests" in output


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fail: Callable[[], object]) -> str:
    """Return what a command prints on stderr that ends in an error of the operating system."""
    app = new_app()

    @app.command()
    def cook() -> None:
        fail()

    monkeypatch.setattr(sys, "argv", ["cook"])
    with pytest.raises(SystemExit) as stopped:
        run(app)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_full_disk_is_one_sentence_that_names_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """``/dev/full`` reports a full disk at each write."""
    path = tmp_path / "a.yaml"

    def fill(_: Path) -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x")

    message = refused(monkeypatch, capsys, lambda: write_atomically(path, fill))
    assert message == f"error: the disk is full: {path} cannot be written; free some space and repeat the command.\n"


def test_a_full_disk_is_the_same_error_for_safetensors(tmp_path: Path) -> None:
    script = f"""
import resource, signal, torch
from ldm.formats.tensors import write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_tensors({str(tmp_path / "a.safetensors")!r}, {{"x": torch.zeros(10000)}}, {{}})
except OSError as error:
    print(error.strerror, error.filename)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"File too large {tmp_path / 'a.safetensors'}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("operation", [Path.read_text, Path.mkdir, Path.write_text])
def test_a_file_that_cannot_be_used_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, operation: Callable[..., Any]
) -> None:
    path = tmp_path / "file" / "inside"
    path.parent.touch()
    message = refused(monkeypatch, capsys, lambda: operation(path, *(["x"] if operation is Path.write_text else [])))
    assert message == f"error: {path} cannot be used (Not a directory); repeat the command with --debug to see where.\n"


@pytest.mark.parametrize("given", [["order=2", "order=3"], ["eta=0 # none"], ["name=a: b"]])
def test_settings_of_a_command_are_parsed_as_overrides_are(given: list[str]) -> None:
    if len(given) == 2:
        with pytest.raises(ConfigError, match="the key order is given twice"):
            values_of(given)
    else:
        name, _, text = given[0].partition("=")
        assert values_of(given) == {name: text}
