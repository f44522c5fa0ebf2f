"""Pipeline: prompt in, pictures out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm import inputs
from ldm.diffusion import (
    SAMPLERS,
    SPECS,
    Denoiser,
    Guidance,
    Noise,
    Schedule,
    Step,
    brownian_noise,
    guided,
    seeded_noise,
    sigmas_from_timesteps,
    sigmas_from_values,
)
from ldm.diffusion import sigmas as spaced_sigmas
from ldm.errors import SamplingError, unknown
from ldm.formats import MODEL_FILE, SHIPPED, load
from ldm.formats.native import save_model
from ldm.images import Images
from ldm.model import LatentDiffusion

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class Pipeline:
    """Samples from a model.

    >>> pipe = Pipeline.from_pretrained("runs/emoji_64")
    >>> pipe("a red apple", seed=1)[0].save("apple.png")
    >>> Pipeline("a red apple")  # the shipped model, loaded once per process; returns the pictures

    A picture depends, to rounding and within one dtype, on model, prompt, settings and seed alone: all its
    noise comes from one CPU generator of its own, first what it starts from, then what the steps add.

    Args:
        model: what to sample from, used where it is (:meth:`to` moves it). Anything else is a prompt: the
            result is then no pipeline but the :class:`Images` that the shipped model makes of it.
        settings: as of :meth:`__call__`, for a prompt.
    """

    model: LatentDiffusion

    def __new__(cls, model: LatentDiffusion | str | Sequence[str], **settings: Any) -> Any:
        if not isinstance(model, LatentDiffusion):
            return _shipped()(model, **settings)
        pipe = super().__new__(cls)
        pipe.model = model.eval()
        return pipe

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] = SHIPPED,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Pipeline:
        """A pipeline of a saved model.

        Args:
            source: a run folder, a file, or ``"emoji"``, the model that comes along; see :func:`ldm.load`.
            device: default: the GPU if there is one, else the CPU.
            dtype: in which the networks compute; default: bf16 where the device has it natively, else fp32.

        Raises:
            CheckpointError: the source cannot be read.
            SamplingError: the device cannot be used.
        """
        device = default_device() if device is None else _usable(device)
        pipe: Pipeline = cls(load(source))
        return pipe.to(device, dtype or default_dtype(device))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Pipeline:
        """Move the model, in place. The networks go into ``dtype``; the statistics of the latents stay fp32.

        Raises:
            SamplingError: the device cannot be used.
        """
        if device is not None:
            self.model.to(_usable(device))
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype or parameter.dtype)
        self.model.to(memory_format=torch.channels_last)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """In which the networks compute; all else is fp32."""
        return next(self.model.denoiser.parameters()).dtype

    def save_pretrained(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Path:
        """Write the model where :meth:`from_pretrained` finds it, and return the file.

        Args:
            path: a folder, or a file name that ends in .safetensors.
            dtype: of the stored weights; default: as they are.
        """
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / MODEL_FILE
        save_model(file, self.model, self.model.provenance, dtype)
        return file

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        label: int | Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        guidance: Guidance | None = None,
        sampler: str | None = None,
        seed: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        spacing: str | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback: Callable[[Step], object] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> Any:
        """Make pictures; what is not given is as ``model.config.sampling`` and ``model.config.size`` say.

        Args:
            prompt: one or several, for models that read text.
            negative_prompt: what the pictures are to keep away from, one for all or one for each prompt;
                default: the empty prompt. Without effect at a guidance scale of 1.
            label: one or several classes, for models that read them.
            height, width: of the pictures in pixels, divisible by the first stage's factor f.
            num_inference_steps: steps of the sampler, 1 or more.
            guidance_scale: classifier-free guidance, one for all or one for each prompt; 1 = none, at half the work;
                above 1 stresses the prompt.
            guidance: all else about guidance, in place of the scale; see :class:`ldm.diffusion.Guidance`.
            sampler: a name of ``ldm.diffusion.SAMPLERS``.
            seed: of the n pictures: one each, or s for s, s + 1, ...; None draws s at random and leaves it in
                ``Images.seeds``.
            num_images_per_prompt: pictures for each prompt or label, one after the other.
            eta: share of fresh noise in a step, 0 to 1, if the sampler takes one; default: the sampler's own.
            spacing: of the noise levels, a name of ``ldm.diffusion.SPACINGS``.
            timesteps: falling, in place of ``num_inference_steps``.
            sigmas: falling noise levels, in place of ``num_inference_steps``.
            latents: unit noise to start from, [n c h/f w/f], in place of what the seeds give.
            output_type: ``"pil"``; ``"np"``, [n h w c] fp32 in [0, 1]; ``"pt"``, [n c h w] fp32 in [0, 1];
                ``"latent"``, normalised latents, [n c h/f w/f] fp32.
            callback: called with each :class:`ldm.diffusion.Step` of each batch; what it raises ends it.
            batch_size: most pictures to work on at once; default: all.
            progress: show a progress bar on stderr.

        Returns:
            :class:`Images`, or the array or tensor that ``output_type`` asks for.

        Raises:
            SamplingError: a setting that this model or sampler cannot meet.
        """
        config = self.model.config
        sampler = config.sampling.sampler if sampler is None else sampler
        inputs.check_solver(sampler, eta)
        inputs.check_counts(num_images_per_prompt=num_images_per_prompt, batch_size=batch_size)
        self._check_output_type(output_type)

        reads, repeats = config.conditioner.reads, range(num_images_per_prompt)
        asked = inputs.conditions(reads, prompt, label)
        avoided = inputs.negatives(reads, negative_prompt, len(asked))
        wanted = [item for item in asked for _ in repeats]
        unwanted = avoided and [item for item in avoided for _ in repeats]
        seeds = inputs.seeds(seed, len(wanted))
        guidance = self._guidance(guidance, guidance_scale, len(asked), num_images_per_prompt)
        levels = self.noise_levels(num_inference_steps, timesteps, sigmas, spacing)
        shape = self.latent_shape(height, width)
        if latents is not None and latents.shape != (len(wanted), *shape):
            given, needed = list(latents.shape), [len(wanted), *shape]
            raise SamplingError(f"latents have the shape {given}; these pictures need {needed}.")

        start, size, results = float(levels[0]), batch_size or len(wanted), []
        batches = [slice(first, first + size) for first in range(0, len(wanted), size)]
        steps = None if SPECS[sampler].adaptive else len(batches) * (len(levels) - 1)
        with torch.inference_mode(), tqdm(total=steps, disable=not progress) as bar:
            for batch in batches:
                noise = seeded_noise(seeds[batch], shape, self.device)
                unit = noise(math.inf, start)  # drawn in any case: the noise of the steps comes after it
                if latents is not None:
                    unit = latents[batch].to(self.device, torch.float32)
                x = self.model.diffusion.start(unit, start).contiguous(memory_format=torch.channels_last)
                denoise = self.denoiser(wanted[batch], unwanted and unwanted[batch], _rows(guidance, batch))
                if SPECS[sampler].brownian and eta != 0:
                    noise = self._brownian(seeds[batch], shape, levels)
                for step in solve(sampler, denoise, x, levels, noise, eta):
                    x = step.x
                    bar.update()
                    if callback is not None:
                        callback(step)
                results.append(x if output_type == "latent" else (self.model.decode(x) + 1) / 2)
        result = torch.cat(results).clone()  # outside of inference mode: a tensor like any other
        if output_type == "np":
            return result.permute(0, 2, 3, 1).cpu().numpy()
        if output_type != "pil":
            return result

        settings: dict[str, Any] = {
            "sampler": sampler,
            "num_inference_steps": len(levels) - 1,
            **_told(guidance),
            "height": result.shape[2],
            "width": result.shape[3],
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        settings |= {} if eta is None else {"eta": eta}
        settings |= {} if spacing is None else {"spacing": spacing}
        settings |= {} if timesteps is None and sigmas is None else {"sigmas": levels.tolist()}
        settings |= {} if latents is None else {"latents": "given"}
        return Images.of(result, self._records(wanted, unwanted, seeds, settings))

    def noise_levels(
        self,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        spacing: str | None = None,
    ) -> Tensor:
        """The falling noise levels to sample along, [steps + 1] fp32 on the CPU, asked for in any one way.

        Raises:
            SamplingError: several ways at once, or levels that the model's schedule does not have.
        """
        if sum(way is not None for way in (num_inference_steps, timesteps, sigmas)) > 1:
            raise SamplingError("give only one of num_inference_steps, timesteps and sigmas.")
        if spacing is not None and (timesteps is not None or sigmas is not None):
            raise SamplingError("timesteps and sigmas are a spacing of their own; leave spacing out.")
        schedule, defaults = self.model.diffusion.schedule, self.model.config.sampling
        if timesteps is not None:
            return sigmas_from_timesteps(schedule, timesteps)
        if sigmas is not None:
            return sigmas_from_values(schedule, sigmas)
        inputs.check_counts(num_inference_steps=num_inference_steps)
        return spaced_sigmas(
            schedule, num_inference_steps or defaults.num_inference_steps, spacing or defaults.spacing
        )

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Shape (c, h/f, w/f) of the latent of a picture of ``height`` by ``width`` pixels.

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

    def denoiser(self, wanted: Sequence[Any], unwanted: Sequence[str] | None, guidance: Guidance | float) -> Denoiser:
        """The model, told what to show, as the denoiser that solvers take.

        Args:
            wanted: what the model reads, for each picture: prompts or labels; anything if it reads nothing.
            unwanted: as many prompts to keep away from; None for the empty one.
            guidance: what is made of the answers; a number is a scale.
        """
        conditioner, reads = self.model.conditioner, self.model.config.conditioner.reads
        if reads is None:
            return guided(self.model.denoise, conditioner({}), None, guidance)
        away = conditioner({reads: unwanted}) if unwanted else conditioner.unconditional(len(wanted))
        return guided(self.model.denoise, conditioner({reads: wanted}), away, guidance)

    def _guidance(
        self, guidance: Guidance | None, scale: float | Sequence[float] | None, prompts: int, repeats: int
    ) -> Guidance:
        """What was asked for, its scales one for each picture if they are several."""
        if guidance is not None and scale is not None:
            raise SamplingError("give either guidance_scale or guidance, which has a scale of its own.")
        if guidance is None:
            guidance = Guidance(self.model.config.sampling.guidance_scale if scale is None else scale)
        if isinstance(guidance.scale, int | float):
            return guidance
        scales = inputs.one_each("guidance scales", list(guidance.scale), prompts, "prompts")
        return replace(guidance, scale=tuple(float(each) for each in scales for _ in range(repeats)))

    def _brownian(self, seeds: Sequence[int], shape: Sequence[int], levels: Tensor) -> Noise:
        """Noise over the schedule's range, wider only where the levels are: it is to depend on the seed alone."""
        schedule: Schedule = self.model.diffusion.schedule
        least, greatest = levels[levels > 0].min().item(), levels.max().item()
        return brownian_noise(
            seeds, shape, min(least, schedule.sigma_min), max(greatest, schedule.sigma_max), self.device
        )

    def _check_output_type(self, output_type: str) -> None:
        if output_type not in OUTPUT_TYPES:
            raise SamplingError(unknown("output_type", output_type, OUTPUT_TYPES))
        channels = self.model.config.first_stage.image_channels
        if output_type == "pil" and channels not in (1, 3):
            raise SamplingError(f"data of {channels} channels are no pictures; ask for output_type 'latent'.")

    def _records(
        self, wanted: list[Any], unwanted: list[str] | None, seeds: list[int], settings: Mapping[str, Any]
    ) -> list[dict[str, str]]:
        """What each picture says of itself; see :class:`Images`."""
        common = {"settings": json.dumps(settings)}
        if self.model.fingerprint:
            common["model"] = self.model.fingerprint
        name = inputs.ARGUMENTS.get(self.model.config.conditioner.reads or "")
        records = []
        for index, seed in enumerate(seeds):
            record = {name: str(wanted[index])} if name else {}
            record |= {"negative_prompt": unwanted[index]} if unwanted else {}
            records.append(record | {"seed": str(seed)} | common)
        return records


def solve(
    sampler: str, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float | None = None
) -> Iterator[Step]:
    """The solver of that name, given the noise and the eta if it takes them."""
    options: dict[str, Any] = {"noise": noise} if SPECS[sampler].stochastic else {}
    options |= {} if eta is None else {"eta": eta}
    return SAMPLERS[sampler](denoise, x, sigmas, **options)


def _rows(guidance: Guidance, batch: slice) -> Guidance:
    """The guidance of some pictures of all."""
    return guidance if isinstance(guidance.scale, int | float) else replace(guidance, scale=guidance.scale[batch])


def _told(guidance: Guidance) -> dict[str, Any]:
    """What of the guidance is not as usual, for the record of a picture."""
    told = {field.name: getattr(guidance, field.name) for field in fields(guidance)}
    usual = {field.name: field.default for field in fields(guidance)}
    named = {name: asdict(value) if is_dataclass(value) else value for name, value in told.items()}
    return {"guidance_scale": guidance.scale} | {
        f"guidance_{name}": value for name, value in named.items() if name != "scale" and told[name] != usual[name]
    }


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device computes in it natively, else fp32: emulated, it is many times slower."""
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if native else torch.float32


@cache
def _shipped() -> Pipeline:
    return Pipeline.from_pretrained()


def _usable(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise SamplingError(f"the device {device} cannot be used ({reason}); 'cpu' always can.") from None
