from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from ldm.clip.timm_tower import TimmTower
from ldm.errors import CheckpointError

NAME = "test_vit"  # of 160 pixels in patches of 16


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of all layers, the classifier's among them, as in the files of timm."""
    torch.manual_seed(0)
    network = timm.create_model(NAME, pretrained=False)
    path = tmp_path_factory.mktemp("timm") / "vit.safetensors"
    save_file({name: torch.randn_like(each) * 0.1 for name, each in network.state_dict().items()}, path)
    return path


@torch.no_grad()
def test_the_last_feature_map_is_that_of_the_normalized_patches(file: Path) -> None:
    """The images have the network's own size, and are normalized by the mean and standard deviation of its config."""
    tower = TimmTower(f"timm:{NAME}={file}").eval()
    image = torch.rand(2, 3, 160, 160) * 2 - 1
    mean, std = (torch.tensor(each)[:, None, None] for each in (tower.network.default_cfg[k] for k in ("mean", "std")))
    states = tower.network.forward_features(((image + 1) / 2 - mean) / std)
    patches = states[:, tower.network.num_prefix_tokens :]
    found = tower.feature_map(image, tower.depth)
    assert tower.depth == len(tower.network.blocks)
    torch.testing.assert_close(found, patches.transpose(1, 2).unflatten(2, (10, 10)))
    assert not torch.allclose(tower.feature_map(image, 1), found)


@torch.no_grad()
def test_images_of_any_size_are_resized(file: Path) -> None:
    tower = TimmTower(f"timm:{NAME}={file}").eval()
    assert tower.feature_map(torch.rand(1, 3, 48, 32), 1).shape == (1, 64, 10, 10)


def test_settings_tell_networks_with_equal_weights_apart(file: Path) -> None:
    tower = TimmTower(f"timm:{NAME}={file}")
    assert tower.settings == {"name": NAME, "size": 160, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def test_convolutional_networks_have_feature_maps() -> None:
    with torch.device("meta"):
        tower = TimmTower("timm:test_resnet")
        assert tower.feature_map(torch.rand(1, 3, 64, 64), tower.depth).dim() == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:test_vitt", "timm has no network 'test_vitt'"),
        ("timm:vit_tiny_patch16", "timm has no network 'vit_tiny_patch16'; it has vit_tiny_patch16_224"),
        (
            "timm:test_vit=nowhere.safetensors",
            "nowhere.safetensors, the file of weights of timm:test_vit, does not exist",
        ),
        ("timm:hiera_tiny_224", "the feature maps of timm:hiera_tiny_224 cannot be read"),
        (
            "timm:test_resnet={file}",
            r"the weights of timm:test_resnet=.* cannot be loaded \(.*Missing key.*; give the file of weights of test_resnet",
        ),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(file: Path, source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised, torch.device("cpu" if "=" in source else "meta"):
        TimmTower(source.format(file=file))
    assert "\n" not in str(raised.value)
