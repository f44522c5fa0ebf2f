"""Models on the Hugging Face hub: download of an id to a path that :mod:`ldm.formats` reads.

The cache, the progress bars and the environment variables (``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_OFFLINE``,
``HF_TOKEN``) are those of ``huggingface_hub``.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from ldm.errors import CheckpointError, first_line
from ldm.formats.kinds import KINDS
from ldm.formats.tensors import PICKLES, SAFETENSORS, STEMS

SETTINGS = ("scheduler", "tokenizer", "tokenizer_2")
"""Folders of a diffusers pipeline that are read in addition to those of its networks."""

STEM, SHARD = f"({'|'.join(STEMS)})", r"-\d+-of-\d+"
SAFE = (rf"{STEM}\.safetensors", rf"{STEM}({SHARD}\.safetensors|\.safetensors\.index\.json)")
PICKLED = (rf"{STEM}\.bin", rf"{STEM}({SHARD}\.bin|\.bin\.index\.json)")


def _weights(variant: str | None) -> list[str]:
    """Return the file name patterns of one set of weights, in order of preference; a folder may hold several sets."""

    def of_variant(name: str, ending: str) -> list[str]:
        part = re.escape(name)
        return [
            rf"{STEM}\.{part}\.{ending}",
            rf"{STEM}(\.{part}{SHARD}\.{ending}|{SHARD}\.{part}\.{ending}|\.{ending}\.index\.{part}\.json)",
        ]

    first = [pattern for ending in ("safetensors", "bin") if variant for pattern in of_variant(variant, ending)]
    return [*first, *SAFE, *of_variant("fp16", "safetensors"), *PICKLED]


NAME = r"(?![\w.-]*(?:--|\.\.))\w(?:[\w.-]*\w)?"
ID = re.compile(rf"{NAME}/({NAME})((?:/(?!\.\.?/)[^/\\]+)*)", re.ASCII)
"""Owner, model, and optionally the path of a file in it."""


def is_hub_id(source: str) -> bool:
    """Return whether ``source`` is ``"owner/name"`` or ``"owner/name/path/to/file.safetensors"``, and not a local path."""
    match = ID.fullmatch(source)
    if match is None or Path(source).exists():
        return False
    name, inside = match.groups()
    endings = (SAFETENSORS, *PICKLES)
    return inside.endswith(endings) if inside else not name.endswith(endings)


def fetch(source: str, revision: str | None = None, subfolder: str | None = None, variant: str | None = None) -> Path:
    """Return the cached folder or file of ``source``, downloading the files that ldm reads.

    If the hub is unreachable or denies access, files that were downloaded before are used.

    Args:
        source: see :func:`is_hub_id`. Without a file name, it is the model in diffusers' layout, else the weights with the
            usual name, else the only weight file at the root.
        revision: a branch, tag or commit; default: the main branch.
        subfolder: folder of the repository that is read in place of its root.
        variant: preferred variant of the weights, such as ``fp16``.

    Raises:
        CheckpointError: it is neither on the hub nor in the cache, it needs a token, or it is ambiguous.
    """
    from huggingface_hub import HfApi, snapshot_download

    owner, name, *inside = source.split("/", 2)
    model = f"{owner}/{name}"
    try:
        siblings = HfApi().model_info(model, revision=revision).siblings or []
    except Exception as error:  # of huggingface_hub, or of its HTTP library
        try:  # _choose also fails if the files are not in the cache
            folder = Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=[]))
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
            chosen = _choose(source, inside, files, subfolder, variant)
        except Exception:
            raise CheckpointError(_error_message(error, source, revision)) from None
    else:
        chosen = _choose(source, inside, [sibling.rfilename for sibling in siblings], subfolder, variant)
        try:
            patterns = [glob.escape(file) for file in chosen]
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
        except Exception as error:
            raise CheckpointError(_error_message(error, source, revision)) from None
    root = folder / subfolder if subfolder else folder
    return folder / chosen[0] if len(chosen) == 1 else root


def _choose(
    source: str, inside: Sequence[str], files: Sequence[str], subfolder: str | None, variant: str | None
) -> list[str]:
    """Return those files of a repository that are read."""
    if subfolder is not None:
        start = f"{subfolder.strip('/')}/"
        within = [file.removeprefix(start) for file in files if file.startswith(start)]
        if not within:
            raise CheckpointError(f"{source} on the hub has no folder {subfolder!r}; name one that it has.")
        chosen = [start + file for file in _choose(f"{source}/{subfolder}", inside, within, None, variant)]
        folder = f"{start.rstrip('/').rpartition('/')[0]}/tokenizer/".lstrip("/")  # that of a text encoder
        return chosen + (_part(files, folder, None)[0] if len(chosen) > 1 else [])
    singles = [file for file in files if "/" not in file and file.endswith((".safetensors", ".ckpt"))]
    if inside:
        if inside[0] not in files:
            raise CheckpointError(
                f"there is no file {source}, neither locally nor on the hub; that model has "
                f"{', '.join(singles) or 'no weights'} at its root."
            )
        return [inside[0]]
    if "model_index.json" in files:
        networks = [(folder, component, kind.name) for kind in KINDS.values() for form in kind.folders
                    for folder, component in form.folders.items()]  # fmt: skip
        parts = {
            part: _part(files, f"{part}/", variant)
            for part in sorted({*SETTINGS, *(folder for folder, _, _ in networks)})
        }
        denoisers = {folder: name for folder, component, name in networks if component == "denoiser"}
        if not any(parts[folder][1] for folder in denoisers):
            known = " or ".join(f"a {name} in {folder}/" for folder, name in denoisers.items())
            raise CheckpointError(f"{source} on the hub has no weights of {known}; name another model.")
        return ["model_index.json", *(file for texts, weights in parts.values() for file in texts + weights)]
    texts, weights = _part(files, "", variant)
    if weights:
        return texts + weights
    if not singles:
        raise CheckpointError(
            f"{source} on the hub has neither a model_index.json nor a .safetensors or .ckpt file at its root; "
            f'name a file in it: "{source}/path/to/file.safetensors".'
        )
    if len(singles) > 1:
        raise CheckpointError(
            f'{source} on the hub has several models, {", ".join(singles)}; name one of them: "{source}/{singles[0]}".'
        )
    return singles


def _part(files: Sequence[str], folder: str, variant: str | None) -> tuple[list[str], list[str]]:
    """Return the config and tokenizer files directly in ``folder``, and the one set of weights to read."""
    names = [file[len(folder) :] for file in files if file.startswith(folder)]
    texts = [n for n in names if "/" not in n and n.endswith((".json", "merges.txt")) and ".index." not in n]
    sets = ([n for n in names if re.fullmatch(pattern, n)] for pattern in _weights(variant))
    weights = next(filter(None, sets), [])
    return [folder + n for n in texts], [folder + n for n in weights]


def _error_message(error: Exception, source: str, revision: str | None) -> str:
    """Return the error message for a ``source`` that cannot be downloaded."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    hub, login = f"the hub ({constants.ENDPOINT})", "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"{source} is gated on {hub}; request access on its page there, then {login}."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{source} has no revision {revision or 'main'!r} on {hub}; name a branch, a tag or a commit."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no local folder or file {source}, and no such model on {hub}; "
            f"check the name, or {login} if it is private."
        )
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return f"{hub} denies access to {source}; {login} with a token that has access."
    return (
        f"there is no local folder or file {source}, and it cannot be downloaded from {hub}: {first_line(error)}; "
        "check the name and the connection, and try again."
    )
