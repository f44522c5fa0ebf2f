"""Images that clients send: bounded in bytes and pixels before they are decoded, and of three formats only."""

from __future__ import annotations

import base64
import binascii

from PIL import Image

from ldm.errors import DataError, SamplingError
from ldm.image_files import image_size, open_image
from ldm.serving.limits import Limits


def decoded_base64(text: str, name: str = "image") -> bytes:
    """Decode base64, also in a data URL.

    Raises:
        SamplingError: it is not valid.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise SamplingError(f"{name} is not valid base64; encode the bytes of a PNG, JPEG or WebP file.") from None


def read_upload(data: bytes, limits: Limits, name: str = "image") -> Image.Image:
    """Decode an image file that a client has sent, upright.

    Other formats than PNG, JPEG and WebP are refused by their first bytes, since decoders of rare formats are attacked more
    easily and some of them start other programs.

    Raises:
        SamplingError: it is of another format, too large, or broken.
    """
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    if not (data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or is_webp):
        raise SamplingError(f"{name} is not a PNG, JPEG or WebP file; convert it to one.")
    try:
        width, height = image_size(data)
        if width * height > limits.max_upload_pixels:
            raise SamplingError(
                f"{name} has {width} x {height} pixels; this server reads at most {limits.max_upload_pixels} pixels."
            )
        return open_image(data)
    except DataError as error:
        raise SamplingError(f"{name} {error}.") from None
