"""CLIP with both encoders in transformers folders, and in open_clip folders and files."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal

from ldm.clip import image_formats
from ldm.clip.image import ViTConfig
from ldm.clip.image_formats import MEAN, STD, ImageFolder, normalized
from ldm.clip.model import CLIPConfig
from ldm.clip.text import TextTowerConfig
from ldm.clip.text_formats import TextFolder, open_clip_table
from ldm.clip.tokenizer import CLIP_VOCAB_SIZE, Tokenizer, clip_bpe, clip_merges
from ldm.errors import CheckpointError, some
from ldm.nn.network_format import (
    FolderFormat,
    KeyMapping,
    KeyTable,
    NetworkKind,
    State,
    Values,
    checked,
    count,
    prefixed,
    ratio,
    reading,
    register,
)

HEAD_WIDTH = 64
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
"""Channels of a head in open_clip's image encoders by width (ViT-H, g, bigG, e), if it is not 64."""

OPEN_CLIP_FIXED: Values = {
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
"""Values in both sections of an open_clip config that ldm's encoders assume."""

POOLS: dict[str, Literal["class", "mean"]] = {"tok": "class", "avg": "mean"}
"""Values of ``pool`` by open_clip's ``pool_type`` of an image encoder."""


class CLIPTransformers(FolderFormat):
    """Format of transformers' ``CLIPModel``."""

    component = ""
    reads_text = True
    library = "transformers"
    classes = ("clip",)
    marks = ("text_model.", "vision_model.")
    weights = ("model", "pytorch_model")
    text, image = TextFolder(), ImageFolder()

    def key_table(self, config: CLIPConfig, names: Iterable[str], values: Values) -> KeyTable:
        return _encoders(
            names,
            lambda text: self.text.key_table(config.text, text, values),
            lambda image: self.image.key_table(config.image, image, values),  # type: ignore[arg-type]
        )

    def read_config(self, values: Values, names: Collection[str], where: object) -> CLIPConfig:
        embed_dim = values.get("projection_dim", 512)
        text = {**_section(values, "text", where), "projection_dim": embed_dim}
        vision = {**_section(values, "vision", where), "preprocessor": values.get("preprocessor", {})}
        image = self.image.read_config(vision, names, where)
        with reading(where):
            return CLIPConfig(self.text.read_config(text, ("text_projection.weight",), where), image, embed_dim)

    def write_config(self, config: CLIPConfig, size: tuple[int, int], extra: Values) -> dict[str, Any]:
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config.embed_dim,
            "logit_scale_init_value": -math.log(config.temperature),
            "text_config": self.text.write_config(config.text, size, {}),
            "vision_config": self.image.write_config(_vit(config), size, {"projection_dim": config.embed_dim or 0}),
        }

    def write_preprocessor(self, config: CLIPConfig) -> dict[str, Any]:
        return self.image.write_preprocessor(_vit(config))


class CLIPOpenCLIP(FolderFormat):
    """Format of open_clip's ``CLIP`` and ``CustomTextCLIP``, whose text encoder is a separate module."""

    component = ""
    reads_text = True
    library = "open_clip"
    classes = ()
    weights = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
    config_file = "open_clip_config.json"
    marks = ("visual.",)

    def key_table(self, config: CLIPConfig, names: Iterable[str], values: Values) -> KeyTable:
        return _encoders(
            names, open_clip_table, lambda image: prefixed("visual.", open_clip_table(image, image_formats.OPEN_CLIP))
        )

    def canonical_name(self, name: str) -> str:
        """Remove the prefix of a separate text module."""
        return name.removeprefix("text.")

    def read_config(self, values: Values, names: Collection[str], where: object) -> CLIPConfig:
        with reading(where):
            return self._read_config(values.get("model_cfg", values), values.get("preprocess_cfg", {}), where)

    def _read_config(self, values: Any, pixels: Any, where: object) -> CLIPConfig:
        vision = checked(values["vision_cfg"], {}, {**OPEN_CLIP_FIXED, "pool_type": tuple(POOLS)}, where)
        text = checked(values["text_cfg"], {}, {**OPEN_CLIP_FIXED, "pool_type": ("argmax", "eos")}, where)
        size, layers, width = vision.get("image_size", 224), vision.get("layers", 12), vision.get("width", 768)
        if not isinstance(layers, int):
            raise CheckpointError(f"{where}: the image encoder is a ResNet; ldm reads only vision transformers.")
        if isinstance(size, list):
            if len(set(size)) > 1:
                raise CheckpointError(
                    f"{where}: the image encoder takes images of {size}; ldm reads only encoders for square images."
                )
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
        encoder = TextTowerConfig(
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
        image = normalized(image, pixels.get("mean") or MEAN, pixels.get("std") or STD, where)
        return CLIPConfig(encoder, image, values["embed_dim"])

    def write_config(self, config: CLIPConfig, size: tuple[int, int], extra: Values) -> dict[str, Any]:
        """Convert a config to JSON; ``extra`` has further values of the section ``text_cfg``."""
        text, image = config.text, _vit(config)
        if text.activation != image.activation:
            raise CheckpointError(
                f"both encoders of open_clip's CLIP have one activation, not {text.activation} and {image.activation}; "
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
            **({} if text.eos_id is None else {"pool_type": "eos", "eos_id": text.eos_id}),
            **extra,
        }
        return {
            "model_cfg": {
                "embed_dim": config.embed_dim,
                "quick_gelu": text.activation == "quick_gelu",
                "vision_cfg": vision_cfg,
                "text_cfg": text_cfg,
            },
            "preprocess_cfg": {"mean": list(image.mean), "std": list(image.std)},
        }

    def tokenizer(self, config: CLIPConfig, values: Values) -> Tokenizer | None:
        """Return open_clip's own tokenizer, unless the config names another or the vocabulary differs."""
        named = values.get("model_cfg", values)["text_cfg"].get("hf_tokenizer_name")
        if named or config.text.vocab_size != CLIP_VOCAB_SIZE:
            return None
        return clip_bpe(clip_merges(), config.text.context_length, pad_id=0, pad_in_text=False)

    def infer_values(self, tensors: State, quick_gelu: bool, source: object) -> dict[str, Any]:
        """Infer the JSON config from names and shapes, and from the conventions of published models for the rest.

        Args:
            tensors: by canonical names.
            quick_gelu: whether the activation is OpenAI's.
            source: file, for error messages.

        Raises:
            CheckpointError: it is not an open_clip CLIP with a vision transformer.
        """
        block, image = "transformer.resblocks.0.mlp.c_fc.weight", "visual."
        needed = {"token_embedding.weight", "positional_embedding", "text_projection", block}
        needed |= {image + name for name in ("conv1.weight", "class_embedding", "positional_embedding", block)}
        lacking = sorted(name for name in needed if name not in tensors or not tensors[name].numel())
        if lacking:
            raise CheckpointError(
                f"{source} holds no open_clip CLIP with a vision transformer: it lacks {some(lacking)}; "
                "if it is one of transformers, name the folder with its config."
            )

        def encoder(prefix: str, width: int) -> dict[str, Any]:
            return {
                "width": width,
                "layers": count(tensors, rf"{prefix}transformer\.resblocks\.(\d+)\."),
                "mlp_ratio": ratio(len(tensors[prefix + block]), width),
            }

        vocabulary, patches = tensors["token_embedding.weight"], tensors["visual.conv1.weight"]
        width, vision_width, patch = vocabulary.shape[-1], len(patches), patches.shape[-1]
        return {
            "embed_dim": tensors["text_projection"].shape[-1],
            "quick_gelu": quick_gelu,
            "vision_cfg": {
                **encoder(image, vision_width),
                "head_width": HEAD_WIDTHS.get(vision_width, HEAD_WIDTH),
                "patch_size": patch,
                "image_size": math.isqrt(len(tensors["visual.positional_embedding"]) - 1) * patch,
            },
            "text_cfg": {
                **encoder("", width),
                "heads": width // HEAD_WIDTH,
                "vocab_size": len(vocabulary),
                "context_length": len(tensors["positional_embedding"]),
            },
        }


def _vit(config: CLIPConfig) -> ViTConfig:
    if not isinstance(config.image, ViTConfig):
        kind = getattr(config.image, "kind", "none")
        raise CheckpointError(
            f"the image encoder is of the kind {kind}, but only vit has other formats; write a native file."
        )
    return config.image


def _section(values: Values, encoder: str, where: object) -> dict[str, Any]:
    """Return the config of an encoder; files of older versions have it twice, and the second takes precedence."""
    sections = [values.get(f"{encoder}_config") or {}, values.get(f"{encoder}_config_dict") or {}]
    if not all(isinstance(section, dict) for section in sections):
        raise CheckpointError(f"{where}: {encoder}_config is not a JSON object; download the folder again.")
    return {**sections[0], **sections[1]}


def _encoders(
    names: Iterable[str], text: Callable[[list[str]], KeyTable], image: Callable[[list[str]], KeyTable]
) -> KeyTable:
    """Join the tables of both encoders, whose names have the prefixes ``text.`` and ``image.`` in our CLIP."""
    listed, table = [*names], {"logit_scale": KeyMapping("logit_scale")}
    for prefix, of_encoder in (("text.", text), ("image.", image)):
        own = [name.removeprefix(prefix) for name in listed if name.startswith(prefix)]
        table |= {prefix + ours: mapping for ours, mapping in of_encoder(own).items()}
    return table


register(NetworkKind(CLIPConfig, "CLIP", folders=(CLIPTransformers(), CLIPOpenCLIP())))
