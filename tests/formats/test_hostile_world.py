"""LDM files and diffusers folders that are broken or made to do harm, as :mod:`tests.formats.test_hostile` has it of our own."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.errors import LdmError
from ldm.formats import load, read, save
from ldm.formats.tensors import fingerprint
from tests.formats.test_hostile import (
    BAD,
    Loaded,
    as_model,
    bruised,
    chunk,
    harmless,
    leaves,
    refuse_or_tell,
    replaced,
    rewritten_headers,
    rewritten_metadata,
)
from tests.tiny import TOKENIZER, tiny_model

__all__ = ["harmless"]  # a fixture
TOWER = {"vocab_size": TOKENIZER.vocab_size, "context_length": 12, "width": 64, "layers": 1, "heads": 1}
UNET = {"kind": "unet", "levels": [{"width": 64, "blocks": 1, "depth": 1}], "context_width": 64, "head_width": 64}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save(tiny_model(), tmp_path_factory.mktemp("own") / "one.safetensors", "ldm", torch.float16).read_bytes()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Without metadata, of a model whose heads follow the rule."""
    path = tmp_path_factory.mktemp("bare") / "bare.safetensors"
    vae = {"kind": "autoencoder_kl", "widths": [32], "blocks": 1}
    model = tiny_model(first_stage=vae, conditioner={"kind": "text", "tower": TOWER}, denoiser=UNET)
    save_file(load_file(save(model, path, "ldm", torch.float16)), path, {"format": "pt"})
    return path.read_bytes()


def as_parts(path: Path) -> Loaded:
    found = read(path)
    states = {f"{name}.{key}": each for name, part in found.parts.items() for key, each in part.state.items()}
    return fingerprint(states, {}), found.parts["denoiser"].config, states


def test_bruised_files_of_ours(own: bytes, tmp_path: Path, harmless: None) -> None:
    path, start = tmp_path / "one.safetensors", 8 + int.from_bytes(own[:8], "little")
    path.write_bytes(own)
    refuse_or_tell(bruised(own, 1, 16, (0, 8, start)), path, as_model, as_model(path))


def test_files_of_ours_with_other_headers(own: bytes, tmp_path: Path, harmless: None) -> None:
    path = tmp_path / "one.safetensors"
    path.write_bytes(own)
    refuse_or_tell(rewritten_headers(own), path, as_model, as_model(path))


def test_files_of_ours_with_other_metadata(own: bytes, tmp_path: Path, harmless: None) -> None:
    path = tmp_path / "one.safetensors"
    path.write_bytes(own)
    refuse_or_tell(chunk(rewritten_metadata(own), 0), path, as_model, as_model(path))


def test_foreign_files(bare: bytes, tmp_path: Path, harmless: None) -> None:
    path, start = tmp_path / "bare.safetensors", 8 + int.from_bytes(bare[:8], "little")
    path.write_bytes(bare)
    mutations = bruised(bare, 2, 24, (0, 8, start)) | rewritten_headers(bare)
    refuse_or_tell(mutations, path, as_parts, as_parts(path))


PARTS = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)


def mutated(text: str, seed: int) -> Iterator[tuple[str, str]]:
    values, draw = json.loads(text), random.Random(seed)
    for place in leaves(values):
        for value in draw.sample(BAD, 2):
            yield f"{'.'.join(map(str, place))} = {value}", json.dumps(replaced(values, place, value))
    for broken in ("", "{", "[" * 100_000, text[: len(text) // 2], '{"_target_": "os.system"}'):
        yield f"{broken[:20]!r}", broken


@pytest.mark.parametrize("part", PARTS)
def test_folders_with_other_configs(part: str, tmp_path: Path, harmless: None) -> None:
    """Each is refused in a sentence that names a file of the folder, or makes a whole model."""
    folder = save(tiny_model(), tmp_path / "folder", "diffusers")
    text, wrong = (folder / part).read_text(), {}
    for name, content in mutated(text, PARTS.index(part)):
        (folder / part).write_text(content)
        try:
            load(folder)
        except LdmError as error:
            told = str(error)
            if not (told.isprintable() and "folder" in told and len(told) < 1000):
                wrong[name] = f"tells {told[:500]!r}"
        except BaseException as error:
            wrong[name] = f"raises {type(error).__name__}: {error}"
    assert not wrong, "\n".join(f"{name}: {told}" for name, told in wrong.items())


@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan, None, [0.5, 0.5]])
def test_a_folder_without_a_scale_says_so(scale: object, tmp_path: Path) -> None:
    config = save(tiny_model(), tmp_path / "folder", "diffusers") / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": scale}))
    with pytest.raises(LdmError, match=r"vae/config\.json does not say how latents are normalised"):
        load(tmp_path / "folder")


@pytest.mark.parametrize("gone", [*PARTS[1:5], "unet/diffusion_pytorch_model.safetensors", "tokenizer"])
def test_a_folder_with_a_missing_part_names_it(gone: str, tmp_path: Path) -> None:
    folder = save(tiny_model(), tmp_path / "folder", "diffusers")
    (folder / gone).rename(tmp_path / "gone")
    with pytest.raises(LdmError, match=gone.partition("/")[0]):
        load(folder)
