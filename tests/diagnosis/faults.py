"""Runs with one fault each, and healthy runs, for the tests of the diagnosis.

``python -m tests.diagnosis.faults [name ...]`` prints a table of the faults and verdicts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from ldm.clip.tokenizer import train_byte_bpe
from ldm.config import config_field
from ldm.data.samples import BatchIndices, Samples
from ldm.data.shapes import Shapes
from ldm.diagnosis.opened_run import OpenedRun
from ldm.diagnosis.runner import Diagnosis, diagnose
from ldm.diffusion import Diffusion
from ldm.diffusion.parametrization import Eps
from ldm.diffusion.schedule import Cosine
from ldm.formats.native import MODEL, header_of, save_state
from ldm.formats.tensors import read_metadata
from ldm.model import ModelConfig
from ldm.vae import FirstStageConfig
from tests.diagnosis.runs import Pictures, train, write_config, write_data

Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Unscaled(Shapes, kind="unscaled_shapes"):
    """A data set that a user wrote, which forgets to scale the values to [-1, 1]."""

    factor: float = config_field(1.0, "Largest value of a pixel; the smallest is 0.")

    def open(self, split: str) -> Samples:
        return _Unscaled(super().open(split), self.factor)


del Unscaled.kinds[Unscaled.kind]  # known within :func:`unscaled_data`


@contextmanager
def unscaled_data() -> Iterator[None]:
    """Register the kind of data within the block."""
    Unscaled.kinds[Unscaled.kind] = Unscaled
    try:
        yield
    finally:
        del Unscaled.kinds[Unscaled.kind]


class _Unscaled(Samples):
    def __init__(self, samples: Samples, factor: float):
        self.samples, self.factor = samples, factor
        self.lengths, self.fingerprint = samples.lengths, samples.fingerprint

    def annotations(self, draw: BatchIndices) -> dict[str, Any]:
        return self.samples.annotations(draw)

    def __getitem__(self, draw: BatchIndices) -> dict[str, Any]:
        batch = self.samples[draw]
        return batch | {"image": (batch["image"] + 1) / 2 * self.factor}


class Bench:
    """A folder with a healthy run, from which the others are made."""

    def __init__(self, folder: Path):
        self.folder, self.data, self.healthy = folder, folder / "data", folder / "healthy" / "run"

    def prepare(self) -> None:
        """Train the healthy run, once."""
        done = self.folder / "done"
        if not done.exists():
            rmtree(self.folder, ignore_errors=True)
            write_data(self.data)
            train(write_config(self.folder / "healthy", self.data), ("vae", "clip", "denoiser"))
            done.touch()

    def copy(self, folder: Path, finished: bool = True) -> Path:
        """Copy the healthy run; without ``model.safetensors`` if it should be one that has not finished."""
        copytree(self.healthy, folder / "run")
        if not finished:
            (folder / "run" / "model.safetensors").unlink()
        return folder / "run"

    def denoiser(self, folder: Path, steps: int, changes: Changes | None = None, data: Path | None = None) -> Path:
        """Train only the denoiser, on the first stage and the CLIP of the healthy run."""
        changes = {
            **(changes or {}),
            "vae": {
                "train": None,
                "checkpoint": str(self.healthy / "vae/final.safetensors"),
                **(changes or {}).get("vae", {}),
            },
            "clip": {"train": None, "checkpoint": str(self.healthy / "clip/final.safetensors")},
        }
        config = write_config(folder, data or self.data, changes)
        return train(config, ["denoiser"], [f"denoiser.train.max_steps={steps}"])


@dataclass(frozen=True)
class Fault:
    """A fault: how its run is made, and the cause that the diagnosis must name."""

    cause: str
    make: Callable[[Bench, Path], Path]

    @property
    def name(self) -> str:
        return self.make.__name__


FAULTS: list[Fault] = []
HEALTHY: list[Fault] = []


def fault(cause: str) -> Callable[[Callable[[Bench, Path], Path]], Callable[[Bench, Path], Path]]:
    def register(make: Callable[[Bench, Path], Path]) -> Callable[[Bench, Path], Path]:
        FAULTS.append(Fault(cause, make))
        return make

    return register


def healthy(make: Callable[[Bench, Path], Path]) -> Callable[[Bench, Path], Path]:
    HEALTHY.append(Fault("", make))
    return make


FEW_STEPS = 40
"""Steps of the runs whose fault is not in the training of the denoiser."""

STEPS = 200
"""Steps of the runs whose fault is there."""


# Data


def shuffled(pictures: Pictures) -> Pictures:
    order = np.random.default_rng(0).permutation(len(pictures.captions))
    return pictures._replace(captions=[pictures.captions[i] for i in order])


@fault("captions_shuffled")
def shuffled_captions(bench: Bench, folder: Path) -> Path:
    write_data(folder / "data", shuffled)
    return bench.denoiser(folder, FEW_STEPS, data=folder / "data")


@fault("captions_shuffled")
def shuffled_captions_of_all_stages(bench: Bench, folder: Path) -> Path:
    """The CLIP was trained on them too."""
    write_data(folder / "data", shuffled)
    vae = {"train": None, "checkpoint": str(bench.healthy / "vae/final.safetensors")}
    config = write_config(folder, folder / "data", {"vae": vae})
    return train(config, ["clip", "denoiser"], [f"denoiser.train.max_steps={FEW_STEPS}"])


@fault("captions_equal")
def equal_captions(bench: Bench, folder: Path) -> Path:
    write_data(folder / "data", lambda pictures: pictures._replace(captions=["a photo"] * len(pictures.captions)))
    return bench.denoiser(folder, FEW_STEPS, data=folder / "data")


@fault("images_duplicated")
def same_images(bench: Bench, folder: Path) -> Path:
    """An index that was computed wrongly leaves sixteen images, over and over."""

    def repeated(pictures: Pictures) -> Pictures:
        rows = [i % 16 for i in range(len(pictures.captions))]
        return Pictures(pictures.images[rows], [pictures.captions[i] for i in rows], [pictures.labels[i] for i in rows])

    write_data(folder / "data", repeated)
    return bench.denoiser(folder, FEW_STEPS, data=folder / "data")


@fault("images_constant")
def black_images(bench: Bench, folder: Path) -> Path:
    """Images in [0, 1] that were saved as integers."""
    write_data(folder / "data", lambda pictures: pictures._replace(images=pictures.images // 255))
    return bench.denoiser(folder, FEW_STEPS, data=folder / "data")


def of_range(bench: Bench, folder: Path, factor: float) -> Path:
    data = {"kind": "unscaled_shapes", "samples": 512, "size": 16, "factor": factor, "cache_latents": True}
    config = write_config(folder, bench.data, {})
    values = yaml.safe_load(config.read_text())
    for stage in ("vae", "clip"):
        values[stage] |= {"train": None, "checkpoint": str(bench.healthy / stage / "final.safetensors")}
    config.write_text(yaml.safe_dump(values | {"data": data}))
    return train(config, ["denoiser"], [f"denoiser.train.max_steps={FEW_STEPS}"])


@fault("images_wrong_range")
def images_to_255(bench: Bench, folder: Path) -> Path:
    return of_range(bench, folder, 255.0)


@fault("images_wrong_range")
def images_to_1(bench: Bench, folder: Path) -> Path:
    return of_range(bench, folder, 1.0)


# Weights


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None, **changes: Any) -> Path:
    """Write a native file again, with other tensors, config or tokenizer."""
    metadata = read_metadata(path)
    kind: type[Any] = ModelConfig if metadata["format"] == MODEL else FirstStageConfig
    header, tensors = header_of(metadata, path, kind), load_file(path)
    tensors = change(tensors) if change else tensors
    config, tokenizer = (
        changes.get("config", lambda config: config)(header.config),
        changes.get("tokenizer", header.tokenizer),
    )
    save_state(path, metadata["format"], tensors, config, tokenizer, header.provenance)
    return path


@fault("weights_not_finite")
def broken_weights(bench: Bench, folder: Path) -> Path:
    run = bench.copy(folder, finished=False)
    checkpoint = torch.load(run / "denoiser/last.ckpt", weights_only=True)
    average = checkpoint["ema"]["average"]
    average[next(name for name in average if name.startswith("denoiser."))].view(-1)[3] = torch.nan
    torch.save(checkpoint, run / "denoiser/last.ckpt")
    return run


# First stage and latents


@fault("first_stage_untrained")
def untrained_first_stage(bench: Bench, folder: Path) -> Path:
    config = write_config(
        folder, bench.data, {"clip": {"train": None, "checkpoint": str(bench.healthy / "clip/final.safetensors")}}
    )
    return train(config, ["vae", "denoiser"], ["vae.train.max_steps=3", f"denoiser.train.max_steps={FEW_STEPS}"])


def permuted(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return a first stage that is as good, with the channels of its latents in another order."""
    order = torch.arange(8).roll(1)
    both = torch.cat([order, order + 8])
    changed = {
        "quant_conv.weight": lambda w: w[both],
        "quant_conv.bias": lambda b: b[both],
        "post_quant_conv.weight": lambda w: w[:, order],
        "latent_mean": lambda m: m[order],
        "latent_std": lambda s: s[order],
        "latent_preview": lambda p: torch.cat([p[:, order], p[:, 8:]], dim=1),
    }
    return tensors | {
        f"{prefix}{name}": change(tensors[f"{prefix}{name}"]).contiguous() for name, change in changed.items()
    }


@fault("first_stage_swapped")
def first_stage_of_another_run(bench: Bench, folder: Path) -> Path:
    """The model was given another first stage, with the same config."""
    run = bench.copy(folder)
    rewrite(run / "model.safetensors", lambda tensors: permuted(tensors, "first_stage."))
    return run


@fault("first_stage_swapped")
def first_stage_trained_again(bench: Bench, folder: Path) -> Path:
    """The first stage was trained again after the denoiser, and the denoiser took over its file."""
    run = bench.copy(folder)
    rewrite(run / "vae/final.safetensors", permuted)
    rewrite(run / "model.safetensors", lambda tensors: permuted(tensors, "first_stage."))
    return run


def with_statistics(bench: Bench, folder: Path, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Path:
    """Train the denoiser with other statistics of the latents."""
    path = folder / "vae.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes((bench.healthy / "vae/final.safetensors").read_bytes())

    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        mean, std = change(tensors["latent_mean"], tensors["latent_std"])
        return tensors | {"latent_mean": mean, "latent_std": std}

    rewrite(path, changed)
    return bench.denoiser(folder, FEW_STEPS, {"vae": {"checkpoint": str(path)}})


@fault("latents_not_normalized")
def unnormalized_latents(bench: Bench, folder: Path) -> Path:
    return with_statistics(bench, folder, lambda mean, std: (torch.zeros_like(mean), torch.ones_like(std)))


@fault("latent_scale")
def scale_of_stable_diffusion(bench: Bench, folder: Path) -> Path:
    """0.18215, which fits latents with a standard deviation of 5.5, applied to latents that are normalized already."""
    return with_statistics(bench, folder, lambda mean, std: (mean, std / 0.18215))


# Text


@fault("clip_untrained")
def untrained_clip(bench: Bench, folder: Path) -> Path:
    vae = {"train": None, "checkpoint": str(bench.healthy / "vae/final.safetensors")}
    config = write_config(folder, bench.data, {"vae": vae})
    return train(config, ["clip", "denoiser"], ["clip.train.max_steps=2", f"denoiser.train.max_steps={FEW_STEPS}"])


@fault("tokenizer_mismatch")
def another_tokenizer(bench: Bench, folder: Path) -> Path:
    run = bench.copy(folder)
    tokenizer = train_byte_bpe([f"{word} of the {word}s" for word in ("house", "tree", "river")] * 9, 300, 12)
    rewrite(run / "model.safetensors", tokenizer=tokenizer)
    return run


@fault("text_encoder_swapped")
def another_text_encoder(bench: Bench, folder: Path) -> Path:
    """A CLIP with the same tokenizer, trained again with another seed after the denoiser."""
    run = bench.copy(folder)
    rmtree(run / "clip")
    vae = {"train": None, "checkpoint": str(run / "vae/final.safetensors")}
    train(write_config(folder, bench.data, {"vae": vae, "seed": 7}), ["clip"])
    values = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(values | {"vae": values["vae"] | {"checkpoint": None}}))
    return run


# Objective


@fault("prediction_type")
def sampled_as_eps(bench: Bench, folder: Path) -> Path:
    """The file says that the network predicts noise."""
    run = bench.copy(folder)
    (run / "denoiser/last.ckpt").unlink()  # which would tell
    rewrite(run / "model.safetensors", config=lambda config: replace(config, diffusion=Diffusion(Cosine(), Eps())))
    return run


@fault("schedule_changed")
def sampled_with_zero_terminal_snr(bench: Bench, folder: Path) -> Path:
    run = bench.copy(folder)

    def changed(config: ModelConfig) -> ModelConfig:
        return replace(config, diffusion=replace(config.diffusion, schedule=Cosine(zero_terminal_snr=True)))

    rewrite(run / "model.safetensors", config=changed)
    return run


@fault("terminal_snr")
def schedule_of_100_timesteps(bench: Bench, folder: Path) -> Path:
    """With the betas of 1000 timesteps, so that the last of 100 is hardly noisy."""
    schedule = {"kind": "scaled_linear", "num_timesteps": 100}
    return bench.denoiser(
        folder, FEW_STEPS, {"denoiser": {"diffusion": {"schedule": schedule, "parametrization": "v"}}}
    )


# Optimization and conditioning


def trained(bench: Bench, folder: Path, **settings: Any) -> Path:
    return bench.denoiser(folder, STEPS, {"denoiser": {"train": settings}})


@fault("learning_rate_too_high")
def high_learning_rate(bench: Bench, folder: Path) -> Path:
    return trained(bench, folder, learning_rate=0.2)


@fault("learning_rate_too_low")
def low_learning_rate(bench: Bench, folder: Path) -> Path:
    return trained(bench, folder, learning_rate=2e-5)


@fault("gradient_clip_too_low")
def clipped_gradients(bench: Bench, folder: Path) -> Path:
    return trained(bench, folder, gradient_clip=1e-8)


@fault("weight_decay_too_high")
def strong_weight_decay(bench: Bench, folder: Path) -> Path:
    return trained(bench, folder, weight_decay=100.0)


@fault("training_too_short")
def barely_started(bench: Bench, folder: Path) -> Path:
    return bench.denoiser(folder, 20)


@fault("overfitted")
def handful_of_images(bench: Bench, folder: Path) -> Path:
    write_data(folder / "few", counts={"train": 12, "val": 256})
    return bench.denoiser(folder, 2 * STEPS, data=folder / "few")


@fault("conditioning_dropped")
def dropped_captions(bench: Bench, folder: Path) -> Path:
    return bench.denoiser(folder, STEPS, {"denoiser": {"conditioner": {"dropout": 0.99}}})


# EMA


@fault("ema_lags")
def stuck_average(bench: Bench, folder: Path) -> Path:
    """The average of a decay of 0.99999 without a ramp: after 800 steps, 99 % of it are still the first weights."""
    first = bench.denoiser(folder / "first", 1)
    run = bench.copy(folder, finished=False)
    begun = torch.load(first / "denoiser/last.ckpt", weights_only=True)["ema"]["average"]
    checkpoint = torch.load(run / "denoiser/last.ckpt", weights_only=True)
    average = checkpoint["ema"]["average"]
    for name, value in average.items():
        value.copy_(0.99 * begun[name] + 0.01 * value)
    torch.save(checkpoint, run / "denoiser/last.ckpt")
    return run


# Sampling


def sampled(bench: Bench, folder: Path, **settings: Any) -> Path:
    run = bench.copy(folder)
    rewrite(
        run / "model.safetensors", config=lambda config: replace(config, sampling=replace(config.sampling, **settings))
    )
    return run


@fault("guidance_scale")
def high_guidance(bench: Bench, folder: Path) -> Path:
    return sampled(bench, folder, guidance_scale=30.0)


@fault("guidance_scale")
def no_guidance(bench: Bench, folder: Path) -> Path:
    return sampled(bench, folder, guidance_scale=0.0)


@fault("too_few_steps")
def two_steps(bench: Bench, folder: Path) -> Path:
    return sampled(bench, folder, num_inference_steps=2)


@fault("sampler_starts_late")
def late_start(bench: Bench, folder: Path) -> Path:
    return sampled(bench, folder, spacing="leading", num_inference_steps=3, sampler="ddim")


@fault("sampler_ends_early")
def early_end(bench: Bench, folder: Path) -> Path:
    """A schedule that begins at a high noise level, where the sampler stops as Stable Diffusion's do."""
    diffusion = {"schedule": {"kind": "karras", "sigma_min": 0.4, "sigma_max": 80.0}, "parametrization": "v"}
    sampling = {"sampler": "ddim", "final": "sigma_min", "num_inference_steps": 20, "guidance_scale": 2.0}
    return bench.denoiser(folder, STEPS, {"denoiser": {"diffusion": diffusion, "sampling": sampling}})


# Healthy runs


@healthy
def text_v_finished(bench: Bench, folder: Path) -> Path:
    return bench.copy(folder)


@healthy
def text_eps_unfinished(bench: Bench, folder: Path) -> Path:
    """Another seed, a constant learning rate, half of the steps, stopped before the end."""
    diffusion = {"schedule": "linear", "parametrization": "eps"}
    run = bench.denoiser(
        folder, 2 * STEPS, {"seed": 1, "denoiser": {"diffusion": diffusion, "train": {"decay": "constant"}}}
    )
    (run / "model.safetensors").unlink()
    return run


@healthy
def classes_of_flow(bench: Bench, folder: Path) -> Path:
    """Class-conditional, with a straight path."""
    changes = {
        "conditioner": {"kind": "class", "classes": 4, "width": 32},
        "model": {"context_width": None, "levels": [{"width": 32, "blocks": 1}, {"width": 48, "blocks": 1}]},
        "diffusion": {"schedule": "flow", "parametrization": "flow"},
        "sampling": {"sampler": "euler", "num_inference_steps": 25, "guidance_scale": 2.0},
        "prompts": [],
        "classes": [0, 1],
    }
    return bench.denoiser(folder, 2 * STEPS, {"seed": 2, "denoiser": changes})


@healthy
def unconditional_pixels(bench: Bench, folder: Path) -> Path:
    """Without a first stage, in pixels, unconditional."""
    changes = {
        "data": {"kind": "shapes", "samples": 512, "size": 8},
        "vae": {"model": {"kind": "identity"}, "train": None},
        "clip": None,
        "seed": 3,
    }
    config = write_config(folder, bench.data, changes)
    values = yaml.safe_load(config.read_text())
    model = values["denoiser"]["model"] | {
        "in_channels": 3,
        "out_channels": 3,
        "context_width": None,
        "vector_width": None,
    }
    model["levels"] = [{"width": 32, "blocks": 1}, {"width": 48, "blocks": 1}]
    values["denoiser"] |= {"model": model, "conditioner": {"kind": "none"}, "prompts": []}
    config.write_text(yaml.safe_dump(values))
    return train(config, ["denoiser"], [f"denoiser.train.max_steps={2 * STEPS}"])


@healthy
def text_longer(bench: Bench, folder: Path) -> Path:
    """The first run, continued with a constant learning rate."""
    run = bench.copy(folder, finished=False)
    config = write_config(folder, bench.data, {"denoiser": {"train": {"decay": "constant", "learning_rate": 5e-4}}})
    train(config, ["denoiser"], ["denoiser.train.max_steps=1000"])
    return run


@healthy
def first_stage_alone(bench: Bench, folder: Path) -> Path:
    """A run of which only stage 1 exists, as a checkpoint."""
    run = bench.copy(folder, finished=False)
    for stage in ("clip", "denoiser"):
        rmtree(run / stage)
    (run / "vae/final.safetensors").unlink()
    return run


def diagnosis_of(run: Path, seconds: float = 900.0) -> Diagnosis:
    return diagnose(OpenedRun(run), seconds)


def main(names: Sequence[str]) -> None:
    """Print the table of faults and verdicts."""
    with tempfile.TemporaryDirectory() as temporary, unscaled_data():
        bench = Bench(Path(temporary) / "bench")
        bench.prepare()
        right, total = 0, 0
        print("| run | seeded | found | verdict |\n|---|---|---|---|", flush=True)
        for each in [*FAULTS, *HEALTHY]:
            if names and each.name not in names:
                continue
            start = time.monotonic()
            run = each.make(bench, Path(temporary) / each.name)
            made = time.monotonic()
            result = diagnosis_of(run)
            found = result.cause.cause if result.cause else ""
            right, total = right + (found == each.cause), total + 1
            took = f"{made - start:.0f} s + {time.monotonic() - made:.0f} s"
            print(
                f"| {each.name} | {each.cause or 'none'} | {found or 'none'} | {result.verdict} ({took}) |", flush=True
            )
        print(f"\n{right} of {total} as seeded")


if __name__ == "__main__":
    main(sys.argv[1:])
