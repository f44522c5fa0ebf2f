"""Batch normalization over the batch of all ranks."""

from __future__ import annotations

from torch import Tensor, nn

from ldm.nn.ranks import mean_over_ranks, world_size


class BatchNorm(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose statistics in training are those of the batches of all ranks, of equal sizes.

    ``nn.SyncBatchNorm`` does the same, but not on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[b c h w] -> [b c h w]``"""
        if not self.training or world_size() == 1:
            return super().forward(x)
        mean = mean_over_ranks(x.float().mean((0, 2, 3)))
        centred = x.float() - mean[:, None, None]
        variance = mean_over_ranks(centred.square().mean((0, 2, 3)))
        self._update(mean.detach(), variance.detach(), world_size() * x.numel() // x.shape[1])
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _update(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Update the running statistics, which hold the unbiased variance."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        self.num_batches_tracked += 1
