from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data import BatchIndices, ShardsData
from ldm.data.shards import SPLITS, Shards, find_shards
from ldm.data.stamps import prepare_stamps, stamp_captions
from ldm.errors import DataError
from tests.data.pictures import encoded, noise_picture

FROG = "A frog.\nde.utf8=Ein Frosch.\npt_BR.utf8=Um sapo = anfíbio.\nru.utf8=\nsr@latin.utf8=Žaba.\n"


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """A folder as Debian's package has it: captions of four stamps, sounds, settings, a mirrored and an SVG-only stamp."""
    folder = tmp_path / "stamps"
    (folder / "animals" / "frogs").mkdir(parents=True)
    animals = folder / "animals"
    (animals / "frogs" / "frog.png").write_bytes(encoded(noise_picture(0).convert("RGBA")))
    (animals / "frogs" / "frog.txt").write_text(FROG, encoding="utf-8")
    (animals / "frogs" / "frog_mirror.png").write_bytes(encoded(noise_picture(1)))
    (animals / "frogs" / "frog_desc_de.ogg").write_bytes(b"a sound")
    (animals / "frogs" / "frog.dat").write_text("tintable\n")
    (animals / "snail.svg").write_text("<svg/>")
    (animals / "snail.txt").write_text("A snail.\nde.utf8=Eine Schnecke.\n")
    for i in range(2, 5):
        (animals / f"{i}.png").write_bytes(encoded(noise_picture(i)))
        (animals / f"{i}.txt").write_text(f"Number {i}.  {i}+1={i + 1}\nsv.utf8=Nummer {i}.\n", encoding="utf-8")
    return folder


def captions(folder: Path) -> dict[str, str]:
    """Key to caption, of all splits."""
    sets = [Shards(find_shards(str(folder / split), split)) for split in SPLITS if (folder / split).is_dir()]
    return {key: shards.text(i) for shards in sets for i, key in enumerate(shards.keys)}


def test_a_text_file_has_the_english_caption_first_and_then_the_translations(stamps: Path) -> None:
    found = stamp_captions(stamps / "animals" / "frogs" / "frog.txt")
    assert found == {"en": "A frog.", "de": "Ein Frosch.", "pt_BR": "Um sapo = anfíbio.", "sr@latin": "Žaba."}


@pytest.mark.parametrize(
    ("language", "expected", "missing"),
    [
        ("en", {"frogs/frog": "A frog.", **{f"{i}": f"Number {i}.  {i}+1={i + 1}" for i in range(2, 5)}}, 0),
        ("sv", {f"{i}": f"Nummer {i}." for i in range(2, 5)}, 1),
        ("pt_BR", {"frogs/frog": "Um sapo = anfíbio."}, 3),
    ],
)
def test_stamps_have_the_captions_of_a_language(
    tmp_path: Path, stamps: Path, language: str, expected: dict[str, str], missing: int
) -> None:
    report = prepare_stamps(stamps, tmp_path / "shards", language=language, shares=(1, 0, 0))
    assert captions(tmp_path / "shards") == {f"animals/{key}": text for key, text in expected.items()}
    stored = json.loads((tmp_path / "shards" / "report.json").read_text(encoding="utf-8"))
    assert list(stored["left_out"]["no caption"]) == ["animals/frogs/frog_mirror.png"]
    assert len(report.left_out.get(f"no caption in {language}", {})) == missing
    assert stored["ignored_files"] == {".dat": 1, ".ogg": 1, ".svg": 1}


def test_splits_are_shares_of_the_images_and_do_not_depend_on_the_language(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(encoded(noise_picture(i)))
        (tmp_path / f"{i}.txt").write_text(f"Stamp {i}." + f"\nde.utf8=Stempel {i}." * (i % 2))
    english = prepare_stamps(tmp_path, tmp_path / "en", shares=(0.5, 0.25, 0.25))
    german = prepare_stamps(tmp_path, tmp_path / "de", shares=(0.5, 0.25, 0.25), language="de")
    assert sum(english.images.values()) == 40
    assert sum(german.images.values()) == 20
    assert min(german.images.values()) > 0
    for split in SPLITS:
        keys = {
            language: set(Shards(find_shards(str(tmp_path / language / split), split)).keys)
            for language in ("en", "de")
        }
        assert keys["de"] == {key for key in keys["en"] if int(key) % 2}


def test_the_background_of_a_transparent_stamp_is_that_of_the_config(tmp_path: Path, stamps: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    (stamps / "animals" / "frogs" / "frog.png").write_bytes(encoded(clear))
    prepare_stamps(stamps, tmp_path / "shards", language="de", shares=(1, 0, 0))
    for background, value in {"white": 1.0, "black": -1.0}.items():
        data = ShardsData(str(tmp_path / "shards" / "train"), size=8, background=background, workers=0)
        image = data.open("train")[BatchIndices(np.array([0]))]["image"]
        np.testing.assert_array_equal(image, np.full((1, 3, 8, 8), value))


def test_mistakes_say_what_to_do(tmp_path: Path, stamps: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean 'de'\? Known: de, en, pt_BR, sr@latin, sv\. Choose one"):
        prepare_stamps(stamps, tmp_path / "shards", language="dee")
    with pytest.raises(DataError, match="none does not exist; install Tux Paint's stamps"):
        prepare_stamps(tmp_path / "none", tmp_path / "shards")
