"""CLIP in the formats of transformers and open_clip: reading and writing.

|            | transformers                             | open_clip                                        |
|------------|------------------------------------------|--------------------------------------------------|
| config     | ``config.json``                          | ``open_clip_config.json``, or the shapes         |
| weights    | ``model.safetensors`` (or .bin, sharded) | ``open_clip_model.safetensors`` (or .bin)        |
| pixels     | ``preprocessor_config.json``             | ``preprocess_cfg`` in the config                 |
| tokenizer  | ``tokenizer.json`` or ``vocab.json``     | its own, or a folder's if the config names one   |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.clip.model import CLIP, CLIPConfig
from ldm.clip.model_formats import CLIPOpenCLIP
from ldm.clip.tokenizer import CLIP_VOCAB_SIZE, Tokenizer
from ldm.errors import CheckpointError, unknown
from ldm.formats.checkpoint import CLIP_COMPONENTS, OTHERS, Checkpoint, Part, conditioner_of, joined, of_clip
from ldm.formats.kinds import KINDS
from ldm.formats.native import build_on_meta, innermost, load_strictly, written_state
from ldm.formats.network_folder import canonical, format_of, network_files, read_network_folder
from ldm.formats.tensors import CONFIG, read_json, read_tensors
from ldm.formats.tokenizer import write_tokenizer
from ldm.nn.network_format import outer_prefix
from ldm.paths import expanded

OPEN_CLIP = CLIPOpenCLIP()


def load_clip(
    source: str | Path, quick_gelu: bool = False, dtype: torch.dtype | None = None
) -> tuple[CLIP, Tokenizer | None]:
    """Load a CLIP that transformers or open_clip wrote, in evaluation mode, its parameters frozen, and its tokenizer if any.

    Args:
        source, quick_gelu: see :func:`read_clip`.
        dtype: dtype of the weights; None: as stored.

    Raises:
        CheckpointError: as :func:`read_clip`, or the source holds only one encoder, or a weight is NaN.
    """
    found = read_clip(Path(expanded(source)), quick_gelu)
    if OTHERS not in found.parts:
        raise CheckpointError(f"{source} holds {found.kind}, not a complete CLIP; name one with both encoders.")
    clip = clip_of(found)
    load_strictly(clip, joined(found.parts, CLIP_COMPONENTS), source, dtype)
    return clip.eval().requires_grad_(False), found.tokenizer


def clip_of(found: Checkpoint) -> CLIP:
    """Build the CLIP of a checkpoint, without weights."""
    state = joined(found.parts, CLIP_COMPONENTS)
    clip: CLIP = build_on_meta(found.parts[OTHERS].config.build, state, found.source)
    return clip


def read_clip(source: Path, quick_gelu: bool = False, variant: str | None = None) -> Checkpoint:
    """Read a CLIP, or one encoder of transformers' CLIP; values of weights are read only when they are used.

    Args:
        source: folder of transformers (``CLIPModel``, ``CLIPTextModel``, ``CLIPVisionModel``) or open_clip, or a file of
            weights that open_clip's training wrote.
        quick_gelu: whether such a file, which does not store the activation, uses OpenAI's QuickGELU; default: open_clip's GELU.
        variant: preferred variant of the weights in a folder, such as ``fp16``.

    Raises:
        CheckpointError: there is no CLIP, it is broken, or ldm's encoders do not support it.
    """
    if source.is_dir():
        if not is_clip(source):
            raise CheckpointError(
                f"{source} is not a CLIP; it needs a {CONFIG} of transformers' CLIP, or open_clip's {OPEN_CLIP.config_file}."
            )
        found = read_network_folder(source, variant)
        if found.layout != OPEN_CLIP.library:
            return found
        values = read_json(source / OPEN_CLIP.config_file)
        named = values.get("model_cfg", values)["text_cfg"].get("hf_tokenizer_name")
        return found if named else replace(found, tokenizer=OPEN_CLIP.tokenizer(found.parts[OTHERS].config, values))
    tensors, _ = canonical(read_tensors(source), OPEN_CLIP)
    values = OPEN_CLIP.infer_values(tensors, quick_gelu, source)
    config = OPEN_CLIP.read_config(values, tensors, source)
    parts = of_clip(config, Part.imported(config, tensors, OPEN_CLIP, source).state)
    tokenizer = OPEN_CLIP.tokenizer(config, values)
    return Checkpoint(str(source), OPEN_CLIP.library, "CLIP", parts, tokenizer, conditioner_of(parts))


def is_clip(path: Path) -> bool:
    """Return whether a folder is one that :func:`read_clip` reads; a pipeline folder is not."""
    form = format_of(path)
    return form is not None and form.library != "diffusers"


def is_open_clip(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether these are the state of an open_clip model (not an LDM file)."""
    outer = outer_prefix(tensors, OPEN_CLIP.marks)
    return any(name.removeprefix(outer).startswith(OPEN_CLIP.marks) for name in tensors)


def save_clip(
    clip: nn.Module, tokenizer: Tokenizer | None, folder: str | Path, to: Literal["transformers", "open_clip"]
) -> None:
    """Write a folder that the library ``to`` opens, with the same tensors; the inverse of :func:`load_clip`.

    open_clip cleans captions before tokenizing, also where ``get_tokenizer`` finds ``tokenizer`` in the folder.

    Raises:
        CheckpointError: the library has no such CLIP, or it could not be read again. Then nothing is written.
    """
    folder, forms = Path(expanded(folder)), {form.library: form for form in KINDS[CLIPConfig].folders}
    if to not in forms:
        raise CheckpointError(unknown("layout of a CLIP", to, forms))
    clip = innermost(clip, CLIP)
    config: CLIPConfig = replace(clip.config, text=clip.text.config)
    _, state = written_state(clip.state_dict(), config.build, folder)
    other_tokenizer = tokenizer is not None and tokenizer.vocab_size != CLIP_VOCAB_SIZE
    extra = {"hf_tokenizer_name": "."} if other_tokenizer else {}  # then open_clip looks for it in the folder
    network_files(forms[to], Part(config, state), (clip.image_size, clip.image_size), extra).write(folder)
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)
