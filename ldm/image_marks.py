"""Marks by which an image tells that a model made it: content credentials (C2PA) and an invisible watermark."""

from __future__ import annotations

import io
import multiprocessing
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.config import config_field
from ldm.errors import ConfigError, SamplingError, first_line, missing_extra
from ldm.image_metadata import TRAINED_MODEL

WATERMARK = [bool(0x6C646D31 >> bit & 1) for bit in reversed(range(32))]
"""Bits of the watermark, the ASCII codes of ``ldm1``."""

WATERMARK_NAME = "blind-watermark"
"""Value of ``watermark`` in the record of an image that has one: the package that added it."""

ENOUGH = 28
"""Equal bits from which an image counts as one with the watermark: 32 random bits have as many once in 100,000 times."""

WATERMARK_BLOCK = 8
"""Pixels on a side of the squares of an image that hold a bit each."""


@dataclass(frozen=True)
class ImageMarks:
    """Marks of the images that are written; each field is an option of the commands.

    Raises:
        ConfigError: a certificate without its key, or the other way round.
    """

    c2pa_certificate: Path | None = config_field(
        None, "sign content credentials (C2PA) into the images: PEM file of the signer's certificate and its issuers"
    )
    c2pa_key: Path | None = config_field(None, "PEM file of the private key of --c2pa-certificate")
    watermark: bool = config_field(False, "add an invisible watermark to the images")

    def __post_init__(self) -> None:
        if (self.c2pa_certificate is None) != (self.c2pa_key is None):
            raise ConfigError(
                "content credentials need a certificate and its key; give both --c2pa-certificate and --c2pa-key."
            )
        for name in ("c2pa_certificate", "c2pa_key"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path))

    def check(self) -> None:
        """Mark an image for trial, to find out before any is made.

        Raises:
            LdmError: a package is missing, or the certificate cannot be used.
        """
        image = Image.new("RGB", (64, 64))
        if self.watermark:
            watermarked(image)
        image.save(file := io.BytesIO(), "PNG")
        self.sign(file.getvalue(), "PNG")

    def sign(self, content: bytes, format: str) -> bytes:
        """Return the content of an image file with content credentials, if a certificate is given.

        Raises:
            LdmError: the package is missing, the certificate cannot be used, or the format holds no content credentials.
        """
        if self.c2pa_certificate is None or self.c2pa_key is None:
            return content
        try:
            import c2pa
        except ImportError:
            raise missing_extra("c2pa-python", "signing content credentials", "c2pa") from None
        from ldm import __version__

        certificate, key = (_read(path) for path in (self.c2pa_certificate, self.c2pa_key))
        agent = {"name": "ldm", "version": __version__}
        created = {"action": "c2pa.created", "digitalSourceType": TRAINED_MODEL, "softwareAgent": agent}
        manifest = {
            "claim_generator_info": [agent],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
        }
        without_thumbnail = c2pa.Settings.from_dict({"builder": {"thumbnail": {"enabled": False}}})
        result = io.BytesIO()
        try:
            info = c2pa.C2paSignerInfo(_algorithm(key, self.c2pa_key), certificate, key, None)
            builder = c2pa.Builder(manifest, c2pa.Context(without_thumbnail))
            builder.sign(c2pa.Signer.from_info(info), Image.MIME.get(format, format), io.BytesIO(content), result)
        except c2pa.C2paError.NotSupported:
            raise SamplingError(f"{format} holds no content credentials; write PNG, JPEG or WebP.") from None
        except c2pa.C2paError as error:
            raise ConfigError(
                f"content credentials cannot be signed with {self.c2pa_certificate} and {self.c2pa_key} "
                f"({first_line(error)}); see docs/sampling.md for how to make a certificate."
            ) from None
        return result.getvalue()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a PEM file.") from None


def _algorithm(key: bytes, path: Path) -> str:
    """Return C2PA's name of the signature algorithm of a private key."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        loaded = load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:  # TypeError: it has a password
        raise ConfigError(f"{path} is no private key that can be used ({first_line(error)}).") from None
    if isinstance(loaded, ec.EllipticCurvePrivateKey):
        return {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}.get(loaded.curve.name, "es256")
    if isinstance(loaded, rsa.RSAPrivateKey):
        return "ps256"
    if isinstance(loaded, ed25519.Ed25519PrivateKey):
        return "ed25519"
    raise ConfigError(f"{path} is a key of another kind than EC, RSA and Ed25519; make one of these.")


def watermarked(image: Image.Image) -> Image.Image:
    """Return an RGB image with the watermark; its ``info`` names it.

    Raises:
        SamplingError: it has too few pixels.
        MissingExtraError: the package is missing.
    """
    _check_size(image)
    watermark = _watermark()
    watermark.read_img(img=_bgr(image))
    watermark.read_wm(list(WATERMARK), mode="bit")
    result = Image.fromarray(watermark.embed().round().astype(np.uint8)[..., ::-1])
    result.info = {**image.info, "watermark": WATERMARK_NAME}
    return result


def watermark_bits(image: Image.Image) -> int:
    """Return how many of the 32 bits of the watermark an image has: about 16 without it, ``ENOUGH`` or more with it.

    Raises:
        SamplingError: it has too few pixels.
        MissingExtraError: the package is missing.
    """
    _check_size(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of no bits, for images of one color
        bits = _watermark().extract(embed_img=_bgr(image), wm_shape=len(WATERMARK), mode="bit")
    return sum(bool(bit) == expected for bit, expected in zip(bits, WATERMARK, strict=True))


def _check_size(image: Image.Image) -> None:
    if (image.width // WATERMARK_BLOCK) * (image.height // WATERMARK_BLOCK) <= len(WATERMARK):
        raise SamplingError(
            f"the image has {image.width} x {image.height} pixels, too few for a watermark; it needs 64 x 64."
        )


def _bgr(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])


def _watermark() -> Any:
    if sys.modules.get("blind_watermark") is None:
        start_method = multiprocessing.get_start_method(allow_none=True)
        multiprocessing.set_start_method(None, force=True)  # the package sets it when it is imported
        try:
            import blind_watermark
        except ImportError:
            raise missing_extra("blind-watermark", "a watermark", "watermark") from None
        finally:
            multiprocessing.set_start_method(start_method, force=True)
        blind_watermark.bw_notes.close()  # what it would print
    return sys.modules["blind_watermark"].WaterMark()
