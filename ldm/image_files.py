"""Reading of image files: the one place that decodes them, for the preparation of data, for training and for sampling.

Files that viewers show are read even if their metadata are damaged: they are tried again without them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from PIL import ExifTags, Image, UnidentifiedImageError

from ldm.errors import DataError, first_line

T = TypeVar("T")


class ImageFileError(DataError):
    """Image file that cannot be read, because of ``problem``; the message is a clause without the file's name."""

    def __init__(self, noun: str, problem: Exception | None):
        super().__init__(f"cannot be read as {noun} ({_reason(problem)})")
        self.problem = problem


_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG, _JPEG_RESTART, _JPEG_END = b"\xff\xd8", b"\xff\xdd", b"\xff\xd9"
_PNG_KEPT = ((b"tRNS", b"eXIf"), ())
"""Ancillary chunks of PNG that are kept in the second and third attempt: transparency and orientation, then none."""
_JPEG_KEPT = ((0xE1, 0xEE), (0xEE,), ())
"""Application segments of JPEG that are kept in further attempts: Exif and Adobe (the meaning of CMYK), then fewer."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of each EXIF orientation upright; height and width are exchanged from 5."""


def open_image(
    source: bytes | str | Path, enough: tuple[int, int] | None = None, noun: str = "an image"
) -> Image.Image:
    """Decode an image file in the mode of its pixels, rotated according to its EXIF orientation; of several frames the first.

    Its ``format`` is Pillow's name of the file format.

    Args:
        source: a file, or its content.
        enough: sufficient height and width; a JPEG may then be decoded at a half, quarter or eighth of its size.
        noun: what the file is meant to be, for the message.

    Raises:
        ImageFileError: it cannot be read, or has more than twice Pillow's ``MAX_IMAGE_PIXELS`` (179 million), for which no
            memory is allocated.
    """

    def load(image: Image.Image) -> Image.Image:
        if enough is not None:
            image.draft("RGB", (max(enough), max(enough)))  # both sides: EXIF may swap them
        image.load()
        turned = upright(image)
        turned.format = image.format
        return turned

    return _read(source, load, noun)


def image_size(source: bytes | str | Path) -> tuple[int, int]:
    """Return width and height of the image that :func:`open_image` returns, without decoding it.

    Raises:
        ImageFileError: as :func:`open_image`.
    """

    def size(image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        rotated = _orientation(image) >= 5 and image.format != "TIFF"  # Pillow itself rotates TIFF
        return (height, width) if rotated else (width, height)

    return _read(source, size, "an image")


def upright(image: Image.Image) -> Image.Image:
    """Return an image rotated according to its EXIF orientation; invalid metadata are ignored."""
    method = _UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, from 1 (upright) to 8; 1 if there is none, or none that is valid."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises many types of errors for invalid metadata
        return 1
    return int(orientation) if orientation in _UPRIGHT else 1


def _read(source: bytes | str | Path, read: Callable[[Image.Image], T], noun: str) -> T:
    """Apply ``read`` to an opened image; if that fails, also without the metadata of the file."""
    problem: Exception | None = None
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        for version in _versions(data):
            try:
                return read(_opened(version))
            except MemoryError:  # says nothing about the file
                raise
            except Exception as error:  # Pillow's plugins raise many types of errors for a broken file
                problem = problem or error
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        problem = error
    raise ImageFileError(noun, problem) from None


def _reason(problem: Exception | None) -> str:
    if isinstance(problem, UnidentifiedImageError):
        return "unknown format"
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    return first_line(problem) if problem is not None else "unknown problem"


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if data[4:8] != b"ftyp":  # the container of HEIC
            raise
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise OSError("HEIC needs the package 'pillow-heif'; install it with pip install 'ldm[heif]'") from None
    register_heif_opener()
    return Image.open(io.BytesIO(data))


def _versions(data: bytes) -> Iterator[bytes]:
    """Yield the content of a file, then with less and less metadata."""
    yield data
    if data.startswith(_PNG):
        yield from (b"".join(_png_chunks(data, kept)) for kept in _PNG_KEPT)
    elif data.startswith(_JPEG):
        yield from (b"".join(_jpeg_segments(data, kept)) for kept in _JPEG_KEPT)
        if _lacks_only_its_end(data):
            yield data + _JPEG_END


def _lacks_only_its_end(data: bytes) -> bool:
    """Return True if a JPEG is complete but for the marker at its end: if pixels were missing, what follows would change them.

    Not for those that are progressive or have restart markers, of which complete scans or intervals may be missing.
    """
    try:
        if _JPEG_RESTART in data or "progressive" in _opened(data).info:
            return False
        return len({_opened(data + 512 * byte + _JPEG_END).tobytes() for byte in (b"", b"\x55", b"\xaa")}) == 1
    except Exception:  # of Pillow's plugin, as above
        return False


def _png_chunks(data: bytes, kept: tuple[bytes, ...]) -> Iterator[bytes]:
    """Yield the parts of a PNG, of ancillary chunks only those of the types ``kept``."""
    yield _PNG
    start = len(_PNG)
    while start < len(data):
        kind = data[start + 4 : start + 8]
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if kind[:1].isupper() or kind in kept:
            yield data[start:end]
        start = end


def _jpeg_segments(data: bytes, kept: tuple[int, ...]) -> Iterator[bytes]:
    """Yield the parts of a JPEG, of application segments only those with the markers ``kept``."""
    yield _JPEG
    start, scan = len(_JPEG), 0xDA
    while data[start : start + 1] == b"\xff" and start + 4 <= len(data) and data[start + 1] != scan:
        marker = data[start + 1]
        end = start + 1 if marker == 0xFF else start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker in kept or not 0xE0 <= marker <= 0xEF:
            yield data[start:end]
        start = end
    yield data[start:]
