"""Generator of ``docs/config.md``: every section, kind and field of an experiment's config, from the dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union

from ldm.config import REQUIRED, Kind, to_dict
from ldm.training.experiment import Experiment

INTRODUCTION = """\
# The config

Every key of an experiment's YAML file. This page is generated from the dataclasses by
`python tools/config_reference.py > docs/config.md`; a test checks that it is up to date.

- Keys without a default are required; an unknown key is an error that suggests the nearest known one.
- A section that comes in **kinds** is written `{kind: cosine, num_timesteps: 500}`, or just `cosine` to use the defaults.
- `base: other.yaml` at the top includes another file (path relative to this one) or a list of files, in order. Keys of this
  file override them; a section of another kind replaces the whole section.
- `key.sub=value` on the command line overrides the file: `denoiser.train.max_steps=2000`. The value is a number, a text as it
  stands, or a list or section in brackets; each key is given once.
- In a path, a leading `~` is the home folder, and `$NAME` or `${NAME}` is an environment variable.
- `--dry-run` prints the resolved config and checks that the stages fit each other.
"""

ALIASES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Section:
    """A dataclass or a family of kinds, and its places in the YAML."""

    config: type
    places: tuple[str, ...]

    @property
    def title(self) -> str:
        return ", ".join(f"`{place}`" for place in self.places) if self.places[0] else "The experiment"

    @property
    def anchor(self) -> str:
        return anchor(self.title)


def reference() -> str:
    """Return the page in Markdown, with a part for each section in the order of the YAML."""
    sections = {section.config: section for section in _sections()}
    parts = [INTRODUCTION]
    for section in sections.values():
        parts.append(f"## {section.title}\n")
        if not _is_family(section.config):
            parts.append(f"{_description(section.config)}\n\n{_table(section.config, sections)}")
            continue
        with_keys = {entry: f"{section.title}: kind `{entry.kind}`" for entry in _kinds(section.config) if _keys(entry)}
        for entry in _kinds(section.config):
            name = f"[`{entry.kind}`](#{anchor(with_keys[entry])})" if entry in with_keys else f"`{entry.kind}`"
            parts.append(f"- {name}: {_description(entry)}")
        parts.append("")
        parts += [f"### {title}\n\n{_table(entry, sections)}" for entry, title in with_keys.items()]
    return "\n".join(parts)


def anchor(title: str) -> str:
    """Return GitHub's anchor of a heading: lower case, without punctuation, a hyphen for each space."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _sections() -> Iterator[Section]:
    """Yield the sections depth first; one that occurs in several places is listed once, at the first."""
    places: dict[type, list[str]] = {}

    def visit(config: type, place: str, above: tuple[type, ...]) -> None:
        if config in above or place in places.setdefault(config, []):
            return
        places[config].append(place)
        for entry in _kinds(config) if _is_family(config) else [config]:
            for name, hint, _ in _keys(entry):
                suffix = "[]" if typing.get_origin(hint) in (tuple, list) else ""
                for inner in _configs_in(hint):
                    visit(inner, f"{place}.{name}{suffix}".lstrip("."), (*above, config))

    visit(Experiment, "", ())
    return (Section(config, tuple(found)) for config, found in places.items())


def _configs_in(hint: Any) -> Iterator[type]:
    """Yield the dataclasses and families that an annotation names."""
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or issubclass(hint, Kind)):
        yield hint
    for argument in typing.get_args(hint):
        yield from _configs_in(argument)


def _is_family(config: type) -> bool:
    return issubclass(config, Kind) and not hasattr(config, "kind")


def _kinds(family: Any) -> list[Any]:
    """Return the entries of a family sorted by name, since the order of registration depends on the order of imports."""
    return [family.kinds[name] for name in sorted(family.kinds)]


def _keys(config: Any) -> list[tuple[str, Any, dataclasses.Field[Any]]]:
    """Return name, annotation and field of each key."""
    hints = typing.get_type_hints(config)
    return [(field.name, hints[field.name], field) for field in dataclasses.fields(config) if field.init]


def _table(config: type, sections: Mapping[type, Section]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, hint, field in _keys(config):
        kind = _type(hint, sections)
        kind = kind.replace(ALIASES[str], "path") if field.metadata.get("path") else kind
        cells = (f"`{name}`", kind, _default(field), _prose(field.metadata.get("help", "")))
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _type(hint: Any, sections: Mapping[type, Section]) -> str:
    """Describe an annotation in terms of YAML."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in ALIASES:
        return ALIASES[hint]
    if hint is type(None):
        return "`null`"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument, sections) for argument in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"[{', '.join(_type(argument, sections) for argument in arguments)}]"
    if origin in (tuple, list):
        return f"list of {_type(arguments[0], sections)}"
    if origin is Mapping:
        return f"section of names, each {_type(arguments[1], sections)}"
    if hint is Any:
        return "any value"
    section = sections[hint]
    return f"[{'kind' if _is_family(hint) else 'section'}](#{section.anchor})"


def _default(field: Any) -> str:
    if field.default is REQUIRED and field.default_factory is REQUIRED:
        return "required"
    value: Any = field.default_factory() if field.default is REQUIRED else field.default
    config: Any = type(value)
    if dataclasses.is_dataclass(value) and value == config():
        return f"`{value.kind}`" if isinstance(value, Kind) else "its defaults"
    return f"`{_yaml(to_dict(value))}`"


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def _description(config: type) -> str:
    """Return the first paragraph of the docstring as one line."""
    return _prose(" ".join(inspect.cleandoc(config.__doc__ or "").split("\n\n")[0].split()))


def _prose(text: str) -> str:
    """Convert reStructuredText of docstrings to Markdown: plain code, and the last name of a cross-reference."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`").replace("<", "&lt;")


def main() -> None:
    """Print the page."""
    print(reference(), end="")
