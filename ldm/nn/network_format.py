"""Interface by which a kind of network describes how other libraries store it.

A kind (:class:`NetworkKind`) is registered under the class of its config. It defines everything about its foreign formats:
the foreign names of its tensors, the conversion of its config from JSON or from names and shapes, and the names of its
layers in LoRA files. :mod:`ldm.formats` contains the container formats (single files, folders) and is independent of kinds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ldm.errors import CheckpointError, LdmError, counted

Rules = Sequence[tuple[str, str]]
"""Regular expressions and their replacements, applied to a name in order."""

Values = Mapping[str, Any]
"""Content of a JSON file, such as ``config.json``."""

State = Mapping[str, Tensor]
"""Tensors by name."""

Network = tuple[Any, State]
"""Config and state dict of a network."""


@dataclass(frozen=True)
class Layout:
    """Conversion of a tensor between a foreign file and our state dict.

    ``read`` maps a foreign tensor to ours; ``write`` maps all of our tensors that share a foreign one to that one.
    """

    read: Callable[[Tensor], Tensor]
    write: Callable[[list[Tensor]], Tensor]


SAME = Layout(lambda theirs: theirs, lambda ours: ours[0])
TRANSPOSED = Layout(lambda theirs: theirs.T, lambda ours: ours[0].T)
MATRIX = Layout(
    lambda theirs: theirs[:, :, None, None] if theirs.ndim == 2 else theirs, lambda ours: ours[0].flatten(1)
)
"""Layout of a 1 x 1 convolution that foreign files store as a linear layer (a convolution is accepted too)."""

THIRDS = tuple(Layout(lambda theirs, i=i: theirs.tensor_split(3)[i], torch.cat) for i in range(3))  # type: ignore[misc]
"""Layouts of queries, keys and values: three tensors in our networks, one in foreign files."""


class KeyMapping(NamedTuple):
    """Foreign name and layout of one tensor of our state dict."""

    name: str
    layout: Layout = SAME


KeyTable = Mapping[str, KeyMapping]
"""Key mappings by the names in our state dict."""


def import_weights(tensors: State, table: KeyTable, expected: State, source: object) -> dict[str, Tensor]:
    """Convert foreign tensors to our state dict, by views.

    Args:
        tensors: foreign tensors; each must be in the table.
        table: key mappings of the network.
        expected: state dict of the network on the meta device, for the shapes.
        source: file or folder, for error messages.

    Raises:
        CheckpointError: names are missing, unexpected or of another shape; ``details`` lists all of them.
    """
    known = {mapping.name for mapping in table.values()}
    missing = [name for name in dict.fromkeys(mapping.name for mapping in table.values()) if name not in tensors]
    unexpected = [name for name in tensors if name not in known]
    state, misshapen = {}, {}
    for ours, mapping in table.items():
        if mapping.name in tensors:
            theirs = tensors[mapping.name]
            state[ours] = mapping.layout.read(theirs)
            if state[ours].shape != expected[ours].shape:
                misshapen[mapping.name] = list(theirs.shape)
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "of a shape that does not fit": [f"{name} {shape}" for name, shape in misshapen.items()],
    }
    if any(problems.values()):
        details = (f"{what:<30} {name}" for what, listed in problems.items() for name in listed)
        raise CheckpointError(f"{source} does not match its config: {counted(problems)}.", details)
    return state


def export_weights(state: State, table: KeyTable) -> dict[str, Tensor]:
    """Convert our state dict to foreign tensors; the inverse of :func:`import_weights`."""
    shared: dict[str, list[str]] = {}
    for ours, mapping in table.items():
        shared.setdefault(mapping.name, []).append(ours)
    return {name: table[ours[0]].layout.write([state[each] for each in ours]) for name, ours in shared.items()}


def renamed(name: str, rules: Rules) -> str:
    """Apply all rules to a name, in order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def prefixed(prefix: str, table: KeyTable) -> dict[str, KeyMapping]:
    """Put a prefix before all foreign names of a table."""
    return {ours: mapping._replace(name=prefix + mapping.name) for ours, mapping in table.items()}


OUTER = (
    r"(?:(?:model|net|network|state_dict|params|unet|vae|autoencoder|text_encoder(?:_2)?|transformer|clip_[lg]"
    r"|diffusion_model|first_stage_model|cond_stage_model)\.)+"
)
"""Prefixes that other software puts before all names of a network."""

NOT_WEIGHTS = frozenset({"decay", "num_updates", "position_ids", "attn_mask"})
"""Last parts of names of tensors that no network needs: counters of an average, and constants that are computed."""


def is_weight(name: str) -> bool:
    """Return whether a tensor of this name may be a weight of a network."""
    return name.rpartition(".")[2] not in NOT_WEIGHTS


def outer_prefix(names: Iterable[str], marks: tuple[str, ...]) -> str:
    """Return the prefix (:data:`OUTER`) that names have before any of ``marks``; empty if one begins with a mark."""
    listed = [*names]
    if not marks or any(name.startswith(marks) for name in listed):
        return ""
    before_mark = re.compile(rf"{OUTER}(?={'|'.join(map(re.escape, marks))})")
    return next((match[0] for name in listed if (match := before_mark.match(name))), "")


def attention_names(layer: str, query: str, key: str, value: str, out: str) -> Rules:
    """Rename the projections of attention layers, in any of their spellings, to the given ones.

    Args:
        layer: regular expression of the layer's name.
        query, key, value, out: names of the projections.
    """
    spellings = {
        query: "query|to_q|q",
        key: "key|to_k|k",
        value: "value|to_v|v",
        out: r"proj_attn|to_out\.0|to_out|proj_out",
    }
    return tuple((rf"\b({layer})\.(?:{theirs})\.(?=weight|bias)", rf"\1.{ours}.") for ours, theirs in spellings.items())


class NetworkFormat:
    """Description of a network kind in one foreign format; subclasses say which tensors have which names there.

    Attributes:
        marks: beginnings of names by which a network of this kind is recognized.
    """

    marks: tuple[str, ...] = ()

    def fits(self, names: Collection[str]) -> bool:
        """Return whether any of these names, without :data:`OUTER`, begins with a mark."""
        outer = outer_prefix(names, self.marks)
        return any(name.removeprefix(outer).startswith(self.marks) for name in names)

    def key_table(self, config: Any, names: Iterable[str], values: Values) -> KeyTable:
        """Map the ``names`` of our weights to foreign ones.

        Args:
            config: config of the network.
            names: names of the weights in our state dict.
            values: JSON config of the network in the foreign format; empty in formats that have none.
        """
        raise NotImplementedError

    def canonical_name(self, name: str) -> str | None:
        """Return the name that the key table has for a variant of it in some files; None for a tensor that is not used.

        :data:`OUTER` and :data:`NOT_WEIGHTS` are the variants that all kinds of network have in common.
        """
        return name

    def build(self, config: Any, values: Values) -> nn.Module:
        """Build the network, with arguments from the JSON config if it needs any."""
        network: nn.Module = config.build()
        return network


class SingleFileFormat(NetworkFormat):
    """Description of a network kind in LDM single files.

    Attributes:
        prefixes: prefix of the network's names to the component of the model that it is, such as ``denoiser``.
        marks: beginnings of names, after the prefix.
    """

    prefixes: ClassVar[Mapping[str, str]]

    def infer_config(self, tensors: State, source: object) -> Any:
        """Infer the config from names (without prefix) and shapes.

        Raises:
            CheckpointError: it is not such a network.
        """
        raise NotImplementedError

    def prefix(self, config: Any, component: str, components: Collection[str]) -> str | None:
        """Return the prefix under which the network is written, as ``component`` of a model; None if it has no place.

        Raises:
            CheckpointError: a network of this kind, but with a setting that LDM files cannot hold.
        """
        return next((prefix for prefix, each in self.prefixes.items() if each == component), None)

    def export(self, config: Any, state: State, prefix: str) -> dict[str, Tensor]:
        """Convert the weights to foreign tensors, named without the ``prefix`` that they are written under."""
        return export_weights(state, self.key_table(config, state, {}))

    def is_surplus(self, config: Any, name: str) -> bool:
        """Return whether :meth:`export` adds this tensor only for other readers."""
        return False

    def latents(self, config: Any) -> tuple[float, float] | None:
        """Return scaling and shift factor that readers assume for a first stage of this config; None: those of the model."""
        return None


class FolderFormat(NetworkFormat):
    """Description of a network kind in folders with a JSON config and a file of weights.

    Attributes:
        component: what the network is in a model; empty for one that is several.
        library: software that such folders are of: ``diffusers``, ``transformers`` or ``open_clip``.
        folders: name of the folder in a diffusers pipeline to the component that it holds.
        classes: values of ``_class_name`` (diffusers) or ``model_type`` (transformers) in the config.
        weights: names of the files of weights, without suffix; the first is the one that is written.
        config_file: name of the JSON config.
        reads_text: whether the network needs a tokenizer.
        sized_in_latents: whether the size in its config is that of the latents, not of the images.
    """

    component: str
    library: str
    folders: ClassVar[Mapping[str, str]] = {}
    classes: tuple[str, ...]
    weights: tuple[str, ...]
    config_file: str = "config.json"
    reads_text: bool = False
    sized_in_latents: bool = False

    def read_config(self, values: Values, names: Collection[str], where: object) -> Any:
        """Convert a JSON config.

        Args:
            values: the JSON; under ``preprocessor`` that of the folder's image processor, if it has one.
            names: canonical names of the tensors in the folder.
            where: file, for error messages.

        Raises:
            CheckpointError: it describes a network that ours cannot be.
        """
        raise NotImplementedError

    def write_config(self, config: Any, size: tuple[int, int], extra: Values) -> dict[str, Any]:
        """Convert a config to JSON; the inverse of :meth:`read_config`.

        Args:
            config: config of the network.
            size: height and width that the model was trained on, in pixels or positions of the latent.
            extra: JSON values that follow from other parts of the model.

        Raises:
            CheckpointError: the foreign software has no such network.
        """
        raise NotImplementedError

    def export(self, config: Any, state: State, values: Values) -> dict[str, Tensor]:
        """Convert the weights to foreign tensors."""
        return export_weights(state, self.key_table(config, state, values))

    def write_preprocessor(self, config: Any) -> dict[str, Any] | None:
        """Return the JSON of the image processor; None for networks that take no images from users."""
        return None

    def class_name(self, config: Any) -> str:
        """Return the foreign class that opens the folder."""
        return self.classes[0]

    def fitted(self, config: Any, state: State, assumed: Values) -> tuple[Any, State]:
        """Change a network so that a pipeline which assumes these config values computes the same.

        Raises:
            CheckpointError: that cannot be.
        """
        for name, value in assumed.items():
            if getattr(config, name, value) != value:
                raise CheckpointError(
                    f"{name} is {getattr(config, name)!r}, but {self.library} pipelines assume {value!r}; "
                    "write a native file."
                )
        return config, state


@dataclass(frozen=True)
class NetworkKind:
    """Format descriptions of one kind of network in foreign files.

    Attributes:
        config: class of its config.
        name: what it is called in messages.
        single_file: descriptions in LDM single files; several if such files hold it in several ways.
        folders: descriptions in folders.
        lora_names: gives, for a config, names of layers, the component that the network is, and all components of the
            model, each name that LoRA files have for a layer, and the layer.
        in_place_of: gives, for the config of a network that is replaced and the config and state of the one that
            replaces it, config and state as the rest of the model needs them.
        fold: gives, for config, state, mean and factor ``[c]`` in fp64, the state of a first stage that encodes to
            ``(z - mean) / factor`` in place of z, and decodes that; None if no weights do so exactly.
    """

    config: type
    name: str
    single_file: tuple[SingleFileFormat, ...] = ()
    folders: tuple[FolderFormat, ...] = ()
    lora_names: Callable[[Any, Sequence[str], str, Collection[str]], Mapping[str, str]] | None = None
    in_place_of: Callable[[Any, Any, State], Network] = field(default=lambda own, config, state: (config, state))
    fold: Callable[[Any, State, Tensor, Tensor], State | None] = field(default=lambda config, state, mean, factor: None)


KINDS: dict[type, NetworkKind] = {}
"""Registered kinds by the class of their config."""


def register(kind: NetworkKind) -> None:
    """Register a kind of network for all container formats."""
    KINDS[kind.config] = kind


def kind_of(config: Any) -> NetworkKind:
    """Return the kind of a network; one without any format if none is registered for the class of its config."""
    return KINDS.get(type(config)) or NetworkKind(type(config), getattr(config, "kind", type(config).__name__))


def lora_spellings(tables: Iterable[KeyTable], dotted: Iterable[str], kohya: str) -> dict[str, str]:
    """Names of layers in LoRA files, to our layers.

    Args:
        tables: key mappings of the layers' weights, in each format whose names LoRA files use.
        dotted: what the naming of diffusers has before a name.
        kohya: what the naming of kohya has before a name, whose dots are underscores.
    """
    spelled: dict[str, str] = {}
    for ours, mapping in (item for table in tables for item in table.items()):
        theirs, layer = mapping.name.removesuffix(".weight"), ours.removesuffix(".weight")
        spelled |= dict.fromkeys([*(start + theirs for start in dotted), kohya + theirs.replace(".", "_")], layer)
    return spelled


# Configs in files


def checked(values: Values, defaults: Values, fixed: Values, where: object) -> dict[str, Any]:
    """Fill in defaults of JSON values.

    Args:
        values: the JSON.
        defaults: values of keys that it leaves out.
        fixed: for some keys, all values that our networks support.
        where: file, for error messages.

    Raises:
        CheckpointError: a value is not supported.
    """
    for name, allowed in fixed.items():
        if name in values and values[name] not in allowed:
            known = " or ".join(map(repr, allowed))
            raise CheckpointError(
                f"{where}: {name} is {values[name]!r}, but ldm supports only {known}; use another model."
            )
    return {**defaults, **values}


def ratio(hidden: int, width: int) -> float:
    """Return ``hidden / width``, rounded so that ``int(width * ratio) == hidden``."""
    quotient = hidden / width
    return quotient if int(width * quotient) == hidden else math.nextafter(quotient, math.inf)


def count(names: Iterable[str], pattern: str) -> int:
    """Count the distinct numbers that the group of ``pattern`` matches at the beginning of names."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})


@contextmanager
def reading(where: object) -> Iterator[None]:
    """Convert any error of building a config from a file's values to a CheckpointError that names the file.

    Raises:
        CheckpointError: in one sentence.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error).rstrip(".") if isinstance(error, LdmError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{where} does not describe a network that ldm supports: {reason}.") from None


@contextmanager
def inferring(network: str, source: object) -> Iterator[None]:
    """Convert any error of inferring a config from names and shapes to a CheckpointError that names the source.

    Raises:
        CheckpointError: in one sentence.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # names and shapes may be invalid in any way
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise CheckpointError(
            f"the config of the {network} in {source} cannot be inferred from names and shapes: {reason}."
        ) from None
