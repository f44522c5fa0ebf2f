"""Conditioner for super-resolution: diffusion conditioned on a low-resolution image.

The small image is concatenated to the noisy latent (Saharia et al. 2104.07636; Rombach et al. 2112.10752, section 4.4).
In training it is noised, and the network is conditioned on the noise level, so that it does not rely on details that small
images from other sources lack (conditioning augmentation, Ho et al. 2106.15282, section 3):

    z = sqrt(1 - s^2) y + s n,    s uniform in [0, noise_max]

which preserves the variance if y has unit variance. In sampling s is ``noise``, and n depends only on the size of the
small image: it is the same for every image of a batch, in the conditional and the unconditional pass.

The concat has the size of the latents, so that other conditions can be concatenated with it; this requires
``latent_factor``, which the model checks against its first stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.clip.model import CLIPConfig
from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning.conditioner import Conditioner, ConditionerConfig, training_images
from ldm.config import config_field
from ldm.errors import ConfigError, DataError, SamplingError
from ldm.image_arguments import signed_image
from ldm.nn.conditioning import Conditioning
from ldm.nn.embeddings import sinusoidal
from ldm.nn.ranks import rand_rows, randn_rows

LEVELS = 1000
"""Factor from noise levels to the inputs of the sinusoidal embedding, which is designed for timesteps."""


@dataclass(frozen=True)
class LowResConditionerConfig(ConditionerConfig, kind="low_res"):
    """A low-resolution image; without dropout, so that guidance has no effect on it."""

    factor: int = config_field(4, "upscaling factor of each side, from the small image to the result")
    latent_factor: int | None = config_field(
        None, "factor of the first stage, to resize the small image to the latents; null = taken from the experiment"
    )
    noise_max: float = config_field(
        0.5, "maximum noise level of the small image in training, 0 to 1; levels are uniform in [0, noise_max]"
    )
    noise: float = config_field(0.0, "noise level of the small image in validation and sampling, up to noise_max")
    width: int = config_field(64, "width of the sinusoidal embedding of the noise level, and of the vector")

    def __post_init__(self) -> None:
        if self.factor < 2 or (self.latent_factor is not None and self.latent_factor < 1):
            raise ConfigError(
                f"factor must be at least 2 and latent_factor at least 1, not {self.factor} and {self.latent_factor}."
            )
        if not 0 <= self.noise <= self.noise_max <= 1:
            raise ConfigError(
                f"noise must be from 0 to noise_max, and that at most 1, not {self.noise} and {self.noise_max}."
            )
        if self.width < 2 or self.width % 2:
            raise ConfigError(f"width must be even and at least 2, not {self.width}.")

    @property
    def input_keys(self) -> tuple[str, ...]:
        return ("low_res",)

    @property
    def vector_width(self) -> int:
        return self.width

    @property
    def concat_channels(self) -> int:
        return 3

    def resolved(self, clip: CLIPConfig | None, latent_size: tuple[int, int], factor: int) -> LowResConditionerConfig:
        return replace(self, latent_factor=self.latent_factor or factor)

    def build(self, tokenizer: Tokenizer | None = None) -> LowResConditioner:
        assert self.latent_factor is not None, "the factor comes from the experiment's first stage"
        return LowResConditioner(self, self.latent_factor)


class LowResConditioner(Conditioner):
    """Conditioner from ``low_res``, images ``[3 h w]`` in [-1, 1] (or PIL, or files), to ``concat [b 3 h' w']`` in latent size.

    The vector is the sinusoidal embedding of the noise level; the MLP that embeds it is part of the U-Net.
    """

    unaffected_by_cfg = True

    def __init__(self, config: LowResConditionerConfig, latent_factor: int):
        super().__init__()
        self.config = config
        self.latent_factor = latent_factor

    def forward(self, inputs: Mapping[str, Any], generator: torch.Generator | None = None) -> Conditioning:
        """Compute the conditioning of a batch; see :class:`Conditioner`.

        Raises:
            SamplingError: a small image is missing or not an image, or the images differ in size.
        """
        small, config = _stacked(inputs["low_res"]), self.config
        if generator is None:
            level = torch.full((len(small),), config.noise, dtype=torch.float32, device="cpu")
            seeded = torch.Generator("cpu").manual_seed(0)
            noise = torch.randn(small.shape[1:], generator=seeded, dtype=torch.float32, device="cpu")
        else:
            level = config.noise_max * rand_rows(len(small), generator)
            noise = randn_rows(small.shape, generator)
        s = level.to(small)[:, None, None, None]
        noisy = (1 - s**2).sqrt() * small + s * noise.to(small)
        size = [side * config.factor // self.latent_factor for side in small.shape[-2:]]
        return Conditioning(
            vector=sinusoidal(LEVELS * level.to(small), config.width),
            concat=F.interpolate(noisy, size=size, mode="bicubic", antialias=True),
        )

    def prepare_batch(
        self, batch: Mapping[str, Any], encode: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> Mapping[str, Any]:
        """Add ``low_res [b 3 h/factor w/factor]`` to the batch: its images, averaged over squares of ``factor`` pixels.

        Raises:
            DataError: latents are cached, or the images' sides are not divisible by the factor.
        """
        images, factor = training_images(batch, "low_res"), self.config.factor
        height, width = images.shape[-2:]
        if height % factor or width % factor:
            raise DataError(
                f"images of {height} x {width} are not divisible by the factor {factor} of the conditioner low_res; "
                "set data.size to a multiple of it."
            )
        return {**batch, "low_res": F.avg_pool2d(images, factor)}


def _stacked(images: Sequence[Any] | Tensor) -> Tensor:
    """Stack images to ``[b 3 h w]`` fp32 in [-1, 1]."""
    if isinstance(images, Tensor):  # a batch in training
        return images.float()
    if any(image is None for image in images):
        raise SamplingError("this model enlarges images; give condition={'low_res': [...]}, or use editing.upscale.")
    tensors = [signed_image(image) for image in images]
    sizes = dict.fromkeys(f"{tensor.shape[2]} x {tensor.shape[1]}" for tensor in tensors)
    if len(sizes) > 1:
        raise SamplingError(
            f"small images must be of one size, but they are {', '.join(sizes)}; enlarge them one by one."
        )
    return torch.stack(tensors)
