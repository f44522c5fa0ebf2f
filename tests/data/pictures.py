"""Small images and shards for the tests of this part."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.shards import Sample, write_shard


def noise_picture(seed: int, height: int = 12, width: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(picture: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def sample(i: int, *, labelled: bool = False) -> Sample:
    picture = encoded(noise_picture(i, height=10 + i % 5, width=12))
    return Sample(f"{i:04d}", f"caption {i}", picture, "png", {"label": i % 3} if labelled else {})


def write_shards(folder: Path, lengths: list[int], *, labelled: bool = False) -> list[Path]:
    paths, first = [], 0
    for number, length in enumerate(lengths):
        paths.append(folder / f"{number:03d}.tar")
        write_shard(paths[-1], (sample(i, labelled=labelled) for i in range(first, first + length)))
        first += length
    return paths


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path
