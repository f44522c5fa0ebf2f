"""Textual-inversion files: those of diffusers, Automatic1111, SDXL and pivotal tuning, and those within LoRA files.

| written by                         | content                                                   | token          |
|------------------------------------|-----------------------------------------------------------|----------------|
| diffusers                          | ``<toy>``: vectors, for any number of tokens              | the key        |
| Automatic1111, the original code   | ``string_to_param``: {``*``: vectors}, ``name``           | ``name``       |
| Automatic1111 (.safetensors)       | ``emb_params``: vectors                                   | file name      |
| kohya, for SDXL                    | ``clip_l``, ``clip_g``: vectors                           | file name      |
| pivotal tuning of diffusers        | ``text_encoders_0``, ``text_encoders_1``: vectors         | ``<s0>``, ...  |
| in LoRA files                      | ``bundle_emb.<name>.`` and a key of the second to fourth  | the name       |
| in LoRA files                      | ``clip_l``, ``clip_g``, ``text_encoders_0``, ...          | ``<s0>``, ...  |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.long_prompts import text_towers
from ldm.conditioning.textual_inversion import TextualInversion
from ldm.errors import CheckpointError
from ldm.formats.hub import fetch, is_hub_id
from ldm.formats.pickles import unpickle
from ldm.formats.tensors import PICKLES, check_finite, fingerprint, read_tensors
from ldm.paths import expanded

FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
"""Names of the file in a folder, or at a hub id, that diffusers wrote."""

ENCODERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
"""Names of text encoders in files, and in a model."""

PIVOTAL = "<s0>"
"""First token of files with a token for each vector; see :func:`_pivotal`."""

BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(string_to_param\.\*|emb_params|clip_l|clip_g)")
"""Key of a textual inversion within a LoRA file."""

WEIGHT = re.compile(r"\.(weight|bias|alpha|embeddings?)$")
"""End of the name of a network's weight, which no token has."""

FAMILIES = {(768,): "SD 1", (1024,): "SD 2", (768, 1280): "SDXL"}
"""Kinds of models by the widths of their text encoders."""

Vectors = Mapping[str, Tensor]
"""Vectors by text encoder in the file; the key is empty if the file has one unnamed text encoder."""


def read_inversions(
    source: str | PathLike[str], model: Any, token: str | Sequence[str] | None = None
) -> list[TextualInversion]:
    """Read the textual inversions of a file for a model.

    Args:
        source: a .safetensors or pickle file, a folder with a ``learned_embeds.safetensors`` or ``.bin``, or a hub id of either.
        model: a LatentDiffusion.
        token: token in place of that of the file; a list gives each vector of the file a token of its own.

    Raises:
        CheckpointError: the file is broken, holds no textual inversion, or one for another kind of model.
    """
    path = _file(source)
    found = _named(_content(path), path)
    if token is not None and len(found) > 1:
        raise CheckpointError(f"{path} holds the tokens {', '.join(found)}; leave token out, or name a file with one.")
    if token is not None or PIVOTAL in found:
        (vectors,) = found.values()
        found = _pivotal(vectors, path) if token is None else _renamed(vectors, token, path)
    return [_inversion(name, vectors, model, path) for name, vectors in found.items()]


def is_bundled(key: str) -> bool:
    """Return whether a tensor of a LoRA file belongs to a textual inversion."""
    return key in ENCODERS or BUNDLED.fullmatch(key) is not None


def read_bundled(path: Path, model: Any, adapter: str) -> list[TextualInversion]:
    """Read the textual inversions within the LoRA file ``path``, which is loaded as ``adapter``.

    Raises:
        CheckpointError: they are for another kind of model.
    """
    held = {key: tensor for key, tensor in read_tensors(path).items() if is_bundled(key)}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in held.items():
        if match := BUNDLED.fullmatch(key):
            found.setdefault(match[1], {})[match[2] if match[2] in ENCODERS else ""] = tensor
    own = {key: tensor for key, tensor in held.items() if key in ENCODERS}
    named = {**found, **(_pivotal(own, path) if own else {})}
    return [_inversion(name, vectors, model, path, adapter) for name, vectors in named.items()]


def _file(source: str | PathLike[str]) -> Path:
    if isinstance(source, str) and is_hub_id(source):
        if source.count("/") > 1:
            return fetch(source)
        try:
            return fetch(f"{source}/{FILES[0]}")
        except CheckpointError:
            return fetch(f"{source}/{FILES[1]}")
    path = Path(expanded(source))
    if path.is_dir():
        return next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])
    return path


def _content(path: Path) -> Any:
    """Return what a file holds: an object of any type from a pickle, tensors by name from a safetensors file."""
    if path.is_file() and path.suffix in PICKLES:
        return unpickle(path, [nn.ParameterDict])
    return read_tensors(path)


def _named(content: Any, path: Path) -> dict[str, Vectors]:
    """Return the vectors of each token."""
    if isinstance(content, Tensor):
        return {path.stem: {"": content}}
    if isinstance(content, dict) and "string_to_param" in content:
        params = content["string_to_param"]
        values = [*params.values()] if isinstance(params, Mapping | nn.ParameterDict) else []
        if len(values) == 1:
            return {content.get("name") or path.stem: {"": values[0]}}
    elif isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
        if content.keys() <= ENCODERS.keys():
            return {path.stem if any(key.startswith("clip_") for key in content) else PIVOTAL: content}
        if others := content.keys() - ENCODERS.keys() if content.keys() & ENCODERS.keys() else set():
            raise CheckpointError(
                f"{path} holds a textual inversion for {', '.join(sorted(others))} too, a text encoder that ldm does not have; "
                "use one for SD 1, SD 2 or SDXL."
            )
        if content.keys() == {"emb_params"}:
            return {path.stem: {"": content["emb_params"]}}
        if all(value.ndim in (1, 2) and not WEIGHT.search(key) for key, value in content.items()):
            return {key: {"": value} for key, value in content.items()}
    raise CheckpointError(f"{path} holds no textual inversion; name a file such as {FILES[0]}.")


def _pivotal(vectors: Vectors, path: Path) -> dict[str, Vectors]:
    """Name the vectors ``<s0>``, ``<s1>``, ..., as the training scripts of diffusers do."""
    return _renamed(vectors, [f"<s{index}>" for index in range(len(_rows(next(iter(vectors.values())), path)))], path)


def _renamed(vectors: Vectors, token: str | Sequence[str], path: Path) -> dict[str, Vectors]:
    """Return the vectors under another token, or each row under a token of its own."""
    if isinstance(token, str):
        return {token: vectors}
    rows = {name: _rows(each, path) for name, each in vectors.items()}
    for each in rows.values():
        if len(each) != len(token):
            raise CheckpointError(
                f"{path} holds {len(each)} vectors, but {len(token)} tokens are given; give one for each."
            )
    return {each: {name: rows[name][index] for name in rows} for index, each in enumerate(token)}


def _inversion(token: Any, vectors: Vectors, model: Any, path: Path, adapter: str | None = None) -> TextualInversion:
    """Check the vectors against the text encoders of a model."""
    if not isinstance(token, str) or not token.strip() or not token.isprintable() or len(token) > 200:
        raise CheckpointError(f"{path} has the invalid token {str(token)[:50]!r}; give another token.")
    encoders = {name: tower.config.width for name, tower in text_towers(model.conditioner).items()}
    if not encoders:
        raise CheckpointError(
            f"{path} holds a textual inversion, but this model has no CLIP text encoder to add it to."
        )
    rows = {name: _rows(each, path) for name, each in vectors.items()}
    check_finite(rows, path)
    first = next(iter(encoders))
    own = {ENCODERS.get(name, first): each for name, each in rows.items()}
    widths = {name: own[name].shape[1] for name in sorted(own)}
    if widths != encoders:
        raise CheckpointError(
            f"{path} holds a textual inversion of {_described(widths)}, but this model needs {_described(encoders)}; "
            "use one that was trained on this kind of model."
        )
    if len({len(each) for each in own.values()}) > 1:
        raise CheckpointError(
            f"{path} holds different numbers of vectors for the two text encoders; download it again."
        )
    return TextualInversion(token, own, fingerprint(rows, {}), adapter)


def _rows(vectors: Tensor, path: Path) -> Tensor:
    """Return vectors as ``[k width]``."""
    rows = vectors.detach()[None] if vectors.ndim == 1 else vectors.detach()
    if rows.ndim != 2 or not rows.numel() or not rows.is_floating_point() or rows.layout != torch.strided:
        raise CheckpointError(
            f"{path} holds vectors of the shape {list(vectors.shape)} and dtype {vectors.dtype}; download it again."
        )
    return rows.clone()


def _described(widths: Mapping[str, int]) -> str:
    """Describe the widths of text encoders, with the kind of model that has them."""
    family = FAMILIES.get(tuple(widths.values()))
    return f"width {' and '.join(map(str, widths.values()))}" + (f" ({family})" if family else "")
