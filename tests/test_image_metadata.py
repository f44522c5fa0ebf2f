from __future__ import annotations

import io
import json

import pytest
from PIL import Image, features

from ldm.image_metadata import NAMESPACE, TRAINED_MODEL, parameters, read_record
from ldm.image_output import encoded, with_record

SETTINGS = {"num_inference_steps": 4, "sampler": "euler", "guidance_scale": 3.0, "width": 24, "height": 16}
RECORD = {
    "prompt": "pomme 🍎 <b> & \"c\"\n'd' \x07",
    "negative_prompt": "blue",
    "seed": "3",
    "settings": json.dumps(SETTINGS),
    "model": "0123abcd",
}
FORMATS = ["PNG", "JPEG", "WEBP", *(["AVIF"] if features.check("avif") else [])]


def written(format: str, record: dict[str, str] = RECORD) -> Image.Image:
    image = with_record(Image.effect_noise((24, 16), 60).convert("RGB"), record)
    return Image.open(io.BytesIO(encoded(image, format)))


@pytest.mark.parametrize("format", FORMATS)
def test_the_record_is_read_from_each_format(format: str) -> None:
    assert read_record(written(format)) == RECORD


@pytest.mark.parametrize("format", FORMATS[1:])
def test_other_programs_find_the_settings_where_the_web_ui_writes_them(format: str) -> None:
    image = written(format)
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == parameters(RECORD)
    assert TRAINED_MODEL.encode() in image.info["xmp"]


def test_the_text_of_parameters_is_that_of_the_web_ui() -> None:
    *prompt, negative, settings = parameters(RECORD).split("\n")
    assert "\n".join(prompt) == RECORD["prompt"]
    assert negative == "Negative prompt: blue"
    assert settings.startswith("Steps: 4, Sampler: euler, CFG scale: 3.0, Seed: 3, Size: 24x16, Model hash: 0123abcd")


def test_webp_is_lossless_unless_a_quality_is_given() -> None:
    image = Image.effect_noise((24, 16), 60).convert("RGB")
    assert Image.open(io.BytesIO(encoded(image, "WEBP"))).tobytes() == image.tobytes()
    sizes = [len(encoded(image, "WEBP", quality=quality)) for quality in (5, 90)]
    assert sizes[0] < sizes[1]


def test_settings_that_are_too_long_for_a_jpeg_are_left_out_with_a_warning() -> None:
    long = RECORD | {"prompt": "word " * 20_000}
    with pytest.warns(UserWarning, match="too long for a JPEG"):
        image = written("JPEG", long)
    assert read_record(image) == {}
    assert read_record(written("WEBP", long)) == long


@pytest.mark.parametrize(
    "xmp",
    [
        b"",
        b"<x",
        b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>",
        f"<x xmlns:l='{NAMESPACE}'><l:record/></x>".encode(),
        f"<x xmlns:l='{NAMESPACE}'><l:record>[1]</l:record></x>".encode(),
        f"<!DOCTYPE x [<!ENTITY a 'b'>]><x xmlns:l='{NAMESPACE}'><l:record>{{}}</l:record></x>".encode(),
    ],
)
def test_foreign_and_damaged_metadata_hold_no_record(xmp: bytes) -> None:
    Image.new("RGB", (8, 8)).save(file := io.BytesIO(), "WEBP", xmp=xmp)
    assert read_record(Image.open(file)) == {}
