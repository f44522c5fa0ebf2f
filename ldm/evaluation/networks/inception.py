"""Inception-v3 with the weights by which FID is defined (Heusel et al. 2017, arXiv 1706.08500), converted from TensorFlow.

The converted weights are known as ``pt_inception-2015-12-05-6726825d.pth``. That network differs from torchvision's in three
ways: average pooling in the blocks does not count the padding, the last block pools by the maximum, and there are 1008 classes.
Features are the 2048 values after the global average pooling.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import CheckpointError, first_line
from ldm.evaluation.features import FeatureNetwork, existing_file, feature_network, weights_hash

FILE = "pt_inception-2015-12-05-6726825d.pth"
SIZE = 299
CLASSES = 1008

AVERAGE = ("Mixed_5", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")
MAXIMUM = "Mixed_7c"
"""Names of the blocks that pool by the average without padding, and by the maximum."""


def _pooled_otherwise(block: Any, x: Tensor, maximum: bool) -> Tensor:
    """Return the outputs of a block of torchvision's Inception whose pooling is that of the original network.

    Args:
        block: the block, the last of whose branches pools.
        x: its input.
        maximum: pool by the maximum instead of the average without padding.
    """
    *outputs, _ = block._forward(x)
    if maximum:
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
    else:
        pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return torch.cat([*outputs, block.branch_pool(pooled)], dim=1)


class FIDInception(nn.Module):
    """Features ``[b 2048]`` of images ``[b 3 h w]`` in [-1, 1], which are resized to 299 x 299."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.inception import inception_v3

        network = inception_v3(
            weights=None, num_classes=CLASSES, aux_logits=False, transform_input=False, init_weights=False
        )
        self.network = network.eval().requires_grad_(False)

    def load(self, state: Mapping[str, Tensor], source: Path) -> None:
        """Load the converted weights, by the names of torchvision.

        Raises:
            CheckpointError: the file has other tensors.
        """
        own = self.network.state_dict()
        optional = {name for name in own if name.endswith("num_batches_tracked")}
        wrong = {name for name in own.keys() - optional if name not in state or state[name].shape != own[name].shape}
        if wrong or state.keys() - own.keys():
            raise CheckpointError(
                f"{source} does not hold the Inception of FID ({len(wrong)} weights are missing or of another shape); "
                f"give the file {FILE}."
            )
        self.network.load_state_dict({**own, **state})

    def forward(self, image: Tensor) -> Tensor:
        x = F.interpolate(image, (SIZE, SIZE), mode="bilinear", align_corners=False)
        for name, module in self.network.named_children():
            if name.startswith(AVERAGE) or name == MAXIMUM:
                x = _pooled_otherwise(module, x, maximum=name == MAXIMUM)
            elif name not in ("avgpool", "dropout", "fc"):
                x = module(x)
        return x.mean((2, 3))


@feature_network("inception")
def open_inception(source: str | None, device: torch.device) -> FeatureNetwork:
    """Open Inception-v3 with the weights of FID from a file; default: in torch's hub folder."""
    path = source or str(Path(torch.hub.get_dir()) / "checkpoints" / FILE)
    file = existing_file(path, f"the feature network 'inception' (--features inception=FILE, {FILE} from pytorch-fid)")
    try:
        state: Any = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # pickles raise anything
        raise CheckpointError(f"{file} cannot be read as weights ({first_line(error)}); download it again.") from None
    network = FIDInception()
    network.load(state, file)
    network.to(device)

    def images(batch: Tensor) -> Tensor:
        features: Tensor = network(batch.to(device))
        return features.float().cpu()

    resize = f"bilinear without antialias to {SIZE}"
    return FeatureNetwork("inception", weights_hash(network.network), resize, images)
