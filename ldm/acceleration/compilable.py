"""The methods of a pipeline that compile its model."""

from __future__ import annotations

from typing import Any, TypeVar

from ldm.model import LatentDiffusion

P = TypeVar("P", bound="Compilable")


class Compilable:
    """Base of pipelines whose model can be compiled for faster sampling."""

    model: LatentDiffusion

    def compile(self: P, backend: str | None = "auto", **options: Any) -> P:
        """Run the denoiser and the first stage with a compiler from now on, and return the pipeline.

        The images are the same to the rounding of the model's dtype. A network is compiled when it is first called with a
        shape, which takes from seconds to minutes and prints a line; results are cached on disk for later processes. Weights
        and LoRAs may change afterwards: networks that are compiled with constant weights are compiled again.

        >>> pipe.compile()  # openvino on the CPU if it is installed, else inductor; cudagraphs on CUDA
        >>> pipe.compile("openvino", quantization="int8_weights")

        Args:
            backend: a file of :mod:`ldm.acceleration.backends`: ``"inductor"``, ``"openvino"``, ``"cudagraphs"``; ``"auto"``
                chooses the fastest that is installed; None undoes it, as :meth:`decompile` does.
            options: options of the backend, see docs/sampling.md; ``progress=False`` prints nothing.

        Raises:
            SamplingError: there is no such backend, or it cannot be used on the device of the model.
            ConfigError: there is no such option.
            MissingExtraError: the backend needs a package that is not installed.
        """
        from ldm.acceleration import accelerate

        if backend is None:
            return self.decompile()
        accelerate(self.model, backend, **options)
        return self

    def decompile(self: P) -> P:
        """Run the networks as they are again, and return the pipeline."""
        self.model.accelerator = None
        return self
