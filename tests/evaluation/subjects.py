"""A tiny model, a tiny CLIP and their data on disk, and what they are opened as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm.clip.model import CLIPConfig
from ldm.config import from_dict
from ldm.data.shards import Sample, write_shard
from ldm.evaluation.metric import Number, all_metrics
from ldm.evaluation.opening import Request, open_subject
from ldm.evaluation.subject import Options, Subject
from ldm.formats import native, save
from ldm.formats.native import save_module
from tests.data.pictures import encoded, noise_picture
from tests.experiments import write_experiment
from tests.tiny import CAPTIONS, SIZE, TOKENIZER, TOWER, tiny_model

COUNTS = {"train": 40, "val": 24}


def tiny_clip(seed: int = 0) -> Any:
    image = {"kind": "vit", "image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return from_dict(CLIPConfig, {"embed_dim": 16, "text": TOWER, "image": image}).build().eval()


def write_subject(folder: Path) -> None:
    """Write `tiny.yaml`, `model.safetensors`, `clip.safetensors` and a shard for each split."""
    write_experiment(folder)
    save(tiny_model(), folder / "model.safetensors")
    clip = tiny_clip()
    save_module(folder / "clip.safetensors", native.CLIP, clip, clip.config, TOKENIZER, {})
    for split, count in COUNTS.items():
        images = (encoded(noise_picture(i + 100 * (split == "val"), 4, 4).resize((SIZE, SIZE))) for i in range(count))
        samples = [
            Sample(f"{i}", CAPTIONS[i % len(CAPTIONS)], image, "png", {"label": i % 3})
            for i, image in enumerate(images)
        ]
        write_shard(folder / f"{split} set.tar", samples)


def data_of(folder: Path) -> list[str]:
    """Overrides that name the shards."""
    return [f"data.{split}={folder / split} set.tar" for split in COUNTS]


def opened(folder: Path, model: str = "model.safetensors", **options: Any) -> Subject:
    return open_subject(
        Request(
            str(folder / "tiny.yaml"),
            data_of(folder),
            model=str(folder / model),
            settings={"num_inference_steps": 2, "guidance_scale": 1.0, "sampler": None},
            features=[f"own={folder / 'clip.safetensors'}"],
            options=Options(**options),
        )
    )


def numbers(subject: Subject, name: str) -> dict[str, Number]:
    """Return the numbers of a metric by their names."""
    return {each.name: each for each in all_metrics()[name].run(subject)}
