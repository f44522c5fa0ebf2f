"""The emoji data set: rendered Noto Color Emoji with their names, and a rule that holds out skin tones.

Every sequence of the package ``emoji`` that the font renders as one glyph is an image. Its key is the
hexadecimal code points (``1f469-200d-1f692``), from which the sequence can be recovered.
"""

from __future__ import annotations

import importlib.metadata
import io
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from ldm.data.shards import SPLITS, Sample, write_shard
from ldm.errors import DataError, missing_extra

EMOJI_VERSION = "2.16.0"
FONT_VERSION = "2.042"
FONT_PATH = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # path of Debian's fonts-noto-color-emoji
GLYPH = 136  # pixels: the font's only bitmap size, reached at a font size of 109
SIZE = 128  # pixels, as stored


def split_of(sequence: str) -> str:
    """Return the split of an emoji: about one in five skin tones of a base is held out, chosen by the base's CRC-32.

    Let ``h`` be the CRC-32 of the sequence without its tones. With one tone (0..4) the sequence is held out
    if ``tone == h % 5``, with two, a and b, if ``(h + 5a + b) % 5 == 0``. Half of those held out are
    ``test``, by their own CRC-32.
    """
    tones = [ord(c) - 0x1F3FB for c in sequence if _is_tone(c)]
    h = zlib.crc32("".join(c for c in sequence if not _is_tone(c)).encode())
    if len(tones) == 1:
        held_out = tones[0] == h % 5
    else:
        held_out = len(tones) == 2 and (h + 5 * tones[0] + tones[1]) % 5 == 0
    if not held_out:
        return "train"
    return "test" if zlib.crc32(sequence.encode()) % 2 else "val"


def _is_tone(character: str) -> bool:
    return 0x1F3FB <= ord(character) <= 0x1F3FF


def key_of(sequence: str) -> str:
    """Return the code points of a sequence in hexadecimal, joined by ``-``."""
    return "-".join(f"{ord(c):x}" for c in sequence)


def render(font_path: Path = FONT_PATH) -> Iterator[tuple[str, Sample]]:
    """Return an iterator over (split, sample), in the order of ``emoji.EMOJI_DATA``, rendered lazily.

    Raises, before anything is rendered:
        DataError: the font is missing or unreadable, or Pillow lacks raqm (joined sequences) or AVIF.
        MissingExtraError: the package ``emoji`` is missing.

    Warns if the version of the package or the font differs from the one used for the committed shards.
    """
    return _drawn(_names(), _font(font_path))


def _drawn(names: dict[str, str], font: ImageFont.FreeTypeFont) -> Iterator[tuple[str, Sample]]:
    for sequence, name in names.items():
        left, _, right, _ = font.getbbox(sequence)
        if right - left != GLYPH:  # no glyph of its own: drawn as several, or as an empty box
            continue
        image = Image.new("RGB", (GLYPH, GLYPH), "white")
        ImageDraw.Draw(image).text((0, 4), sequence, font=font, embedded_color=True)
        file = io.BytesIO()
        # Flat colours with sharp edges: AVIF with full chroma is 8 dB better here than WebP of the same size.
        image.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(
            file, "AVIF", quality=76, subsampling="4:4:4", speed=6, max_threads=1
        )
        caption = name.strip(":").replace("_", " ")
        yield split_of(sequence), Sample(key_of(sequence), caption, file.getvalue(), "avif")


def write_emoji_shards(folder: Path, font_path: Path = FONT_PATH) -> dict[str, int]:
    """Render the set into ``folder/emoji-<split>-000.tar``; return the number of images of each split."""
    from tqdm import tqdm

    samples: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    rendered = render(font_path)
    for split, sample in tqdm(rendered, desc="rendering", unit="emoji"):
        samples[split].append(sample)
    for split in SPLITS:
        write_shard(folder / f"emoji-{split}-000.tar", samples[split])
    return {split: len(samples[split]) for split in SPLITS}


def _names() -> dict[str, str]:
    try:
        import emoji
    except ImportError:
        raise missing_extra("emoji", "rendering the emoji set", "prepare") from None
    _warn_if_other("the package emoji", importlib.metadata.version("emoji"), EMOJI_VERSION)
    wanted = emoji.STATUS["fully_qualified"]
    return {sequence: str(data["en"]) for sequence, data in emoji.EMOJI_DATA.items() if data["status"] == wanted}


def _font(path: Path) -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        raise DataError(
            "this build of Pillow has no raqm, which joins emoji sequences; install Pillow from its wheel on PyPI."
        )
    if not features.check("avif"):
        raise DataError("this build of Pillow cannot write AVIF; install Pillow 11.3 or newer from its wheel on PyPI.")
    try:
        font = ImageFont.truetype(path, 109)
    except OSError:
        raise DataError(
            f"the font {path} is missing or cannot be opened; install Noto Color Emoji "
            "(on Debian fonts-noto-color-emoji) or name its file with --font."
        ) from None
    _warn_if_other("the font Noto Color Emoji", _font_version(path), FONT_VERSION)
    return font


def _font_version(path: Path) -> str:
    """``fontRevision`` of the OpenType table ``head`` (16.16 fixed point at offset 4), e.g. 2.042."""
    data = path.read_bytes()
    tables = int.from_bytes(data[4:6], "big")
    for record in (data[12 + 16 * i : 28 + 16 * i] for i in range(tables)):
        if record[:4] == b"head":
            offset = int.from_bytes(record[8:12], "big")
            return f"{int.from_bytes(data[offset + 4 : offset + 8], 'big') / 65536:.3f}"
    return "unknown"


def _warn_if_other(what: str, found: str, expected: str) -> None:
    if found != expected:
        warnings.warn(
            f"{what} has version {found}, but the shipped set was made with {expected}: images may differ",
            stacklevel=2,
        )
