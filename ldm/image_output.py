"""The images that a pipeline returns, each with the record of how it was made."""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.errors import SamplingError
from ldm.formats.tensors import write_atomically
from ldm.image_marks import ImageMarks, watermarked
from ldm.image_metadata import save_options
from ldm.paths import expanded

CAPTION_SIZE = 12  # pixels
CAPTION_WIDTH = 20  # characters a line
GAP = 4  # pixels between the images of a grid
FRAME_TIME = 80  # milliseconds that a frame of an animation is shown


def with_record(image: Image.Image, record: Mapping[str, str]) -> Image.Image:
    """Return the image with ``record`` in its ``info`` and in the text chunks of any PNG that it is saved as.

    Opened again, the PNG has the same ``info``.
    """
    image.info.update(dict(record))
    image.encoderinfo = save_options("PNG", record)  # Pillow's defaults for the keywords of `save`
    return image


class Images(list[Image.Image]):
    """A list of PIL images.

    The ``info`` of an image records how it was made, in strings: ``prompt``, ``negative_prompt`` or ``label``
    if given, ``seed``, ``settings`` (JSON) and ``model``, the fingerprint of the model's file.
    """

    @classmethod
    def of(cls, images: Tensor, records: Sequence[Mapping[str, str]] | None = None) -> Images:
        """Create them from ``images [n c h w]`` in [0, 1], ``c`` 1 or 3, and the record of each."""
        levels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        converted = (Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array) for array in levels)
        return cls(
            with_record(image, record) for image, record in zip(converted, records or [{}] * len(images), strict=True)
        )

    @property
    def seeds(self) -> list[int]:
        """The seed of each image, which reproduces it alone or in any batch."""
        return [int(image.info["seed"]) for image in self]

    @property
    def prompts(self) -> list[str]:
        """The prompt or class label of each image; empty if it has neither."""
        return [image.info.get("prompt", image.info.get("label", "")) for image in self]

    def grid(self, columns: int | None = None, captions: bool | Sequence[str] = False, scale: int = 1) -> Image.Image:
        """Arrange the images in one, row by row, on white.

        Args:
            columns: images in a row; default: as square as possible.
            captions: texts to write under the images, or True for their prompts.
            scale: factor by which each image is enlarged.

        Raises:
            SamplingError: there is no image, or not one caption for each.
        """
        if not self:
            raise SamplingError("a grid needs at least one image.")
        texts = self.prompts if captions is True else list(captions or [])
        if texts and len(texts) != len(self):
            raise SamplingError(f"{len(texts)} captions do not fit {len(self)} images; give one for each.")
        columns = min(columns or math.ceil(math.sqrt(len(self))), len(self))
        rows = math.ceil(len(self) / columns)

        font = ImageFont.load_default(CAPTION_SIZE)
        wrapped = [textwrap.fill(text, CAPTION_WIDTH) for text in texts]
        lines = max((text.count("\n") + 1 for text in wrapped), default=0)
        caption_width = max((font.getlength(line) for text in wrapped for line in text.split("\n")), default=0)
        image_width = scale * max(image.width for image in self)
        image_height = scale * max(image.height for image in self)
        width = max(image_width, math.ceil(caption_width))
        height = image_height + lines * (CAPTION_SIZE + 3) + (GAP if texts else 0)

        sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), "white")
        draw = ImageDraw.Draw(sheet)
        for index, image in enumerate(self):
            x = GAP + index % columns * (width + GAP)
            y = GAP + index // columns * (height + GAP)
            size = (scale * image.width, scale * image.height)
            enlarged = image.resize(size, Image.Resampling.BICUBIC)
            sheet.paste(enlarged, (x + (width - enlarged.width) // 2, y))
            if texts:
                under = (x + width / 2, y + image_height + GAP)
                draw.multiline_text(under, wrapped[index], "black", font, "ma", spacing=3, align="center")
        return with_record(sheet, self._common_record())

    def save(self, path: str | Path, marks: ImageMarks | None = None) -> list[Path]:
        """Write the images, with their records if the format is PNG, JPEG, WebP or AVIF, and return the files written.

        Args:
            path: a file name, under which several images become one :meth:`grid`; a file name with ``{index}`` or
                ``{seed}`` in it, for a file each; or a folder, for ``0000.png``, ``0001.png``, ...
            marks: content credentials and watermark; default: none.

        Raises:
            SamplingError: unknown format, one name for two images, or a file that cannot be written.
        """
        path = check_target(path)
        pattern = path if "{" in path.name else path / "{index:04d}.png"
        if pattern != path and path.suffix and not path.is_dir():
            return [write_image(self[0] if len(self) == 1 else self.grid(), path, marks)]
        names = [pattern.name.format(index=index, seed=seed) for index, seed in enumerate(self.seeds)]
        if len(set(names)) < len(names):
            raise SamplingError(f"{path} gives several images one name; put {{index}} into it.")
        files = [pattern.with_name(name) for name in names]
        return [write_image(image, file, marks) for image, file in zip(self, files, strict=True)]

    def _repr_png_(self) -> bytes:
        """Encode the grid as PNG, as notebooks show the list."""
        file = io.BytesIO()
        self.grid().save(file, "PNG")
        return file.getvalue()

    def _common_record(self) -> dict[str, str]:
        """Merge the records: entries that all have in common as they are, others as a JSON list."""
        record: dict[str, str] = {}
        for name in dict.fromkeys(str(name) for image in self for name in image.info):
            values = [image.info.get(name, "") for image in self]
            record[name] = values[0] if len(set(values)) == 1 else json.dumps(values, ensure_ascii=False)
        return record


def check_target(path: str | Path) -> Path:
    """Return ``path`` if :meth:`Images.save` can write there, to check it before the images are made.

    Raises:
        SamplingError: a file name with other fields than index and seed, or with no image format's ending.
    """
    path = Path(expanded(path))
    try:
        path.name.format(index=0, seed=0)
    except (KeyError, IndexError, ValueError):
        raise SamplingError(f"{path} is no pattern; the fields of one are {{index}} and {{seed}}.") from None
    is_file = ("{" in path.name or path.suffix) and not path.is_dir()
    if is_file and path.suffix.lower() not in Image.registered_extensions():
        raise SamplingError(f"{path} ends in {path.suffix!r}, which is no image format; end it in .png.")
    return path


def encoded(image: Image.Image, format: str, marks: ImageMarks | None = None, quality: int | None = None) -> bytes:
    """Return the content of a file of an image, with the record in its ``info``.

    Args:
        format: Pillow's name of the file format.
        marks: content credentials and watermark; default: none.
        quality: as in :func:`ldm.image_metadata.save_options`.

    Raises:
        OSError: the format does not hold such an image.
        LdmError: it cannot be marked.
    """
    marks, file = marks or ImageMarks(), io.BytesIO()
    if marks.watermark and "watermark" not in image.info:
        image = watermarked(image)
    record = {str(name): text for name, text in image.info.items() if isinstance(text, str)}
    image.save(file, format, **save_options(format, record, quality))
    return marks.sign(file.getvalue(), format)


def write_image(image: Image.Image, path: Path, marks: ImageMarks | None = None, quality: int | None = None) -> Path:
    """Write one image, atomically, in the format of the path's ending, and return the path.

    Raises:
        SamplingError: it cannot be written.
    """
    kind = Image.registered_extensions()[path.suffix.lower()]
    return _write(path, lambda temporary: temporary.write_bytes(encoded(image, kind, marks, quality)))


def check_animation(path: str | Path) -> Path:
    """Return ``path`` if it is a file name of an animation, to check it before the images are made.

    Raises:
        SamplingError: it does not end in .gif.
    """
    path = Path(expanded(path))
    if path.suffix.lower() != ".gif":
        raise SamplingError(f"{path} is to be an animation, which is a GIF; end it in .gif.")
    return path


def write_animation(frames: Sequence[Image.Image], path: str | Path, hold: int = FRAME_TIME) -> Path:
    """Write frames of one size, atomically, as a GIF that loops, and return the path.

    Args:
        frames: one or more; each is shown for ``FRAME_TIME``.
        hold: milliseconds for which the last one is shown instead.

    Raises:
        SamplingError: the path does not end in .gif, or cannot be written.
    """
    first, *others = frames
    times = [FRAME_TIME] * len(others) + [hold]
    return _write(
        check_animation(path),
        lambda temporary: first.save(temporary, "GIF", save_all=True, append_images=others, duration=times, loop=0),
    )


def _write(path: Path, write: Callable[[Path], object]) -> Path:
    try:
        write_atomically(path, write)
    except OSError as error:
        reason = error.strerror or error
        raise SamplingError(f"{path} cannot be written ({reason}); choose another place.") from None
    return path
