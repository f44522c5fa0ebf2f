from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.diffusion import Diffusion, Guidance, Projection, guided
from ldm.diffusion.parametrization import V
from ldm.diffusion.schedule import ScaledLinear
from ldm.errors import SamplingError
from ldm.nn.conditioning import Conditioning

B = 3
CONDITIONAL = Conditioning(vector=torch.linspace(1, 2, B)[:, None], context=torch.ones(B, 2, 4))
UNCONDITIONAL = Conditioning(vector=torch.zeros(B, 1), context=torch.zeros(B, 2, 4))
X, SIGMA = torch.linspace(-1, 1, B * 6).reshape(B, 2, 3), torch.tensor([0.1, 1.0, 9.0])


class CountingNetwork:
    """x0 = tanh(x / (1 + sigma) + vector), and the batch sizes that it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        assert cond.vector is not None
        self.batches.append(len(x))
        return torch.tanh(x / (1 + sigma[:, None, None]) + cond.vector[:, :, None])


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_guidance_goes_from_unconditional_towards_conditional_in_one_call(scale: float) -> None:
    network = CountingNetwork()
    denoised = guided(network, CONDITIONAL, UNCONDITIONAL, scale)(X, SIGMA)
    assert network.batches == [2 * B]
    with_it, without = network(X, SIGMA, CONDITIONAL), network(X, SIGMA, UNCONDITIONAL)
    torch.testing.assert_close(denoised, (1 - scale) * without + scale * with_it)


@pytest.mark.parametrize(("unconditional", "scale"), [(UNCONDITIONAL, 1.0), (None, 1.0), (None, 7.5)])
def test_without_anything_to_guide_by_the_network_runs_once(unconditional: Conditioning | None, scale: float) -> None:
    network = CountingNetwork()
    denoised = guided(network, CONDITIONAL, unconditional, scale)(X, SIGMA)
    assert network.batches == [B]
    assert torch.equal(denoised, network(X, SIGMA, CONDITIONAL))


def test_guiding_x0_is_guiding_what_the_network_says() -> None:
    """Ho & Salimans guide eps; the answer of any parametrization may be guided, since D is affine in it."""
    diffusion, network = Diffusion(ScaledLinear(), V()), CountingNetwork()

    def guided_network(x: Tensor, noise_level: Tensor, cond: Conditioning) -> Tensor:
        without = network(x, noise_level, UNCONDITIONAL)
        return without + 4.0 * (network(x, noise_level, cond) - without)

    inside = diffusion.denoise(guided_network, X, SIGMA, CONDITIONAL)
    outside = guided(
        lambda x, sigma, cond: diffusion.denoise(network, x, sigma, cond), CONDITIONAL, UNCONDITIONAL, 4.0
    )(X, SIGMA)
    torch.testing.assert_close(outside, inside)


def test_each_picture_may_have_a_scale_of_its_own() -> None:
    network = CountingNetwork()
    together = guided(network, CONDITIONAL, UNCONDITIONAL, Guidance([0.0, 1.0, 7.0]))(X, SIGMA)
    for row, scale in enumerate([0.0, 1.0, 7.0]):
        alone = guided(network, CONDITIONAL, UNCONDITIONAL, scale)(X, SIGMA)
        torch.testing.assert_close(together[row], alone[row])


def test_outside_the_interval_the_conditional_model_runs_alone() -> None:
    network = CountingNetwork()
    denoise = guided(network, CONDITIONAL, UNCONDITIONAL, Guidance(5.0, interval=(0.5, 4.0)))
    everywhere = guided(network, CONDITIONAL, UNCONDITIONAL, 5.0)
    network.batches.clear()
    for sigma, rows in ((0.1, B), (0.5, 2 * B), (2.0, 2 * B), (4.0, 2 * B), (9.0, B)):
        levels = torch.full((B,), sigma)
        result = denoise(X, levels)
        assert network.batches.pop() == rows
        expected = everywhere(X, levels) if rows > B else network(X, levels, CONDITIONAL)
        torch.testing.assert_close(result, expected)
    mixed = denoise(X, SIGMA)  # 0.1, 1 and 9
    torch.testing.assert_close(mixed[1], everywhere(X, SIGMA)[1])
    torch.testing.assert_close(mixed[[0, 2]], network(X, SIGMA, CONDITIONAL)[[0, 2]])


def test_rescaling_gives_v_the_deviation_of_the_conditional_one() -> None:
    network = CountingNetwork()

    def v(estimate: Tensor) -> Tensor:
        s = SIGMA[:, None, None]
        return (X / (1 + s**2) - estimate) * (1 + s**2).sqrt() / s

    plain = guided(network, CONDITIONAL, UNCONDITIONAL, 7.0)(X, SIGMA)
    whole = guided(network, CONDITIONAL, UNCONDITIONAL, Guidance(7.0, rescale=1.0))(X, SIGMA)
    wanted = v(network(X, SIGMA, CONDITIONAL)).flatten(1).std(1)
    torch.testing.assert_close(v(whole).flatten(1).std(1), wanted, rtol=1e-4, atol=1e-5)
    part = guided(network, CONDITIONAL, UNCONDITIONAL, Guidance(7.0, rescale=0.7))(X, SIGMA)
    torch.testing.assert_close(part, 0.7 * whole + 0.3 * plain, rtol=1e-4, atol=1e-5)


def test_thresholding_brings_the_range_back_to_that_of_the_conditional_estimate() -> None:
    network = CountingNetwork()
    towards = network(X, SIGMA, CONDITIONAL)
    whole = guided(network, CONDITIONAL, UNCONDITIONAL, Guidance(9.0, threshold=1.0))(X, SIGMA)
    plain = guided(network, CONDITIONAL, UNCONDITIONAL, 9.0)(X, SIGMA)
    for result, guided_one, wanted in zip(whole, plain, towards, strict=True):
        assert result.abs().max() <= wanted.abs().max() * (1 + 1e-5)
        if guided_one.abs().max() > wanted.abs().max():
            torch.testing.assert_close(result / result.abs().max(), guided_one / guided_one.abs().max())
    assert (plain.abs().amax((1, 2)) > towards.abs().amax((1, 2))).any()
    clipped = guided(network, CONDITIONAL, UNCONDITIONAL, Guidance(9.0, threshold=0.5))(X, SIGMA)
    assert (clipped.abs().flatten(1) == clipped.abs().flatten(1).amax(1, keepdim=True)).sum(1).ge(3).all()


def test_projection_drops_what_lies_along_the_conditional_estimate() -> None:
    network = CountingNetwork()
    towards, away = network(X, SIGMA, CONDITIONAL), network(X, SIGMA, UNCONDITIONAL)
    all_of_it = guided(network, CONDITIONAL, UNCONDITIONAL, Guidance(4.0, projection=Projection(eta=1.0)))(X, SIGMA)
    torch.testing.assert_close(all_of_it, away + 4.0 * (towards - away))
    none = guided(network, CONDITIONAL, UNCONDITIONAL, Guidance(4.0, projection=Projection()))(X, SIGMA)
    along = ((none - towards) * towards).flatten(1).sum(1)
    torch.testing.assert_close(along, torch.zeros(B), atol=1e-4, rtol=0)
    short = Guidance(4.0, projection=Projection(eta=1.0, norm_threshold=0.1))
    pushed = guided(network, CONDITIONAL, UNCONDITIONAL, short)(X, SIGMA) - towards
    torch.testing.assert_close(pushed.flatten(1).norm(dim=1), torch.full((B,), 0.3), rtol=1e-4, atol=0)


def test_momentum_sums_the_differences_of_a_sample_and_of_no_other() -> None:
    network = CountingNetwork()
    towards, away = network(X, SIGMA, CONDITIONAL), network(X, SIGMA, UNCONDITIONAL)
    how = Guidance(3.0, projection=Projection(eta=1.0, momentum=-0.5))
    for _ in range(2):
        denoise = guided(network, CONDITIONAL, UNCONDITIONAL, how)
        torch.testing.assert_close(denoise(X, SIGMA), towards + 2.0 * (towards - away))
        torch.testing.assert_close(denoise(X, SIGMA), towards + 2.0 * 0.5 * (towards - away))


def test_perturbed_guidance_goes_away_from_the_perturbed_answer_with_or_without_a_prompt() -> None:
    network, perturbed = CountingNetwork(), Conditioning(vector=CONDITIONAL.vector - 3, context=CONDITIONAL.context)
    towards, away, worse = (network(X, SIGMA, each) for each in (CONDITIONAL, UNCONDITIONAL, perturbed))
    alone = guided(network, CONDITIONAL, None, Guidance(1.0, perturbed=2.0), perturbed)(X, SIGMA)
    torch.testing.assert_close(alone, towards + 2.0 * (towards - worse))
    network.batches.clear()
    both = guided(network, CONDITIONAL, UNCONDITIONAL, Guidance(4.0, perturbed=2.0), perturbed)(X, SIGMA)
    assert network.batches == [3 * B]
    torch.testing.assert_close(both, away + 4.0 * (towards - away) + 2.0 * (towards - worse))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rescale": 1.5}, "the guidance rescale is 1.5; it must be from 0 to 1"),
        ({"interval": (3.0, 1.0)}, "give two rising noise levels"),
        ({"threshold": 0.0}, "the guidance threshold is 0.0; it must be above 0"),
    ],
)
def test_impossible_guidance_is_one_sentence(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        Guidance(2.0, **settings)


def test_what_a_picture_becomes_does_not_depend_on_the_scales_beside_it() -> None:
    network, how = CountingNetwork(), {"threshold": 0.6, "rescale": 0.5}
    together = guided(network, CONDITIONAL, UNCONDITIONAL, Guidance([1.0, 5.0, 2.0], **how))(X, SIGMA)
    for row, scale in enumerate((1.0, 5.0, 2.0)):
        one = slice(row, row + 1)
        alone = guided(network, CONDITIONAL[one], UNCONDITIONAL[one], Guidance(scale, **how))(X[one], SIGMA[one])
        torch.testing.assert_close(together[one], alone)
