from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.config import from_dict, read_yaml, to_yaml
from ldm.errors import ConfigError
from ldm.training.experiment import load_config
from ldm.yaml_text import dump, parse, parse_value
from tests.experiments import write_experiment
from tests.test_config import Circle, Part, Whole, wholes, write

AMBIGUOUS = [
    "yes",
    "No",
    "on",
    "OFF",
    "010",
    "007",
    "12:30",
    "12:30:45",
    "2026-11-25",
    "0o10",
    "=",
    "<<",
    "1e-4 m",
    "y",
]
"""Texts that YAML 1.1 or a careless reader takes for something else."""

texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"])).map(str.strip)


@given(wholes)
def test_a_config_written_as_yaml_is_read_again(whole: Whole) -> None:
    assert from_dict(Whole, parse(to_yaml(whole).replace("\\${", "${"))) == whole


@pytest.mark.parametrize(
    "text", [*AMBIGUOUS, "1e-4", ".5e3", "true", "null", "1_000", "a # b", "${HOME}", r"a\${name}", "$", "???"]
)
def test_a_text_of_a_config_is_read_again_from_its_file(tmp_path: Path, text: str) -> None:
    """Through the file that a run folder keeps, with its interpolation of ``${...}``."""
    path = write(tmp_path / "a.yaml", to_yaml(Whole(text)))
    assert from_dict(Whole, read_yaml(path)).name == text


@given(
    st.recursive(texts | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False), st.lists, max_leaves=5)
)
def test_plain_values_are_read_again(value: Any) -> None:
    assert parse(dump({"a": value})) == {"a": value}


# The value of an override


@given(texts.filter(lambda text: text[:1] not in ("[", "{", "'", '"')))
def test_a_text_is_taken_as_it_stands(text: str) -> None:
    value = parse_value(text)
    assert value == text or re.fullmatch(r"|~|null|true|false|[-+]?\.inf|\.nan|[-+.0-9].*", text, re.IGNORECASE)
    assert value == text or not isinstance(value, str)


@pytest.mark.parametrize(
    "text",
    [
        *AMBIGUOUS,
        "runs/try #2",
        "a: b",
        "#1",
        "*.tar",
        "&a",
        "!x",
        "%y",
        "@z",
        "`",
        "|",
        "> a",
        "- b",
        "? c",
        "a, b",
        "a]",
    ],
)
def test_characters_with_a_meaning_in_yaml_are_text(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.yaml", "name: a")
    assert read_yaml(path, [f"name={text}"]) == {"name": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("-3", -3), ("+3", 3), ("1_000", 1000), ("0x1F", 31),
        (".inf", math.inf), ("true", True), ("False", False), ("null", None), ("~", None), ("'010'", "010"), ('"a # b"', "a # b"),
        ("[a b, 1, {c: no}]", ["a b", 1, {"c": "no"}]), ("{a: 1}", {"a": 1}),
    ],
)  # fmt: skip
def test_numbers_lists_and_quotes_are_parsed(text: str, value: Any) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize("text", ["[a, b] # c", "[1", "{a: 1, a: 2}", "'tis", '"a" b', "[a #b]", "{a: 1}}"])
def test_an_unclosed_or_trailing_value_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_value(text)


# By the type of the field


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("Off", False), ("on", True), ("NO", False), ("true", True)]
)
def test_the_words_of_yaml_1_1_are_booleans_where_one_is_expected(text: str, value: bool) -> None:
    assert from_dict(Whole, {"name": "a", **parse(f"on: {text}")}).on is value


@pytest.mark.parametrize("text", ["010", "-07", "0_1"])
def test_a_number_with_a_leading_zero_is_an_error(text: str) -> None:
    for config, key in ((Part, "count"), (Circle, "radius")):
        node = {"shape": "circle", key: text} if config is Part else {key: text}
        with pytest.raises(
            ConfigError, match=f"{key}: expected a .*number, found '{text}'; write it without the zero in front"
        ):
            from_dict(config, node)


def test_a_number_for_a_text_says_how_to_write_it() -> None:
    with pytest.raises(
        ConfigError, match="name: expected a string, found 2024; write it in quotes if it is meant as text"
    ):
        from_dict(Whole, parse("name: 2024"))


def test_not_a_number_is_an_error() -> None:
    with pytest.raises(ConfigError, match="radius: expected a number, found nan"):
        from_dict(Circle, parse("radius: .nan"))


# Overrides that would have no effect

SECTIONS = "a: {b: 1, c: [{d: 1}, {d: 2}]}\ns: {kind: box, sides: [1, 2]}\nt: circle\nn: null"


@pytest.mark.parametrize(
    "overrides",
    [
        ["a.b=2", "a.b=3"],
        ["a.b=2", "a.b=2"],
        ["a.b=2", "a={b: 3}"],
        ["a={b: 3}", "a.b=2"],
        ["a.b=2", "a=null"],
        ["a=null", "a.b=2"],
        ["a.c.0.d=5", "a.c=[{d: 7}]"],
        ["a.c.0.d=5", "a.c[0].d=6"],
        ["s.sides=[3, 4]", "s.kind=circle"],
        ["s.sides=[3, 4]", "s={kind: circle}"],
        ["s.sides=[3, 4]", "s=circle"],
        ["x=train-0.tar", "x=train-1.tar"],
        ["n.b=1"],
        ["a.b.c=1"],
        ["a.c.2.d=1"],
        ["a.c.x=1"],
    ],
)
def test_an_override_without_effect_is_an_error(tmp_path: Path, overrides: list[str]) -> None:
    path = write(tmp_path / "a.yaml", SECTIONS)
    with pytest.raises(ConfigError) as raised:
        read_yaml(path, overrides)
    assert any(override in str(raised.value) for override in overrides)


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["a={e: 1}", "a.b=2"], {"a": {"b": 2, "c": [{"d": 1}, {"d": 2}], "e": 1}}),
        (["a.b=2", "a={e: 1}"], {"a": {"b": 2, "c": [{"d": 1}, {"d": 2}], "e": 1}}),
        (["s.kind=circle", "s.radius=2"], {"s": {"kind": "circle", "radius": 2}}),
        (["s=circle", "s.radius=2"], {"s": {"kind": "circle", "radius": 2}}),
        (["t.radius=2"], {"t": {"kind": "circle", "radius": 2}}),
    ],
)
def test_overrides_of_a_section_and_of_its_keys_are_combined(
    tmp_path: Path, overrides: list[str], changed: dict[str, Any]
) -> None:
    path = write(tmp_path / "a.yaml", SECTIONS)
    assert read_yaml(path, overrides) == read_yaml(path) | changed


def test_an_override_of_one_use_of_an_anchor_leaves_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "a: &x {p: 1, q: {r: 1}}\nb: *x\nc: {<<: *x, p: 2}")
    assert read_yaml(path, ["a.p=5", "b.q.r=3"]) == {
        "a": {"p": 5, "q": {"r": 1}}, "b": {"p": 1, "q": {"r": 3}}, "c": {"p": 2, "q": {"r": 1}},
    }  # fmt: skip


def test_an_override_without_a_value_is_an_error(tmp_path: Path) -> None:
    """A run folder from an unset variable of the shell is not the default one."""
    with pytest.raises(ConfigError, match="the override 'run_dir=' has no value; write run_dir=null for none"):
        load_config(write_experiment(tmp_path), ["run_dir="])


# Files


@pytest.mark.parametrize(
    "text", ["a: 1\nb: 2\na: 3", "s: {a: 1, b: {c: 1, c: 2}}", "l:\n- {a: 1, a: 2}", "a: 1\n'a': 2"]
)
def test_a_key_that_occurs_twice_in_a_file_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml is not valid YAML: the key '\w' is given twice"):
        read_yaml(write(tmp_path / "a.yaml", text))


def test_the_bare_name_of_a_kind_in_a_base_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "shape: circle")
    assert read_yaml(write(tmp_path / "a.yaml", "base: base.yaml\nshape: {radius: 2}")) == {
        "shape": {"kind": "circle", "radius": 2}
    }


@pytest.mark.parametrize(
    "content",
    [
        b"a: \xff",
        b"a: [1",
        b"a: \x07",
        b"a: 1\n---\nb: 2",
        b"a: &x {b: *x}",
        b"base: 3",
        b"a: !!python/name:os.system x",
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^\S*a\.yaml[: ]") as raised:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(raised.value)
