"""Pipeline: generates images with a model."""

from __future__ import annotations

import math
import threading
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ldm import inputs
from ldm.acceleration.compilable import Compilable
from ldm.checks import whole_number
from ldm.conditioning import ConditioningSchedule, conditioning_schedules
from ldm.conditioning.long_prompts import check_clip_skip
from ldm.control_images import control_images, hints_of, with_controls
from ldm.controlnet_loader import ControlNetLoader
from ldm.devices import check_dtype, default_device, default_dtype, usable, usual_torch_state
from ldm.diffusion import SPECS, Denoiser, Perturbable, guided, seeded_noise, sigmas_from_timesteps, sigmas_from_values
from ldm.diffusion import sigmas as spaced_sigmas
from ldm.diffusion.self_conditioning import Evaluate, SelfConditioning
from ldm.errors import SamplingError
from ldm.formats import SHIPPED, Source, load, save
from ldm.formats.native import innermost
from ldm.formats.tensors import channels_last, check_finite, to_dtype
from ldm.image_output import Images
from ldm.lora_loader import LoRALoader
from ldm.model import LatentDiffusion
from ldm.nn.attention import AttentionOptions
from ldm.prompts import Prompt
from ldm.sampling_loop import Edit, SamplingStep, SamplingStream, batches_of, solve, starting_point
from ldm.sampling_settings import SamplingSettings, takes_settings
from ldm.shortcuts import check_shortcuts, evaluation_options
from ldm.textual_inversion_loader import TextualInversionLoader


class _Sampling(NamedTuple):
    """One call of the pipeline, checked and resolved."""

    settings: SamplingSettings
    request: inputs.Request
    models: Sequence[LatentDiffusion]  # the model of each image
    levels: Tensor  # falling noise levels [steps + 1]
    shape: tuple[int, int, int]  # of one latent


class Pipeline(ControlNetLoader, LoRALoader, TextualInversionLoader, Compilable):
    """Generates images with a model. Several threads may call one pipeline at once.

    >>> Pipeline.from_pretrained("runs/emoji_64")("a red apple", seed=1)[0].save("apple.png")
    >>> Pipeline("a red apple")  # the shipped model, loaded once per process; returns the images

    An image depends, to rounding and within one dtype, on model, prompt, settings and seed alone: all its
    noise comes from one CPU generator of its own, first the starting noise, then that of the steps; solvers with a
    Brownian path read the latter off a path that the seed determines.

    Args:
        model: the model, which stays on its device (:meth:`to` moves it). Anything else is a prompt: the
            result is then the :class:`Images` that the shipped model makes of it.
        settings: as in :meth:`__call__`, for a prompt.

    ``lora_folder`` is the folder of LoRA files that prompts can name, if it is not given to the call; see docs/prompts.md.
    """

    model: LatentDiffusion
    lora_folder: Source | None = None

    def __new__(cls, model: LatentDiffusion | Prompt | Sequence[Prompt], **settings: Any) -> Any:
        if not isinstance(model, torch.nn.Module):
            with _LOCK:
                shipped = _shipped()
            return shipped(model, **settings)
        innermost(model, LatentDiffusion)
        pipe = super().__new__(cls)
        pipe.model = model.eval()
        return pipe

    def __getnewargs__(self) -> tuple[LatentDiffusion]:
        """Return the arguments of ``__new__`` for copies and pickles."""
        return (self.model,)

    @classmethod
    def from_pretrained(
        cls,
        source: Source = SHIPPED,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        lora_folder: Source | None = None,
        **options: Any,
    ) -> Pipeline:
        """Load a model and return a pipeline of it.

        Args:
            source: a run folder, a file or folder of SD 1.x, SD 2.x or SDXL, a hub id, or ``"emoji"``, the shipped
                model; see :func:`ldm.load`.
            device: default: the GPU if there is one, else the CPU.
            dtype: dtype of the networks; default: bf16 if the device has it natively, else fp32.
            lora_folder: folder of LoRA files that prompts can name, as in ``<lora:name:0.8>``.
            options: further options of :func:`ldm.load`: ``vae``, ``revision``, ``prediction_type``, ...

        Raises:
            CheckpointError: the source cannot be read.
            SamplingError: the device cannot be used.
        """
        device = default_device() if device is None else usable(device)
        dtype = check_dtype(dtype) or default_dtype(device)
        folder = SamplingSettings(lora_folder=lora_folder).lora_folder
        pipe: Pipeline = cls(load(source, dtype=dtype, **options))
        pipe.lora_folder = folder
        return pipe.to(device, dtype)

    @usual_torch_state()
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Pipeline:
        """Move the model, in place. The networks go into ``dtype``; the statistics of the latents stay fp32.

        Raises:
            SamplingError: the device cannot be used.
        """
        if device is not None:
            self.model.to(usable(device))
        adapters = set(self.model.adapters.parameters())  # these keep their precision
        for parameter in self.model.parameters():
            if parameter not in adapters:
                parameter.data = to_dtype(parameter.data, check_dtype(dtype))
        self.model.adapters.merge(self.model)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the networks; everything else is fp32."""
        return next(self.model.denoiser.parameters()).dtype

    @usual_torch_state()
    def save_pretrained(self, path: Source, dtype: torch.dtype | None = None, to: str = "native") -> Path:
        """Write the model as a source of :meth:`from_pretrained`, and return the file; see :func:`ldm.formats.save`."""
        return save(self.model, path, to, dtype)

    @takes_settings(SamplingSettings)
    def __call__(self, settings: SamplingSettings) -> Any:
        """Generate images; settings that are not given are those of ``model.config.sampling`` and ``model.config.size``.

        Returns:
            :class:`Images`, or the array or tensor that ``output_type`` names.

        Raises:
            SamplingError: an unknown or invalid setting, or one that this model or solver does not support.
        """
        return self.sample(settings).result()

    @takes_settings(SamplingSettings)
    def stream(self, settings: SamplingSettings) -> SamplingStream:
        """Generate images step by step, as an iterator; takes the settings of :meth:`__call__` and raises as it does.

        Settings are checked at once; each step is computed when the iterator reaches it.

        >>> stream = pipe.stream("a red apple")
        >>> for step in stream:
        ...     print(step.done, step.total, step.sigma)
        >>> stream.result()[0].save("apple.png")

        Returns:
            The steps; :meth:`SamplingStream.result` is what :meth:`__call__` returns, :meth:`SamplingStream.close` cancels.
        """
        return self.sample(settings)

    @usual_torch_state()
    def sample(self, settings: SamplingSettings) -> SamplingStream:
        """:meth:`stream` for settings that are a record already."""
        settings, conditioner = settings.resolved(self.model.config.sampling), self.model.config.conditioner
        assert settings.guidance is not None
        self._check_output_type(settings.output_type)
        check_shortcuts(self.model, settings)
        shape = self.latent_shape(settings.height, settings.width)
        request = inputs.request(
            conditioner.input_keys,
            {"prompt": settings.prompt, "label": settings.label, **(settings.condition or {})},
            settings.negative_prompt,
            settings.guidance,
            settings.seed,
            settings.num_images_per_prompt,
            settings.prompt_options,
            conditioner.defaults(*(side * self.model.config.first_stage.factor for side in shape[1:])),
        )
        repeats = settings.num_images_per_prompt
        controls = hints_of(self.model, control_images(settings.controlnets or ()), shape[1:], len(request), repeats)
        request = replace(request, controls=controls)
        levels = (settings.edit or Edit()).levels(self._noise_levels(settings))
        if settings.latents is not None and settings.latents.shape != (len(request), *shape):
            given, needed = list(settings.latents.shape), [len(request), *shape]
            raise SamplingError(f"latents have the shape {given}; these images need {needed}.")
        check_clip_skip(self.model.conditioner, settings.clip_skip)
        named = [settings.prompt_options.lora_tags(prompt) for prompt in request.conditions.get("text", ())]
        models = [self.model] * len(request)
        if any(named):
            from ldm.prompt_loras import prompt_models

            if self.model.accelerator is not None:
                self.model.accelerator.check_prompt_loras()
            models = prompt_models(self.model, named, settings.lora_folder or self.lora_folder)
        return SamplingStream(self._run(_Sampling(settings, request, models, levels, shape)), self.model)

    def _run(self, sampling: _Sampling) -> Generator[SamplingStep, None, Any]:
        """Yield the steps of all batches, and return the result."""
        settings, request, models, *_ = sampling
        results = yield from self._steps(sampling)
        result = torch.cat(results).clone()  # outside of inference mode: a tensor like any other
        if settings.output_type == "np":
            return result.permute(0, 2, 3, 1).cpu().numpy()
        if settings.output_type != "pil":
            return result

        record = settings.record() | {"height": result.shape[2], "width": result.shape[3]}
        steps = len(self._noise_levels(settings)) - 1  # an edit may leave out the first of them
        record |= {} if SPECS[str(settings.sampler)].adaptive else {"num_inference_steps": steps}
        record |= {} if settings.latents is None else {"latents": "given"}
        record |= {"dtype": str(self.dtype).removeprefix("torch."), **(settings.sampler_options or {})}
        controls = [hints.record() for hints in request.controls]
        record |= {"controlnets": controls} if controls else {}
        edit = (settings.edit or Edit()).record()
        records = [record | each.additions | edit for each in models]
        model = {"model": self.model.fingerprint} if self.model.fingerprint else {}
        return Images.of(result, [request.record(index, each) | model for index, each in enumerate(records)])

    @torch.inference_mode()
    def _steps(self, sampling: _Sampling) -> Generator[SamplingStep, None, list[Tensor]]:
        """Yield the steps of all batches, and return the batches' images or latents. Inference mode ends at each yield."""
        self._lay_out_weights()
        if self.model.accelerator is not None:
            self.model.accelerator.check_weights()
        settings, request, models, levels, shape = sampling
        sampler, options, edit = str(settings.sampler), settings.sampler_options or {}, settings.edit or Edit()
        spacing = settings.spacing or self.model.config.sampling.spacing
        diffusion, latents = self.model.diffusion, settings.latents
        start, size, results = float(levels[0]), settings.batch_size or len(request), []
        batches = batches_of(models, size)
        total = None if SPECS[sampler].adaptive else len(batches) * (len(levels) - 1)
        with tqdm(total=total, disable=not settings.progress) as bar:
            done = 0
            for model, rows in batches:
                noise = seeded_noise(request.seeds[rows], shape, self.device)
                unit = noise(math.inf, start)  # drawn in any case: the noise of the steps comes after it
                if latents is not None:
                    unit = latents[rows].to(self.device, torch.float32)
                x = edit.start(starting_point(diffusion, unit, start, sampler, spacing), unit, start, rows)
                x = x.contiguous(memory_format=torch.channels_last)
                pipe = self if model is self.model else type(self)(model)
                denoise = edit.wrap(pipe.denoiser(request[rows], levels, evaluation_options(settings)), rows)
                for step in solve(diffusion, sampler, denoise, x, levels, noise, options, request.seeds[rows]):
                    x, done = step.x, done + 1
                    bar.update()
                    seen = SamplingStep(step.index, step.sigma, x, step.denoised, done, total, rows, self.preview)
                    if settings.callback is not None:
                        settings.callback(seen)
                    yield seen
                x = self._finite(diffusion.finish(x, float(levels[-1])), "sample")
                if settings.output_type != "latent":
                    image = self.model.decode_each(x, settings.decoder)
                    x = edit.finish(self._finite((image + 1) / 2, "decoded image"), rows)
                results.append(x)
        return results

    def _lay_out_weights(self) -> None:
        """Convert the kernels of convolutions to channels_last; only the first call of several threads changes anything.

        Not when the model is made: of a memory-mapped file, nothing has been read by then.
        """
        with _LOCK:
            for parameter in self.model.parameters():
                if not parameter.requires_grad:  # the moments of an optimizer lie as its parameters do
                    weight = parameter.data
                    if (converted := channels_last(weight)) is not weight:
                        parameter.data = converted

    @usual_torch_state()
    def preview(self, latents: Tensor) -> Images:
        """Decode normalized latents ``[n c h/f w/f]``, such as ``step.denoised``, roughly, without the decoder."""
        self._check_output_type("pil")
        with torch.inference_mode():
            return Images.of((self.model.full_size_preview(latents.to(self.device, torch.float32)) + 1) / 2)

    @usual_torch_state()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images ``[n 3 h w]`` in [0, 1] to normalized latents ``[n c h/f w/f]``, the mean of their posterior."""
        with torch.inference_mode():
            return self.model.encode(2 * images.to(self.device) - 1)

    def noise_levels(self, num_inference_steps: int | None = None, **settings: Any) -> Tensor:
        """Return the falling noise levels of a sampling, ``[steps + 1]`` fp32 on the CPU.

        Args:
            num_inference_steps: number of steps; default: the model's.
            settings: ``timesteps``, ``sigmas``, ``spacing``, ``shift`` and ``sampler`` as in :meth:`__call__`.

        Raises:
            SamplingError: several ways at once, levels that the model's schedule does not have, or an unknown solver.
        """
        return self._noise_levels(SamplingSettings.of(num_inference_steps=num_inference_steps, **settings))

    @usual_torch_state()
    def _noise_levels(self, settings: SamplingSettings) -> Tensor:
        steps, timesteps, sigmas = settings.num_inference_steps, settings.timesteps, settings.sigmas
        if sum(way is not None for way in (steps, timesteps, sigmas)) > 1:
            raise SamplingError("give only one of num_inference_steps, timesteps and sigmas.")
        if (settings.spacing, settings.shift) != (None, None) and (timesteps is not None or sigmas is not None):
            raise SamplingError("timesteps and sigmas are a spacing of their own; leave spacing and shift out.")
        schedule, defaults = self.model.diffusion.schedule, self.model.config.sampling
        sampler = settings.sampler or defaults.sampler
        final = defaults.final_of(sampler)
        if timesteps is not None:
            return sigmas_from_timesteps(schedule, timesteps, final)
        if sigmas is not None:
            return sigmas_from_values(schedule, sigmas)
        return spaced_sigmas(
            schedule,
            steps or defaults.num_inference_steps,
            settings.spacing or defaults.spacing,
            defaults.offset,
            final,
            defaults.shift if settings.shift is None else settings.shift,
            SPECS[sampler].grid,
        )

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Return the shape (c, h/f, w/f) of the latent of an image of ``height`` by ``width`` pixels.

        Raises:
            SamplingError: a side is not a whole number, or not divisible by the factor f of the first stage.
        """
        factor = self.model.config.first_stage.factor
        sides = []
        for name, given in (("height", height), ("width", width)):
            side = None if given is None else whole_number(name, given)
            if side is not None and side % factor:
                near = max(1, round(side / factor)) * factor
                raise SamplingError(
                    f"the {name} {side} is not divisible by {factor}, the factor of this model; try {near}."
                )
            sides.append(side)
        return self.model.latent_shape(*sides)

    @usual_torch_state()
    def denoiser(self, request: inputs.Request, levels: Tensor, options: AttentionOptions | None = None) -> Denoiser:
        """Return the model under its conditions and guidance, as the denoiser of solvers along ``levels [steps + 1]``."""
        guidance, conditions, negatives = request.guidance, request.conditions, request.negative_prompts
        *both, composition = conditioning_schedules(
            self.model.conditioner, conditions, negatives, request.prompt_options, levels
        )
        conditional, negative = (phases.map(lambda record: record.to(self.device)) for phases in both)
        if request.controls:
            images = range(len(request)) if composition is None else composition.rows
            conditional, negative = with_controls(
                self.model, request.controls, conditional, negative, levels, images, len(request)
            )
        unconditional = negative if self.model.config.conditioner.input_keys else None
        denoise: Evaluate = self.model.denoise
        if self.model.config.denoiser.self_conditioning:
            denoise = SelfConditioning(denoise, len(request), composition)

        def network(x: Tensor, sigma: Tensor, phases: ConditioningSchedule) -> Tensor:
            return denoise(x, sigma, phases.at(sigma), options)

        if not guidance.perturbed:
            return guided(network, conditional, unconditional, guidance, composition=composition)
        if not self.model.config.denoiser.has_perturbed_attention:
            raise SamplingError("perturbed guidance needs self-attention in the middle of the U-Net, which this lacks.")

        def perturbable(x: Tensor, sigma: Tensor, batch: Perturbable[ConditioningSchedule]) -> Tensor:
            perturbed = replace(options or AttentionOptions(), identity=batch.rows)
            return denoise(x, sigma, batch.conditioning.at(sigma), perturbed)

        rows = torch.ones(len(request), dtype=torch.bool, device=self.device)
        prompts = rows if composition is None else rows[[*composition.rows]]
        return guided(
            perturbable,
            Perturbable(conditional, ~prompts),
            None if unconditional is None else Perturbable(unconditional, ~rows),
            guidance,
            perturbed=Perturbable(conditional, prompts),
            composition=composition,
        )

    def _finite(self, x: Tensor, what: str) -> Tensor:
        """Return ``x`` if it is finite; else raise a CheckpointError that names the weight which is not, or a SamplingError."""
        if not x.isfinite().all():
            check_finite(self.model.state_dict(), "the model")
            cause = "the guidance scale, noise or conditions are too large; give smaller ones"
            if torch.float16 in {parameter.dtype for parameter in self.model.parameters()}:
                cause = (
                    "either float16 cannot hold what the networks compute: load the model in float32 or bfloat16; or "
                    + cause
                )
            raise SamplingError(f"the {what} is not finite, though all weights and settings are: {cause}.")
        return x

    def _check_output_type(self, output_type: str) -> None:
        channels = self.model.config.first_stage.image_channels
        if output_type == "pil" and channels not in (1, 3):
            raise SamplingError(f"data of {channels} channels are no images; ask for output_type 'latent'.")


_LOCK = threading.RLock()
"""Held by what changes a model on first use, so that several threads can call one pipeline."""


@cache
def _shipped() -> Pipeline:
    return Pipeline.from_pretrained()
