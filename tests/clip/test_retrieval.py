from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.clip import retrieval
from ldm.clip.retrieval import recall_at_k, reduce_images, reduced_recall


def pair_features(n: int = 40, d: int = 6) -> tuple[Tensor, Tensor]:
    """Texts near enough to their images that recall is neither 0 nor 1."""
    image = torch.randn(n, d)
    return image + torch.randn(n, d), image


@pytest.mark.parametrize("chunk", [1024, 7])
def test_recall_equals_that_of_a_sorted_list(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    text, image = pair_features()
    found = recall_at_k(text, image, ks=(1, 5))
    assert set(found) == {f"{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5)}
    for way, queries, keys in (("text_to_image", text, image), ("image_to_text", image, text)):
        order = F.cosine_similarity(queries[:, None], keys[None], dim=-1).argsort(dim=1, descending=True)
        for k in (1, 5):
            hits = [own in row[:k].tolist() for own, row in enumerate(order)]
            assert found[f"{way}_R@{k}"] == pytest.approx(sum(hits) / len(hits))
    assert 0 < found["text_to_image_R@1"] < found["text_to_image_R@5"] < 1


def test_perfect_pairs_are_all_found_whatever_their_length() -> None:
    features = torch.randn(30, 8)
    assert set(recall_at_k(3 * features, features).values()) == {1.0}


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_embeddings_that_tell_nothing_apart_score_nothing(value: float) -> None:
    features = torch.full((30, 37), value)
    assert set(recall_at_k(features, features).values()) == {0.0}


def test_a_tie_counts_against() -> None:
    features = torch.eye(6)[[0, 1, 1, 2, 3, 4]]
    found = recall_at_k(features, features, ks=(1, 2))
    assert found["text_to_image_R@1"] == pytest.approx(4 / 6)
    assert found["text_to_image_R@2"] == 1.0


def test_pictures_are_reduced_by_the_mean_of_their_blocks() -> None:
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    blocks = images.reshape(2, 3, 16, 4, 16, 4).mean(dim=(3, 5))
    torch.testing.assert_close(reduce_images(images), blocks.flatten(1))


@pytest.mark.parametrize("chunk", [1024, 3])
def test_reduced_recall_equals_that_of_a_sorted_list(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    truths = torch.rand(25, 3, 32, 32)
    own = torch.randperm(25)[:12]
    samples = truths[own] + 6.0 * torch.randn(12, 3, 32, 32)
    found = reduced_recall(reduce_images(samples), reduce_images(truths), own, ks=(1, 5))
    reference = reduce_images(truths)
    order = [(sample - reference).norm(dim=1).argsort().tolist() for sample in reduce_images(samples)]
    ranks = [row.index(index) for row, index in zip(order, own.tolist(), strict=True)]
    assert found == {f"R@{k}": pytest.approx(sum(rank < k for rank in ranks) / 12) for k in (1, 5)}
    assert 0 < found["R@1"] < 1


def test_a_shared_drawing_does_not_count_against_a_sample() -> None:
    truths = torch.rand(9, 3, 16, 16)
    truths[4] = truths[2]
    samples = truths + 0.01 * torch.randn(9, 3, 16, 16)
    assert reduced_recall(reduce_images(samples), reduce_images(truths), torch.arange(9), ks=(1,)) == {"R@1": 1.0}


def test_samples_that_are_not_finite_are_not_found() -> None:
    truths = torch.rand(9, 3, 16, 16)
    samples = torch.full_like(truths, float("nan"))
    assert reduced_recall(reduce_images(samples), reduce_images(truths), torch.arange(9)) == {"R@1": 0.0, "R@5": 0.0}
