"""Feature networks: what they take, what they are named by, and what is said if their weights are missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.errors import CheckpointError
from ldm.evaluation.features import FeatureNetwork, open_network, weights_hash
from ldm.evaluation.metrics.frechet import estimate
from ldm.evaluation.networks.clip import clip_network
from ldm.formats.clip import save_clip
from tests.evaluation.subjects import tiny_clip
from tests.tiny import TOKENIZER

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def own() -> FeatureNetwork:
    return clip_network("own", tiny_clip(), TOKENIZER)


def test_features_and_distances_of_8_bit_and_of_float_images_are_equal(own: FeatureNetwork) -> None:
    sets = [torch.randint(low, 256, (40, 3, 20, 24), dtype=torch.uint8) for low in (0, 90)]
    floats = [each.float() / 127.5 - 1 for each in sets]
    for eight_bit, real in zip(sets, floats, strict=True):
        assert torch.equal(own(eight_bit), own(real))
    assert estimate(*map(own, sets)).value == estimate(*map(own, floats)).value > 0


def test_the_hash_is_that_of_the_weights() -> None:
    assert weights_hash(tiny_clip(0)) == weights_hash(tiny_clip(0)) != weights_hash(tiny_clip(1))


def test_a_clip_of_a_folder_has_the_embeddings_of_the_clip(own: FeatureNetwork, tmp_path: Path) -> None:
    save_clip(tiny_clip(), TOKENIZER, tmp_path / "clip", "transformers")
    found = open_network(f"clip={tmp_path / 'clip'}", CPU)
    image = torch.rand(3, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(found(image), own(image))
    assert found.captions is not None
    assert own.captions is not None
    torch.testing.assert_close(found.captions(["a red car"]), own.captions(["a red car"]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("inceptoin", "unknown feature network 'inceptoin'; did you mean 'inception'"),
        ("clip", "needs its weights; give --features clip=SOURCE"),
        ("own", "the image tower of stage 2, and this run has no"),
        ("inception=/nowhere.pth", "/nowhere.pth, the weights of the feature network 'inception'"),
    ],
)
def test_missing_weights_are_one_sentence(given: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_network(given, CPU)
    assert "\n" not in str(caught.value)


def test_another_network_is_not_taken_for_the_inception(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3, 2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not hold the Inception of FID"):
        open_network(f"inception={tmp_path / 'other.pth'}", CPU)
