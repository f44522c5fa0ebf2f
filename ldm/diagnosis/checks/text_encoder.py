"""Text encoder: whether tokenizer and text tower of the denoiser are those of the CLIP that it was trained with."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ldm.diagnosis.association import clip_of, similarity
from ldm.diagnosis.check import Clock, Finding, Item, Measured, Topic, check
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.predecessors import differing, predecessor
from ldm.diagnosis.statistics import CONSISTENT


@check(Topic.TEXT, "tokenizer and text encoder", stages=("denoiser",))
def text_encoder(run: OpenedRun, clock: Clock) -> Iterator[Item]:
    """Compare tokenizer, text encoder and recorded fingerprint with the result of stage 2.

    A tokenizer with other numbers for the same words gives the text encoder words that it never saw in this place; prompts then
    have no meaning. The evidence is the similarity of images and captions when the CLIP reads the captions with this tokenizer.
    """
    if "text" not in run.config.conditioner.input_keys:
        return
    found, own = predecessor(run, "clip"), run.stages["denoiser"].header.tokenizer
    if found is None:
        return
    parts = found.source.parts
    trained = {name for name, each in run.averaged.conditioner.named_parameters() if each.requires_grad}
    frozen = not trained and not getattr(run.config.conditioner, "trainable", False)
    names = differing(_tower(run), "", parts["text_encoder"].state) if frozen and "text_encoder" in parts else []
    same_tokenizer = own is None or found.source.tokenizer is None or own.to_json() == found.source.tokenizer.to_json()
    yield Measured(
        f"fingerprint {found.fingerprint}, trained on {found.recorded}; {len(names)} weights of the text encoder differ; "
        f"the tokenizers are {'equal' if same_tokenizer else 'different'}"
    )
    if not same_tokenizer:
        clip, evidence = clip_of(run), "the tokenizer in the model is not that of stage clip"
        if clip is not None and own is not None:
            batch = run.images("val" if run.validates else "train")
            with_own, right = similarity(clip, batch, own), similarity(clip, batch)
            evidence += (
                f"; own captions fit images better than others by {right.first - right.second:.3f} with the right one and by "
                f"{with_own.first - with_own.second:.3f} with this one"
            )
            if with_own.z < CONSISTENT:
                evidence += ", which is nothing"
        yield Finding(
            "tokenizer_mismatch",
            "the tokenizer is not the one that the text encoder was trained with",
            evidence,
            "clip.tokenizer",
            "restore the tokenizer of stage clip, or train stages clip and denoiser again with the new one",
        )
    elif names or found.is_another:
        yield Finding(
            "text_encoder_swapped",
            "the text encoder is not the one that the denoiser was trained with",
            f"{len(names)} of its weights differ from those of stage clip"
            if names
            else f"its fingerprint is {found.fingerprint}, but the denoiser was trained on {found.recorded}",
            "clip.checkpoint",
            "restore the CLIP of the training, or train the denoiser with the new one, in another run_dir",
        )


def _tower(run: OpenedRun) -> dict[str, Tensor]:
    """Return the state of the text encoder in the model."""
    encoders = dict(run.averaged.conditioner.pretrained_encoders())
    return encoders["text_encoder"].state_dict() if "text_encoder" in encoders else {}
