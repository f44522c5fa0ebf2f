"""Loading a checkpoint of SD 1.5 from a file and from a folder, against diffusers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm.benchmarks.case import Setup, register
from ldm.benchmarks.models import sd15
from ldm.benchmarks.new_process import ProcessComparison, Program

FILE, FOLDER = "sd15.safetensors", "sd15"

OURS = "Pipeline.from_pretrained({source!r}, dtype=torch.{dtype})"
SINGLE_FILE = (
    "StableDiffusionPipeline.from_single_file("
    "{source!r}, config={folder!r}, local_files_only=True, torch_dtype=torch.{dtype})"
)
PRETRAINED = "StableDiffusionPipeline.from_pretrained({source!r}, torch_dtype=torch.{dtype})"


def sd15_folder(setup: Setup) -> Path:
    """Return the diffusers folder of a model of the sizes of SD 1.5 in fp32; it is made if it does not exist (4.3 GB)."""
    from ldm.formats import save

    folder = setup.folder / ("small" if setup.small else "") / FOLDER
    if not (folder / "model_index.json").is_file():
        save(_model(setup), folder, "diffusers")
    return folder


def sd15_file(setup: Setup) -> Path:
    """Return the single file of the same model; it is made if it does not exist (4.3 GB)."""
    from ldm.formats import save

    file = sd15_folder(setup).with_name(FILE)
    if not file.is_file():
        save(_model(setup), file, "ldm")
    return file


def _model(setup: Setup) -> Any:
    return sd15(Setup(torch.device("cpu"), small=setup.small))


def programs(setup: Setup, single_file: bool) -> tuple[Program, Program]:
    """Return the programs that load the file or the folder."""
    folder = sd15_folder(setup)
    values = {
        "source": str(sd15_file(setup) if single_file else folder),
        "folder": str(folder),
        "dtype": str(setup.dtype).removeprefix("torch."),
    }
    theirs = SINGLE_FILE if single_file else PRETRAINED
    return (
        Program("import torch\nfrom ldm import Pipeline", OURS.format(**values)),
        Program("import torch\nfrom diffusers import StableDiffusionPipeline", theirs.format(**values)),
    )


def difference(setup: Setup, single_file: bool) -> float:
    """Return the largest difference between the outputs of the loaded U-Nets, relative to the largest output."""
    from diffusers import UNet2DConditionModel

    from ldm import load
    from ldm.nn.conditioning import Conditioning

    folder = sd15_folder(setup)
    unet: Any = load(sd15_file(setup) if single_file else folder).denoiser
    x, t = setup.randn(1, 4, 32, 32).float().cpu(), torch.tensor([500.0])
    context = setup.randn(1, 77, unet.config.context_width, seed=1).float().cpu()
    with torch.inference_mode():
        ours = unet(x, t, Conditioning(context=context))
        del unet
        theirs: Any = UNet2DConditionModel.from_pretrained(folder / "unet")(x, t, context).sample
    return float((ours - theirs).abs().max() / theirs.abs().max())


for _name, _title, _single_file in (
    ("load-file", "loading a single file of SD 1.5", True),
    ("load-folder", "loading a diffusers folder of SD 1.5", False),
):
    register(
        ProcessComparison(
            _name,
            _title,
            "diffusers",
            partial(programs, single_file=_single_file),
            difference=partial(difference, single_file=_single_file),
        )
    )
