"""The folder of generated images. Each is a file with its settings, under a name that the server makes."""

from __future__ import annotations

import re
import secrets
import time
from datetime import datetime, timezone
from pathlib import Path

from PIL import Image

from ldm.image_marks import ImageMarks
from ldm.image_output import write_image

FORMATS = ("png", "jpeg", "webp")
"""Formats of the files, which are their endings."""

NAME = re.compile(rf"\d{{8}}-\d{{6}}-[0-9a-f]{{32}}\.({'|'.join(FORMATS)})")
"""Names of files: date, time (UTC), and 128 random bits, so that nobody finds one by trying."""

STALE = 60.0
"""Seconds after which a temporary file is that of a server which was killed."""


class Gallery:
    """A folder of images. Files are complete at any time, since each is written under another name first.

    Args:
        folder: the folder, which is made if it is missing.
        marks: content credentials and watermark of the images; default: none.
    """

    def __init__(self, folder: Path, marks: ImageMarks | None = None):
        self.folder, self.marks = folder, marks
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".[0-9]*-*.*.*"):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink(missing_ok=True)

    def save(self, image: Image.Image, format: str = "png", quality: int | None = None) -> str:
        """Write an image with the record in its ``info``, and return the name of the file.

        Args:
            format: one of ``FORMATS``.
            quality: as in :func:`ldm.image_metadata.save_options`.
        """
        name = f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(16)}.{format}"
        write_image(image, self.folder / name, self.marks, quality)
        return name

    def file(self, name: str) -> Path | None:
        """Return the file of this name; None if there is none, or if the name is not one that the server makes."""
        path = self.folder / name if NAME.fullmatch(name) else None
        return path if path is not None and path.is_file() else None
