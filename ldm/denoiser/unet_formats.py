"""The U-Net in LDM files, diffusers folders and LoRA files.

Blocks are numbered differently:

|      | ours                      | LDM file                         | diffusers folder                  |
|------|---------------------------|----------------------------------|-----------------------------------|
| down | one list                  | ``input_blocks``, one later      | by level, downsampling at its end |
| up   | upsampling before a block | upsampling at the end of a block | by level, upsampling at its end   |

Inside a block, names differ by the rules below.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from ldm.denoiser.unet import LevelSpec, UNetConfig
from ldm.errors import CheckpointError
from ldm.nn.network_format import (
    FolderFormat,
    KeyMapping,
    KeyTable,
    NetworkKind,
    Rules,
    SingleFileFormat,
    State,
    Values,
    attention_names,
    checked,
    count,
    inferring,
    lora_spellings,
    reading,
    register,
    renamed,
)

PREFIX = "model.diffusion_model."

HEADS = 8
"""Attention heads at every level of published models whose projections are convolutions."""

HEAD_WIDTH = 64
"""Channels of an attention head in all other published models."""

ENDS_LDM = "input_blocks.0.0", "label_emb.0.0", "middle_block.1"
ENDS_DIFFUSERS = "conv_in", "add_embedding.linear_1", "mid_block.attentions.0"
"""Names of the first convolution, the vector embedding and the transformer in the middle; see :func:`inferred`."""

TRANSFORMER: Rules = ((r"\bblocks\.", "transformer_blocks."), (r"\bto_out", "to_out.0"), (r"\bff\.", "ff.net."))
RESIDUAL_LDM: Rules = (
    (r"\bnorm1", "in_layers.0"),
    (r"\bconv1", "in_layers.2"),
    (r"\bembedding", "emb_layers.1"),
    (r"\bnorm2", "out_layers.0"),
    (r"\bconv2", "out_layers.3"),
    (r"\bshortcut", "skip_connection"),
)
OTHERS_LDM: Rules = (
    (r"^noise_embedding\.mlp", "time_embed"),
    (r"^vector_embedding", "label_emb.0"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^norm_out", "out.0"),
    (r"^conv_out", "out.2"),
)
RESIDUAL_DIFFUSERS: Rules = ((r"\bembedding", "time_emb_proj"), (r"\bshortcut", "conv_shortcut"))
OTHERS_DIFFUSERS: Rules = (
    (r"^noise_embedding\.mlp\.0", "time_embedding.linear_1"),
    (r"^noise_embedding\.mlp\.2", "time_embedding.linear_2"),
    (r"^norm_out", "conv_norm_out"),
)

NAMES: Rules = attention_names(r"attn\d", "to_q", "to_k", "to_v", "to_out.0")
"""Names of attention layers as other tools have them."""

USUAL = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight", ".to_out.0.bias")
"""Ends of the names of attention layers in most files, which the rules would leave as they are."""

UNDOTTED: Rules = (
    (r"^(input_blocks|output_blocks)(\d+)(\d)(?=[a-z])", r"\1.\2.\3."),
    (r"^(middle_block|time_embed|out)(\d)", r"\1.\2."),
    (r"^label_emb(\d)(\d)", r"label_emb.\1.\2."),
    (r"(transformer_blocks)(\d+)", r"\1.\2."),
    (r"((?:in|emb|out)_layers)(\d)", r"\1.\2."),
    (r"(attn\d)to_", r"\1.to_"),
    (r"to_out(\d)", r"to_out.\1."),
    (r"ffnet(\d)(proj)?", r"ff.net.\1.\2."),
    (r"(weight|bias)$", r".\1"),
    (r"\.+", "."),
)
"""Rules that restore the dots of a name in an LDM file; the names of EMA weights omit them."""

DEFAULTS: Values = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "cross_attention_dim": 1280,
    "use_linear_projection": False,
    "norm_num_groups": 32,
    "dropout": 0.0,
    "class_embed_type": None,
    "addition_embed_type": None,
    "projection_class_embeddings_input_dim": None,
}
"""Defaults of diffusers' ``UNet2DConditionModel``, for keys that a file omits."""

FIXED: Values = {
    "act_fn": ("silu",),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "downsample_padding": (1,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "center_input_sample": (False,),
    "mid_block_scale_factor": (1,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "dual_cross_attention": (False,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "class_embed_type": (None, "projection"),
    "addition_embed_type": (None, "text_time"),
    **dict.fromkeys(
        (
            "cross_attention_norm",
            "encoder_hid_dim",
            "encoder_hid_dim_type",
            "mid_block_only_cross_attention",
            "num_class_embeds",
            "reverse_transformer_layers_per_block",
            "time_cond_proj_dim",
            "time_embedding_act_fn",
            "time_embedding_dim",
            "timestep_post_act",
        ),
        (None,),
    ),
}
"""Values that ldm's U-Net assumes."""


class UNetSingleFile(SingleFileFormat):
    """Format of the U-Net in LDM files."""

    prefixes: ClassVar = {PREFIX: "denoiser"}
    marks = ("input_blocks.",)

    def key_table(self, config: UNetConfig, names: Iterable[str], values: Values) -> KeyTable:
        blocks = {"middle.0.residual": "middle_block.0"}
        if config.middle_depth:
            blocks |= {"middle.0.transformer": "middle_block.1", "middle.1.residual": "middle_block.2"}
        else:
            blocks |= {"middle.1.residual": "middle_block.1"}
        down = [depth for level in config.levels for depth in [None, *[level.depth] * level.blocks]][1:]
        for i, depth in enumerate(down):
            if depth is None:
                blocks[f"down.{i}.conv"] = f"input_blocks.{i + 1}.0.op"
            else:
                blocks[f"down.{i}.residual"] = f"input_blocks.{i + 1}.0"
                blocks[f"down.{i}.transformer"] = f"input_blocks.{i + 1}.1"
        up = [level.depth for level in reversed(config.levels) for _ in range(level.blocks + 1)]
        for j, _ in enumerate(up):
            blocks[f"up.{j}.residual"] = f"output_blocks.{j}.0"
            blocks[f"up.{j}.transformer"] = f"output_blocks.{j}.1"
            if j:
                blocks[f"up.{j}.upsample"] = f"output_blocks.{j - 1}.{2 if up[j - 1] else 1}"
        return _key_table(names, blocks, RESIDUAL_LDM, OTHERS_LDM)

    def canonical_name(self, name: str) -> str:
        return _with_usual_names(name if "." in name else renamed(name, UNDOTTED))

    def infer_config(self, tensors: State, source: object) -> UNetConfig:
        with inferring("U-Net", source):
            return inferred(tensors, levels_of_file(tensors, source), *ENDS_LDM, "out.2")

    def prefix(self, config: UNetConfig, component: str, components: Collection[str]) -> str | None:
        if config.context_width is None and any(level.depth for level in config.levels):
            raise CheckpointError(
                "the U-Net of an LDM file attends to a context, but this one has none; write a native file."
            )
        _check_self_conditioning(config, "an LDM file")
        return super().prefix(config, component, components)


class UNetDiffusersFile(SingleFileFormat):
    """Format of the U-Net in single files with the names of a diffusers folder, which are only read."""

    prefixes: ClassVar = UNetSingleFile.prefixes
    marks = ("up_blocks.",)

    def key_table(self, config: UNetConfig, names: Iterable[str], values: Values) -> KeyTable:
        return UNetFolder().key_table(config, names, values)

    def canonical_name(self, name: str) -> str:
        return _with_usual_names(re.sub(r"^class_embedding\.", "add_embedding.", name))

    def infer_config(self, tensors: State, source: object) -> UNetConfig:
        with inferring("U-Net", source):
            return inferred(tensors, levels_of_folder(tensors), *ENDS_DIFFUSERS, "conv_out")

    def prefix(self, config: UNetConfig, component: str, components: Collection[str]) -> str | None:
        return None


class UNetFolder(FolderFormat):
    """Format of diffusers' ``UNet2DConditionModel``."""

    component = "denoiser"
    library = "diffusers"
    folders: ClassVar = {"unet": "denoiser"}
    marks = ("conv_in.", "down_blocks.")
    classes = ("UNet2DConditionModel",)
    weights = ("diffusion_pytorch_model",)
    sized_in_latents = True

    def key_table(self, config: UNetConfig, names: Iterable[str], values: Values) -> KeyTable:
        """Map the names; the JSON config selects ``add_embedding`` (SDXL) or ``class_embedding`` for the vector embedding."""
        vector = "class_embedding" if values.get("class_embed_type") else "add_embedding"
        blocks = {
            "middle.0.residual": "mid_block.resnets.0",
            "middle.0.transformer": "mid_block.attentions.0",
            "middle.1.residual": "mid_block.resnets.1",
        }
        i = j = 0
        for number, level in enumerate(config.levels):
            if number:
                blocks[f"down.{i}.conv"] = f"down_blocks.{number - 1}.downsamplers.0.conv"
                i += 1
            for block in range(level.blocks):
                blocks[f"down.{i}.residual"] = f"down_blocks.{number}.resnets.{block}"
                blocks[f"down.{i}.transformer"] = f"down_blocks.{number}.attentions.{block}"
                i += 1
        for number, level in enumerate(reversed(config.levels)):
            if number:
                blocks[f"up.{j}.upsample"] = f"up_blocks.{number - 1}.upsamplers.0"
            for block in range(level.blocks + 1):
                blocks[f"up.{j}.residual"] = f"up_blocks.{number}.resnets.{block}"
                blocks[f"up.{j}.transformer"] = f"up_blocks.{number}.attentions.{block}"
                j += 1
        embedding = ((r"^vector_embedding\.0", f"{vector}.linear_1"), (r"^vector_embedding\.2", f"{vector}.linear_2"))
        return _key_table(names, blocks, RESIDUAL_DIFFUSERS, (*OTHERS_DIFFUSERS, *embedding))

    def canonical_name(self, name: str) -> str:
        return _with_usual_names(name)

    def read_config(self, values: Values, names: Collection[str], where: object) -> UNetConfig:
        given = checked(values, DEFAULTS, FIXED, where)
        with reading(where):
            widths = list(given["block_out_channels"])
            attends = [name == "CrossAttnDownBlock2D" for name in given["down_block_types"]]
            known = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
            mirrored = [name == "CrossAttnUpBlock2D" for name in given["up_block_types"]][::-1]
            others = {*given["down_block_types"], *given["up_block_types"]} - known
            if others or attends != mirrored or len(attends) != len(widths) or _any(given.get("only_cross_attention")):
                raise CheckpointError(
                    f"{where}: ldm's U-Net has only blocks of {', '.join(sorted(known))}, the way up mirroring the way "
                    f"down, not {', '.join([*given['down_block_types'], *given['up_block_types']])}; use another model."
                )
            blocks = _for_each_level(given["layers_per_block"], widths)
            depths = _for_each_level(given["transformer_layers_per_block"], widths)
            counts = _for_each_level(given["num_attention_heads"] or given["attention_head_dim"], widths)
            attending = [i for i in range(len(widths)) if attends[i] or i == len(widths) - 1]
            head_widths = {widths[i] // counts[i] for i in attending}
            heads = {counts[i] for i in attending}
            if len(heads) > 1 and len(head_widths) > 1:
                raise CheckpointError(
                    f"{where}: attention_head_dim {counts} is neither a fixed number nor a fixed width of heads; "
                    "ldm's U-Net has the one or the other at all levels."
                )
            has_vector = given["class_embed_type"] or given["addition_embed_type"]
            return UNetConfig(
                levels=tuple(
                    LevelSpec(width, blocks[i], depths[i] if attends[i] else 0) for i, width in enumerate(widths)
                ),
                in_channels=given["in_channels"],
                out_channels=given["out_channels"],
                context_width=given["cross_attention_dim"],
                vector_width=given["projection_class_embeddings_input_dim"] if has_vector else None,
                middle_depth=depths[-1],
                heads=counts[-1] if len(heads) == 1 else None,
                head_width=head_widths.pop() if len(heads) > 1 else None,
                projection="linear" if given["use_linear_projection"] else "conv",
                groups=given["norm_num_groups"],
                dropout=given["dropout"],
            )

    def write_config(self, config: UNetConfig, size: tuple[int, int], extra: Values) -> dict[str, Any]:
        """Convert a config to JSON; the conditioning vector is passed as class labels unless ``extra`` overrides that."""
        _check_self_conditioning(config, "diffusers")
        levels = config.levels
        depths = [level.depth or config.middle_depth for level in levels]
        if config.middle_depth == 0 or levels[-1].depth not in (0, config.middle_depth):
            raise CheckpointError(
                f"diffusers' U-Net has as many transformer blocks in the middle as at its last level, not "
                f"{config.middle_depth} and {levels[-1].depth}; write an LDM file instead."
            )
        if config.context_width is None:
            raise CheckpointError("diffusers' U-Net attends to a context, but this one has none; write a native file.")
        heads = [config.heads or level.width // (config.head_width or 1) for level in levels]
        vector = {"projection_class_embeddings_input_dim": config.vector_width} if config.vector_width else {}
        attends = [level.depth > 0 for level in levels]
        return {
            "_class_name": self.classes[0],
            "sample_size": size[0] if size[0] == size[1] else list(size),
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "block_out_channels": [level.width for level in levels],
            "down_block_types": ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attends],
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": ["CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)],
            "layers_per_block": _one(level.blocks for level in levels),
            "transformer_layers_per_block": _one(depths),
            "attention_head_dim": _one(heads),
            "cross_attention_dim": config.context_width,
            "use_linear_projection": config.projection == "linear",
            "norm_num_groups": config.groups,
            "dropout": config.dropout,
            **({**vector, **(extra or {"class_embed_type": "projection"})} if vector else {}),
        }


def _check_self_conditioning(config: UNetConfig, where: str) -> None:
    if config.self_conditioning:
        raise CheckpointError(
            f"the U-Net of {where} has no self-conditioning, but this one was trained with it; write a native file."
        )


def lora_names(config: UNetConfig, names: Sequence[str], component: str, components: Collection[str]) -> dict[str, str]:
    """Return layers by their names in LoRA files, which follow a diffusers folder or an LDM file."""
    weights = [f"{name}.weight" for name in names]
    folders = [UNetFolder().key_table(config, weights, {"class_embed_type": kind}) for kind in (None, "projection")]
    file = UNetSingleFile().key_table(config, weights, {})
    return lora_spellings([*folders, file], ("unet.", ""), "lora_unet_")


def levels_of_file(tensors: State, source: object) -> list[LevelSpec]:
    """Infer the levels from the ``input_blocks`` of an LDM file.

    Raises:
        CheckpointError: the blocks of a level differ.
    """
    levels: list[list[tuple[int, int]]] = [[]]
    for number in range(1, count(tensors, r"input_blocks\.(\d+)\.")):
        block = f"input_blocks.{number}"
        if f"{block}.0.op.weight" in tensors:
            levels.append([])
            continue
        depth = count(tensors, rf"input_blocks\.{number}\.1\.transformer_blocks\.(\d+)\.")
        levels[-1].append((tensors[f"{block}.0.out_layers.3.weight"].shape[0], depth))
    if any(len(set(level)) != 1 for level in levels):
        raise CheckpointError(
            f"{source}: the blocks of a level of its U-Net differ, which ldm does not support; use another model."
        )
    return [LevelSpec(level[0][0], len(level), level[0][1]) for level in levels]


def levels_of_folder(tensors: State) -> list[LevelSpec]:
    """Infer the levels from the ``down_blocks`` of a diffusers folder."""
    levels = []
    for block in (f"down_blocks.{number}" for number in range(count(tensors, r"down_blocks\.(\d+)\."))):
        blocks = count(tensors, rf"{re.escape(block)}\.resnets\.(\d+)\.")
        depth = count(tensors, rf"{re.escape(block)}\.attentions\.0\.transformer_blocks\.(\d+)\.")
        levels.append(LevelSpec(tensors[f"{block}.resnets.0.conv2.weight"].shape[0], blocks, depth))
    return levels


def inferred(
    tensors: State, levels: Sequence[LevelSpec], first: str, vector: str, middle: str, last: str | None = None
) -> UNetConfig:
    """Infer a config from names and shapes.

    Args:
        tensors: tensors by foreign names.
        levels: the levels.
        first, vector, middle, last: names of first convolution, vector embedding, transformer in the middle and last convolution;
            without the last, the output has the channels of the input.
    """
    keys = [name for name in tensors if name.endswith("attn2.to_k.weight")]
    conv = any(tensors[name].ndim == 4 for name in tensors if name.endswith(".proj_in.weight"))
    embedding, in_channels = tensors.get(f"{vector}.weight"), tensors[f"{first}.weight"].shape[1]
    return UNetConfig(
        levels=tuple(levels),
        in_channels=in_channels,
        out_channels=in_channels if last is None else tensors[f"{last}.weight"].shape[0],
        context_width=tensors[keys[0]].shape[1] if keys else None,
        vector_width=None if embedding is None else embedding.shape[1],
        middle_depth=count(tensors, rf"{re.escape(middle)}\.transformer_blocks\.(\d+)\."),
        heads=HEADS if conv else None,
        head_width=None if conv else HEAD_WIDTH,
        projection="conv" if conv else "linear",
    )


def _with_usual_names(name: str) -> str:
    return name if ".attn" not in name or name.endswith(USUAL) else renamed(name, NAMES)


def _key_table(names: Iterable[str], blocks: Mapping[str, str], residual: Rules, others: Rules) -> KeyTable:
    inside = {"residual": residual, "transformer": TRANSFORMER}
    table = {}
    for name in names:
        block = re.match(r"(?:down|middle|up)\.\d+\.(\w+)", name)
        if block is None:
            table[name] = KeyMapping(renamed(name, others))
        else:
            rest = renamed(name[block.end() :], inside.get(block[1], ()))
            table[name] = KeyMapping(blocks[block[0]] + rest)
    return table


def _for_each_level(value: Any, widths: list[int]) -> list[int]:
    """Return one integer for each level, from one integer or a list."""
    values = [value] * len(widths) if isinstance(value, int) else list(value)
    if len(values) != len(widths) or not all(isinstance(each, int) for each in values):
        raise ValueError(f"{value!r} is not one integer for each of {len(widths)} levels")
    return values


def _one(values: Iterable[Any]) -> Any:
    """Return the value that all entries have, or else the list."""
    listed = list(values)
    return listed[0] if len(set(listed)) == 1 else listed


def _any(value: Any) -> bool:
    return any(value) if isinstance(value, list | tuple) else bool(value)


register(NetworkKind(UNetConfig, "U-Net", (UNetSingleFile(), UNetDiffusersFile()), (UNetFolder(),), lora_names))
