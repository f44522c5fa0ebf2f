from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from typer.testing import CliRunner

from ldm.cli.common import new_app, options_from
from ldm.config import config_field
from ldm.errors import SamplingError


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
