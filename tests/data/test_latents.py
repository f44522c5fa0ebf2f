from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.data.config import ShardsData
from ldm.data.latents import cache_latents
from ldm.data.samples import Samples
from ldm.data.stream import EvaluationLoader, TrainStream
from ldm.data.teacher import Teacher
from ldm.vae.first_stage import DiagonalGaussian, FirstStage
from tests.data.pictures import write_shards


class TinyFirstStage(FirstStage):
    """Convolution to mean and log-variance; counts the images that it has encoded."""

    def __init__(self) -> None:
        super().__init__(latent_channels=2, factor=4)
        self.convolution = nn.Conv2d(3, 4, 4, stride=4)
        self.encoded = 0

    def encode(self, image: Tensor) -> DiagonalGaussian:
        self.encoded += len(image)
        return DiagonalGaussian(*self.convolution(image).chunk(2, dim=1))


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    write_shards(tmp_path / "shards", [20, 15], labelled=True)
    return ShardsData(str(tmp_path / "shards"), size=(8, 12), workers=0).open("train")


def test_cached_latents_are_those_of_the_first_stage(tmp_path: Path, samples: Samples) -> None:
    first_stage = TinyFirstStage()
    cached = cache_latents(first_stage, "mark", samples, tmp_path / "latents" / "train.safetensors")
    pictures = TrainStream(samples, 6, 0, 9)
    for batch, expected in zip(TrainStream(cached, 6, 0, 9), pictures, strict=True):
        posterior = first_stage.encode(expected["image"])
        for name, exact in (("mean", posterior.mean), ("std", posterior.std)):
            assert batch[name].dtype == torch.float32
            assert batch[name].is_contiguous(memory_format=torch.channels_last)
            assert torch.allclose(batch[name], exact, rtol=1e-3, atol=1e-6)  # fp16 keeps 11 bits
        assert batch["key"] == expected["key"]
        assert batch["text"] == expected["text"]
        assert torch.equal(batch["label"], expected["label"])


class TinyTeacher(nn.Conv2d):
    """Convolution as a network with feature maps; counts the images that it has encoded."""

    def __init__(self) -> None:
        super().__init__(3, 5, 4, stride=4)
        self.encoded = 0
        self.settings: dict[str, int] = {}

    def feature_map(self, image: Tensor, layer: int) -> Tensor:
        self.encoded += len(image)
        return layer * self(image)


def test_features_of_a_teacher_are_cached_with_the_latents(tmp_path: Path, samples: Samples) -> None:
    """In a file of their own, which is made again for another layer or other weights."""
    network = TinyTeacher().requires_grad_(False)

    def cached(layer: int = 1) -> Samples:
        path = tmp_path / "train.safetensors"
        return cache_latents(TinyFirstStage(), "mark", samples, path, teacher=Teacher(network, layer))

    pictures = TrainStream(samples, 6, 0, 9)
    for batch, expected in zip(TrainStream(cached(), 6, 0, 9), pictures, strict=True):
        torch.testing.assert_close(batch["teacher"], network(expected["image"]), rtol=1e-3, atol=1e-3)  # fp16
        assert batch.keys() >= {"mean", "std", "key", "text"}
        assert "image" not in batch
    assert network.encoded == 35
    cached()
    assert network.encoded == 35
    cached(2)
    assert network.encoded == 70
    network.weight += 1
    cached(2)
    assert network.encoded == 105
    network.settings["size"] = 4
    cached(2)
    assert network.encoded == 140


def test_the_file_is_valid_safetensors(tmp_path: Path, samples: Samples) -> None:
    path = tmp_path / "train.safetensors"
    cached = cache_latents(TinyFirstStage(), "mark", samples, path)
    posterior = load_file(path)["posterior"]
    assert posterior.shape == (35, 2, 2, 2, 3)
    batches = list(EvaluationLoader(cached, 10))
    assert torch.equal(posterior[:, 0].float(), torch.cat([batch["mean"] for batch in batches]))
    assert np.array_equal([len(batch["key"]) for batch in batches], [10, 10, 10, 5])


def test_pictures_are_encoded_again_only_if_something_changed(tmp_path: Path, samples: Samples) -> None:
    path, first_stage = tmp_path / "train.safetensors", TinyFirstStage()

    def encoded(mark: str, samples: Samples) -> int:
        before = first_stage.encoded
        cache_latents(first_stage, mark, samples, path)
        return first_stage.encoded - before

    other_size = ShardsData(str(tmp_path / "shards"), size=8, workers=0).open("train")
    assert [encoded("a", samples), encoded("a", samples), encoded("b", samples)] == [35, 0, 35]
    assert [encoded("b", other_size), encoded("b", other_size)] == [35, 0]
    path.write_bytes(path.read_bytes()[:-1])
    assert encoded("b", other_size) == 35
    assert encoded("b", other_size) == 0
