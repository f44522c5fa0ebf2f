"""A small denoiser, trained on the latents of a first stage for a fixed budget: whether they are easy to learn to generate.

Reconstruction does not say this: latents can hold every detail and yet be hard to model (Rombach et al. 2022, arXiv 2112.10752,
section 4.1, on stronger regularization). Generated latents are decoded and compared as images, so that first stages
with different latents are comparable.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.conditioning.conditioner import NoConditionerConfig
from ldm.config import from_dict, to_dict
from ldm.denoiser.unet import LevelSpec, UNetConfig
from ldm.diagnosis.pool import Pool
from ldm.diffusion import Diffusion, seeded_noise
from ldm.diffusion.loss import WeightedLossConfig
from ldm.evaluation.collected import Collected
from ldm.evaluation.intervals import mean_estimate
from ldm.evaluation.metric import Number, metric
from ldm.evaluation.metrics import frechet
from ldm.evaluation.metrics.denoising import levels_of, relative_error
from ldm.model import LatentDiffusion, ModelConfig, SamplingConfig
from ldm.nn.conditioning import Conditioning
from ldm.nn.wrappers import with_own_methods
from ldm.training.config import TrainConfig
from ldm.training.gradient_clipping import clip_gradients
from ldm.training.learning_rate import Cosine
from ldm.training.optimizers import set_learning_rate
from ldm.vae import FirstStage

if TYPE_CHECKING:
    from ldm.evaluation.subject import Subject

TRAINED, HELD_OUT = 4096, 256
"""Largest numbers of images that the probe is trained and measured on."""

BATCH, LEARNING_RATE, WIDTHS = 32, 1e-3, (64, 128)
"""Hyperparameters of the training, and widths of the U-Net."""

SAMPLING = SamplingConfig(num_inference_steps=20, guidance_scale=1.0)


def normalized(stage: FirstStage, mode: Tensor, std: Tensor) -> FirstStage:
    """Return a copy of a first stage whose latents are normalized by the statistics of posteriors ``mode, std [n z h w]``.

    The stored statistics are those of another set, or not measured yet; the metric ``latents`` shows how well they fit.
    """
    copied = with_own_methods(copy.deepcopy(stage))
    variance = mode.double().var((0, 2, 3), unbiased=False) + std.double().square().mean((0, 2, 3))
    copied.latent_mean.copy_(mode.double().mean((0, 2, 3)))
    copied.latent_std.copy_(variance.clamp(min=1e-12).sqrt())
    return copied


def widths_of(stage: FirstStage, size: tuple[int, int]) -> tuple[int, ...]:
    """Return the widths of the U-Net for images of a size: one level alone for latents with an odd side."""
    return WIDTHS if all(each // stage.factor % 2 == 0 for each in size) else WIDTHS[:1]


def new_probe(stage: FirstStage, config: Any, size: tuple[int, int], seed: int) -> LatentDiffusion:
    """Return an unconditional model of a first stage with a new denoiser, in fp32."""
    z, levels = stage.latent_channels, tuple(LevelSpec(width, blocks=1) for width in widths_of(stage, size))
    network = UNetConfig(levels, in_channels=z, out_channels=z, heads=4, groups=16)
    diffusion = from_dict(Diffusion, {"schedule": "cosine", "parametrization": "v"})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LatentDiffusion(ModelConfig(config, NoConditionerConfig(), network, diffusion, size, SAMPLING))
    device = next(stage.parameters()).device
    model.first_stage = stage
    model.denoiser.to(device)
    return model


def train(model: LatentDiffusion, mode: Tensor, std: Tensor, steps: int, seed: int) -> None:
    """Train the denoiser of a probe, in place, on posteriors ``mode, std [n z h w]`` that are not normalized.

    AdamW with a learning rate that decays as a cosine to 0, so that no average of the weights is needed.
    """
    config = TrainConfig(max_steps=steps, batch_size=BATCH, learning_rate=LEARNING_RATE, decay=Cosine())
    generator, loss_of = torch.Generator().manual_seed(seed), WeightedLossConfig().build()
    optimizer = config.optimizer.build([model.denoiser], config)
    device = next(model.denoiser.parameters()).device
    model.denoiser.train()
    for step in range(steps):
        set_learning_rate(optimizer, config.learning_rate * config.learning_rate_factor(step))
        rows = torch.randint(len(mode), (BATCH,), generator=generator)
        unit = torch.randn(mode[rows].shape, generator=generator)
        latents = model.first_stage.normalize((mode[rows] + std[rows] * unit).to(device))
        loss, _ = loss_of(model.denoiser, model.diffusion, latents, Conditioning(), generator)
        loss.mean().backward()
        clip_gradients(model.denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.denoiser.eval()


@torch.no_grad()
def held_out_error(model: LatentDiffusion, mode: Tensor, std: Tensor, seeds: Sequence[int]) -> Tensor:
    """Return the error of latents sampled from posteriors ``[n z h w]``, the mean over the noise levels, ``[n]``.

    The unit is that of the metric ``denoising``. Of different first stages the lower error need not be the better one: noisy
    latents are easier to denoise as well as those without details.
    """
    noise, device = seeded_noise(seeds, mode.shape[1:]), next(model.denoiser.parameters()).device
    latents = model.first_stage.normalize((mode + std * noise(0.0, 0.0)).to(device)).cpu()
    pool = Pool(latents, noise(0.0, 0.0), {})
    levels = levels_of(model.diffusion.schedule)
    return torch.stack([relative_error(model, pool, level) for level in levels]).mean(0)


@torch.no_grad()
def posteriors(subject: Subject, split: str, most: int) -> tuple[Tensor, Tensor, str]:
    """Return mode and standard deviation of the posteriors of the first images of a split, ``[n z h w]``, and their hash."""
    modes, deviations, images = [], [], Collected((), reduce=False)
    for batch in subject.batches(split, most):
        posterior = subject.encode(batch["image"])
        modes.append(posterior.mode.float().cpu())
        deviations.append(posterior.variance.float().sqrt().cpu())
        images.add(batch["image"])
    return torch.cat(modes), torch.cat(deviations), images.fingerprint


@metric("probe", "vae", by_default=False)
def probe(subject: Subject) -> Iterator[Number]:
    """Train the probe on the training set, and measure the images that it generates and its error on held-out latents.

    The intervals are over images; they do not hold the randomness of the training, which other seeds show.
    """
    from ldm.pipeline import Pipeline

    stage = subject.first_stage
    config = subject.pipe.model.config.first_stage if subject.pipe else getattr(stage, "config", None)
    if stage is None or config is None or not config.has_weights or "train" not in subject.sets:
        return
    options = subject.options
    mode, std, trained_on = posteriors(subject, "train", TRAINED)
    size = (mode.shape[2] * stage.factor, mode.shape[3] * stage.factor)
    stage = normalized(stage, mode, std)
    model = new_probe(stage, config, size, options.seed)
    train(model, mode, std, options.probe_steps, options.seed)
    parameters = {
        "training_steps": options.probe_steps,
        "batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "widths": list(widths_of(stage, size)),
        "training_images": len(mode),
        "training_data": trained_on,
    }
    held_out = posteriors(subject, subject.split, min(HELD_OUT, options.images or HELD_OUT))[:2]
    seeds = [options.seed + i for i in range(len(held_out[0]))]
    errors = held_out_error(model, *held_out, seeds).double().numpy()
    shape = {"latent": list(mode.shape[1:]), "levels": levels_of(model.diffusion.schedule)}
    yield Number("probe_error", mean_estimate(errors), len(errors), "neither", parameters=parameters | shape)
    if not subject.networks:
        return
    reference = subject.true(subject.reference)
    pipe = Pipeline(model)
    made = [
        pipe(num_images_per_prompt=len(part), seed=part[0], output_type="pt", progress=False).cpu() * 2 - 1
        for part in (seeds[start : start + BATCH] for start in range(0, len(seeds), BATCH))
    ]
    for network in subject.networks:
        features = torch.cat([network(part) for part in made])
        found = frechet.estimate(features, reference.features[network.name])
        yield Number(
            "probe_fid",
            found,
            len(features),
            "lower",
            network=network,
            reference=subject.reference,
            parameters=parameters | {"sampling": to_dict(SAMPLING)},
        )
