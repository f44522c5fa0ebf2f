"""The text encoder in transformers folders, LDM files (with names of transformers or open_clip) and LoRA files."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from ldm.clip.text import TextTowerConfig
from ldm.errors import CheckpointError
from ldm.nn.network_format import (
    SAME,
    THIRDS,
    TRANSPOSED,
    FolderFormat,
    KeyMapping,
    KeyTable,
    Network,
    NetworkKind,
    Rules,
    SingleFileFormat,
    State,
    Values,
    checked,
    count,
    inferring,
    lora_spellings,
    ratio,
    reading,
    register,
    renamed,
)

HEAD_WIDTH = 64
"""Channels of an attention head in all published text encoders of Stable Diffusion."""

OPEN_CLIP_WIDTH = 1024
"""Least width of open_clip's text encoders in Stable Diffusion, which use GELU also where they have transformers' names."""

LEGACY_EOS = 2
"""The ``eos_token_id`` that older versions of transformers wrote; it means the highest token id."""

TRANSFORMERS: Rules = (
    (r"^token_embedding", "embeddings.token_embedding"),
    (r"^position_embedding$", "embeddings.position_embedding.weight"),
    (r"^blocks\.", "encoder.layers."),
    (r"\battn\.to_([qkv])", r"self_attn.\1_proj"),
    (r"\battn\.to_out", "self_attn.out_proj"),
    (r"\bnorm([12])", r"layer_norm\1"),
    (r"\bfc([12])", r"mlp.fc\1"),
    (r"^final_norm", "final_layer_norm"),
)
OPEN_CLIP: Rules = (
    (r"^position_embedding$", "positional_embedding"),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\battn\.to_[qkv]\.(weight|bias)", r"attn.in_proj_\1"),
    (r"\battn\.to_out", "attn.out_proj"),
    (r"\bnorm([12])", r"ln_\1"),
    (r"\bfc1", "mlp.c_fc"),
    (r"\bfc2", "mlp.c_proj"),
    (r"^final_norm", "ln_final"),
    (r"^projection\.weight", "text_projection"),
)

DEFAULTS: Values = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
}
"""Defaults of transformers' ``CLIPTextConfig``, for keys that a file omits."""

FIXED: Values = {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,)}
"""Values that both encoders of ldm's CLIP assume."""


def transformers_table(
    names: Iterable[str], rules: Rules = TRANSFORMERS, model: str = "text_model.", projection: str = "text_projection"
) -> KeyTable:
    """Return the key table of an encoder in transformers' CLIP, with the prefix ``model`` except for the projection."""
    return {
        name: KeyMapping(f"{projection}.weight" if name == "projection.weight" else model + renamed(name, rules))
        for name in names
    }


def open_clip_table(names: Iterable[str], rules: Rules = OPEN_CLIP) -> KeyTable:
    """Return the key table of an encoder in open_clip's CLIP: q, k and v are one tensor, the projection is transposed."""
    table = {}
    for name in names:
        part = re.search(r"\battn\.to_([qkv])\.", name)
        layout = THIRDS["qkv".index(part[1])] if part else TRANSPOSED if name == "projection.weight" else SAME
        table[name] = KeyMapping(renamed(name, rules), layout)
    return table


def canonical_transformers_name(name: str, model: str) -> str | None:
    """Add the prefix ``model`` (``text_model.``) to a name that lacks it; None for the temperature of a CLIP."""
    if name.endswith("logit_scale"):
        return None
    return name if name.startswith((model, "text_projection.", "visual_projection.")) else model + name


def read_transformer(given: Values) -> dict[str, Any]:
    """Convert the values that the JSON configs of both encoders have in common."""
    return {
        "width": given["hidden_size"],
        "layers": given["num_hidden_layers"],
        "heads": given["num_attention_heads"],
        "mlp_ratio": ratio(given["intermediate_size"], given["hidden_size"]),
        "activation": given["hidden_act"],
    }


def write_transformer(config: Any) -> dict[str, Any]:
    """Convert the fields that the configs of both encoders have in common; the inverse of :func:`read_transformer`."""
    return {
        "hidden_size": config.width,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
    }


class TextFolder(FolderFormat):
    """Format of transformers' ``CLIPTextModel``; the context is the last hidden state after the final norm."""

    component = "text_encoder"
    reads_text = True
    library = "transformers"
    folders: ClassVar = {"text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
    classes = ("clip_text_model",)
    marks = ("text_model.", "embeddings.token_embedding.")
    weights = ("model", "pytorch_model")

    def key_table(self, config: TextTowerConfig, names: Iterable[str], values: Values) -> KeyTable:
        return transformers_table(names)

    def canonical_name(self, name: str) -> str | None:
        return canonical_transformers_name(name, "text_model.")

    def read_config(self, values: Values, names: Collection[str], where: object) -> TextTowerConfig:
        given = checked(values, DEFAULTS, FIXED, where)
        with reading(where):
            eos = given["eos_token_id"]
            return TextTowerConfig(
                vocab_size=given["vocab_size"],
                context_length=given["max_position_embeddings"],
                **read_transformer(given),
                embed_dim=given["projection_dim"] if {"text_projection.weight", "text_projection"} & {*names} else None,
                eos_id=None if eos in (None, LEGACY_EOS) or eos >= given["vocab_size"] - 1 else eos,
            )

    def write_config(self, config: TextTowerConfig, size: tuple[int, int], extra: Values) -> dict[str, Any]:
        """Convert a config to JSON; the pipeline, not this JSON, sets which hidden state is the context."""
        return {
            "architectures": [self.class_name(config)],
            "dtype": "float32",  # diffusers' default; without it, transformers 5 uses the stored dtype
            "model_type": "clip_text_model",
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.context_length,
            **write_transformer(config),
            "projection_dim": config.embed_dim or config.width,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": LEGACY_EOS if config.eos_id is None else config.eos_id,
        }

    def class_name(self, config: TextTowerConfig) -> str:
        return "CLIPTextModelWithProjection" if config.embed_dim else "CLIPTextModel"

    def fitted(self, config: TextTowerConfig, state: State, assumed: Values) -> Network:
        """Omit the last block if the pipeline assumes the last hidden state but the context is the penultimate one."""
        norm, hidden_state = assumed["context_norm"], assumed["hidden_state"]
        if norm != config.context_norm or (hidden_state == "penultimate" and config.hidden_state == "last"):
            raise CheckpointError(
                f"diffusers pipelines with this number of text encoders cannot read the {config.hidden_state} hidden "
                f"state {'with' if config.context_norm else 'without'} the final norm; write a native or an LDM file."
            )
        if hidden_state == config.hidden_state:
            return config, state
        if config.embed_dim:
            raise CheckpointError(
                "the context is the last hidden state but one, and the pooled state that of the last, which pipelines of "
                "diffusers with one text encoder cannot read; write a native or an LDM file."
            )
        last = f"blocks.{config.layers - 1}."
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(last)}
        return replace(config, layers=config.layers - 1, hidden_state="last"), kept


class OpenAITextSingleFile(SingleFileFormat):
    """Format of OpenAI's text encoder in LDM files, with names of transformers."""

    prefixes: ClassVar = {
        "cond_stage_model.transformer.": "text_encoder",
        "conditioner.embedders.0.transformer.": "text_encoder",
    }
    marks = ("text_model.", "embeddings.token_embedding.")
    activation = "quick_gelu"

    def key_table(self, config: TextTowerConfig, names: Iterable[str], values: Values) -> KeyTable:
        return transformers_table(names)

    def canonical_name(self, name: str) -> str | None:
        return canonical_transformers_name(name, "text_model.")

    def infer_config(self, tensors: State, source: object) -> TextTowerConfig:
        return _inferred(
            tensors,
            source,
            embedding="text_model.embeddings.token_embedding.weight",
            position="text_model.embeddings.position_embedding.weight",
            blocks="text_model.encoder.layers",
            hidden="mlp.fc1.weight",
            activation=self.activation,
            embed_dim=_length(tensors, "text_projection.weight", 0),
        )

    def prefix(self, config: TextTowerConfig, component: str, components: Collection[str]) -> str | None:
        """Return the prefix: of two text encoders by position, of a single one by its activation."""
        single, first_of_two = self.prefixes
        if component != "text_encoder":
            return None
        return first_of_two if "text_encoder_2" in components else single if config.activation == "quick_gelu" else None


class SecondTextSingleFile(OpenAITextSingleFile):
    """Format of SDXL's second text encoder with names of transformers, as some programs write it; it is only read."""

    prefixes: ClassVar = {"conditioner.embedders.1.transformer.": "text_encoder_2"}
    activation = "gelu"

    def prefix(self, config: TextTowerConfig, component: str, components: Collection[str]) -> str | None:
        return None


class OpenCLIPTextSingleFile(SingleFileFormat):
    """Format of open_clip's text encoder in LDM files."""

    prefixes: ClassVar = {"cond_stage_model.model.": "text_encoder", "conditioner.embedders.1.model.": "text_encoder_2"}
    marks = ("transformer.resblocks.",)

    def key_table(self, config: TextTowerConfig, names: Iterable[str], values: Values) -> KeyTable:
        return open_clip_table(names)

    def canonical_name(self, name: str) -> str | None:
        return None if name.endswith("logit_scale") else name

    def infer_config(self, tensors: State, source: object) -> TextTowerConfig:
        return _inferred(
            tensors,
            source,
            embedding="token_embedding.weight",
            position="positional_embedding",
            blocks="transformer.resblocks",
            hidden="mlp.c_fc.weight",
            activation="gelu",
            embed_dim=_length(tensors, "text_projection", 1),
        )

    def prefix(self, config: TextTowerConfig, component: str, components: Collection[str]) -> str | None:
        if component == "text_encoder" and (config.activation == "quick_gelu" or "text_encoder_2" in components):
            return None
        return super().prefix(config, component, components)

    def export(self, config: TextTowerConfig, state: State, prefix: str) -> dict[str, Tensor]:
        """Add a block if the last state of a single text encoder is the context, since readers use the penultimate one."""
        tensors = super().export(config, state, prefix)
        if prefix == next(iter(self.prefixes)) and config.hidden_state == "last":
            last, added = (f"transformer.resblocks.{config.layers - i}." for i in (1, 0))
            tensors |= {name.replace(last, added): each for name, each in tensors.items() if name.startswith(last)}
        return tensors

    def is_surplus(self, config: TextTowerConfig, name: str) -> bool:
        return name.startswith(f"transformer.resblocks.{config.layers}.")


def lora_names(
    config: TextTowerConfig, names: Sequence[str], component: str, components: Collection[str]
) -> Mapping[str, str]:
    """Return layers by their names in LoRA files; kohya numbers the text encoders if there are two."""
    weights = [f"{name}.weight" for name in names]
    number = {"text_encoder": "1" if "text_encoder_2" in components else "", "text_encoder_2": "2"}.get(component)
    if number is None:
        return {}
    tables = [transformers_table(weights), transformers_table(weights, model="")]
    return lora_spellings(tables, (f"{component}.",), f"lora_te{number}_")


def in_place_of(own: TextTowerConfig, config: TextTowerConfig, state: State) -> Network:
    """Read the context from the block that the denoiser was trained with.

    That is a number of blocks, which SD 2 has as all but the last of 24 in an LDM file, and as all of 23 in a folder.
    """
    attended = own.context_depth
    hidden_state = {attended: "last", attended + 1: "penultimate"}.get(config.layers, own.hidden_state)
    projected = own.embed_dim is not None
    read: Any = {"hidden_state": hidden_state, "context_norm": own.context_norm}
    return (
        replace(config, **read, embed_dim=config.embed_dim if projected else None),
        {name: tensor for name, tensor in state.items() if projected or name != "projection.weight"},
    )


def _inferred(
    tensors: State,
    source: object,
    *,
    embedding: str,
    position: str,
    blocks: str,
    hidden: str,
    activation: Any,
    embed_dim: int | None,
) -> TextTowerConfig:
    with inferring("text encoder", source):
        vocab_size, width = tensors[embedding].shape
        return TextTowerConfig(
            vocab_size=vocab_size,
            context_length=tensors[position].shape[0],
            width=width,
            layers=count(tensors, rf"{re.escape(blocks)}\.(\d+)\."),
            heads=width // HEAD_WIDTH,
            mlp_ratio=tensors[f"{blocks}.0.{hidden}"].shape[0] / width,
            activation="gelu" if width >= OPEN_CLIP_WIDTH else activation,
            embed_dim=embed_dim,
        )


def _length(tensors: State, name: str, dimension: int) -> int | None:
    """Return the length of one dimension of a matrix; None if there is none."""
    matrix = tensors.get(name)
    return None if matrix is None or matrix.ndim != 2 else matrix.shape[dimension]


register(
    NetworkKind(
        TextTowerConfig,
        "text encoder",
        (OpenAITextSingleFile(), SecondTextSingleFile(), OpenCLIPTextSingleFile()),
        (TextFolder(),),
        lora_names,
        in_place_of,
    )
)
