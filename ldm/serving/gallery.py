"""The folder of generated images. Each is a PNG with its settings, under a name that the server makes."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from datetime import datetime, timezone
from pathlib import Path

from PIL import Image

from ldm.image_output import write_image

NAME = re.compile(r"\d{8}-\d{6,12}-[0-9a-f]{32}\.png")
"""Names of files: date, time (UTC) in microseconds, and 128 random bits, so that nobody finds one by trying."""

INPUT = re.compile(r"input-[0-9a-f]{32}\.png")
"""Names of images that clients sent to be edited: a hash of the pixels."""

STALE = 60.0
"""Seconds after which a temporary file is that of a server which was killed."""


class Gallery:
    """A folder of images, with a subfolder for each API key.

    Files are complete at any time, since each is written under another name first.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.rglob(".*.png.*"):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink(missing_ok=True)

    def save(self, image: Image.Image, client: str = "") -> str:
        """Write an image of a client with the record in its ``info``, and return the name of the file."""
        name = f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S%f}-{secrets.token_hex(16)}.png"
        write_image(image, self._folder(client, create=True) / name)
        return name

    def save_input(self, image: Image.Image, client: str = "") -> str:
        """Write an image that a client has sent, once, and return the name of the file."""
        content = f"{image.mode} {image.size}".encode() + image.tobytes()
        path = self._folder(client, create=True) / f"input-{hashlib.sha256(content).hexdigest()[:32]}.png"
        if not path.exists():
            write_image(image, path)
        return path.name

    def file(self, name: str) -> Path | None:
        """Return the file of this name; None if there is none, or if the name is not one that the server makes."""
        if not (NAME.fullmatch(name) or INPUT.fullmatch(name)):
            return None
        return next((path for path in (self.folder / name, *self.folder.glob(f"key-*/{name}")) if path.is_file()), None)

    def newest(self, client: str, n: int, before: str | None = None) -> tuple[list[Path], bool]:
        """Return ``n`` generated images of a client, the newest first, and whether there are older ones.

        Args:
            before: name of an image; those that follow it are returned.
        """
        folder = self._folder(client)
        names = [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []
        names = [name for name in names if NAME.fullmatch(name) and (before is None or name < before)]
        names.sort(reverse=True)
        return [folder / name for name in names[:n]], len(names) > n

    def _folder(self, client: str, create: bool = False) -> Path:
        """Return the folder of a client: that of its API key, or without keys that of all."""
        folder = self.folder / client if client.startswith("key-") else self.folder
        if create:
            folder.mkdir(exist_ok=True)
        return folder
