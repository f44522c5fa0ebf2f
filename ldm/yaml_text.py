"""YAML as configs use it: read strictly, with text left as text, and written so that it is read back unchanged.

PyYAML follows YAML 1.1, in which ``no`` is false, ``010`` is 8 and ``12:30`` is 750. Here a plain scalar is a number, ``true``,
``false`` or ``null`` as in YAML 1.2 (in addition with underscores, hexadecimal or binary), and anything else is text. A key that
occurs twice in a section is an error.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

from ldm.errors import ConfigError, first_line

PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
"""Plain scalars that are not text, and their first characters, by YAML's name of the type."""

MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys: set[Hashable] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                    )
                keys.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.1 or :class:`_Loader` reads as something else."""


for _name, (_pattern, _first) in PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)


def parse(text: str | bytes) -> Any:
    """Parse one YAML document.

    Raises:
        ConfigError: it is not valid, or a key occurs twice in a section.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" in line {mark.line + 1}" if mark and len(text.splitlines()) > 1 else ""
        raise ConfigError(f"{error.problem or error.context}{line}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(first_line(error)) from None


def parse_value(text: str) -> Any:
    """Parse the value of an override: a list or section in brackets, a text in quotes, a number, or a text as it stands.

    A text needs no quotes, also if it contains ``#``, ``:`` or another character that has a meaning in a YAML file.

    Raises:
        ConfigError: brackets or quotes are not closed, or something stands behind them.
    """
    text = text.strip()
    if text[:1] in ("[", "{", "'", '"'):
        value = parse(text)
        if behind := text[_Loader(text).get_single_node().end_mark.index :].strip():
            raise ConfigError(f"{behind!r} stands behind the closing bracket or quote")
        return value
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    return text if tag == MERGE else loader.construct_object(yaml.ScalarNode(tag, text))


def dump(values: Any) -> str:
    """Return plain values as the text of a YAML file, with keys in their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
