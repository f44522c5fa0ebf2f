"""ControlNets in files of the original repository and in diffusers folders.

The encoder has the names that it has as a part of a U-Net (:mod:`ldm.denoiser.unet_formats`). The other layers:

|                       | ours             | original file           | diffusers                                |
|-----------------------|------------------|-------------------------|------------------------------------------|
| embedding of the hint | ``hint.convs.i`` | ``input_hint_block.2i`` | ``controlnet_cond_embedding.``, then     |
|                       |                  |                         | ``conv_in``, ``blocks.i-1``, ``conv_out`` |
| zero convolutions     | ``zeros.i``      | ``zero_convs.i.0``      | ``controlnet_down_blocks.i``             |
| that of the middle    | the last of them | ``middle_block_out.0``  | ``controlnet_mid_block``                 |
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import PurePath
from typing import Any, ClassVar

from ldm.denoiser.controlnet import ControlNetConfig
from ldm.denoiser.unet import UNetConfig
from ldm.denoiser.unet_formats import (
    DEFAULTS,
    ENDS_DIFFUSERS,
    ENDS_LDM,
    FIXED,
    UNetDiffusersFile,
    UNetFolder,
    UNetSingleFile,
    inferred,
    levels_of_file,
    levels_of_folder,
)
from ldm.errors import CheckpointError
from ldm.nn.network_format import (
    FolderFormat,
    KeyMapping,
    KeyTable,
    NetworkKind,
    SingleFileFormat,
    State,
    Values,
    checked,
    count,
    inferring,
    reading,
    register,
)

SIZE_EMBEDDING_WIDTH = 256
"""Width of the embedding of each size in the vectors of published models that have one (SDXL)."""

POOLED = "shuffle"
"""Part of the names of files whose outputs are averaged over their positions, which weights do not show."""

ONLY_UNET = ("out_channels", "up_block_types", "sample_size", "dropout")
"""Keys of the config of diffusers' U-Net that the config of its ControlNet does not have."""


class ControlNetSingleFile(SingleFileFormat):
    """Format of ControlNets in files of the original repository, with and without their prefix."""

    prefixes: ClassVar = {"control_model.": "controlnet"}
    marks = ("input_hint_block.", "zero_convs.", "middle_block_out.")

    def key_table(self, config: ControlNetConfig, names: Iterable[str], values: Values) -> KeyTable:
        encoder, hint, zeros = _divided(names)
        table = dict(UNetSingleFile().key_table(config.encoder, encoder, values))
        table |= {name: KeyMapping(f"input_hint_block.{2 * i}.{end}") for name, i, end in hint}
        last = max((i for _, i, _ in zeros), default=0)
        table |= {
            name: KeyMapping(f"middle_block_out.0.{end}" if i == last else f"zero_convs.{i}.0.{end}")
            for name, i, end in zeros
        }
        return table

    def canonical_name(self, name: str) -> str:
        return UNetSingleFile().canonical_name(name)

    def infer_config(self, tensors: State, source: object) -> ControlNetConfig:
        with inferring("ControlNet", source):
            encoder = inferred(tensors, levels_of_file(tensors, source), *ENDS_LDM)
            convs = count(tensors, r"input_hint_block\.(\d+)\.")
            widths = [tensors[f"input_hint_block.{2 * i}.weight"].shape[0] for i in range(0, convs - 1, 2)]
            return _inferred(encoder, tensors["input_hint_block.0.weight"].shape[1], widths, source)


class ControlNetDiffusersFile(SingleFileFormat):
    """Format of ControlNets in single files with the names of a diffusers folder, which are only read."""

    prefixes: ClassVar = ControlNetSingleFile.prefixes
    marks = ("controlnet_cond_embedding.", "controlnet_down_blocks.", "controlnet_mid_block.")

    def key_table(self, config: ControlNetConfig, names: Iterable[str], values: Values) -> KeyTable:
        return ControlNetFolder().key_table(config, names, values)

    def canonical_name(self, name: str) -> str:
        return UNetDiffusersFile().canonical_name(name)

    def infer_config(self, tensors: State, source: object) -> ControlNetConfig:
        with inferring("ControlNet", source):
            encoder = inferred(tensors, levels_of_folder(tensors), *ENDS_DIFFUSERS)
            first = tensors["controlnet_cond_embedding.conv_in.weight"]
            blocks = count(tensors, r"controlnet_cond_embedding\.blocks\.(\d+)\.")
            coarser = [tensors[f"controlnet_cond_embedding.blocks.{i}.weight"].shape[0] for i in range(1, blocks, 2)]
            return _inferred(encoder, first.shape[1], [first.shape[0], *coarser], source)

    def prefix(self, config: ControlNetConfig, component: str, components: Collection[str]) -> str | None:
        return None


class ControlNetFolder(FolderFormat):
    """Format of diffusers' ``ControlNetModel``."""

    component = "controlnet"
    library = "diffusers"
    marks = ("controlnet_cond_embedding.", "controlnet_down_blocks.", "controlnet_mid_block.")
    classes = ("ControlNetModel",)
    weights = ("diffusion_pytorch_model",)

    def key_table(self, config: ControlNetConfig, names: Iterable[str], values: Values) -> KeyTable:
        encoder, hint, zeros = _divided(names)
        table = dict(UNetFolder().key_table(config.encoder, encoder, values))
        convs, last = (
            {0: "conv_in", 2 * len(config.hint_widths) - 1: "conv_out"},
            max((i for _, i, _ in zeros), default=0),
        )
        table |= {
            name: KeyMapping(f"controlnet_cond_embedding.{convs.get(i, f'blocks.{i - 1}')}.{end}")
            for name, i, end in hint
        }
        table |= {
            name: KeyMapping(f"controlnet_mid_block.{end}" if i == last else f"controlnet_down_blocks.{i}.{end}")
            for name, i, end in zeros
        }
        return table

    def canonical_name(self, name: str) -> str:
        return UNetFolder().canonical_name(name)

    def read_config(self, values: Values, names: Collection[str], where: object) -> ControlNetConfig:
        given = checked(
            values,
            {**DEFAULTS, "conditioning_channels": 3, "conditioning_embedding_out_channels": (16, 32, 96, 256)},
            {"controlnet_conditioning_channel_order": ("rgb",), "conditioning_channels": (1, 3), **FIXED},
            where,
        )
        with reading(where):
            up = [name.replace("Down", "Up") for name in reversed(given["down_block_types"])]
            mirrored = {"up_block_types": up, "out_channels": given["in_channels"]}
            sizes = given.get("addition_time_embed_dim") if given["addition_embed_type"] == "text_time" else None
            return ControlNetConfig(
                encoder=UNetFolder().read_config({**given, **mirrored}, names, where),
                hint_channels=given["conditioning_channels"],
                hint_widths=tuple(int(width) for width in given["conditioning_embedding_out_channels"]),
                global_pool=bool(given.get("global_pool_conditions", False)),
                size_embedding_width=None if sizes is None else int(sizes),
            )

    def write_config(self, config: ControlNetConfig, size: tuple[int, int], extra: Values) -> dict[str, Any]:
        width = config.size_embedding_width
        sizes = {} if width is None else {"addition_embed_type": "text_time", "addition_time_embed_dim": width}
        encoder = UNetFolder().write_config(config.encoder, size, sizes)
        return {
            **{name: value for name, value in encoder.items() if name not in ONLY_UNET},
            "_class_name": self.classes[0],
            "conditioning_channels": config.hint_channels,
            "conditioning_embedding_out_channels": list(config.hint_widths),
            "global_pool_conditions": config.global_pool,
        }


Numbered = list[tuple[str, int, str]]
"""Names of tensors, the numbers of their layers, and the ends of the names."""


def _divided(names: Iterable[str]) -> tuple[list[str], Numbered, Numbered]:
    """Divide names into those of the encoder, of the embedding of the hint, and of the zero convolutions."""
    encoder: list[str] = []
    groups: dict[str, Numbered] = {"hint.convs": [], "zeros": []}
    for name in names:
        if found := re.fullmatch(r"(hint\.convs|zeros)\.(\d+)\.(\w+)", name):
            groups[found[1]].append((name, int(found[2]), found[3]))
        else:
            encoder.append(name)
    return encoder, groups["hint.convs"], groups["zeros"]


def _inferred(encoder: UNetConfig, channels: int, widths: list[int], source: object) -> ControlNetConfig:
    if channels not in (1, 3):
        raise CheckpointError(
            f"{source}: its hints have {channels} channels, but ldm supports only 3 or 1; use another ControlNet."
        )
    return ControlNetConfig(
        encoder=encoder,
        hint_channels=channels,
        hint_widths=tuple(widths),
        global_pool=POOLED in PurePath(str(source)).name.lower(),
        size_embedding_width=SIZE_EMBEDDING_WIDTH if encoder.vector_width else None,
    )


register(
    NetworkKind(
        ControlNetConfig, "ControlNet", (ControlNetSingleFile(), ControlNetDiffusersFile()), (ControlNetFolder(),)
    )
)
