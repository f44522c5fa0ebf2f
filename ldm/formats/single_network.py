"""Networks by themselves, written: an autoencoder, a U-Net, a CLIP.

|             | native | ldm | diffusers | transformers | open_clip |
|-------------|--------|-----|-----------|--------------|-----------|
| autoencoder | yes    | yes | yes       |              |           |
| U-Net       |        | yes | yes       |              |           |
| CLIP        | yes    |     |           | yes          | yes       |
"""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.clip.model import CLIP as CLIPNetwork
from ldm.errors import CheckpointError
from ldm.formats import names, target, writing
from ldm.formats.checkpoint import OTHERS, Checkpoint, Part, joined
from ldm.formats.clip import save_clip
from ldm.formats.diffusers_folder import write_network
from ldm.formats.folding import SCALE, folded, scale_of
from ldm.formats.native import CLIP, FIRST_STAGE, empty, load_strictly, save_state
from ldm.formats.single_file import SCALE_FACTOR
from ldm.formats.tensors import check_finite, write_tensors

WRITTEN = {
    "vae": ("native", "ldm", "diffusers"),
    "unet": ("ldm", "diffusers"),
    "CLIP": ("native", "transformers", "open_clip"),
}
"""Formats of each network."""


def save_lone(found: Checkpoint, path: Path, to: str, dtype: torch.dtype | None = None) -> Path:
    """Write the one network that a source holds, and return the file or folder.

    Args:
        found: what :func:`ldm.formats.read` found.
        path: a file name that ends in .safetensors for native and ldm, else a folder.
        to: a format of ``WRITTEN``.
        dtype: of the weights; None: as they are.

    Raises:
        CheckpointError: the source holds none of these, or the network has no such format.
    """
    kind = "CLIP" if OTHERS in found.parts else next(iter(found.parts), "nothing")
    if kind not in WRITTEN or (kind != "CLIP" and len(found.parts) > 1):
        held, lone, missing = " and ".join(found.parts), ", ".join(WRITTEN), ", ".join(found.missing())
        raise CheckpointError(
            f"{found.source} holds {held}, which is neither a whole model nor a lone {lone}; name what is missing ({missing})."
        )
    if to not in WRITTEN[kind]:
        raise CheckpointError(
            f"a lone {kind} is written as {', '.join(WRITTEN[kind])}, not as {to}; choose one of them."
        )
    parts = {name: part if name == OTHERS else part.to(dtype) for name, part in found.parts.items()}
    for part in parts.values():
        check_finite(part.state, found.source)
    path = target(path, to)
    with writing(path):
        if kind == "CLIP":
            _save_clip(found, parts, path, to)
        elif to == "native":
            vae = parts["vae"]
            save_state(path, FIRST_STAGE, vae.state, vae.config, None, found.provenance)
        elif to == "ldm":
            _write_ldm(path, kind, parts[kind])
        else:
            write_network(path, kind, parts[kind], (64, 64) if kind == "unet" else (512, 512))
    return path


def _save_clip(found: Checkpoint, parts: dict[str, Part], path: Path, to: str) -> None:
    config, state = parts[OTHERS].config, joined(parts, {"text": "text", "image": "image"})
    if to == "native":
        save_state(path, CLIP, state, config, found.tokenizer, found.provenance)
        return
    clip: CLIPNetwork = empty(config.build, state, found.source)
    load_strictly(clip, state, found.source)
    save_clip(clip, found.tokenizer, path, "transformers" if to == "transformers" else "open_clip")


def _write_ldm(path: Path, kind: str, part: Part) -> None:
    """Names without a prefix, as such files are passed around; a scale that readers do not expect is said."""
    part = folded(part) if kind == "vae" else part
    table = (names.vae_ldm if kind == "vae" else names.unet_ldm)(part.config, part.weights)
    tensors = names.scatter(part.weights, table)
    scale = scale_of(part) if kind == "vae" else None
    if scale not in (None, SCALE):
        tensors[SCALE_FACTOR] = torch.tensor(scale)
    write_tensors(path, tensors, {"format": "pt"})
