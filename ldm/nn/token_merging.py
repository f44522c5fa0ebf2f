"""Token merging (ToMe for Stable Diffusion, Bolya & Hoffman 2023, arXiv 2303.17604): similar positions attend as one.

The first position of each 2 x 2 square of a feature map is a destination, the others are sources. The sources that are most
similar to their nearest destination are averaged with it before the attention, and get its result afterwards. Nothing is random.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenMerging:
    """Which positions of a feature map are merged, for each image by itself.

    Args:
        x: features ``[b h*w d]`` by whose cosine similarity positions are merged.
        size: height and width of the feature map.
        ratio: share of the positions that are merged, at most those that are no destinations (3/4 for even sides).
    """

    def __init__(self, x: Tensor, size: tuple[int, int], ratio: float):
        index = torch.arange(x.shape[1], device=x.device).view(size)
        is_destination = torch.zeros(size, dtype=torch.bool, device=x.device)
        is_destination[::2, ::2] = True
        self.destinations, sources = index[is_destination], index[~is_destination]
        count = min(len(sources), round(ratio * x.shape[1]))

        unit = F.normalize(x, dim=-1)
        similarity = unit[:, sources] @ unit[:, self.destinations].transpose(1, 2)
        best, nearest = similarity.max(dim=-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
        self.merged, self.left = sources[order[:, :count]], sources[order[:, count:]]  # [b count], [b rest]
        self.nearest = nearest.gather(1, order[:, :count])  # [b count], in destinations

    def merge(self, x: Tensor) -> Tensor:
        """Return the positions that are left, then the destinations averaged with what is merged: ``[b n d] -> [b m d]``."""
        destinations, merged = x[:, self.destinations], _rows(x, self.merged)
        into = self.nearest[..., None].expand_as(merged)
        averaged = destinations.scatter_reduce(1, into, merged, "mean")
        return torch.cat([_rows(x, self.left), averaged], dim=1)

    def unmerge(self, x: Tensor) -> Tensor:
        """Return the result for each position, that of a merged one being its destination's: ``[b m d] -> [b n d]``."""
        left, destinations = x.split([self.left.shape[1], len(self.destinations)], dim=1)
        everywhere = self.destinations.expand(len(x), -1)
        places = torch.cat([self.left, everywhere, self.merged], dim=1)
        values = torch.cat([left, destinations, _rows(destinations, self.nearest)], dim=1)
        return torch.empty_like(values).scatter(1, places[..., None].expand_as(values), values)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows ``index [b m]`` of each ``x [b n d]``: ``[b m d]``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
