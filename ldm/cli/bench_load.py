"""Benchmark of loading a full-size SD 1 checkpoint: time and memory, compared with diffusers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from ldm.errors import LdmError

FILE, FOLDER = "sd1.safetensors", "sd1"

OURS = """
from ldm import Pipeline
load = lambda: Pipeline.from_pretrained({source!r}, dtype=torch.{dtype})
"""
SINGLE_FILE = """
from diffusers import StableDiffusionPipeline
load = lambda: StableDiffusionPipeline.from_single_file(
    {source!r}, config={folder!r}, local_files_only=True, torch_dtype=torch.{dtype}
)
"""
PRETRAINED = """
from diffusers import StableDiffusionPipeline
load = lambda: StableDiffusionPipeline.from_pretrained({source!r}, torch_dtype=torch.{dtype})
"""
MEASURE = """
import re, time
from pathlib import Path
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e6
before, start = peak(), time.perf_counter()
loaded = load()
print("measured", time.perf_counter() - start, peak() - before)
"""
"""Script that prints seconds and the increase of peak memory in GB (Linux only, whose VmHWM is per process)."""


def bench_load(folder: Path, dtype: str, rounds: int) -> None:
    """Print a line for each way to load the file, each in its own process, and the difference of one denoising step.

    The file and the folder, random weights of 4.3 GB each, are created if they do not exist.
    """
    file, pipeline = folder / FILE, folder / FOLDER
    if not (pipeline / "model_index.json").is_file():
        make(folder)
    size = file.stat().st_size / 1e9
    print(f"a file of {size:.2f} GB into {dtype}, best of {rounds} rounds")
    print(f"{'':34}{'seconds':>9}{'memory':>10}{'of the file':>13}")
    ways = {
        "ldm, single file": (OURS, file),
        "diffusers, from_single_file": (SINGLE_FILE, file),
        "ldm, folder": (OURS, pipeline),
        "diffusers, from_pretrained": (PRETRAINED, pipeline),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (code, source) in ways.items():
            found[name].append(measured(code.format(source=str(source), folder=str(pipeline), dtype=dtype)))
    for name, results in found.items():
        seconds, memory = min(seconds for seconds, _ in results), max(memory for _, memory in results)
        print(f"{name:34}{seconds:8.2f}s{memory:7.2f} GB{memory / size:12.2f}x")
    print(f"one denoising step: {difference(file, pipeline):.1e} apart")


def measured(code: str) -> tuple[float, float]:
    """Measure seconds and GB of a load in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", f"import torch\n{code}\n{MEASURE}"], capture_output=True, text=True, check=False
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("measured")), None)
    if line is None:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise LdmError(f"loading failed ({last[0]}); run it separately to see why.")
    _, seconds, memory = line.split()
    return float(seconds), float(memory)


def make(folder: Path) -> None:
    """Create a single file and a diffusers folder of SD 1 with the same random weights."""
    import torch

    from ldm.clip.text import TextTowerConfig
    from ldm.clip.tokenizer import CLIPBPEConfig
    from ldm.conditioning.text import TextConditionerConfig
    from ldm.denoiser import LevelSpec, UNetConfig
    from ldm.diffusion import Diffusion
    from ldm.formats import save
    from ldm.formats.families import SAMPLED
    from ldm.formats.native import WithoutInit
    from ldm.model import LatentDiffusion, ModelConfig
    from ldm.vae import AutoencoderKLConfig

    levels = tuple(LevelSpec(width, 2, int(i < 3)) for i, width in enumerate((320, 640, 1280, 1280)))
    config = ModelConfig(
        first_stage=AutoencoderKLConfig(),
        conditioner=TextConditionerConfig(tower=TextTowerConfig(activation="quick_gelu")),
        denoiser=UNetConfig(levels=levels, context_width=768, heads=8, projection="conv"),
        diffusion=Diffusion(),
        size=(512, 512),
        sampling=SAMPLED,
    )
    with torch.device("meta"), WithoutInit():
        model = LatentDiffusion(config, CLIPBPEConfig().build())
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    model.first_stage.latent_mean.zero_()
    model.first_stage.latent_std.fill_(1 / 0.18215)
    save(model, folder / FILE, "ldm")
    save(model, folder / FOLDER, "diffusers")


def difference(file: Path, folder: Path) -> float:
    """Return the largest difference between our U-Net's output and that of diffusers, relative to its largest value."""
    import torch
    from diffusers import UNet2DConditionModel

    from ldm import load
    from ldm.nn.conditioning import Conditioning

    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(shape, generator=generator) for shape in ((1, 4, 32, 32), (1, 77, 768)))
    t = torch.tensor([500.0])
    with torch.inference_mode():
        ours: Any = load(file).denoiser(x, t, Conditioning(context=context))
        peer: Any = UNet2DConditionModel.from_pretrained(folder / "unet")(x, t, context).sample
    return float((ours - peer).abs().max() / peer.abs().max())
