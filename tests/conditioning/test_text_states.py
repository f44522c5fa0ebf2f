"""Text states that are stored once give the conditionings of live encoding, for each conditioner with a text encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.conditioning import Conditioner, ConditionerConfig
from ldm.conditioning.text_states import TEXT_STATES, TextStates
from ldm.config import from_dict
from tests.tiny import TOKENIZER, TOWER

SECOND = TOWER | {"layers": 2, "hidden_state": "penultimate", "context_norm": False, "embed_dim": 8}
TEXT = {"kind": "text", "tower": TOWER, "dropout": 0.5}
SDXL = {"kind": "sdxl", "first": TOWER, "second": SECOND, "size_embedding_width": 4, "dropout": 0.5}
LABEL = {"kind": "class", "classes": 3, "width": 4}
CONDITIONERS: dict[str, dict[str, Any]] = {
    "text": TEXT,
    "pooled": TEXT | {"pooled": True},
    "sdxl": SDXL,
    "sdxl of empty captions": SDXL | {"zeros_for_empty": False},
    "several": {"kind": "several", "parts": {"caption": TEXT, "label": LABEL}},
}
CAPTIONS = ["a red apple", "", "two green cars", "a blue sky", "a red car", "a green apple"]


def built(config: dict[str, Any]) -> Conditioner:
    torch.manual_seed(0)
    return from_dict(ConditionerConfig, config).build(TOKENIZER).eval()


def conditions() -> dict[str, Any]:
    pairs = [[16 + i, 20 - i] for i in range(len(CAPTIONS))]
    sizes = {name: torch.tensor(pairs) for name in ("original_size", "crops_coords_top_left", "target_size")}
    return {"text": CAPTIONS, "label": torch.arange(len(CAPTIONS)) % 3, **sizes}


def stored(conditioner: Conditioner) -> TextStates:
    """Return the states of each caption, encoded by itself."""
    rows = [conditioner.encode_texts([caption]) for caption in CAPTIONS]
    states = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return TextStates(CAPTIONS, states, conditioner.encode_texts([""]))


@pytest.mark.parametrize("name", CONDITIONERS)
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_stored_states_give_the_conditioning_of_live_encoding(
    name: str, seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a seed, some captions are dropped."""
    conditioner = built(CONDITIONERS[name])
    inputs, states = conditions(), stored(conditioner)

    def encoded(inputs: dict[str, Any]) -> Any:
        return conditioner(inputs, None if seed is None else torch.Generator().manual_seed(seed))

    live = encoded(inputs)
    for encoder in conditioner.text_encoders():
        monkeypatch.setattr(encoder.network, "forward", None)  # it is not called
    cached = encoded({**inputs, TEXT_STATES: states})
    for field in ("context", "mask", "vector"):
        a, b = getattr(live, field), getattr(cached, field)
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.allclose(a.float(), b.float(), atol=1e-6)


def test_other_captions_are_encoded() -> None:
    conditioner = built(CONDITIONERS["text"])
    inputs = conditions() | {TEXT_STATES: stored(conditioner)}
    changed = {**inputs, "text": ["another caption", *CAPTIONS[1:]]}
    assert torch.equal(conditioner(changed).context, conditioner({"text": changed["text"]}).context)


def test_states_follow_from_weights_settings_and_tokenizer() -> None:
    names = [encoder.name for encoder in built(CONDITIONERS["sdxl"]).text_encoders()]
    assert names == ["text_encoder", "text_encoder_2"]
    assert [each.name for each in built(CONDITIONERS["several"]).text_encoders()] == ["caption.text_encoder"]
    trainable = built(CONDITIONERS["text"] | {"trainable": True})
    assert list(trainable.text_encoders()) == []
