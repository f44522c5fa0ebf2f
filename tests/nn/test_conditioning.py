from __future__ import annotations

import pytest
import torch

from ldm.nn.conditioning import Conditioning, Context


def record(n: int) -> Conditioning:
    return Conditioning(context=torch.randn(n, 5, 4), mask=torch.rand(n, 5) < 0.5, concat=torch.randn(n, 1, 3, 3))


def test_records_are_joined_along_the_batch_and_taken_apart_again() -> None:
    a, b = record(2), record(3)
    joined = Conditioning.cat([a, b])
    assert joined.vector is None
    for rows, part in ((slice(0, 2), a), (slice(2, 5), b)):
        for name in ("context", "mask", "concat"):
            assert torch.equal(getattr(joined[rows], name), getattr(part, name))


def test_the_padding_of_shorter_contexts_is_masked() -> None:
    short, long = Conditioning(context=torch.randn(2, 3, 4)), record(1)
    joined = Conditioning.cat([short, Conditioning(context=long.context, mask=long.mask)])
    assert joined.context.shape == (3, 5, 4)
    assert torch.equal(joined.context[:2, :3], short.context)
    assert joined.mask[:2].tolist() == [[True] * 3 + [False] * 2] * 2
    assert torch.equal(joined.context[2:], long.context)
    assert torch.equal(joined.mask[2:], long.mask)


def test_records_of_other_parts_are_not_joined() -> None:
    with pytest.raises(AssertionError, match="some records have context and some do not"):
        Conditioning.cat([record(1), Conditioning(vector=torch.zeros(1, 2))])


def test_only_floating_point_parts_change_precision() -> None:
    low = record(2).to(dtype=torch.bfloat16)
    assert (low.context.dtype, low.mask.dtype, low.concat.dtype) == (torch.bfloat16, torch.bool, torch.bfloat16)


def test_named_contexts_are_joined_taken_apart_and_cast_like_the_first() -> None:
    short = Conditioning(context=torch.randn(1, 5, 4), contexts={"image": Context(torch.randn(1, 2, 3))})
    long = Conditioning(context=torch.randn(2, 5, 4), contexts={"image": Context(torch.randn(2, 6, 3))})
    joined = Conditioning.cat([short, long]).to(dtype=torch.float64)
    image = joined.contexts["image"]
    assert image.states.shape == (3, 6, 3)
    assert image.states.dtype == torch.float64
    assert image.mask.tolist() == [[True] * 2 + [False] * 4] + [[True] * 6] * 2
    assert torch.equal(joined[:1].contexts["image"].states[:, :2].float(), short.contexts["image"].states)
    assert torch.equal(joined[1:].contexts["image"].states.float(), long.contexts["image"].states)
    assert joined.mask is None
    with pytest.raises(AssertionError, match="some records have image and some do not"):
        Conditioning.cat([short, Conditioning(context=torch.randn(1, 5, 4))])
