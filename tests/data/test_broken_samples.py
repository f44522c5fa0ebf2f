"""A set of good samples and of broken ones of twelve kinds, as the web has them, in shards that no report lists."""

from __future__ import annotations

import resource
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.bad_samples import BAD, BadSamplesFile, read_counts
from ldm.data.config import ShardsData
from ldm.data.samples import Samples
from ldm.data.stream import EvaluationLoader, TrainStream
from tests.data.pictures import encoded, write_tar
from tests.odd_images import chunk, png_16

SIZE = 16


def picture(i: int) -> Image.Image:
    """A smooth image that depends on ``i``."""
    small = np.random.default_rng(i).integers(40, 216, (2, 2, 3), np.uint8)
    return Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def bomb() -> bytes:
    """A PNG of 140 bytes with 900 million pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def transparent(image: Image.Image) -> Image.Image:
    """The image with a palette that has an alpha channel, opaque on the left and transparent on the right."""
    image = image.convert("RGBA")
    image.paste((0, 0, 0, 0), (SIZE // 2, 0, SIZE, SIZE))
    return image.quantize(64)


def on_white(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.paste((255, 255, 255), (SIZE // 2, 0, SIZE, SIZE))
    return image


GOOD = {
    "plain": lambda image: ("png", encoded(image)),
    "cmyk": lambda image: ("jpg", encoded(image.convert("CMYK"), "JPEG", quality=98, subsampling=0)),
    "16-bit": lambda image: ("png", png_16(2, np.asarray(image).astype(np.uint16) * 257)),
    "palette": lambda image: ("png", encoded(transparent(image))),
    "animated": lambda image: (
        "gif",
        encoded(image, "GIF", save_all=True, append_images=[image.rotate(90), image.rotate(180)]),
    ),
}
"""Kinds that can be used: suffix and content of the file that shows an image."""

REASONS = {
    "truncated": "truncated shard",
    "zeros": "empty image",
    "magic": "unknown image format",
    "bomb": "too many pixels",
    "uncaptioned": "no caption",
    "encoding": "caption is not UTF-8",
    "long": "caption too long",
    "twice": "duplicate key",
}
"""Kinds that cannot be used, and why."""


def write_set(folder: Path, each: int) -> None:
    """Write shards with ``12 each`` good samples and ``each`` of each of the twelve kinds; those of truncated shards are last."""
    members: list[tuple[str, bytes]] = []
    for number in range(12 * each):
        members += [(f"plain-{number}.png", encoded(picture(number))), (f"plain-{number}.txt", b"a good image")]
    for kind in (*GOOD, *REASONS):
        for number in range(each if kind not in ("plain", "truncated") else 0):
            image, key = picture(number), f"{kind}-{number}"
            suffix, data = GOOD.get(kind, GOOD["plain"])(image)
            data = {"zeros": bytes(len(data)), "magic": b"GIX8" + data[4:], "bomb": bomb()}.get(kind, data)
            key = f"plain-{number}" if kind == "twice" else key
            caption = {"encoding": b"caf\xe9", "long": b"a " * 500_000}.get(kind, b"a caption")
            members += [(f"{key}.{suffix}", data), *([] if kind == "uncaptioned" else [(f"{key}.txt", caption)])]
    write_tar(folder / "0.tar", members)
    for number in range(each):
        path = folder / f"truncated-{number}.tar"
        kept = [(f"whole-{number}.png", encoded(picture(number))), (f"whole-{number}.txt", b"before the cut")]
        cut = [(f"truncated-{number}.txt", b"cut"), (f"truncated-{number}.png", np.random.default_rng(0).bytes(20_000))]
        write_tar(path, [*kept, *cut])
        path.write_bytes(path.read_bytes()[:15_000])


def resident() -> float:
    """Memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def peak() -> float:
    """The most memory that this process has used, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def check_look(samples: Samples) -> None:
    """Check that the images of each kind that can be used look like the original."""
    for batch in EvaluationLoader(samples, 64):
        for key, image in zip(batch["key"], batch["image"], strict=True):
            kind, number = key.rsplit("-", 1)
            shown = picture(int(number)) if kind != "palette" else on_white(picture(int(number)))
            levels = ((image + 1) * 127.5).permute(1, 2, 0).numpy()
            difference = np.abs(levels - np.asarray(shown, np.float32)).mean()
            assert difference < {"plain": 0.5, "16-bit": 0.5}.get(kind, 6), (key, difference)


@pytest.mark.parametrize(
    ("each", "workers", "epochs"),
    [(4, 0, 3), pytest.param(83, 0, 5, marks=pytest.mark.slow), pytest.param(83, 2, 3, marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("ignore:.*samples are skipped")
def test_training_uses_the_good_samples_and_lists_each_kind_of_the_others(
    tmp_path: Path, each: int, workers: int, epochs: int
) -> None:
    write_set(tmp_path, each)
    samples = ShardsData(str(tmp_path), size=SIZE, workers=workers).open("train")
    file = BadSamplesFile(tmp_path / "bad_samples.csv")
    file.start({"train": samples.dropped})
    check_look(samples)
    before = peak()
    batch_size, seen, memory = 8, Counter[str](), []
    per_epoch = -(-len(samples) // batch_size)
    for number, batch in enumerate(TrainStream(samples, batch_size, 0, epochs * per_epoch)):
        seen.update(batch["key"])
        for bad in batch.get(BAD, ()):
            file.add(number, "train", bad)
        if (number + 1) % per_epoch == 0:
            memory.append(resident())
    kinds = Counter(key.rsplit("-", 1)[0] for key in seen)
    assert kinds == {"plain": 12 * each, "whole": each} | dict.fromkeys(GOOD.keys() - {"plain"}, each)
    assert read_counts(tmp_path / "bad_samples.csv") == {"train": dict.fromkeys(REASONS.values(), each)}
    assert max(memory) - memory[0] < 30, f"memory after each epoch: {memory} MB"
    assert peak() - before < 300, "the pixels of a decompression bomb were allocated"
