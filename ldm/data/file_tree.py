"""Files of a folder and its subfolders, through symbolic links."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def find_files(folder: Path, skip: Path, unreadable: Callable[[Path, str], None]) -> list[Path]:
    """Return the files of a folder and its subfolders, sorted by path.

    Links to files and folders are followed, each folder is visited once (by its own path rather than by a link, if it has both),
    and links to a folder that contains them are not followed.

    Args:
        folder: an absolute path without links.
        skip: a subfolder that is not visited; without effect if it is the folder itself.
        unreadable: called with each folder, or broken link to a file, that cannot be read, and the reason.
    """
    files: list[Path] = []
    folders: list[Path] = [folder]
    links: list[Path] = []
    visited = {skip} - {folder}
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        actual = current.resolve()
        if actual in visited:
            continue
        visited.add(actual)
        try:
            for path in sorted(current.iterdir()):
                if path.is_dir():
                    if not path.is_symlink():
                        folders.append(path)
                    elif path.resolve() not in actual.parents:
                        links.append(path)
                elif path.is_file():
                    files.append(path)
                elif path.is_symlink():
                    unreadable(path, "broken link")
        except OSError as error:
            unreadable(current, error.strerror or str(error))
    return sorted(files)
