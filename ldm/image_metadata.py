"""The record of a generated image in its file: text chunks of PNG; XMP and EXIF of JPEG, WebP and AVIF.

XMP holds the record as JSON, and IPTC's digital source type for images made by a trained model. The ``UserComment`` of EXIF
holds the text that AUTOMATIC1111's web UI writes there, which its readers show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from ldm.errors import warn

TRAINED_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's digital source type of media that a trained model has made."""

NAMESPACE = "urn:ldm:record"
"""XML namespace of the record."""

XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:ldm="{namespace}" '
    'Iptc4xmpExt:DigitalSourceType="{source}"><ldm:record>{record}</ldm:record>'
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)

QUALITY = 95
"""Quality of JPEG and AVIF, 0 to 100, if none is given; WebP is then lossless."""

JPEG_SEGMENT = 65_000
"""Bytes that fit into a segment of a JPEG, in which EXIF and XMP are."""


def save_options(format: str, record: Mapping[str, str], quality: int | None = None) -> dict[str, Any]:
    """Return the keyword arguments with which Pillow writes an image with its record.

    Args:
        format: Pillow's name of the file format; formats other than PNG, JPEG, WebP and AVIF hold no record.
        record: texts by name.
        quality: 0 to 100, of formats that have one; default: ``QUALITY``, and lossless for WebP.
    """
    if format == "PNG":
        chunks = PngInfo()
        for name, text in record.items():
            chunks.add_text(name, text)
        return {"pnginfo": chunks}
    if format not in ("JPEG", "WEBP", "AVIF"):
        return {}
    options: dict[str, Any] = {"quality": QUALITY if quality is None else quality}
    if format == "JPEG":
        options["subsampling"] = "4:4:4"
    if format == "WEBP" and quality is None:
        options |= {"lossless": True}
    return options | _exif_and_xmp(format, record)


def _exif_and_xmp(format: str, record: Mapping[str, str]) -> dict[str, bytes]:
    if not record:
        return {}
    exif = Image.Exif()
    comment = b"UNICODE\0" + parameters(record).encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    xmp = XMP.format(
        namespace=NAMESPACE, source=TRAINED_MODEL, record=escape(json.dumps(dict(record)), quote=False)
    ).encode()
    options = {"exif": exif.tobytes(), "xmp": xmp}
    if format == "JPEG" and max(map(len, options.values())) > JPEG_SEGMENT:
        warn("the settings of the image are too long for a JPEG, which is written without them; write a PNG or WebP.")
        return {}
    return options


def read_record(image: Image.Image) -> dict[str, str]:
    """Return the record of an image that was opened from a file; empty if there is none."""
    if "settings" in image.info:
        return {str(name): value for name, value in image.info.items() if isinstance(value, str)}
    from xml.etree import ElementTree

    xmp = image.info.get("xmp", b"")
    xmp = xmp if isinstance(xmp, bytes) else str(xmp).encode()
    if b"<!" in xmp:  # a document type, whose entities may expand without end
        return {}
    try:
        element = ElementTree.fromstring(xmp.strip(b"\0 \n\r\t")).find(f".//{{{NAMESPACE}}}record")
        record = json.loads(element.text or "") if element is not None else {}
    except (ElementTree.ParseError, ValueError):
        return {}
    return {str(name): str(text) for name, text in record.items()} if isinstance(record, dict) else {}


def parameters(record: Mapping[str, str]) -> str:
    """Return a record as the text that AUTOMATIC1111's web UI writes: prompt, negative prompt, and a line of settings."""
    try:
        settings = json.loads(record.get("settings", ""))
    except ValueError:
        settings = {}
    settings = settings if isinstance(settings, dict) else {}
    shown = {
        "Steps": settings.get("num_inference_steps"),
        "Sampler": settings.get("sampler"),
        "Schedule type": settings.get("spacing"),
        "CFG scale": settings.get("guidance_scale"),
        "Seed": record.get("seed"),
        "Size": "{width}x{height}".format_map(settings) if {"width", "height"} <= settings.keys() else None,
        "Model hash": record.get("model"),
        "Denoising strength": settings.get("strength"),
        "Clip skip": settings.get("clip_skip"),
        "Version": "ldm",
    }
    lines = [record.get("prompt", "")]
    lines += [f"Negative prompt: {record['negative_prompt']}"] if record.get("negative_prompt") else []
    lines += [", ".join(f"{name}: {value}" for name, value in shown.items() if value is not None)]
    return "\n".join(lines)
