"""Time from the start of a process to the import of the pipeline class, and to the first image, against diffusers."""

from __future__ import annotations

from pathlib import Path

from ldm.benchmarks.case import Setup, register
from ldm.benchmarks.cases.train_denoiser import EMOJI
from ldm.benchmarks.new_process import ProcessComparison, Program
from ldm.clip.tokenizer import train_byte_bpe
from ldm.model import LatentDiffusion

IMPORTS = (
    Program("", "from ldm import Pipeline"),
    Program("", "from diffusers import StableDiffusionPipeline"),
)
OUR_IMAGE = 'from ldm import Pipeline\nimages = Pipeline("a red apple", seed=1)\nassert images[0].size == (64, 64)'
THEIR_IMAGE = """
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from transformers import CLIPTextModel
text_encoder = CLIPTextModel.from_pretrained({folder!r}, subfolder="text_encoder", dtype=torch.{dtype})
pipe = StableDiffusionPipeline.from_pretrained({folder!r}, text_encoder=text_encoder, torch_dtype=torch.{dtype})
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
images = pipe("a red apple", num_inference_steps=25, guidance_scale=3.0).images
assert images[0].size == (64, 64)
"""


def imports(setup: Setup) -> tuple[Program, Program]:
    """Return the programs that import the pipeline classes."""
    return IMPORTS


def first_image(setup: Setup) -> tuple[Program, Program]:
    """Return the programs that make an image with the shipped model, and with a diffusers folder of the same sizes.

    The latter has no conditioning vector, which diffusers' pipeline does not pass on. It is made if it does not exist.
    """
    values = {"folder": str(_emoji_folder(setup)), "dtype": str(setup.dtype).removeprefix("torch.")}
    return Program("", OUR_IMAGE), Program("", THEIR_IMAGE.format(**values))


def _emoji_folder(setup: Setup) -> Path:
    from ldm.formats import save
    from ldm.training.experiment import load_config

    folder = setup.folder / "emoji"
    if not (folder / "model_index.json").is_file():
        experiment = load_config(EMOJI, ["denoiser.model.vector_width=null", "denoiser.conditioner.pooled=false"])
        assert experiment.clip is not None
        words = experiment.clip.tokenizer
        tokenizer = train_byte_bpe([""], words.vocab_size, words.context_length)
        save(LatentDiffusion(experiment.model_config, tokenizer), folder, "diffusers")
    return folder


register(
    ProcessComparison(
        "startup-import",
        "process start to the import of the pipeline class",
        "diffusers",
        imports,
        from_start=True,
    )
)
register(
    ProcessComparison(
        "startup-emoji",
        "process start to the first image of a model of the size of the emoji model",
        "diffusers",
        first_image,
        from_start=True,
    )
)
