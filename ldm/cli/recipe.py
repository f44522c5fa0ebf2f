"""Recipes: how a generated image is made again, read from the record in its file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.cli.common import DTYPES
from ldm.diffusion import OPTIONS
from ldm.errors import DataError, SamplingError, first_line, warn
from ldm.image_files import open_image
from ldm.image_metadata import read_record
from ldm.sampling_settings import SamplingSettings

FOREIGN = {
    "parameters": "AUTOMATIC1111's web UI, or a program that writes as it does",
    "workflow": "ComfyUI",
    "invokeai_metadata": "InvokeAI",
    "sd-metadata": "InvokeAI",
    "Dream": "InvokeAI",
}
"""Other programs by the name of a text that they write into PNGs."""

TASKS = {
    "ImageToImage": [("--image", "the image that was edited")],
    "Inpaint": [("--image", "the image that was edited"), ("--mask", "its mask")],
}
"""Options that name the files of which an edited image was made, by the task in its record."""


@dataclass(frozen=True)
class Recipe:
    """Settings, model and inputs that made an image.

    Attributes:
        file: the image.
        arguments: prompts and options of ``tools/sample.py``, without those of ``needed``.
        needed: options that the file cannot hold the values of, such as ``--image`` of an edited image; one that is
            repeated occurs several times. The second item of each pair describes the value.
        model: fingerprint of the model; None if it has none.
    """

    file: Path
    arguments: list[str]
    needed: list[tuple[str, str]]
    model: str | None

    @classmethod
    def of(cls, file: str | Path) -> Recipe:
        """Read the recipe of an image file, or of a grid of images.

        Raises:
            SamplingError: the file cannot be read, has no record of ldm, or one that the command has no options for.
        """
        record = _record_of(Path(file))
        try:
            return _recipe(Path(file), record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, SamplingError):
                raise
            raise SamplingError(f"the settings in {file} are damaged ({type(error).__name__} {error}).") from None

    def check_model(self, fingerprint: str | None, source: str) -> None:
        """Check that a model is the one that made the image.

        Raises:
            SamplingError: it has another fingerprint.
        """
        if self.model is not None and fingerprint != self.model:
            raise SamplingError(
                f"{self.file} was made by the model with the fingerprint {self.model}, and that of {source} is "
                f"{fingerprint}; give its source with --model."
            )

    def compared(self, file: Path) -> str:
        """Return a sentence on how an image that was made again differs from the original."""
        original, again = (np.asarray(open_image(each).convert("RGB"), np.int16) for each in (self.file, file))
        if original.shape != again.shape:
            return f"{file} is of another size than {self.file}"
        difference = np.abs(original - again)
        if not difference.any():
            return f"{file} is equal to {self.file} in every pixel"
        share = (difference.max(axis=-1) > 0).mean()
        return f"{file} differs from {self.file} in {share:.1%} of the pixels, by at most {difference.max()} of 255"


def _record_of(file: Path) -> dict[str, str]:
    record: dict[str, str] = {}
    names: Collection[str] = ()
    try:
        open_image(file)  # raises if it is no image
        with Image.open(file) as image:
            record, names = read_record(image), list(map(str, image.info))
    except DataError as error:
        raise SamplingError(f"{file} {error}.") from None
    except Exception as error:  # Pillow raises many types of errors for damaged metadata
        warn(f"the metadata of {file} cannot be read ({first_line(error)})")
    if "seed" in record:
        return record
    for name, program in FOREIGN.items():
        if name in names:
            raise SamplingError(f"{file} has settings of {program}; give an image that ldm has made.")
    raise SamplingError(
        f"{file} has no settings of ldm; either it was not made by ldm, or a program has removed its metadata."
    )


def _recipe(file: Path, record: Mapping[str, str]) -> Recipe:
    seeds = json.loads(record["seed"])
    seeds = [int(seed) for seed in (seeds if isinstance(seeds, list) else [seeds])]
    settings = json.loads(record["settings"])
    if isinstance(settings, list):
        raise SamplingError(
            f"{file} is a grid of images with different settings; write the images into files of their own, with "
            "{index} in --out."
        )
    if settings.get("latents"):
        raise SamplingError(f"{file} was made from latents that a file does not hold; it can be made again in Python.")
    if seeds != list(range(seeds[0], seeds[0] + len(seeds))):
        raise SamplingError(f"{file} is a grid of images whose seeds do not follow each other; make them one by one.")
    prompts, labels, negatives = (
        _listed(record.get(name), len(seeds)) for name in ("prompt", "label", "negative_prompt")
    )
    if len(negatives) > 1:
        raise SamplingError(f"{file} is a grid of images with different negative prompts; make them one by one.")
    for prompt in (*prompts, *negatives):
        if prompt.startswith(("Blend(first=", "Scheduled(first=")):
            raise SamplingError(
                f"{file} was made with the prompt {prompt}, which is an object of Python; make it there."
            )
    options = ["--seed", str(seeds[0])]
    if len(seeds) > 1 and len(prompts) < 2 and len(labels) < 2:
        options += ["--n", str(len(seeds))]
    for label in labels:
        options += ["--label", label]
    for negative in negatives:
        options += ["--negative", negative]
    more, needed = _options(file, settings)
    options += more
    if settings.get("prompt_syntax") == "weighted" and any("<lora:" in prompt for prompt in prompts):
        needed = [("--lora-folder", "the folder of the LoRAs that the prompt names")] + [
            each for each in needed if each[0] != "--lora"
        ]
    if "watermark" in record:
        options += ["--watermark"]
    separator = ["--"] if any(prompt.startswith("-") for prompt in prompts) else []
    return Recipe(file, [*options, *separator, *prompts], needed, record.get("model"))


def _listed(text: str | None, n: int) -> list[str]:
    """Return an entry of the record of an image, or of a grid of ``n``: the values of its images, or one if all are equal."""
    if text is None:
        return []
    try:
        values = json.loads(text) if n > 1 else None
    except ValueError:
        values = None
    return [str(value) for value in values] if isinstance(values, list) and len(values) == n else [text]


def _options(file: Path, settings: dict[str, Any]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the options that the settings stand for, and those whose values a file does not hold."""
    fields = {entry.name: entry for entry in dataclasses.fields(SamplingSettings)}
    options: list[str] = []
    needed: list[tuple[str, str]] = []
    given = dict(settings)
    if "task" in given:
        needed += TASKS[given.pop("task")]
        del given["height"], given["width"]  # those of the image
    if "timesteps" in given or "sigmas" in given:
        given.pop("num_inference_steps", None)
    for entry in given.pop("loras", []):
        needed.append(("--lora", f"{entry['name']} with the fingerprint {entry['file']}, as FILE:{entry['scale']}"))
    for entry in given.pop("textual_inversions", []):
        needed.append(("--textual-inversion", f"{entry['name']} with the fingerprint {entry['file']}"))
    controls = given.pop("controlnets", [])
    for entry in controls:
        needed.append(("--controlnet", f"{entry['name']} with the fingerprint {entry['file']}"))
        needed.append(("--control", f"the image of the ControlNet {entry['name']}"))
        options += ["--control-scale", str(entry["scale"])]
    if any("start" in entry for entry in controls):
        for entry in controls:
            options += ["--control-span", f"{entry.get('start', 0.0)},{entry.get('end', 1.0)}"]
    for name, value in given.items():
        if name == "dtype":
            options += ["--dtype", {long: short for short, long in DTYPES.items()}[value]]
        elif name == "strength":
            options += ["--strength", str(value)]
        elif name in OPTIONS:
            options += ["--option", f"{name}={value}"]
        elif name in fields:
            flags = fields[name].metadata["flags"]
            flag = f"--{name.replace('_', '-')}" if flags is None else flags[0]
            options += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
        elif name.startswith("guidance_"):
            nested = value if isinstance(value, dict) else {"": value}
            for key, each in nested.items():
                if each is not None:
                    place = ".".join(filter(None, (name.removeprefix("guidance_"), key)))
                    options += ["--guide", f"{place}={json.dumps(each)}"]
        else:
            raise SamplingError(f"{file} was made with {name}, for which there is no option; make it in Python.")
    return options, needed
