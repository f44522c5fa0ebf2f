"""The stamps of Tux Paint: drawings and photographs with captions in many languages, which are not part of the package.

Debian's package ``tuxpaint-stamps-default`` (GPL-2) has them in folders by topic: ``x.png`` or ``x.svg``, and ``x.txt``, whose
first line is the English caption and whose further lines are translations, such as ``de.utf8=Ein Frosch.``
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.data.captions import NO_CAPTION, FolderCaptions
from ldm.data.folder import prepare_folder
from ldm.data.preparation_report import LeftOut, Report
from ldm.errors import DataError, unknown
from ldm.modalities.caption import CAPTION

STAMPS_PATH = Path("/usr/share/tuxpaint/stamps")  # path of Debian's tuxpaint-stamps-default
ENGLISH = "en"
SHARES = (0.8, 0.1, 0.1)
_FIELD = "text"
_ENCODING = ".utf8"


class StampCaptions(FolderCaptions):
    """Captions of stamps in one language.

    Args:
        source: the folder, for names in the report.
        files: all files of the folder.
        images: those that are images.
        language: ``en``, or a language or locale of the translations, such as ``de`` or ``pt_BR``.
        report: gets what is left out.

    Raises:
        DataError: no file has a caption in the language.
    """

    def __init__(self, source: Path, files: Sequence[Path], images: Iterable[Path], language: str, report: Report):
        super().__init__(source, files, images, _FIELD, report)
        self._language = language
        texts = [path for path in files if path.suffix == f".{CAPTION.suffix}"]
        self._by_language = {path: stamp_captions(path) for path in texts}
        languages = {name for captions in self._by_language.values() for name in captions} | {ENGLISH}
        if language not in languages:
            raise DataError(f"{unknown('language of the stamps', language, languages)} Choose one with --language.")

    def _values(self, path: Path) -> Mapping[str, Any]:
        captions = self._by_language.get(path, {})
        if self._language not in captions:
            raise LeftOut(f"{NO_CAPTION} in {self._language}")
        return {_FIELD: captions[self._language]}


def stamp_captions(path: Path) -> dict[str, str]:
    """Return the captions of a stamp's text file by language; bytes that are not UTF-8 become surrogates."""
    try:
        first, *lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    except OSError:
        return {}
    named = (line.partition("=") for line in lines)
    translations = {key.removesuffix(_ENCODING): text for key, _, text in named if key.endswith(_ENCODING)}
    return {language: text.strip() for language, text in {**translations, ENGLISH: first}.items() if text.strip()}


def prepare_stamps(
    source: Path,
    destination: Path,
    *,
    language: str = ENGLISH,
    shard_size: int = 1000,
    min_size: int = 1,
    max_size: int | None = None,
    shares: Sequence[float] = SHARES,
    workers: int = 4,
    drop_duplicates: int | None = None,
) -> Report:
    """Write a set of shards with the stamps of Tux Paint that are PNG files; see :func:`ldm.data.folder.prepare_folder`.

    A hash of the path of a stamp chooses its split. Transparent parts stay transparent; ``data.background`` is the color behind
    them. Stamps that are only SVG files are not used, nor are mirrored copies (``x_mirror.png``), which have no caption.

    Args:
        source: folder of the stamps.
        destination: folder of the shards.
        language: language of the captions; stamps without a caption in it are left out.
        shares: fractions of train, val and test; they add up to 1.
        shard_size, min_size, max_size, workers, drop_duplicates: see :func:`ldm.data.folder.prepare_folder`.

    Raises:
        DataError: a missing folder, a language that no stamp has, an invalid setting, or no usable image.
    """
    if not source.is_dir():
        raise DataError(
            f"the folder of stamps {source} does not exist; install Tux Paint's stamps (on Debian tuxpaint-stamps-default) or "
            "give their folder."
        )
    return prepare_folder(
        source,
        destination,
        shard_size=shard_size,
        min_size=min_size,
        max_size=max_size,
        shares=shares,
        workers=workers,
        drop_duplicates=drop_duplicates,
        captions=lambda folder, files, images, report: StampCaptions(folder, files, images, language, report),
    )
