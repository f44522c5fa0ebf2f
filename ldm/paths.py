"""Paths as users write them: ``~`` is the home folder, ``$NAME`` and ``${NAME}`` are environment variables."""

from __future__ import annotations

import os
import re
from os import PathLike
from pathlib import Path

from ldm.errors import PathError

VARIABLE = re.compile(r"\$(?:(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)\})", re.ASCII)
"""``$NAME`` or ``${NAME}``."""


def expanded(path: str | PathLike[str]) -> str:
    """Return a path with a leading ``~`` or ``~user`` and environment variables replaced by their values.

    A file or folder that exists under the name as it is written keeps its ``$``. Anything else than a path, such as a hub id
    or a pattern of shards, is returned unchanged unless it contains one of these.

    Raises:
        PathError: the variable is not set or empty, there is no such user, or the path contains a null byte.
    """
    text = os.fsdecode(path)
    if "\0" in text:
        raise PathError(f"the path {text!r} is invalid; name a file or folder.")
    if text.startswith("~"):
        try:
            text = str(Path(text).expanduser())
        except RuntimeError:
            if not os.path.lexists(text):
                home = text.partition("/")[0]
                raise PathError(
                    f"the path {text!r} begins with the home folder {home}, which does not exist."
                ) from None

    def value(match: re.Match[str]) -> str:
        name = match["name"] or match["braced"]
        if not os.environ.get(name):
            raise PathError(
                f"the path {text!r} contains {match[0]}, but the environment variable {name} is not set; set it, or write "
                "the path itself."
            )
        return os.environ[name]

    if "$" not in text or os.path.lexists(text):
        return text
    return VARIABLE.sub(value, text)
