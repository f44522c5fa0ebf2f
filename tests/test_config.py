from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ldm.config import Kind, config_field, from_dict, read_yaml, to_dict
from ldm.errors import ConfigError


class Shape(Kind):
    """A family for these tests."""


@dataclass(frozen=True)
class Circle(Shape, kind="circle"):
    radius: float = config_field(1.0, "of the circle")


@dataclass(frozen=True)
class Box(Shape, kind="box"):
    sides: tuple[float, float] = config_field(help="height and width")

    def __post_init__(self) -> None:
        if min(self.sides) < 0:
            raise ConfigError("sides must not be negative.")


@dataclass(frozen=True)
class Part:
    shape: Shape = config_field(help="what it looks like")
    count: int = config_field(1, "how many")


@dataclass(frozen=True)
class Whole:
    name: str = config_field(help="of all of it")
    parts: tuple[Part, ...] = config_field((), "what it is made of")
    spare: Part | None = config_field(None, "one more")
    mode: Literal["fast", "slow"] = config_field("fast", "how")
    size: int | tuple[int, int] = config_field(1, "a side, or two")
    weights: dict[str, float] = config_field(help="by name", factory=dict)
    on: bool = config_field(True, "whether")
    height: int = config_field(1, "how tall", formerly="tall")
    color: str = config_field("red", "a field added later", omit_default=True)


numbers = st.floats(allow_nan=False, allow_infinity=False)
shapes = st.builds(Circle, numbers) | st.builds(Box, st.tuples(*[st.floats(0, 1e6)] * 2))
parts = st.builds(Part, shapes, st.integers())
wholes = st.builds(
    Whole, st.text(), st.lists(parts, max_size=3).map(tuple), st.none() | parts, st.sampled_from(["fast", "slow"]),
    st.integers() | st.tuples(st.integers(), st.integers()), st.dictionaries(st.text(), numbers, max_size=3), st.booleans(),
)  # fmt: skip


@given(wholes)
def test_what_is_written_is_read_again(whole: Whole) -> None:
    assert from_dict(Whole, to_dict(whole)) == whole


@given(wholes)
def test_it_survives_yaml(whole: Whole) -> None:
    text = yaml.safe_dump(to_dict(whole), allow_unicode=True)
    assert from_dict(Whole, yaml.safe_load(text)) == whole


def test_the_bare_name_of_a_kind_stands_for_its_defaults() -> None:
    assert from_dict(Part, {"shape": "circle"}) == from_dict(Part, {"shape": {"kind": "circle"}}) == Part(Circle())


def test_numbers_are_read_as_yaml_writes_them() -> None:
    assert from_dict(Circle, {"radius": "1e-4"}).radius == 1e-4  # YAML 1.1 reads it as a string
    assert isinstance(from_dict(Circle, {"radius": 2}).radius, float)
    assert from_dict(Part, {"shape": "circle", "count": 1e3}).count == 1000


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({}, r"config: the key 'name' is missing \(of all of it\)"),
        ({"name": "a", "prats": []}, r"config: unknown key 'prats'; did you mean 'parts'\? Known: "),
        ({"name": "a", "parts": [{"shape": "circle"}, {"shape": {"kind": "circel"}}]},
         r"parts\[1\]\.shape: unknown kind 'circel'; did you mean 'circle'\? Known: box, circle"),
        ({"name": "a", "spare": {"shape": {"kind": "circle", "raduis": 1}}}, r"spare\.shape: unknown key 'raduis'; did you"),
        ({"name": "a", "spare": {"shape": {"kind": "box", "sides": [1, -1]}}}, r"spare\.shape: sides must not be negative"),
        ({"name": "a", "spare": {"shape": {"kind": "box", "sides": [1, 1, 1]}}}, r"spare\.shape\.sides: expected 2 values"),
        ({"name": "a", "spare": {"shape": {"kind": ["box"]}}}, r"spare\.shape: unknown kind \['box'\]"),
        ({"name": "a", "spare": {"shape": {"radius": 1}}}, r"spare\.shape: give a kind, one of box, circle"),
        ({"name": "a", "spare": {"shape": None}}, r"spare\.shape: give a kind"),
        ({"name": "a", "spare": 3}, "spare: expected a section with the keys of Part, found 3"),
        ({"name": 3}, "name: expected a string, found 3"),
        ({"name": "a", "on": 1}, "on: expected true or false, found 1"),
        ({"name": "a", "parts": [{"shape": "circle", "count": 1.5}]}, r"parts\[0\]\.count: expected a whole number, found 1\.5"),
        ({"name": "a", "parts": [{"shape": "circle", "count": True}]}, r"parts\[0\]\.count: expected a whole number, found True"),
        ({"name": "a", "parts": {"shape": "circle"}}, "parts: expected a list"),
        ({"name": "a", "weights": {"x": "heavy"}}, r"weights\.x: expected a number, found 'heavy'"),
        ({"name": "a", "weights": [1]}, r"weights: expected a section, found \[1\]"),
        ({"name": "a", "mode": "fats"}, r"mode: unknown value 'fats'; did you mean 'fast'\? Known: fast, slow"),
        ({"name": "a", "mode": ["fast"]}, r"mode: unknown value \['fast'\]"),
        ({"name": "a", 7: 1}, "config: unknown key 7"),
        ({"name": "a", "size": "big"}, "size: expected"),
    ],
)  # fmt: skip
def test_an_error_names_the_place(node: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        from_dict(Whole, node)


def test_the_former_name_of_a_field_is_read_with_a_warning_that_names_the_new_one() -> None:
    with pytest.warns(FutureWarning, match="whole: 'tall' is now called 'height'; rename it"):
        assert from_dict(Whole, {"name": "a", "tall": 3}, "whole").height == 3
    with pytest.raises(ConfigError, match="'tall' is the former name of 'height'; give only the latter"):
        from_dict(Whole, {"name": "a", "tall": 3, "height": 3})


def test_a_field_added_later_is_written_only_if_it_was_set() -> None:
    assert "color" not in to_dict(Whole("a"))
    assert to_dict(Whole("a", color="blue"))["color"] == "blue"


def test_every_config_field_has_its_sentence() -> None:
    """Of all kinds and sections that an experiment can have: the reference prints them."""
    import typing

    from ldm.training.experiment import Experiment

    seen: set[type] = set()

    def visit(hint: Any) -> None:
        for argument in typing.get_args(hint):
            visit(argument)
        if not isinstance(hint, type) or hint in seen:
            return
        seen.add(hint)
        if issubclass(hint, Kind) and not hasattr(hint, "kind"):
            for entry in hint.kinds.values():
                visit(entry)
        elif is_dataclass(hint):
            hints = typing.get_type_hints(hint)
            for field in fields(hint):
                assert field.metadata.get("help"), f"{hint.__name__}.{field.name}"
                visit(hints[field.name])

    visit(Experiment)
    assert len(seen) > 20


# Files and overrides


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_goes_on_top_of_its_bases(tmp_path: Path) -> None:
    write(tmp_path / "base" / "first.yaml", "a: 1\nsection: {x: 1, y: {kind: box, sides: [1, 2]}}\nlist: [1, 2]")
    write(tmp_path / "base" / "second.yaml", "base: first.yaml\na: 2\nsection: {x: 2}")
    write(tmp_path / "base" / "third.yaml", "c: 3\na: 3")
    top = write(
        tmp_path / "top.yaml", "base: [base/second.yaml, base/third.yaml]\nsection: {y: {kind: circle}}\nlist: [3]"
    )
    assert read_yaml(top) == {"a": 3, "c": 3, "section": {"x": 2, "y": {"kind": "circle"}}, "list": [3]}


def test_overrides_are_typed_as_yaml_and_reach_into_lists(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "a: {b: 1, c: [{d: 1}, {d: 2}]}\ne: text")
    overrides = ["a.b=2.5", "a.c.1.d=3", "e=null", "f.g=[x, 'y z']", "h=a=b", "i="]
    assert read_yaml(path, overrides) == {
        "a": {"b": 2.5, "c": [{"d": 1}, {"d": 3}]}, "e": None, "f": {"g": ["x", "y z"]}, "h": "a=b", "i": None,
    }  # fmt: skip


@pytest.mark.parametrize("override", ["s.y.kind=circle", "s.y={kind: circle}", "s={y: {kind: circle}}"])
def test_another_kind_does_not_keep_the_settings_of_the_former(tmp_path: Path, override: str) -> None:
    path = write(tmp_path / "a.yaml", "s: {x: 1, y: {kind: box, sides: [1, 2]}}")
    assert read_yaml(path, [override]) == {"s": {"x": 1, "y": {"kind": "circle"}}}


@pytest.mark.parametrize("override", ["s.y.kind=box", "s.y={kind: box}"])
def test_the_same_kind_keeps_its_settings(tmp_path: Path, override: str) -> None:
    path = write(tmp_path / "a.yaml", "s: {y: {kind: box, sides: [1, 2]}}")
    assert read_yaml(path, [override]) == {"s": {"y": {"kind": "box", "sides": [1, 2]}}}


def test_a_kind_given_by_its_name_alone_is_overridden(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "s: {y: box}")
    assert read_yaml(path, ["s.y={kind: circle, radius: 2}"]) == {"s": {"y": {"kind": "circle", "radius": 2}}}
    assert read_yaml(path, ["s.y.kind=circle"]) == {"s": {"y": {"kind": "circle"}}}


@pytest.mark.parametrize(
    "override",
    [
        "max_steps",
        "=3",
        "",
        "a.b=[1",
        "a.c.9.d=1",
        "a={x: ${nowhere}}",
        ".e=x",
        "e.=x",
        "a..b=2",
        "a.c[]=2",
        "e=~",
        "a.b= ~ ",
    ],
)
def test_an_override_that_does_not_fit_is_named(tmp_path: Path, override: str) -> None:
    path = write(tmp_path / "a.yaml", "a: {b: 1, c: [{d: 1}]}\ne: text")
    with pytest.raises(ConfigError) as raised:
        read_yaml(path, [override])
    assert "\n" not in str(raised.value)
    assert override in str(raised.value) or "nowhere" in str(raised.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the config .*none\.yaml does not exist"):
        read_yaml(tmp_path / "none.yaml")
    child = write(tmp_path / "child.yaml", "base: none.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml, named as base in .*child\.yaml does not exist"):
        read_yaml(child)
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        read_yaml(write(tmp_path / "broken.yaml", "a: [1"))
    with pytest.raises(ConfigError, match=r"list\.yaml contains no section"):
        read_yaml(write(tmp_path / "list.yaml", "[1, 2]"))


def test_circular_bases_are_rejected(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml")
    write(tmp_path / "b.yaml", "base: a.yaml")
    with pytest.raises(ConfigError, match="its bases are circular"):
        read_yaml(tmp_path / "a.yaml")
