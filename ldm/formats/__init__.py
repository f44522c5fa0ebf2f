"""Files of models: one door for all of them."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from ldm.errors import CheckpointError
from ldm.formats.hub import fetch, is_hub_id
from ldm.formats.native import load_model
from ldm.model import LatentDiffusion

SHIPPED = "emoji"
"""The name of the model that comes along."""

MODEL_FILE = "model.safetensors"
"""The whole model in a run folder, after its last stage."""

ASSETS = Path(__file__).parents[1] / "assets"


def load(source: str | PathLike[str] = SHIPPED, revision: str | None = None) -> LatentDiffusion:
    """A whole model in fp32 on the CPU, in evaluation mode, its parameters frozen.

    Args:
        source: ``"emoji"`` for the shipped model (a folder of that name is ``"./emoji"``), a run folder or
            any other with a ``model.safetensors`` in it, such a file, or what :func:`ldm.formats.hub.fetch` takes.
        revision: of a model on the hub: a branch, tag or commit.

    Raises:
        CheckpointError: there is nothing that can be read, or it does not fit its own config.
    """
    if isinstance(source, str) and is_hub_id(source):
        source = fetch(source, revision)
    elif revision is not None:
        raise CheckpointError(f"{source} is no model on the hub, so it has no revision {revision!r}; leave that out.")
    return load_model(find(source))


def find(source: str | PathLike[str]) -> Path:
    """The file that :func:`load` reads for ``source``.

    Raises:
        CheckpointError: saying what is there instead.
    """
    if source == SHIPPED:
        return _existing(ASSETS / MODEL_FILE, "this installation lacks the shipped model; install ldm anew.")
    path = Path(source)
    if (path / "model_index.json").is_file():
        raise CheckpointError(f"{path} is a diffusers folder; only files that ldm wrote can be read.")
    if path.is_dir():
        return _existing(
            path / MODEL_FILE,
            f"{path} holds no {MODEL_FILE}; a run has one after its last stage (tools/train.py --stage all).",
        )
    _existing(path, f"there is no model {path}; name a run folder, a file, a hub id, or {SHIPPED!r}.")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is no .safetensors file; only files that ldm wrote can be read.")
    return path


def _existing(path: Path, otherwise: str) -> Path:
    if not path.is_file():
        raise CheckpointError(otherwise)
    return path
