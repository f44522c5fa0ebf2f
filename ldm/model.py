"""LatentDiffusion: first stage, conditioner, denoiser and diffusion as one module that is trained, saved and sampled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.clip.tokenizer import Tokenizer
from ldm.conditioning import Conditioner, ConditionerConfig
from ldm.conditioning.textual_inversion import TextualInversions
from ldm.config import config_field
from ldm.denoiser import DenoiserConfig
from ldm.denoiser.controlnets import ControlNets
from ldm.diffusion.parametrization import Diffusion
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.spacing import SPACINGS, Final
from ldm.errors import ConfigError, SamplingError, unknown
from ldm.nn.adapters import Adapters
from ldm.nn.attention import AttentionOptions
from ldm.nn.conditioning import Conditioning
from ldm.nn.wrappers import has_replaced_methods, with_own_methods
from ldm.vae import FirstStage, FirstStageConfig, Tiling, TinyDecoderConfig
from ldm.vae.posterior import Posterior
from ldm.vae.preview import preview

R = TypeVar("R")


@dataclass(frozen=True)
class SamplingConfig:
    """Default sampling settings of a model."""

    sampler: str = config_field("dpmpp_2m", "name of the solver")
    num_inference_steps: int = config_field(30, "number of solver steps")
    guidance_scale: float = config_field(5.0, "scale of classifier-free guidance; 1 = none")
    spacing: str = config_field("trailing", "spacing of the noise levels: " + ", ".join(SPACINGS))
    offset: int = config_field(0, "offset added to the timesteps of the spacing leading; 1 for Stable Diffusion")
    final: Final = config_field(
        "zero",
        "last noise level: zero, or sigma_min as in Stable Diffusion's ddim and plms; applies to this sampler, "
        "ddim and plms, while other samplers end at zero",
    )
    shift: float = config_field(1.0, "factor on the noise levels of a flow schedule, in addition to the schedule's own")

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(unknown("sampler", self.sampler, SAMPLERS))
        if self.spacing not in SPACINGS:
            raise ConfigError(unknown("spacing", self.spacing, SPACINGS))

    def final_of(self, sampler: str) -> Final:
        """Return the last noise level of ``sampler``: ``final`` for the default sampler, ddim and plms, else zero."""
        return self.final if sampler in (self.sampler, "ddim", "plms") else "zero"


@dataclass(frozen=True)
class ModelConfig:
    """Config of a complete model, stored in the metadata of its file."""

    first_stage: FirstStageConfig = config_field(help="images to latents")
    conditioner: ConditionerConfig = config_field(help="what the denoiser is conditioned on")
    denoiser: DenoiserConfig = config_field(help="denoising network")
    diffusion: Diffusion = config_field(help="schedule and parametrization")
    size: tuple[int, int] = config_field(help="height and width of the training images, in pixels")
    sampling: SamplingConfig = config_field(SamplingConfig(), "default sampling settings of the pipeline")
    tiny_decoder: TinyDecoderConfig | None = config_field(
        None, "small decoder for previews and fast sampling; null = none", omit_default=True
    )

    def __post_init__(self) -> None:
        channels, denoiser = self.first_stage.latent_channels, self.denoiser
        for name, found in (("latent_channels", channels), ("latent_factor", self.first_stage.factor)):
            expected = getattr(self.conditioner, name)
            if expected not in (None, found):
                raise ConfigError(
                    f"the conditioner's {name} is {expected}, but the first stage's is {found}; set it to {found}."
                )
        in_channels = channels + self.conditioner.concat_channels
        if denoiser.in_channels != in_channels or denoiser.out_channels != channels:
            concatenated = f" and the conditioner adds {in_channels - channels}" if in_channels > channels else ""
            raise ConfigError(
                f"the denoiser has in_channels {denoiser.in_channels} and out_channels {denoiser.out_channels}, but the "
                f"first stage's latents have {channels} channels{concatenated}; set them to {in_channels} and {channels}."
            )
        for width in ("context_width", "vector_width"):
            if getattr(denoiser, width) != getattr(self.conditioner, width):
                raise ConfigError(
                    f"the denoiser's {width} is {getattr(denoiser, width)}, "
                    f"but the conditioner gives {getattr(self.conditioner, width)}; make them equal."
                )
        rows, timesteps = denoiser.num_timesteps, self.diffusion.schedule.num_timesteps
        if rows is not None and rows != timesteps:
            raise ConfigError(
                f"the denoiser's num_timesteps is {rows}, but the schedule's is {timesteps}; make them equal."
            )
        factor = self.first_stage.factor
        if self.tiny_decoder is not None:
            self.tiny_decoder.check_fit(self.first_stage)
        if self.size[0] % factor or self.size[1] % factor:
            raise ConfigError(
                f"the size {self.size[0]} x {self.size[1]} is not divisible by the first stage's factor {factor}."
            )


class Component(NamedTuple):
    """A network of a model: the prefix of its names in the model's state dict, and its config."""

    prefix: str
    config: Any


def components(config: ModelConfig, conditioner: Conditioner) -> dict[str, Component]:
    """Return the networks of a model by name.

    They are ``first_stage``, ``denoiser``, ``tiny_decoder`` if there is one, and the encoders of the conditioner.
    """
    modules = {module: f"conditioner.{name}" for name, module in conditioner.named_modules()}
    encoders = {name: Component(modules[each], each.config) for name, each in conditioner.pretrained_encoders()}
    names = ("first_stage", "denoiser", *(["tiny_decoder"] if config.tiny_decoder else []))
    return {name: Component(name, getattr(config, name)) for name in names} | encoders


class Accelerator(Protocol):
    """Interface of what runs the networks of a model in their place; see :mod:`ldm.acceleration`."""

    def denoiser(self, network: nn.Module, /) -> nn.Module:
        """Return what is called in place of the denoiser."""

    def first_stage(self, stage: FirstStage, /) -> FirstStage:
        """Return what is called in place of the first stage."""

    def check_weights(self) -> None:
        """Find out which weights have changed; called before each sampling."""

    def check_prompt_loras(self) -> None:
        """Check that LoRAs named in prompts can act."""


class LatentDiffusion(nn.Module):
    """A text-to-image (or unconditional, or two-dimensional) diffusion model.

    Args:
        config: configs of its parts.
        tokenizer: tokenizer of the text conditioner; None if the model is not conditioned on text.

    ``fingerprint`` and ``provenance`` are those of the file that the model was loaded from; None and empty if it was not loaded.
    ``tiling`` bounds how much the first stage processes at once, and may be set to another :class:`ldm.vae.Tiling`.
    ``accelerator`` runs the networks if it is not None; :meth:`ldm.pipeline.Pipeline.compile` sets it.
    ``adapters`` are the LoRAs in use; see :meth:`ldm.pipeline.Pipeline.load_lora` and :func:`ldm.nn.lora.new_lora`.
    ``controlnets`` are those that calls can use; see :meth:`ldm.pipeline.Pipeline.load_controlnet`.
    ``textual_inversions`` are the tokens that :meth:`ldm.pipeline.Pipeline.load_textual_inversion` has added.
    Parameters may be in low precision: the inputs of a network are cast to its precision, and its outputs are cast back.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.fingerprint: str | None = None
        self.provenance: dict[str, Any] = {}
        self.diffusion = config.diffusion
        self.first_stage = config.first_stage.build()
        self.conditioner = config.conditioner.build(tokenizer)
        self.denoiser = config.denoiser.build()
        self.tiny_decoder = config.tiny_decoder.build() if config.tiny_decoder else None
        self.tiling = Tiling()
        self.accelerator: Accelerator | None = None
        self.adapters = Adapters()
        self.controlnets = ControlNets()
        self.textual_inversions = TextualInversions()

    def __copy__(self) -> LatentDiffusion:
        new = type(self).__new__(type(self))
        new.__dict__.update(vars(self))
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentDiffusion:
        """Copy the model without methods that were replaced, which would go on using the weights of this one."""
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(vars(self), memo))
        return with_own_methods(new)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: compiled methods cannot be."""
        return super(LatentDiffusion, copy.deepcopy(self) if has_replaced_methods(self) else self).__getstate__()

    @property
    def additions(self) -> dict[str, Any]:
        """Adapters and textual inversions that are loaded, as entries of the record of a generated image."""
        return self.adapters.record() | self.textual_inversions.record()

    @property
    def components(self) -> dict[str, Component]:
        """Networks of the model by name; see :func:`components`."""
        return components(self.config, self.conditioner)

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning, options: AttentionOptions | None = None) -> Tensor:
        """Estimate the clean latents ``[b c h w]`` of ``x = x0 + sigma n [b c h w]``, ``sigma [b]``; fp32 in and out.

        ``options`` are for denoisers whose config ``has_perturbed_attention``.
        """
        network = partial(self._network, options=options)
        return self.diffusion.denoise(network, x, sigma, cond.at_levels(sigma))

    @torch.no_grad()
    def with_estimate(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Conditioning:
        """Return the conditions with the estimate that a denoiser with self-conditioning makes of ``x`` without one.

        The arguments are those of :meth:`denoise`. For other denoisers, the conditions are returned as they are.
        """
        if not self.config.denoiser.self_conditioning:
            return cond
        estimate = self.denoise(x, sigma, cond)
        torch.clear_autocast_cache()  # before pytorch/pytorch#165068, it may hold weights that are cut off from their gradients
        return replace(cond, estimate=estimate)

    def _network(
        self, x: Tensor, noise_level: Tensor, cond: Conditioning, options: AttentionOptions | None = None
    ) -> Tensor:
        precision = _precision(self.denoiser, x.dtype)
        x, controls = x.to(precision), cond.controls
        cond = (replace(cond, controls=()) if controls else cond).to(dtype=precision)
        inputs: list[Any] = [x, noise_level, cond]
        if controls:
            inputs += [options, self.controlnets.residuals(x, noise_level, cond, controls)]
        elif options is not None:
            inputs.append(options)
        denoiser = self.denoiser if self.accelerator is None else self.accelerator.denoiser(self.denoiser)
        result: Tensor = denoiser(*inputs)
        return result

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images ``[b 3 h w]`` in [-1, 1] to normalised latents: a posterior sample, or its mode without ``noise``."""

        def run(stage: FirstStage) -> Posterior:
            x = image.to(_precision(stage, image.dtype))
            return self.tiling.encode(self._accelerated(stage, x, self.first_stage.factor), x)

        posterior = self._within_range(run, lambda posterior: posterior.mode)
        return self.first_stage.normalize(
            (posterior.mode if noise is None else posterior.sample(noise)).to(image.dtype)
        )

    def decode(self, latent: Tensor, decoder: str = "full") -> Tensor:
        """Decode normalised latents ``[b c h w]`` to images ``[b 3 fh fw]`` in [-1, 1], by the ``full`` or the ``tiny`` decoder.

        Raises:
            SamplingError: there is no tiny decoder.
        """
        self.check_decoder(decoder)
        if decoder == "tiny" and self.tiny_decoder is not None:
            image = self.tiling.decode(self.tiny_decoder, latent.to(_precision(self.tiny_decoder, latent.dtype)))
            return image.to(latent.dtype).clamp(-1, 1)
        z = self.first_stage.denormalize(latent)

        def run(stage: FirstStage) -> Tensor:
            x = z.to(_precision(stage, z.dtype))
            return self.tiling.decode(self._accelerated(stage, x, 1), x)

        image = self._within_range(run, lambda image: image)
        return image.to(latent.dtype).clamp(-1, 1)

    def decode_each(self, latent: Tensor, decoder: str = "full") -> Tensor:
        """Call :meth:`decode`, on the CPU for one image at a time: each is bitwise the same in any batch, and memory is saved."""
        size = 1 if latent.device.type == "cpu" and self.accelerator is None else len(latent)
        return torch.cat([self.decode(part, decoder) for part in latent.split(size)])

    def check_decoder(self, decoder: str) -> None:
        """Check that the model has the ``full`` or ``tiny`` decoder.

        Raises:
            SamplingError: it does not.
        """
        if decoder == "tiny" and self.tiny_decoder is None:
            raise SamplingError(
                "this model has no tiny decoder; train one with tools/train.py --stage decoder, or load the file of one with the "
                "option tiny_decoder."
            )

    def _accelerated(self, stage: FirstStage, x: Tensor, scale: int) -> FirstStage:
        """Return what encodes or decodes ``x [b c scale*h scale*w]``; tiles share statistics, which no accelerator computes."""
        if self.accelerator is None or self.tiling.in_tiles(x, scale):
            return stage
        return self.accelerator.first_stage(stage)

    def _within_range(self, run: Callable[[FirstStage], R], values: Callable[[R], Tensor]) -> R:
        """Return what ``run`` computes with the first stage, which is put into fp32 if fp16 cannot hold its values.

        That is if its config says so, or if ``values`` of the result are not finite.
        """
        if _precision(self.first_stage, torch.float32) != torch.float16:
            return run(self.first_stage)
        if not getattr(self.config.first_stage, "overflows_fp16", False):
            result = run(self.first_stage)
            if values(result).isfinite().all():
                return result
        with torch.inference_mode(False), torch.no_grad():
            wide = with_own_methods(copy.deepcopy(self.first_stage))  # other threads may be using this one
            for parameter in wide.parameters():
                parameter.data = parameter.data.float()
        self.first_stage = wide
        return run(wide)

    def preview(self, latent: Tensor) -> Tensor:
        """Estimate :meth:`decode` cheaply, without the decoder, one pixel per position: ``[b c h w] -> [b 3 h w]``."""
        return preview(self.first_stage, latent).clamp(-1, 1)

    def full_size_preview(self, latent: Tensor) -> Tensor:
        """Return a preview ``[b 3 fh fw]`` in [-1, 1]: by the tiny decoder if there is one, else :meth:`preview` enlarged."""
        if self.tiny_decoder is not None:
            return self.decode(latent, "tiny")
        small = self.preview(latent)
        return F.interpolate(small, scale_factor=self.config.first_stage.factor, mode="bicubic").clamp(-1, 1)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Return the shape ``(c, h, w)`` of the latent of an image, by default of the size that the model was trained on."""
        factor = self.config.first_stage.factor
        return (
            self.config.first_stage.latent_channels,
            (height or self.config.size[0]) // factor,
            (width or self.config.size[1]) // factor,
        )


def _precision(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype of a module's parameters; ``default`` if it has none."""
    return next((parameter.dtype for parameter in module.parameters()), default)
