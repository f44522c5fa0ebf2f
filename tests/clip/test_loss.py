from __future__ import annotations

import math
from pathlib import Path

import open_clip.loss
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ldm.clip.loss import CLIPLossConfig, CrossEntropyConfig, SigLIPConfig
from ldm.config import from_dict
from tests.processes import run_on_ranks


def features(n: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_a_section_without_a_kind_is_the_cross_entropy() -> None:
    assert from_dict(CLIPLossConfig, {}) == CrossEntropyConfig()
    assert from_dict(CLIPLossConfig, {"kind": "siglip", "bias": -5}) == SigLIPConfig(-5.0)


def test_siglip_is_a_binary_classification_of_all_pairs() -> None:
    image, text, scale = features(5, 0), features(5, 1), torch.tensor(10.0)
    loss = SigLIPConfig().build()
    logits = scale * image @ text.T - 10
    expected = F.binary_cross_entropy_with_logits(logits, torch.eye(5), reduction="sum") / 5
    torch.testing.assert_close(loss(image, text, scale), expected)


@pytest.mark.parametrize("config", [CrossEntropyConfig(), SigLIPConfig()], ids=repr)
def test_logits_are_computed_in_fp32(config: CLIPLossConfig) -> None:
    loss, scale = config.build(), torch.tensor(100.0)
    image, text = features(6, 0).bfloat16(), features(6, 1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(image, text, scale)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(image.float(), text.float(), scale))


def test_siglip_is_that_of_open_clip_and_learns_its_bias() -> None:
    image, text, scale = features(6, 0), features(6, 1), torch.tensor(10.0)
    loss = SigLIPConfig().build()
    value = loss(image, text, scale)
    assert torch.equal(value, open_clip.loss.SigLipLoss()(image, text, scale, torch.tensor(-10.0)))
    value.backward()
    # d/db of the sum above: sum_ij sigmoid(logit_ij) - n, over n
    expected = (torch.sigmoid(scale * image @ text.T - 10).sum() - 6) / 6
    torch.testing.assert_close(loss.logit_bias.grad, expected)
    assert loss.logit_bias.item() == -10.0
    assert [name for name, _ in loss.named_parameters()] == ["logit_bias"]


def compare() -> None:
    """The mean over the ranks of loss and gradients is that of the joint batch on one process."""
    rank, n = dist.get_rank(), 3
    for config in (CrossEntropyConfig(), SigLIPConfig(-2.0)):
        image, text = features(2 * n, 0).requires_grad_(), features(2 * n, 1).requires_grad_()
        scale = torch.tensor(math.log(7.0), requires_grad=True)
        joint, split = config.build(), config.build()
        whole = joint(image, text, scale.exp())
        inputs = (image, text, scale, *joint.parameters())
        wanted = torch.autograd.grad(whole, inputs)
        own = slice(rank * n, (rank + 1) * n)
        part = split(image[own], text[own], scale.exp(), rank, 2)
        found = torch.autograd.grad(part, (image, text, scale, *split.parameters()))
        for a, b in zip((whole.detach(), *wanted), (part.detach(), *found), strict=True):
            mean = b.clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / 2, a)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_batches_of_two_processes_count_as_one(tmp_path: Path) -> None:
    run_on_ranks(compare, tmp_path)
