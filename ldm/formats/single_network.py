"""Writing of single networks: a first stage, a denoiser, a text or image encoder, a CLIP."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.errors import CheckpointError
from ldm.formats import target, writing
from ldm.formats.checkpoint import CLIP_COMPONENTS, OTHERS, Checkpoint, Part, joined
from ldm.formats.clip import clip_of, save_clip
from ldm.formats.native import CONFIG_BY_FORMAT, load_strictly, save_state, written_state
from ldm.formats.network_folder import network_files
from ldm.formats.single_file import write_single_network
from ldm.formats.tensors import check_finite
from ldm.formats.tokenizer import write_tokenizer

LATENT_SIZE, IMAGE_SIZE = (64, 64), (512, 512)
"""Sizes written to the configs of networks without a model."""


def formats_of(part: Part) -> list[str]:
    """Return the formats that a network is written to by itself: native, ldm, or the library of a folder."""
    native = [held for held, config in CONFIG_BY_FORMAT.items() if issubclass(type(part.config), config)]
    file = ["ldm"] if part.kind.single_file else []
    return ["native"][: len(native)] + file + [form.library for form in part.kind.folders]


def save_single_network(found: Checkpoint, path: Path, to: str, dtype: torch.dtype | None = None) -> Path:
    """Write the one network, or the CLIP, that a source holds, and return the file or folder.

    Args:
        found: result of :func:`ldm.formats.read`.
        path: a file name that ends in .safetensors for native and ldm, else a folder.
        to: a format of the network, see :func:`formats_of`.
        dtype: dtype of the weights; None: unchanged.

    Raises:
        CheckpointError: the source holds several networks but not a complete model, or the network has no such format.
    """
    parts = {name: part if name == OTHERS else part.to(dtype) for name, part in found.parts.items()}
    if len(parts) > 1 and OTHERS not in parts:
        held, missing = " and ".join(parts), ", ".join(found.missing())
        raise CheckpointError(
            f"{found.source} holds {held}, which is neither a complete model nor a single network; name what is missing "
            f"({missing})."
        )
    network = parts[OTHERS] if OTHERS in parts else next(iter(parts.values()))
    formats = formats_of(network)
    if to not in formats:
        raise CheckpointError(
            f"a single {network.kind.name} is written as {', '.join(formats) or 'no format'}, not as {to}; choose one of them."
        )
    for part in parts.values():
        check_finite(part.state, found.source)
    path = target(path, to)
    if found.layout == "native" and OTHERS not in parts:  # else it was checked while it was read
        written_state(network.state, network.config.build, path)
    with writing(path):
        if to == "native":
            held = next(held for held, config in CONFIG_BY_FORMAT.items() if issubclass(type(network.config), config))
            state = joined(parts, CLIP_COMPONENTS) if OTHERS in parts else network.state
            save_state(path, held, state, network.config, found.tokenizer, found.provenance)
        elif to == "ldm":
            write_single_network(path, next(iter(parts)), network)
        elif OTHERS in parts:
            clip = clip_of(found)
            load_strictly(clip, joined(parts, CLIP_COMPONENTS), found.source)
            save_clip(clip, found.tokenizer, path, "transformers" if to == "transformers" else "open_clip")
        else:
            form = next(form for form in network.kind.folders if form.library == to)
            network_files(form, network, LATENT_SIZE if form.sized_in_latents else IMAGE_SIZE).write(path)
            if found.tokenizer is not None and form.reads_text:
                write_tokenizer(found.tokenizer, path)
    return path
