"""Strict conversion of YAML and overrides to typed, frozen dataclasses.

Three ideas. A *config* is a frozen dataclass; each field has a type, a default and a help sentence (:func:`config_field`). A
*kind* is an entry of a registry: ``class Schedule(Kind)`` opens a family, ``class Cosine(Schedule, kind="cosine")`` adds an
entry, and a field of type ``Schedule`` is written ``{kind: cosine, ...}`` (or just ``cosine``) in YAML; ``class Loss(Kind,
default="l2")`` opens a family whose sections may leave ``kind`` out. :func:`from_dict`
turns plain values into configs and rejects unknown keys and values; its errors name the place and the closest valid name.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union

from ldm.errors import ConfigError, PathError, first_line, unknown
from ldm.paths import expanded

T = TypeVar("T")
REQUIRED: Any = dataclasses.MISSING


def config_field(
    default: Any = REQUIRED,
    help: str = "",
    *,
    factory: Any = REQUIRED,
    formerly: str | None = None,
    omit_default: bool = False,
    changeable: bool = False,
    path: bool = False,
) -> Any:
    """Declare a field of a config.

    Args:
        default: default value; without one the field is required.
        help: sentence for the config reference.
        factory: function that makes the default, for mutable values.
        formerly: an older name of the field; it is still read, with a warning that names the new one.
        omit_default: leave the field out of :func:`to_dict` while it has its default. For fields that are added to a
            config whose dictionary is part of fingerprints, so that those of existing files do not change.
        changeable: a training that is resumed takes over a new value of the field, or of anything in its section, from that
            step on. Any other field must keep its value; see :mod:`ldm.training.resume`.
        path: the texts of the field are paths, or sources such as hub ids that may be paths: :func:`from_dict` expands ``~``
            and environment variables in them (:mod:`ldm.paths`).
    """
    metadata = {
        "help": help,
        "formerly": formerly,
        "omit_default": omit_default,
        "changeable": changeable,
        "path": path,
    }
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


class Kind:
    """Base of the registries: a direct subclass opens a family, a subclass with ``kind=`` adds an entry to its family.

    In a family with ``default=``, a section without ``kind`` is of that kind.
    """

    kinds: ClassVar[dict[str, type[Any]]]
    default_kind: ClassVar[str | None]
    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str | None = None, default: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if Kind in cls.__bases__:
            cls.kinds, cls.default_kind = {}, default
        if kind is not None:
            assert kind not in cls.kinds, f"{kind} is registered twice"
            cls.kind = kind
            cls.kinds[kind] = cls


def from_dict(cls: type[T], node: Any, where: str = "") -> T:
    """Convert plain values (of YAML or JSON) to an instance of the config ``cls``.

    Args:
        cls: a dataclass, or a family of kinds.
        node: a mapping of its fields; for a family also ``kind``, or the bare name of the kind.
        where: dotted place of the node in the file, for the error messages.

    Raises:
        ConfigError: unknown or missing key, wrong type, or a combination that the config itself rejects.
    """
    if issubclass(cls, Kind) and not hasattr(cls, "kind"):
        node = {"kind": node} if isinstance(node, str) else node
        if cls.default_kind and isinstance(node, Mapping):
            node = {"kind": cls.default_kind, **node}
        if not isinstance(node, Mapping) or "kind" not in node:
            raise ConfigError(f"{_at(where)}: give a kind, one of {', '.join(sorted(cls.kinds))}.")
        if node["kind"] not in list(cls.kinds):  # a list: the value may be one that cannot be hashed
            raise ConfigError(f"{_at(where)}: {unknown('kind', node['kind'], cls.kinds)}")
        cls, node = cls.kinds[node["kind"]], {key: value for key, value in node.items() if key != "kind"}
    if not isinstance(node, Mapping):
        raise ConfigError(f"{_at(where)}: expected a section with the keys of {cls.__name__}, found {node!r}.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls)) if field.init}
    node = _with_current_names(node, cls, where)
    for key in node:
        if key not in fields:
            raise ConfigError(f"{_at(where)}: {unknown('key', key, fields)}")
    for name, field in fields.items():
        if name not in node and field.default is REQUIRED and field.default_factory is REQUIRED:
            raise ConfigError(
                f"{_at(where)}: the key {name!r} is missing ({field.metadata.get('help', 'it has no default')})"
            )
    values = {}
    for key, value in node.items():
        place = f"{where}.{key}" if where else key
        values[key] = _convert(
            hints[key], _expanded(value, place) if fields[key].metadata.get("path") else value, place
        )
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{_at(where)}: {error}") from None


def to_dict(config: Any) -> Any:
    """Convert a config to dicts, lists and plain values, with the ``kind`` of each; the inverse of :func:`from_dict`."""
    if dataclasses.is_dataclass(config):
        kind: dict[str, Any] = {"kind": config.kind} if isinstance(config, Kind) else {}
        fields = [f for f in dataclasses.fields(config) if f.init and not _is_omitted(f, getattr(config, f.name))]
        return kind | {f.name: to_dict(getattr(config, f.name)) for f in fields}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config


def _is_omitted(field: dataclasses.Field[Any], value: Any) -> bool:
    return bool(field.metadata.get("omit_default")) and value == field.default


def former_names(config: Any) -> dict[str, str]:
    """Return the names of the fields of a dataclass by their former names."""
    formerly = {field.metadata.get("formerly"): field.name for field in dataclasses.fields(config)}
    return {former: name for former, name in formerly.items() if former is not None}


def _with_current_names(node: Mapping[str, Any], config: type, where: str) -> dict[str, Any]:
    """Return the section with former names of fields replaced by the current ones, with a warning for each."""
    former = former_names(config)
    renamed = {}
    for key, value in node.items():
        name = former.get(key, key)
        if name != key:
            if name in node:
                raise ConfigError(f"{_at(where)}: {key!r} is the former name of {name!r}; give only the latter.")
            warnings.warn(f"{_at(where)}: {key!r} is now called {name!r}; rename it.", FutureWarning, stacklevel=3)
        renamed[name] = value
    return renamed


def to_yaml(config: Any) -> str:
    """Return a config as the text of a YAML file that :func:`read_yaml` reads, with its keys in the order of the fields."""
    from ldm.yaml_text import dump  # not needed to sample

    def escaped(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: escaped(item) for key, item in value.items()}
        if isinstance(value, list):
            return [escaped(item) for item in value]
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value

    return dump(escaped(to_dict(config)))


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file, merged over the files that its ``base:`` names (relative to it), and apply ``key.sub=value`` overrides.

    ``${a.b}`` is the value of the key ``a.b``, or of an environment variable if no key has the name.

    Raises:
        ConfigError: missing or malformed file, circular ``base``, an override that is not ``key=value``, or one that another
            override replaces.
    """
    from omegaconf import OmegaConf  # not needed to sample

    path = Path(expanded(path))
    values = with_overrides(_with_bases(path, ()), overrides, path)
    try:
        config = OmegaConf.create(_with_variables(values, values))
        return typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except Exception as error:
        raise ConfigError(f"{path}: {first_line(error)}.") from None


def with_overrides(values: dict[str, Any], overrides: Sequence[str], source: str | Path) -> dict[str, Any]:
    """Return plain values with ``key.sub=value`` overrides; ``source`` names the values in error messages.

    Raises:
        ConfigError: one is not ``key=value``, does not fit the values, or is replaced by another.
    """
    from ldm.yaml_text import parse_value

    given: dict[str, tuple[str, Any]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not re.fullmatch(r"[^.\[\]]+(\.[^.\[\]]+|\[\d+\])*", key):
            raise ConfigError(
                f"the override {override!r} is not of the form key=value; example: denoiser.train.max_steps=2000."
            )
        if key in given:
            raise ConfigError(
                f"the key {key} is given twice, as {given[key][0]!r} and {override!r}; leave one out (a list is written "
                f"{key}=[a,b])."
            )
        if text.strip() == "~":
            raise ConfigError(
                f"the override {override!r} means null in YAML; write {key}=null for that, or {key}=~/ for the home folder."
            )
        try:
            value = parse_value(text)
            values = _overridden(values, _names(key), value)
        except ConfigError as error:
            raise ConfigError(f"the override {override!r} does not fit {source}: {error}.") from None
        given[key] = override, value
    for key, (override, value) in given.items():
        if not _is_in(values, key, value):
            raise ConfigError(f"the override {override!r} is replaced by another one; leave one of them out.")
    return values


def _with_bases(path: Path, seen: tuple[Path, ...]) -> dict[Any, Any]:
    from ldm.yaml_text import parse

    if path.resolve() in seen:
        raise ConfigError(f"{path}: its bases are circular; remove one base: from the circle.")
    if not path.is_file():
        named = f", named as base in {seen[-1]}" if seen else ""
        problem = "is not a file" if path.exists() else "does not exist"
        raise ConfigError(f"the config {path}{named} {problem}; configs/ contains the shipped ones.")
    try:
        values = parse(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"the config {path} cannot be read ({error.strerror}); make it readable.") from None
    except ConfigError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}.") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} contains no section; it needs the keys of an experiment, as in configs/emoji_64.yaml."
        )
    base = values.pop("base", None)
    bases = [base] if isinstance(base, str) else base or []
    if not (isinstance(bases, list) and all(isinstance(name, str) for name in bases)):
        raise ConfigError(f"{path}: base is the name of a file or a list of them, not {base!r}.")
    merged: dict[Any, Any] = {}
    for layer in (*(_with_bases(path.parent / expanded(name), (*seen, path.resolve())) for name in bases), values):
        merged = _merge(merged, layer)
    return merged


def _overridden(node: Any, names: Sequence[str], value: Any, place: str = "") -> Any:
    """Return a copy of a config with a value set where ``names`` lead to; sections are merged as in :func:`_merge`."""
    if not names or (place and names == ["kind"]):  # another kind is another section
        return _merge(node, {"kind": value} if names else value)
    name, rest, within = names[0], names[1:], f"{place}.{names[0]}".lstrip(".")
    if isinstance(node, list):
        if not (name.isdecimal() and int(name) < len(node)):
            raise ConfigError(f"{place} is a list of {len(node)} entries, and {name!r} is not the number of one")
        return [_overridden(each, rest, value, within) if i == int(name) else each for i, each in enumerate(node)]
    if isinstance(node, str):  # the bare name of a kind
        node = {"kind": node}
    if not isinstance(node, dict):
        raise ConfigError(f"{place} is {'null' if node is None else repr(node)}, not a section")
    return node | {name: _overridden(node.get(name, {}), rest, value, within)}


def _names(key: str) -> list[str]:
    """Split ``a.b[0].c`` into its names."""
    return [name for name in re.split(r"[.\[\]]", key) if name]


def _merge(under: Any, over: Any) -> Any:
    """Merge ``over`` into ``under``; a section of another ``kind`` replaces the old one, since its fields have other meanings."""
    if isinstance(under, str):  # the bare name of a kind
        under = {"kind": under}
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    if "kind" in over and under.get("kind") != over["kind"]:
        return over
    return under | {key: _merge(under[key], value) if key in under else value for key, value in over.items()}


def _is_in(values: Any, key: str, value: Any) -> bool:
    """Return True if a config has all that an override gives to it: giving it again changes nothing."""
    forms = (
        (value, {"kind": value}) if isinstance(value, str) else (value,)
    )  # the bare name of a kind may have gained keys
    try:
        return any(_overridden(values, _names(key), form) == values for form in forms)
    except ConfigError:
        return False


def _with_variables(values: Any, keys: Mapping[Any, Any]) -> Any:
    """Return the values with ``${NAME}`` as OmegaConf's ``${oc.env:NAME}`` where the name is not one of ``keys``."""

    def replaced(match: re.Match[str]) -> str:
        if match[1] in keys:
            return match[0]
        if not os.environ.get(match[1]):
            raise ConfigError(f"{match[0]} is neither a key of the config nor an environment variable that is set")
        return f"${{oc.env:{match[1]}}}"

    if isinstance(values, dict):
        return {key: _with_variables(value, keys) for key, value in values.items()}
    if isinstance(values, list):
        return [_with_variables(value, keys) for value in values]
    return re.sub(r"(?<!\\)\$\{([A-Za-z_]\w*)\}", replaced, values) if isinstance(values, str) else values


def _expanded(value: Any, where: str) -> Any:
    """Expand a path, or a list of paths, of a config."""
    if isinstance(value, (list, tuple)):
        return [_expanded(item, where) for item in value]
    try:
        return expanded(value) if isinstance(value, str) else value
    except PathError as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Convert ``value`` to the annotated type, or raise a ConfigError that names the place."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        # 1 and 1.0 may have two meanings, as a number of steps and a fraction: the type of the value is the first choice
        options = sorted(
            (option for option in args if option is not type(None)), key=lambda each: each is not type(value)
        )
        for option in options[:-1]:
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
        return _convert(options[-1], value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{_at(where)}: {unknown('value', value, map(str, args))}")
        return value
    if origin in (tuple, list, Sequence):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{_at(where)}: expected a list, found {value!r}.")
        fixed = origin is tuple and not (len(args) == 2 and args[1] is Ellipsis)
        if fixed and len(value) != len(args):
            raise ConfigError(f"{_at(where)}: expected {len(args)} values, found {len(value)}.")
        hints = args if fixed else [args[0]] * len(value)
        items = [
            _convert(item_hint, item, f"{where}[{i}]")
            for i, (item_hint, item) in enumerate(zip(hints, value, strict=True))
        ]
        return items if origin is list else tuple(items)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{_at(where)}: expected a section, found {value!r}.")
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) or (isinstance(hint, type) and issubclass(hint, Kind)):
        return from_dict(typing.cast(type, hint), value, where)
    return _scalar(hint, value, where)


BOOLEANS = {"yes": True, "on": True, "no": False, "off": False}
"""Texts that a field of true or false takes, in lower case; YAML 1.1 reads them so."""


def _scalar(hint: type, value: Any, where: str) -> Any:
    def wrong(remedy: str = "") -> ConfigError:
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        return ConfigError(f"{_at(where)}: expected {names.get(hint, hint.__name__)}, found {value!r}{remedy}.")

    if hint in (int, float) and isinstance(value, str) and re.fullmatch(r"[-+]?0[0-9_]+", value):
        raise wrong("; write it without the zero in front, which YAML 1.1 takes for octal")
    if hint is bool and isinstance(value, str):
        value = BOOLEANS.get(value.lower(), value)
    if hint is int and isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+", value):  # in quotes, or from a variable
        value = int(value)
    if hint is float and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise wrong() from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)) or value != value:
        number = hint is str and isinstance(value, (int, float))
        raise wrong("; write it in quotes if it is meant as text" if number else "")
    return value


def _at(where: str) -> str:
    return where or "config"
