"""Pipeline: prompt in, images out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm import inputs
from ldm.conditioning import ConditioningSchedule, conditioning_schedules
from ldm.devices import default_device, default_dtype, usable
from ldm.diffusion import (
    SAMPLERS,
    SPECS,
    Denoiser,
    Guidance,
    Noise,
    Perturbable,
    Step,
    brownian_noise,
    guided,
    seeded_noise,
    sigmas_from_timesteps,
    sigmas_from_values,
)
from ldm.diffusion import sigmas as spaced_sigmas
from ldm.diffusion.schedule import BetaSchedule
from ldm.errors import SamplingError, unknown
from ldm.formats import SHIPPED, Source, load, save
from ldm.formats.lora import read_lora
from ldm.formats.tensors import channels_last, check_finite, to_dtype
from ldm.image_output import Images
from ldm.inputs import Edit
from ldm.model import LatentDiffusion
from ldm.nn.attention import AttentionOptions
from ldm.prompts import Prompt, PromptOptions

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class Pipeline:
    """Samples from a model.

    >>> pipe = Pipeline.from_pretrained("runs/emoji_64")
    >>> pipe("a red apple", seed=1)[0].save("apple.png")
    >>> Pipeline("a red apple")  # the shipped model, loaded once per process; returns the images

    An image depends, to rounding and within one dtype, on model, prompt, settings and seed alone: all its
    noise comes from one CPU generator of its own, first what it starts from, then what the steps add; solvers with a
    Brownian path draw the latter from one that the seed fixes.

    Args:
        model: what to sample from, used where it is (:meth:`to` moves it). Anything else is a prompt: the
            result is then no pipeline but the :class:`Images` that the shipped model makes of it.
        settings: as of :meth:`__call__`, for a prompt.
    """

    model: LatentDiffusion

    def __new__(cls, model: LatentDiffusion | Prompt | Sequence[Prompt], **settings: Any) -> Any:
        if not isinstance(model, LatentDiffusion):
            return _shipped()(model, **settings)
        pipe = super().__new__(cls)
        pipe.model = model.eval()
        return pipe

    @classmethod
    def from_pretrained(
        cls,
        source: Source = SHIPPED,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Pipeline:
        """A pipeline of a saved model.

        Args:
            source: a run folder, a file or folder of SD 1.x, SD 2.x or SDXL, a hub id, or ``"emoji"``, the model that
                comes along; see :func:`ldm.load`.
            device: default: the GPU if there is one, else the CPU.
            dtype: in which the networks compute; default: bf16 where the device has it natively, else fp32.
            options: further ones of :func:`ldm.load`: ``vae``, ``revision``, ``prediction_type``, ...

        Raises:
            CheckpointError: the source cannot be read.
            SamplingError: the device cannot be used.
        """
        device = default_device() if device is None else usable(device)
        dtype = dtype or default_dtype(device)
        pipe: Pipeline = cls(load(source, dtype=dtype, **options))
        return pipe.to(device, dtype)

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
                parameter.data = to_dtype(parameter.data, dtype)
        self.model.adapters.merge(self.model)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """In which the networks compute; all else is fp32."""
        return next(self.model.denoiser.parameters()).dtype

    def save_pretrained(self, path: Source, dtype: torch.dtype | None = None, to: str = "native") -> Path:
        """Write the model where :meth:`from_pretrained` finds it, and return the file; see :func:`ldm.formats.save`."""
        return save(self.model, path, to, dtype)

    def load_lora(self, source: Source, scale: float = 1.0, name: str | None = None, merge: bool = False) -> str:
        """Add the LoRA of a file to those that are loaded, and return its name.

        Args:
            source: a file of kohya's or of diffusers' naming, a folder that diffusers wrote, or a hub id of either.
            scale: of what it adds.
            name: default: that of the file.
            merge: into the weights, which :meth:`save_pretrained` then writes so; else it acts beside them, and is not written.

        Raises:
            CheckpointError: the file cannot be read, or is for another model.
            SamplingError: the name is taken, or the scale is no finite number.
        """
        return self.model.adapters.add(self.model, read_lora(source, self.model, scale, name, merge))

    def set_lora_scale(self, name: str, scale: float) -> None:
        """Change the scale of a loaded LoRA, at once; a SamplingError if there is none of this name."""
        self.model.adapters.set_scale(self.model, name, scale)

    def unload_lora(self, name: str | None = None) -> None:
        """Take a LoRA away, or all; every weight is bit for bit what it is without. A SamplingError as above."""
        self.model.adapters.remove(self.model, name)

    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt] | None = None,
        negative_prompt: Prompt | Sequence[Prompt] | None = None,
        *,
        prompt_syntax: str = "plain",
        long_prompts: str = "chunks",
        label: int | Sequence[int] | None = None,
        condition: Mapping[str, Sequence[Any]] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance: Guidance | None = None,
        sampler: str | None = None,
        sampler_options: Mapping[str, Any] | None = None,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        spacing: str | None = None,
        shift: float | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback: Callable[[Step], object] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        edit: Edit | None = None,
    ) -> Any:
        """Make images; what is not given is as ``model.config.sampling`` and ``model.config.size`` say.

        Args:
            prompt: one or several, for models that read text: strings, or objects of :mod:`ldm.prompts`.
            negative_prompt: what the images are to keep away from, one for all or one for each prompt;
                default: the empty prompt. Without effect at a guidance scale of 1.
            prompt_syntax: ``"plain"``, or ``"weighted"`` for ``(word:1.3)`` and its kin; see :mod:`ldm.prompts`.
            long_prompts: what becomes of a prompt that is too long for the text tower: read in ``"chunks"`` of its
                length, one after the other, or ``"cut"``.
            label: one or several classes, for models that read them.
            condition: what else the model reads, by name, an entry for each prompt or one for all.
            height, width: of the images in pixels, divisible by the first stage's factor f.
            num_inference_steps: steps of the sampler, 1 or more.
            guidance_scale: classifier-free guidance, one for all or one for each prompt; 1 = none, at half the work;
                above 1 stresses the prompt.
            guidance: all else about guidance; see :class:`ldm.diffusion.Guidance`.
            sampler: a name of ``ldm.diffusion.SAMPLERS``.
            sampler_options: its further parameters by name, such as ``{"order": 3}``.
            seed: of the n images: one each, or s for s, s + 1, ...; None draws s at random and leaves it in
                ``Images.seeds``.
            num_images_per_prompt: images for each prompt or label, one after the other.
            eta: share of fresh noise in a step, 0 to 1, if the sampler takes one; default: the sampler's own.
            spacing: of the noise levels, a name of ``ldm.diffusion.SPACINGS``.
            shift: factor on the noise levels, for models with a flow schedule.
            timesteps: falling, in place of ``num_inference_steps``.
            sigmas: falling noise levels, in place of ``num_inference_steps``.
            latents: unit noise to start from, [n c h/f w/f], in place of what the seeds give.
            output_type: ``"pil"``; ``"np"``, [n h w c] fp32 in [0, 1]; ``"pt"``, [n c h w] fp32 in [0, 1];
                ``"latent"``, normalised latents, [n c h/f w/f] fp32.
            callback: called with each :class:`ldm.diffusion.Step` of each batch; what it raises ends it.
            batch_size: most images to work on at once; default: all.
            progress: show a progress bar on stderr.
            edit: makes of sampling an editing of images; see :mod:`ldm.editing`.

        Returns:
            :class:`Images`, or the array or tensor that ``output_type`` asks for.

        Raises:
            SamplingError: a setting that this model or sampler cannot meet.
        """
        sampler = self.model.config.sampling.sampler if sampler is None else sampler
        options = dict(sampler_options or {}) | ({} if eta is None else {"eta": eta})
        guidance = self._guidance(guidance, guidance_scale)
        inputs.check_solver(sampler, options, guidance)
        inputs.check_counts(num_images_per_prompt=num_images_per_prompt, batch_size=batch_size)
        self._check_output_type(output_type)

        edit, conditioner = edit or Edit(), self.model.config.conditioner
        shape = self.latent_shape(height, width)
        request = inputs.request(
            conditioner.input_keys,
            {"prompt": prompt, "label": label, **(condition or {})},
            negative_prompt,
            guidance,
            seed,
            num_images_per_prompt,
            PromptOptions(prompt_syntax, long_prompts),
            conditioner.defaults(*(side * self.model.config.first_stage.factor for side in shape[1:])),
        )
        levels = edit.levels(self.noise_levels(num_inference_steps, timesteps, sigmas, spacing, shift, sampler))
        if latents is not None and latents.shape != (len(request), *shape):
            given, needed = list(latents.shape), [len(request), *shape]
            raise SamplingError(f"latents have the shape {given}; these images need {needed}.")

        for parameter in self.model.parameters():  # not before it is needed: nothing of a mapped file has been read yet
            if not parameter.requires_grad:  # the moments of an optimizer lie as its parameters do
                parameter.data = channels_last(parameter.data)
        start, size, results = float(levels[0]), batch_size or len(request), []
        batches = [slice(first, first + size) for first in range(0, len(request), size)]
        steps = None if SPECS[sampler].adaptive else len(batches) * (len(levels) - 1)
        with torch.inference_mode(), tqdm(total=steps, disable=not progress) as bar:
            for rows in batches:
                noise = seeded_noise(request.seeds[rows], shape, self.device)
                unit = noise(math.inf, start)  # drawn in any case: the noise of the steps comes after it
                if latents is not None:
                    unit = latents[rows].to(self.device, torch.float32)
                x = edit.start(self._start(unit, start, sampler, spacing), unit, start, rows)
                x = x.contiguous(memory_format=torch.channels_last)
                denoise = edit.wrap(self.denoiser(request[rows], levels), rows)
                for step in self._solve(sampler, denoise, x, levels, noise, options, request.seeds[rows]):
                    x = step.x
                    bar.update()
                    if callback is not None:
                        callback(step)
                x = self._finite(self.model.diffusion.finish(x, float(levels[-1])), "sample")
                if output_type != "latent":
                    x = edit.finish(self._finite((self.model.decode(x) + 1) / 2, "decoded image"), rows)
                results.append(x)
        result = torch.cat(results).clone()  # outside of inference mode: a tensor like any other
        if output_type == "np":
            return result.permute(0, 2, 3, 1).cpu().numpy()
        if output_type != "pil":
            return result

        settings: dict[str, Any] = {
            "sampler": sampler,
            **({} if steps is None else {"num_inference_steps": len(levels) - 1}),
            "height": result.shape[2],
            "width": result.shape[3],
            "dtype": str(self.dtype).removeprefix("torch."),
            **options,
        }
        settings |= {} if spacing is None else {"spacing": spacing}
        settings |= {} if shift is None else {"shift": shift}
        settings |= {} if timesteps is None and sigmas is None else {"sigmas": levels.tolist()}
        settings |= {} if latents is None else {"latents": "given"}
        settings |= self.model.adapters.record() | edit.record()
        model = {"model": self.model.fingerprint} if self.model.fingerprint else {}
        return Images.of(result, [request.record(index, settings) | model for index in range(len(request))])

    def preview(self, latents: Tensor) -> Images:
        """What normalised latents ``[n c h/f w/f]``, such as the ``denoised`` of a step, are going to show, roughly."""
        self._check_output_type("pil")
        with torch.inference_mode():
            small = self.model.preview(latents.to(self.device, torch.float32))
            large = F.interpolate(small, scale_factor=self.model.config.first_stage.factor, mode="bicubic")
        return Images.of((large.clamp(-1, 1) + 1) / 2)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures ``[n 3 h w]`` in [0, 1] to normalised latents ``[n c h/f w/f]``, the mean of their posterior."""
        with torch.inference_mode():
            return self.model.encode(2 * pictures.to(self.device) - 1)

    def noise_levels(
        self,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        spacing: str | None = None,
        shift: float | None = None,
        sampler: str | None = None,
    ) -> Tensor:
        """The falling noise levels that ``sampler`` walks along, [steps + 1] fp32 on the CPU, asked for in any one way.

        Raises:
            SamplingError: several ways at once, levels that the model's schedule does not have, or an unknown sampler.
        """
        if sum(way is not None for way in (num_inference_steps, timesteps, sigmas)) > 1:
            raise SamplingError("give only one of num_inference_steps, timesteps and sigmas.")
        if (spacing, shift) != (None, None) and (timesteps is not None or sigmas is not None):
            raise SamplingError("timesteps and sigmas are a spacing of their own; leave spacing and shift out.")
        schedule, defaults = self.model.diffusion.schedule, self.model.config.sampling
        sampler = sampler or defaults.sampler
        inputs.check_sampler(sampler)
        final = defaults.final_of(sampler)
        if timesteps is not None:
            return sigmas_from_timesteps(schedule, timesteps, final)
        if sigmas is not None:
            return sigmas_from_values(schedule, sigmas)
        inputs.check_counts(num_inference_steps=num_inference_steps)
        return spaced_sigmas(
            schedule,
            num_inference_steps or defaults.num_inference_steps,
            spacing or defaults.spacing,
            defaults.offset,
            final,
            defaults.shift if shift is None else shift,
            SPECS[sampler].grid,
        )

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Shape (c, h/f, w/f) of the latent of an image of ``height`` by ``width`` pixels.

        Raises:
            SamplingError: a side is not divisible by the factor f of the first stage.
        """
        inputs.check_counts(height=height, width=width)
        factor = self.model.config.first_stage.factor
        for name, side in (("height", height), ("width", width)):
            if side is not None and side % factor:
                near = max(1, round(side / factor)) * factor
                raise SamplingError(
                    f"the {name} {side} is not divisible by {factor}, the factor of this model; try {near}."
                )
        return self.model.latent_shape(height, width)

    def denoiser(self, request: inputs.Request, levels: Tensor) -> Denoiser:
        """The model, told what to show, as the denoiser that solvers take along ``levels [steps + 1]``."""
        guidance, wanted = request.guidance, request.wanted
        told = conditioning_schedules(self.model.conditioner, wanted, request.unwanted, request.reading, levels)
        conditional, avoided = (phases.map(lambda record: record.to(self.device)) for phases in told)
        unconditional = avoided if self.model.config.conditioner.input_keys else None

        def network(x: Tensor, sigma: Tensor, phases: ConditioningSchedule) -> Tensor:
            return self.model.denoise(x, sigma, phases.at(sigma))

        if not guidance.perturbed:
            return guided(network, conditional, unconditional, guidance)
        if not self.model.config.denoiser.has_perturbed_attention:
            raise SamplingError("perturbed guidance needs self-attention in the middle of the U-Net, which this lacks.")

        def perturbable(x: Tensor, sigma: Tensor, batch: Perturbable[ConditioningSchedule]) -> Tensor:
            return self.model.denoise(x, sigma, batch.conditioning.at(sigma), AttentionOptions(identity=batch.rows))

        rows = torch.ones(len(request), dtype=torch.bool, device=self.device)
        return guided(
            perturbable,
            Perturbable(conditional, ~rows),
            None if unconditional is None else Perturbable(unconditional, ~rows),
            guidance,
            perturbed=Perturbable(conditional, rows),
        )

    def _finite(self, x: Tensor, what: str) -> Tensor:
        """``x``, if it is finite; else a CheckpointError that names the weight which is not, or a SamplingError."""
        if not x.isfinite().all():
            check_finite(self.model.state_dict(), "the model")
            raise SamplingError(
                f"the {what} is not finite, though all weights are: {self.dtype} cannot hold what the networks compute; "
                "load the model in float32 or bfloat16."
            )
        return x

    def _start(self, unit: Tensor, sigma: float, sampler: str, spacing: str | None) -> Tensor:
        """Where sampling starts, ``[b c h w]``: at unit variance as the network sees it.

        At sigma times the noise, as k-diffusion's solvers do in diffusers on grids that reach up to the last timestep.
        """
        up_to_the_last = (spacing or self.model.config.sampling.spacing) != "leading"
        if (
            SPECS[sampler].grid == "fractional"
            and up_to_the_last
            and isinstance(self.model.diffusion.schedule, BetaSchedule)
        ):
            return sigma * unit
        return self.model.diffusion.start(unit, sigma)

    def _guidance(self, guidance: Guidance | None, scale: float | Sequence[float] | None) -> Guidance:
        guidance = guidance or Guidance()
        if scale is not None and guidance.scale is not None:
            raise SamplingError("give either guidance_scale or a guidance with a scale of its own, not both.")
        if scale is None:
            scale = self.model.config.sampling.guidance_scale if guidance.scale is None else guidance.scale
        return replace(guidance, scale=scale)

    def _solve(
        self,
        sampler: str,
        denoise: Denoiser,
        x: Tensor,
        levels: Tensor,
        noise: Noise,
        options: Mapping[str, Any],
        seeds: Sequence[int],
    ) -> Iterator[Step]:
        """The solver of that name, with the kind of noise that it takes; nothing where there is no step to make."""
        if len(levels) < 2:
            return iter(())
        spec, schedule = SPECS[sampler], self.model.diffusion.schedule
        given = dict(options)
        if spec.brownian and options.get("eta") != 0:
            # over the range of the schedule, and wider only where the levels are: it is to depend on the seed alone
            least = min(levels[levels > 0].min().item(), schedule.sigma_min)
            noise = brownian_noise(seeds, x.shape[1:], least, max(levels[0].item(), schedule.sigma_max), self.device)
        if spec.stochastic:
            given["noise"] = noise
        return SAMPLERS[sampler](denoise, x, levels, **given)

    def _check_output_type(self, output_type: str) -> None:
        if output_type not in OUTPUT_TYPES:
            raise SamplingError(unknown("output_type", output_type, OUTPUT_TYPES))
        channels = self.model.config.first_stage.image_channels
        if output_type == "pil" and channels not in (1, 3):
            raise SamplingError(f"data of {channels} channels are no images; ask for output_type 'latent'.")


@cache
def _shipped() -> Pipeline:
    return Pipeline.from_pretrained()
