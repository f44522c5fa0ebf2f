"""CLIP as transformers and open_clip store it, read into our towers and written from them.

|            | transformers                             | open_clip                                        |
|------------|------------------------------------------|--------------------------------------------------|
| config     | ``config.json``                          | ``open_clip_config.json``, or the shapes         |
| weights    | ``model.safetensors`` (or .bin, sharded) | ``open_clip_model.safetensors`` (or .bin)        |
| pixels     | ``preprocessor_config.json``             | ``preprocess_cfg`` in the config                 |
| tokenizer  | ``tokenizer.json`` or ``vocab.json``     | its own, or a folder's if the config names one   |
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.clip.image import ViTConfig
from ldm.clip.model import CLIP, CLIPConfig
from ldm.clip.text import TextTowerConfig
from ldm.clip.tokenizer import CLIP_VOCAB_SIZE, Tokenizer, clip_bpe, clip_merges
from ldm.errors import CheckpointError, some, unknown
from ldm.formats import configs, names
from ldm.formats.checkpoint import OTHERS, Checkpoint, Part, conditioner_of, joined, of_clip
from ldm.formats.native import empty, load_strictly
from ldm.formats.tensors import (
    CONFIG,
    TRANSFORMERS,
    read_json,
    read_tensors,
    read_weights,
    write_atomically,
    write_tensors,
)
from ldm.formats.tokenizer import has_tokenizer, read_tokenizer, write_tokenizer

OPEN_CLIP_CONFIG = "open_clip_config.json"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
OPEN_CLIP_WEIGHTS = ("open_clip_model", "open_clip_pytorch_model", *TRANSFORMERS)
MODEL_TYPES = ("clip", "clip_text_model", "clip_vision_model")
"""``model_type`` of transformers' CLIP and of its towers by themselves."""

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that OpenAI's CLIP was trained on; of others' too, where nothing else is said."""

HEAD_WIDTH = 64
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
"""Of open_clip's image towers by their width (ViT-H, g, bigG, e), where it is not 64."""

OPEN_CLIP_FIXED: configs.Values = {
    **dict.fromkeys(("ls_init_value", "timm_model_name", "hf_model_name"), (None,)),
    "act_kwargs": (None, {}),
    "norm_kwargs": (None, {}, {"eps": 1e-5}),
    "block_type": (None, "default"),
    **dict.fromkeys(
        (
            "attentional_pool",
            "embed_cls",
            "final_ln_after_pool",
            "no_causal_mask",
            "no_ln_pre",
            "proj_bias",
            "qk_norm",
            "scale_attn",
            "scale_attn_inner",
            "scale_fc",
            "scale_heads",
            "scaled_cosine_attn",
        ),
        (False,),
    ),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
}
"""What our towers are by construction; both towers of an open_clip config have to say the same, or nothing."""

POOLS: dict[str, Literal["class", "mean"]] = {"tok": "class", "avg": "mean"}
"""open_clip's ``pool_type`` of an image tower, and ours."""


def load_clip(
    source: str | Path, quick_gelu: bool = False, dtype: torch.dtype | None = None
) -> tuple[CLIP, Tokenizer | None]:
    """A CLIP that transformers or open_clip wrote, in evaluation mode, its parameters frozen, and its tokenizer, if it has one.

    Args:
        source, quick_gelu: see :func:`read_clip`.
        dtype: of the weights; None: as they are stored.

    Raises:
        CheckpointError: as of :func:`read_clip`, or the source holds one tower alone, or a weight is NaN.
    """
    found = read_clip(Path(source), quick_gelu)
    if OTHERS not in found.parts:
        raise CheckpointError(f"{source} holds {found.kind}, and no whole CLIP; name one with both towers.")
    config = found.parts[OTHERS].config
    state = joined(found.parts, {"text": "text", "image": "image"})
    clip: CLIP = empty(config.build, state, source)
    load_strictly(clip, state, source, dtype)
    return clip.eval().requires_grad_(False), found.tokenizer


def read_clip(source: Path, quick_gelu: bool = False) -> Checkpoint:
    """A CLIP, or a tower of one, as parts ``text`` and ``image``; the context of the text tower is the last hidden state, normed.

    Args:
        source: a folder of a ``CLIPModel``, ``CLIPTextModel``, ``CLIPTextModelWithProjection`` or
            ``CLIPVisionModelWithProjection``; a folder of open_clip; or a file of the state of an open_clip model.
        quick_gelu: of such a file, which does not say it: whether it has OpenAI's activation. The default is open_clip's own.

    Raises:
        CheckpointError: there is none, it is broken, or it is one that our towers cannot be.
    """
    if not source.is_dir():
        tensors = _open_clip_state(read_tensors(source))
        return _open_clip(_derived(tensors, quick_gelu, source), {}, tensors, source, source)
    values = read_json(source / CONFIG) if (source / CONFIG).is_file() else {}
    if values.get("model_type") in MODEL_TYPES:
        return _transformers(values, source)
    if not (source / OPEN_CLIP_CONFIG).is_file():
        raise CheckpointError(
            f"{source} is no CLIP; it needs a {CONFIG} of transformers whose model_type is {' or '.join(MODEL_TYPES)}, "
            f"or open_clip's {OPEN_CLIP_CONFIG}."
        )
    values = read_json(source / OPEN_CLIP_CONFIG)
    tensors, files = read_weights(source, OPEN_CLIP_WEIGHTS)
    config, pixels = values.get("model_cfg", values), values.get("preprocess_cfg", {})
    return _open_clip(config, pixels, _open_clip_state(tensors), files[0], source / OPEN_CLIP_CONFIG)


def is_clip(path: Path) -> bool:
    """Whether a folder is one that :func:`read_clip` reads, that of a diffusers pipeline being none."""
    model_type = read_json(path / CONFIG).get("model_type") if (path / CONFIG).is_file() else None
    return (path / OPEN_CLIP_CONFIG).is_file() or model_type in MODEL_TYPES


def is_open_clip(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the state of an open_clip model, an LDM file being none."""
    return any(name.startswith("visual.") for name in _open_clip_state(tensors))


def _checkpoint(source: Path, layout: str, parts: Mapping[str, Part], tokenizer: Tokenizer | None) -> Checkpoint:
    beside = source.parent / "tokenizer"  # where it is in a pipeline's folder
    if tokenizer is None and "text" in parts and has_tokenizer(beside):
        tokenizer = read_tokenizer(beside)
    kind = "CLIP" if OTHERS in parts else f"a lone {' and '.join(parts)} tower"
    return Checkpoint(str(source), layout, kind, parts, tokenizer, conditioner_of(parts))


def save_clip(
    clip: CLIP, tokenizer: Tokenizer | None, folder: str | Path, to: Literal["transformers", "open_clip"]
) -> None:
    """The inverse of :func:`load_clip`: a folder that the library ``to`` opens, with the same tensors.

    open_clip cleans captions before it makes tokens of them, also where ``get_tokenizer`` finds ``tokenizer`` in the folder.

    Raises:
        CheckpointError: the library has no such CLIP.
    """
    folder, image = Path(folder), clip.config.image
    assert isinstance(image, ViTConfig), f"{type(image).__name__} is no vision transformer"
    text = clip.text.config
    if to == "transformers":
        files = {CONFIG: _write_transformers(text, image, clip), PREPROCESSORS[0]: _write_preprocessor(image)}
        weights, table = "model", names.clip_transformers
    elif to == "open_clip":
        files = {OPEN_CLIP_CONFIG: _write_open_clip(text, image, clip, tokenizer)}
        weights, table = "open_clip_model", names.clip_open_clip
    else:
        raise CheckpointError(unknown("layout of a CLIP", to, ("transformers", "open_clip")))
    state = clip.state_dict()
    write_tensors(folder / f"{weights}.safetensors", names.scatter(state, table(state)), {"format": "pt"})
    for name, values in files.items():
        write_atomically(folder / name, methodcaller("write_text", json.dumps(values, indent=2), encoding="utf-8"))
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder)


# transformers


def _transformers(values: configs.Values, folder: Path) -> Checkpoint:
    where, kind = folder / CONFIG, values["model_type"]
    tokenizer = read_tokenizer(folder) if kind != "clip_vision_model" and has_tokenizer(folder) else None
    embed_dim = values.get("projection_dim", 512)
    if kind == "clip_text_model":
        return _checkpoint(folder, "transformers", {"text": read_text_tower(values, folder)}, tokenizer)
    tensors, files = read_weights(folder, TRANSFORMERS)
    if kind == "clip_vision_model":
        image = _with_pixels(configs.read_image(values, where), folder)
        tensors = names.of_one_tower(tensors, "vision_model")
        wanted = empty(lambda: image.build(embed_dim), tensors, files[0]).state_dict()
        state = names.gather(tensors, names.image_transformers(wanted), wanted, files[0])
        return _checkpoint(folder, "transformers", {"image": Part(image, state)}, None)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    text = {**_section(values, "text", where), "projection_dim": embed_dim}
    image = _with_pixels(configs.read_image(_section(values, "vision", where), where), folder)
    with configs.reading(where):
        config = CLIPConfig(configs.read_text(text, where, projected=True), image, embed_dim)
    clip = Part.gathered(config, tensors, names.clip_transformers, files[0])
    return _checkpoint(folder, "transformers", of_clip(config, clip.state), tokenizer)


def read_text_tower(values: configs.Values, folder: Path) -> Part:
    """The text tower in a folder of transformers with these values in its ``config.json``.

    Raises:
        CheckpointError: it is broken, or is one that ours cannot be.
    """
    tensors, files = read_weights(folder, TRANSFORMERS)
    tensors = names.of_one_tower(tensors, "text_model")
    config = configs.read_text(values, folder / CONFIG, projected="text_projection.weight" in tensors)
    return Part.gathered(config, tensors, names.text_transformers, files[0])


def _section(values: configs.Values, tower: str, where: Path) -> dict[str, Any]:
    """The config of a tower; files of older versions say it twice, and the second goes."""
    sections = [values.get(f"{tower}_config") or {}, values.get(f"{tower}_config_dict") or {}]
    if not all(isinstance(section, dict) for section in sections):
        raise CheckpointError(f"{where}: {tower}_config is no section; get the folder anew.")
    return {**sections[0], **sections[1]}


def _with_pixels(config: ViTConfig, folder: Path) -> ViTConfig:
    """The tower for pixels normalised as the folder's preprocessor does it."""
    path = next((folder / name for name in PREPROCESSORS if (folder / name).is_file()), None)
    if path is None:
        return _normalized(config, MEAN, STD, folder)
    values = read_json(path)
    values = values.get("image_processor", values)
    if not isinstance(values, dict) or not values.get("do_rescale", True):
        raise CheckpointError(f"{path} does not bring pixels to [0, 1], which ldm's image tower is for.")
    if not values.get("do_normalize", True):
        return _normalized(config, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), path)
    return _normalized(config, values.get("image_mean") or MEAN, values.get("image_std") or STD, path)


def _normalized(config: ViTConfig, mean: Any, std: Any, where: Path) -> ViTConfig:
    with configs.reading(where):
        (red, green, blue), (red_std, green_std, blue_std) = map(float, mean), map(float, std)
        return replace(config, mean=(red, green, blue), std=(red_std, green_std, blue_std))


def _write_transformers(text: TextTowerConfig, image: ViTConfig, clip: CLIP) -> dict[str, Any]:
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": clip.config.embed_dim,
        "logit_scale_init_value": -math.log(clip.config.temperature),
        "text_config": configs.write_text(text),
        "vision_config": configs.write_image(image, clip.config.embed_dim or 0),
    }


def _write_preprocessor(image: ViTConfig) -> dict[str, Any]:
    size = {"height": image.image_size, "width": image.image_size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image.image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "do_convert_rgb": True,
    }


# open_clip


def _open_clip_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what training on several devices puts before each name."""
    several = all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module.") if several else name: tensor for name, tensor in tensors.items()}


def _open_clip(values: Any, pixels: Any, tensors: Mapping[str, Tensor], file: Path, where: Path) -> Checkpoint:
    with configs.reading(where):
        config = _read_open_clip(values, pixels, where)
    prefix = _text_prefix(tensors)
    clip = Part.gathered(config, tensors, lambda state: names.clip_open_clip(state, prefix), file)
    text, tokenizer = values["text_cfg"], None
    if text.get("hf_tokenizer_name"):
        tokenizer = read_tokenizer(where.parent) if has_tokenizer(where.parent) else None
    elif config.text.vocab_size == CLIP_VOCAB_SIZE:
        tokenizer = clip_bpe(clip_merges(), config.text.context_length, pad_id=0, pad_in_text=False)
    source = file if where == file else where.parent
    return _checkpoint(source, "open_clip", of_clip(config, clip.state), tokenizer)


def _read_open_clip(values: Any, pixels: Any, where: Path) -> CLIPConfig:
    vision = configs.checked(values["vision_cfg"], {}, {**OPEN_CLIP_FIXED, "pool_type": tuple(POOLS)}, where)
    text = configs.checked(values["text_cfg"], {}, {**OPEN_CLIP_FIXED, "pool_type": ("argmax", "eos")}, where)
    size, layers, width = vision.get("image_size", 224), vision.get("layers", 12), vision.get("width", 768)
    if not isinstance(layers, int):
        raise CheckpointError(f"{where}: the image tower is a ResNet; ldm reads vision transformers alone.")
    if isinstance(size, list):
        if len(set(size)) > 1:
            raise CheckpointError(f"{where}: the image tower takes images of {size}; ldm reads those of squares alone.")
        size = size[0]
    activation: Literal["gelu", "quick_gelu"] = "quick_gelu" if values.get("quick_gelu") else "gelu"
    image = ViTConfig(
        image_size=size,
        patch_size=vision.get("patch_size", 16),
        width=width,
        layers=layers,
        heads=width // vision.get("head_width", HEAD_WIDTH),
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        activation=activation,
        pool=POOLS[vision.get("pool_type", "tok")],
    )
    tower = TextTowerConfig(
        vocab_size=text.get("vocab_size", CLIP_VOCAB_SIZE),
        context_length=text.get("context_length", 77),
        width=text.get("width", 512),
        layers=text.get("layers", 12),
        heads=text.get("heads", 8),
        mlp_ratio=text.get("mlp_ratio", 4.0),
        activation=activation,
        embed_dim=values["embed_dim"],
        eos_id=text.get("eos_id", 2) if text.get("pool_type") == "eos" else None,
    )
    image = _normalized(image, pixels.get("mean") or MEAN, pixels.get("std") or STD, where)
    return CLIPConfig(tower, image, values["embed_dim"])


def _derived(tensors: Mapping[str, Tensor], quick_gelu: bool, source: Path) -> dict[str, Any]:
    """What the config of an open_clip folder would say, from the shapes of its weights."""
    text, image = _text_prefix(tensors), "visual."
    block = "transformer.resblocks.0.mlp.c_fc.weight"
    needed = {
        *(f"{text}{name}" for name in ("token_embedding.weight", "positional_embedding", "text_projection", block)),
        *(f"{image}{name}" for name in ("conv1.weight", "class_embedding", "positional_embedding", block)),
    }
    lacking = sorted(name for name in needed if name not in tensors or not tensors[name].numel())
    if lacking:
        raise CheckpointError(
            f"{source} holds no CLIP of open_clip with a vision transformer, for it lacks {some(lacking)}; "
            "name a folder with its config, if it is one of transformers."
        )

    def tower(prefix: str, width: int) -> dict[str, Any]:
        numbers = {re.match(rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.", name) for name in tensors}
        return {
            "width": width,
            "layers": len({number[1] for number in numbers if number}),
            "mlp_ratio": configs.ratio(len(tensors[prefix + block]), width),
        }

    vocabulary, patches = tensors[f"{text}token_embedding.weight"], tensors[f"{image}conv1.weight"]
    width, vision_width, patch = vocabulary.shape[-1], len(patches), patches.shape[-1]
    return {
        "embed_dim": tensors[f"{text}text_projection"].shape[-1],
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            **tower(image, vision_width),
            "head_width": HEAD_WIDTHS.get(vision_width, HEAD_WIDTH),
            "patch_size": patch,
            "image_size": math.isqrt(len(tensors[f"{image}positional_embedding"]) - 1) * patch,
        },
        "text_cfg": {
            **tower(text, width),
            "heads": width // HEAD_WIDTH,
            "vocab_size": len(vocabulary),
            "context_length": len(tensors[f"{text}positional_embedding"]),
        },
    }


def _text_prefix(tensors: Mapping[str, Tensor]) -> str:
    """A model whose text tower is a module of its own has it under that name."""
    return "text." if "text.token_embedding.weight" in tensors else ""


def _write_open_clip(
    text: TextTowerConfig, image: ViTConfig, clip: CLIP, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    if text.activation != image.activation:
        raise CheckpointError(
            f"both towers of open_clip's CLIP have one activation, not {text.activation} and {image.activation}; "
            "write a transformers folder instead."
        )
    vision_cfg = {
        "image_size": image.image_size,
        "patch_size": image.patch_size,
        "width": image.width,
        "layers": image.layers,
        "head_width": image.width // image.heads,
        "mlp_ratio": image.mlp_ratio,
        "pool_type": next(theirs for theirs, ours in POOLS.items() if ours == image.pool),
    }
    text_cfg: dict[str, Any] = {
        "vocab_size": text.vocab_size,
        "context_length": text.context_length,
        "width": text.width,
        "layers": text.layers,
        "heads": text.heads,
        "mlp_ratio": text.mlp_ratio,
    }
    if text.eos_id is not None:
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_id}
    if tokenizer is not None and tokenizer.vocab_size != CLIP_VOCAB_SIZE:
        text_cfg["hf_tokenizer_name"] = "."  # then open_clip looks for it in the folder
    return {
        "model_cfg": {
            "embed_dim": clip.config.embed_dim,
            "quick_gelu": text.activation == "quick_gelu",
            "vision_cfg": vision_cfg,
            "text_cfg": text_cfg,
        },
        "preprocess_cfg": {"mean": list(image.mean), "std": list(image.std)},
    }
