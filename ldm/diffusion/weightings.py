"""Weightings of the denoising loss by functions of the signal-to-noise ratio."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ldm.diffusion.parametrization import Parametrization

WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "min_snr": lambda snr, gamma: snr.clamp(max=gamma),
    "soft_min_snr": lambda snr, gamma: snr * gamma / (snr + gamma),
}
"""Weights on the squared error of x0, as functions of the signal-to-noise ratio and a limit gamma.

Min-SNR: Hang et al. 2023, arXiv 2303.09556. Soft min-SNR, which has no kink: Crowson et al. 2024, arXiv 2401.11605.
"""


def snr_weight(weighting: str, parametrization: Parametrization, sigma: Tensor, gamma: float) -> Tensor:
    """Return the weight [b] on the error of F that amounts to w(SNR, gamma) of :data:`WEIGHTINGS` on that of x0.

    Since D - x0 = out(s) (F - target), in units of the data's standard deviation d,

        w(SNR) |D - x0|^2 / d^2 = w(SNR) (out(s) / d)^2 |F - target|^2,    SNR = (d / s)^2

    which for min-SNR is min(SNR, gamma) / SNR for eps, min(SNR, gamma) / (SNR + 1) for v and edm, min(SNR, gamma) for x0.
    The other norms take the same weight.
    """
    d, weight = parametrization.sigma_data, WEIGHTINGS[weighting]
    return weight((d / sigma) ** 2, gamma) * (parametrization.scalings(sigma).out / d) ** 2
