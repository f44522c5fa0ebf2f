"""Distances of features against torch-fidelity, which is installed in a folder of its own, since it has a package ``tests``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.evaluation.features import open_network
from ldm.evaluation.metrics.coverage import precision_and_recall
from ldm.evaluation.metrics.frechet import Moments, frechet_distance
from ldm.evaluation.metrics.kernels import gaussian, mmd, polynomial
from ldm.evaluation.networks.inception import FILE, FIDInception

FOLDER = Path(sys.prefix) / "torch-fidelity"
"""Folder in which ``make install`` installs it."""


@pytest.fixture(scope="module")
def fidelity() -> Iterator[Any]:
    sys.path.append(str(FOLDER))
    yield pytest.importorskip("torch_fidelity", reason="`make install` installs torch-fidelity")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def features() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    made, true = (torch.rand(300, 48, generator=draw, dtype=torch.float64) for _ in range(2))
    return made.square() + 0.1, true


def test_fid(fidelity: Any, features: tuple[Tensor, Tensor]) -> None:
    found = frechet_distance(*(Moments.of(each.numpy()) for each in features))
    statistics = (fidelity.metric_fid.fid_features_to_statistics(each) for each in features)
    expected = fidelity.metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(expected, rel=1e-4)


def test_kernel_distances(fidelity: Any, features: tuple[Tensor, Tensor]) -> None:
    """KID, and CMMD with its constants; of one subset, which are all images."""
    options = {"kid_subsets": 1, "kid_subset_size": len(features[0]), "verbose": False}
    for kernel, chosen in ((polynomial, {}), (gaussian, {"kid_kernel": "rbf", "kid_kernel_rbf_sigma": 10.0})):
        expected = fidelity.metric_kid.kid_features_to_metric(*features, **options, **chosen)[
            "kernel_inception_distance_mean"
        ]
        assert mmd(*features, kernel).value == pytest.approx(expected, rel=1e-4)


def test_precision_and_recall(fidelity: Any, features: tuple[Tensor, Tensor]) -> None:
    found = precision_and_recall(*features)
    expected = fidelity.metric_prc.prc_features_to_metric(*features, prc_neighborhood=3, verbose=False)
    assert {name: each.value for name, each in found.items()} == pytest.approx(
        {name: expected[name] for name in found}, rel=1e-4
    )
    assert 0.1 < found["recall"].value < 0.9


def test_the_inception(fidelity: Any, tmp_path: Path) -> None:
    """On images of 299 pixels, for which the resizing of either is the identity; theirs have values of -1 to 127/128."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FIDInception().network
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    torch.save(network.state_dict(), tmp_path / FILE)
    image = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    expected = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=tmp_path / FILE)(image)[0]
    ours = FIDInception()
    ours.load(torch.load(tmp_path / FILE, weights_only=True), tmp_path / FILE)
    torch.testing.assert_close(ours((image.float() - 128) / 128), expected)
    assert expected.abs().mean() > 0.01

    found = open_network(f"inception={tmp_path / FILE}", torch.device("cpu"))
    torch.testing.assert_close(found(image), ours(image.float() / 127.5 - 1))
