"""Families of published models, and the settings that their single files do not hold.

|                 | SD 1                        | SD 2                | SDXL                            |
|-----------------|-----------------------------|---------------------|---------------------------------|
| recognized by   | transformers' text encoder  | open_clip's         | both                            |
| context         | last state, normed          | penultimate, normed | penultimate of both, not normed |
| latent scale    | 0.18215                     | 0.18215             | 0.13025                         |
| prediction type | eps                         | eps (or v)          | eps (or v)                      |
| sampled by      | ddim, 50 steps, scale 7.5   | the same            | euler, 50 steps, scale 5        |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ldm.clip.text import TextTowerConfig
from ldm.clip.text_formats import OPEN_CLIP_WIDTH
from ldm.clip.tokenizer import CLIP_VOCAB_SIZE, CLIPBPEConfig, Tokenizer
from ldm.formats.checkpoint import Part
from ldm.formats.folding import SCALE, SCALE_SDXL
from ldm.model import SamplingConfig

SAMPLED = SamplingConfig("ddim", 50, 7.5, "leading", 1, "sigma_min")
SAMPLED_SDXL = SamplingConfig("euler", 50, 5.0, "leading", 1)


@dataclass(frozen=True)
class Family:
    """Settings of a family of published models that its files do not hold.

    Attributes:
        name: name of the family.
        hidden_state, context_norm: fields of the config of its text encoders.
        scale: scaling factor of the latents.
        sampling: defaults of sampling.
        sizes: height and width of the images, of the models that predict eps and v.
        overflows_fp16: whether fp16 cannot hold the values of the first stage.
    """

    name: str
    hidden_state: str = "penultimate"
    context_norm: bool = True
    scale: float = SCALE
    sampling: SamplingConfig = field(default=SAMPLED)
    sizes: tuple[int, int] = (512, 512)
    overflows_fp16: bool = False


SD_1 = Family("SD 1", hidden_state="last")
SD_2 = Family("SD 2", sizes=(512, 768))
SDXL = Family(
    "SDXL", context_norm=False, scale=SCALE_SDXL, sampling=SAMPLED_SDXL, sizes=(1024, 1024), overflows_fp16=True
)
SINGLE = Family("a single network")
FAMILIES = {
    "conditioner.embedders.1.transformer.": SDXL,
    "conditioner.embedders.1.model.": SDXL,
    "cond_stage_model.model.": SD_2,
    "cond_stage_model.transformer.": SD_1,
    "conditioner.embedders.0.transformer.": SINGLE,
    "model.diffusion_model.label_emb.0.0.weight": SDXL,
    "model.diffusion_model.add_embedding.linear_1.weight": SDXL,
}
"""Prefixes of names by which a family is recognized; the first that occurs decides."""


def family_of(names: Iterable[str], text_encoder: TextTowerConfig | None = None) -> Family:
    """Return the family that the full names of a file's tensors belong to.

    Args:
        names: the names.
        text_encoder: the first text encoder, if there is one: other programs store that of SD 2 with the names of SD 1's.
    """
    listed = [*names]
    family = next((FAMILIES[mark] for mark in FAMILIES for name in listed if name.startswith(mark)), SINGLE)
    if family is SD_1 and text_encoder is not None and text_encoder.width >= OPEN_CLIP_WIDTH:
        # diffusers leaves out the last of 24 blocks, whose output is not used
        return SD_2 if text_encoder.layers == 24 else replace(SD_2, hidden_state="last")
    return family


def assumed(name: str, family: Family, complete: bool, hidden_state: str | None = None) -> dict[str, Any]:
    """Return the fields of a text encoder's config that its weights do not determine.

    Args:
        name, family: of the text encoder.
        complete: whether the file holds further networks.
        hidden_state: hidden state that the file states; all models of the other families have the same.
    """
    hidden_state = hidden_state if family is SD_1 and hidden_state else family.hidden_state
    fields = {"hidden_state": hidden_state, "context_norm": family.context_norm}
    # The pooled state of a model's first text encoder is not used.
    return fields | ({"embed_dim": None} if complete and name == "text_encoder" else {})


def tokenizer_of(parts: Mapping[str, Part], family: Family) -> Tokenizer | None:
    """Return CLIP's tokenizer as the family pads its tokens; None if the text encoder has another vocabulary."""
    if "text_encoder" not in parts or parts["text_encoder"].config.vocab_size != CLIP_VOCAB_SIZE:
        return None
    length = parts["text_encoder"].config.context_length
    return CLIPBPEConfig(length, pad_id=0 if family.name == SD_2.name else None).build()
