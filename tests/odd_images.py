"""Images that are odd but valid: any viewer shows them, as the image or its greyscale version, upright or on its side."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pillow_heif
from PIL import Image, ImageCms

WIDTH, HEIGHT = 60, 36
ORIENTATION = 0x112


def smooth_image() -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (HEIGHT // 6, WIDTH // 6, 3), np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


IMAGE = smooth_image()
GREY = IMAGE.convert("L")
LEFT_HALF_HIDDEN = IMAGE.convert("RGBA")
LEFT_HALF_HIDDEN.paste((0, 0, 0, 0), (0, 0, WIDTH // 2, HEIGHT))
PALETTE = IMAGE.quantize(16)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def heic() -> bytes:
    file = io.BytesIO()
    pillow_heif.from_pillow(IMAGE).save(file, quality=95)
    return file.getvalue()


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def with_chunk(kind: bytes, data: bytes, *, checksum: int | None = None, last: bool = False) -> bytes:
    png = encoded(IMAGE, "PNG")
    place = len(png) - 12 if last else 33  # before the end, or behind the header
    return png[:place] + chunk(kind, data, checksum) + png[place:]


def png_16(colour: int, values: np.ndarray, transparent: bytes = b"") -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    hidden = chunk(b"tRNS", transparent) if transparent else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + hidden
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def exif(tag: int, kind: int, value: bytes, orientation: int | None = None) -> bytes:
    """Exif data with one value of four bytes, of any type, and the orientation."""
    entries = [] if orientation is None else [struct.pack("<HHIHH", ORIENTATION, 3, 1, orientation, 0)]
    entries.append(struct.pack("<HHI", tag, kind, 1) + value)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + b"\0\0\0\0"


def jpeg(*segments: tuple[int, bytes], image: Image.Image = IMAGE, **options: object) -> bytes:
    data = encoded(image, "JPEG", quality=95, **options)
    added = (b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content for marker, content in segments)
    return data[:2] + b"".join(added) + data[2:]


LARGE = zlib.compress(b"x" * 3_000_000)
GREY_16, RGB_16 = np.asarray(GREY).astype(np.uint16) * 257, np.asarray(IMAGE).astype(np.uint16) * 257
LAB = ImageCms.profileToProfile(IMAGE, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")

COLOUR: dict[str, bytes] = {
    "png-compressed-text": with_chunk(b"zTXt", b"k\0\0" + LARGE),
    "png-compressed-text-last": with_chunk(b"zTXt", b"k\0\0" + LARGE, last=True),
    "png-international-text": with_chunk(b"iTXt", b"k\0\1\0\0\0" + LARGE),
    "png-text-70-mb": with_chunk(b"tEXt", b"k\0" + bytes(70_000_000)),
    "png-text-checksum": with_chunk(b"tEXt", b"k\0v", checksum=5),
    "png-large-profile": with_chunk(b"iCCP", b"k\0\0" + LARGE),
    "png-broken-profile": with_chunk(b"iCCP", b"k\0\0nonsense"),
    "png-cut-profile": with_chunk(b"iCCP", b"k"),
    "png-empty-profile": with_chunk(b"iCCP", b""),
    "png-short-resolution": with_chunk(b"pHYs", b"\0"),
    "png-short-gamma": with_chunk(b"gAMA", b"\0"),
    "png-short-transparency": with_chunk(b"tRNS", b"\0"),
    "png-short-animation": with_chunk(b"acTL", b"\0\0\0"),
    "png-exif-garbage": with_chunk(b"eXIf", b"garbage"),
    "png-transparent-colour": encoded(IMAGE, "PNG", transparency=(1, 2, 3)),
    "png-16-bit": png_16(2, RGB_16),
    "png-16-bit-transparent-colour": png_16(2, RGB_16, struct.pack(">HHH", 1, 2, 3)),
    "jpeg-without-end": jpeg()[:-2],
    "jpeg-exif-garbage": jpeg(exif=b"Exif\0\0garbage"),
    "jpeg-exif-cut": jpeg(exif=exif(ORIENTATION, 3, b"\6\0\0\0")[:16]),
    "jpeg-orientation-text": jpeg(exif=exif(ORIENTATION, 2, b"6\0\0\0")),
    "jpeg-orientation-99": jpeg(exif=exif(ORIENTATION, 3, b"\x63\0\0\0")),
    "jpeg-cut-profile": jpeg((0xE2, b"ICC_PROFILE\0\1\3abc")),
    "jpeg-short-profile": jpeg((0xE2, b"ICC_PROFILE\0")),
    "jpeg-short-adobe": jpeg((0xEE, b"Adobe\0")),
    "jpeg-short-jfif": jpeg((0xE0, b"JFIF\0\1")),
    "jpeg-broken-mpf": jpeg((0xE2, b"MPF\0garbage garbage")),
    "jpeg-cmyk": encoded(IMAGE.convert("CMYK"), "JPEG", quality=95),
    "webp-exif-garbage": encoded(IMAGE, "WEBP", lossless=True, exif=b"Exif\0\0garbage"),
    "avif-exif-cut": encoded(IMAGE, "AVIF", quality=95, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0abc"),
    "tiff-lab": encoded(LAB, "TIFF"),
    "tiff-cmyk": encoded(IMAGE.convert("CMYK"), "TIFF"),
    "tiff-pages": encoded(IMAGE, "TIFF", save_all=True, append_images=[GREY]),
    "apng": encoded(IMAGE, "PNG", save_all=True, append_images=[IMAGE.rotate(180)]),
    "bmp": encoded(IMAGE, "BMP"),
    "tga": encoded(IMAGE, "TGA"),
    "jp2": encoded(IMAGE, "JPEG2000"),
    "heic": heic(),
}
"""Files that show :data:`IMAGE`."""

MONOCHROME: dict[str, bytes] = {
    "png-16-bit-grey": png_16(0, GREY_16),
    "png-16-bit-grey-alpha": png_16(4, np.stack([GREY_16, np.full_like(GREY_16, 65535)], -1)),
    "tiff-16-bit": encoded(Image.fromarray(GREY_16), "TIFF"),
    "tiff-32-bit": encoded(Image.fromarray(GREY_16.astype(np.int32)), "TIFF"),
    "tiff-float": encoded(Image.fromarray(np.asarray(GREY, np.float32) / 255), "TIFF"),
    "jp2-16-bit": encoded(Image.fromarray(GREY_16), "JPEG2000"),
}
"""Files that show :data:`GREY`."""

ON_ITS_SIDE: dict[str, bytes] = {
    "jpeg-orientation-float": jpeg(exif=exif(ORIENTATION, 11, struct.pack("<f", 6.0))),
    "jpeg-orientation-long": jpeg(exif=exif(ORIENTATION, 4, b"\6\0\0\0")),
    "jpeg-resolution-text": jpeg(exif=exif(0x11A, 2, b"abc\0", orientation=6)),
    "jpeg-resolution-byte": jpeg(exif=exif(0x11A, 1, b"a\0\0\0", orientation=6)),
    "jpeg-width-float": jpeg(exif=exif(0x100, 11, struct.pack("<f", 1.5), orientation=6)),
    "jpeg-unknown-type": jpeg(exif=exif(0x11A, 99, b"a\0\0\0", orientation=6)),
    "jpeg-gps-text": jpeg(exif=exif(0x8825, 2, b"abc\0", orientation=6)),
    "tiff-orientation": encoded(IMAGE, "TIFF", tiffinfo={ORIENTATION: 6}),
    "png-orientation-and-text": with_chunk(b"zTXt", b"k\0\0" + LARGE)[:33]
    + chunk(b"eXIf", exif(0x11A, 2, b"abc\0", orientation=6)[6:])
    + with_chunk(b"zTXt", b"k\0\0" + LARGE)[33:],
}
"""Files that show :data:`IMAGE` turned clockwise."""

LEFT_HALF_WHITE: dict[str, bytes] = {
    "png": encoded(LEFT_HALF_HIDDEN, "PNG"),
    "png-16-bit-grey": png_16(
        0, np.where(np.arange(WIDTH) < WIDTH // 2, 7, np.maximum(GREY_16, 8)).astype(np.uint16), struct.pack(">H", 7)
    ),
    "webp": encoded(LEFT_HALF_HIDDEN, "WEBP", lossless=True),
    "gif": encoded(LEFT_HALF_HIDDEN, "GIF"),
    "tga": encoded(LEFT_HALF_HIDDEN, "TGA", compression="tga_rle"),
    "tiff": encoded(LEFT_HALF_HIDDEN, "TIFF"),
    "jp2": encoded(LEFT_HALF_HIDDEN, "JPEG2000"),
}
"""Files whose left half is transparent."""

SHOWN: dict[str, tuple[bytes, Image.Image]] = {
    **{name: (data, IMAGE) for name, data in COLOUR.items()},
    **{name: (data, GREY.convert("RGB")) for name, data in MONOCHROME.items()},
    **{name: (data, IMAGE.transpose(Image.Transpose.ROTATE_270)) for name, data in ON_ITS_SIDE.items()},
}
"""Files and what they show."""


def differs(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of two images, in levels of 255; infinite if their sizes differ."""
    if one.size != other.size:
        return float("inf")
    return float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean())
