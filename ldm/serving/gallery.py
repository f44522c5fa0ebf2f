"""The folder of generated images. Each is a PNG with its settings, under a name that the server makes."""

from __future__ import annotations

import re
import secrets
import time
from datetime import datetime, timezone
from pathlib import Path

from PIL import Image

from ldm.image_output import write_image

NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{32}\.png")
"""Names of files: date, time (UTC), and 128 random bits, so that nobody finds one by trying."""

STALE = 60.0
"""Seconds after which a temporary file is that of a server which was killed."""


class Gallery:
    """A folder of images. Files are complete at any time, since each is written under another name first."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".*.png.*"):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink(missing_ok=True)

    def save(self, image: Image.Image) -> str:
        """Write an image with the record in its ``info``, and return the name of the file."""
        name = f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{secrets.token_hex(16)}.png"
        write_image(image, self.folder / name)
        return name

    def file(self, name: str) -> Path | None:
        """Return the file of this name; None if there is none, or if the name is not one that the server makes."""
        path = self.folder / name if NAME.fullmatch(name) else None
        return path if path is not None and path.is_file() else None
