from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import c2pa
import numpy as np
import pytest
from PIL import Image

from ldm.errors import ConfigError, MissingExtraError, SamplingError
from ldm.image_marks import ENOUGH, ImageMarks, watermark_bits, watermarked
from ldm.image_metadata import TRAINED_MODEL, read_record
from ldm.image_output import encoded, with_record
from tests.test_image_metadata import RECORD

CERTIFICATE = Path(__file__).parents[1] / "docs" / "scripts" / "test-certificate.sh"


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> ImageMarks:
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(["bash", CERTIFICATE], cwd=folder, check=True, capture_output=True)
    return ImageMarks(folder / "test.pem", folder / "test.key")


def noise(size: int = 64, spread: float = 20) -> Image.Image:
    """A smooth image with some noise on it."""
    ramp = np.linspace(40, 200, size)
    texture = np.random.default_rng(0).normal(0, spread, (size, size, 3))
    return Image.fromarray((ramp[:, None, None] / 2 + ramp[None, :, None] / 2 + texture).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_content_credentials_name_a_model_as_the_source(signer: ImageMarks, format: str) -> None:
    image = with_record(noise(), RECORD)
    content = encoded(image, format, signer)
    reader = c2pa.Reader(Image.MIME[format], io.BytesIO(content))
    assert reader.get_validation_state() == "Valid"
    (actions,) = [each for each in reader.get_active_manifest()["assertions"] if "actions" in each["label"]]
    (action,) = actions["data"]["actions"]
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", TRAINED_MODEL)
    assert read_record(Image.open(io.BytesIO(content))) == RECORD
    assert len(content) < len(encoded(image, format)) + 10_000

    changed = bytearray(content)
    changed[200 if format == "WEBP" else -200] ^= 1  # of the pixels
    damaged = json.loads(c2pa.Reader(Image.MIME[format], io.BytesIO(bytes(changed))).json())
    assert damaged["validation_state"] == "Invalid"


def test_mistakes_about_certificates_are_one_sentence(signer: ImageMarks, tmp_path: Path) -> None:
    certificate, key = signer.c2pa_certificate, signer.c2pa_key
    with pytest.raises(ConfigError, match="give both"):
        ImageMarks(certificate)
    for marks, message in (
        (ImageMarks(certificate, tmp_path / "none.key"), "cannot be read"),
        (ImageMarks(key, key), "cannot be signed with"),
        (ImageMarks(certificate, certificate), "is no private key"),
    ):
        with pytest.raises(ConfigError, match=message):
            marks.check()
    with pytest.raises(SamplingError, match="BMP holds no content credentials"):
        encoded(noise(), "BMP", signer)


def test_without_the_extras_the_marks_name_them(signer: ImageMarks, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("c2pa", "blind_watermark"):
        monkeypatch.setitem(sys.modules, package, None)
    for marks, extra in ((signer, "c2pa"), (ImageMarks(watermark=True), "watermark")):
        with pytest.raises(MissingExtraError, match=rf"pip install 'ldm\[{extra}\]'"):
            marks.check()


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_watermark_is_found_in_the_file(format: str) -> None:
    image = with_record(noise(128), RECORD)
    content = encoded(image, format, ImageMarks(watermark=True))
    marked = Image.open(io.BytesIO(content))
    assert watermark_bits(marked) >= ENOUGH > watermark_bits(image)
    assert read_record(marked) == RECORD | {"watermark": "blind-watermark"}
    error = np.square(np.asarray(marked, float) - np.asarray(image, float)).mean()
    assert 10 * np.log10(255**2 / error) > 30  # dB


def test_an_image_is_marked_once() -> None:
    once = watermarked(with_record(noise(), RECORD))
    twice = Image.open(io.BytesIO(encoded(once, "PNG", ImageMarks(watermark=True))))
    assert twice.tobytes() == once.tobytes()


def test_small_images_have_no_watermark() -> None:
    with pytest.raises(SamplingError, match="it needs 64 x 64"):
        watermarked(noise(32))


def test_the_package_of_the_watermark_leaves_the_start_of_processes_as_it_is() -> None:
    script = (
        "import multiprocessing; from PIL import Image; from ldm.image_marks import watermarked;"
        "multiprocessing.set_start_method('spawn'); watermarked(Image.new('RGB', (64, 64)));"
        "print(multiprocessing.get_start_method())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stdout == "spawn\n", run.stderr
