from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from ldm import editing
from ldm.image_metadata import read_record
from ldm.serving.service import VARIATION_STRENGTH
from tests.serving.servers import Running, serving
from tests.tiny import SIZE


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("openai")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="not needed", max_retries=0) as made:
        yield made


def decoded(entry: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry.b64_json)))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((SIZE, SIZE), 60).convert("RGB")


QUIET: dict[str, Any] = {"progress": False}


def test_images_generate(server: Running, client: openai.OpenAI) -> None:
    extra = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 4, "negative_prompt": "blue"}
    result = client.images.generate(
        prompt="a red apple", n=2, size=f"{SIZE}x{2 * SIZE}", response_format="b64_json", extra_body={"extra": extra}
    )
    expected = server.pipe(
        "a red apple", num_images_per_prompt=2, height=2 * SIZE, width=SIZE, batch_size=1, **extra, **QUIET
    )
    assert result.data is not None
    assert [decoded(entry).tobytes() for entry in result.data] == [each.tobytes() for each in expected]
    assert decoded(result.data[0]).info["seed"] == "3"


def test_an_address_leads_to_the_image(server: Running, client: openai.OpenAI) -> None:
    result = client.images.generate(prompt="a red apple", model="tiny", extra_body={"extra": {"seed": 1}})
    assert result.data is not None
    content = server.http.get(str(result.data[0].url)).raise_for_status().content
    assert Image.open(io.BytesIO(content)).tobytes() == server.pipe("a red apple", seed=1, **QUIET)[0].tobytes()


def test_images_edit_repaints_where_the_mask_is_transparent(
    server: Running, client: openai.OpenAI, image: Image.Image
) -> None:
    mask = Image.new("RGBA", (SIZE, SIZE), "black")
    mask.paste((0, 0, 0, 0), (0, 0, SIZE // 2, SIZE))
    white = Image.new("L", (SIZE, SIZE))
    white.paste(255, (0, 0, SIZE // 2, SIZE))
    result = client.images.edit(
        image=("image.png", png(image)),
        mask=("mask.png", png(mask)),
        prompt="a red car",
        response_format="b64_json",
        extra_body={"extra": {"seed": 2, "sampler": "euler"}},
    )
    expected = editing.inpaint(server.pipe, "a red car", image, white, seed=2, sampler="euler", **QUIET)
    assert result.data is not None
    assert decoded(result.data[0]).tobytes() == expected[0].tobytes()


def test_images_edit_without_transparency_changes_all_of_the_image(
    server: Running, client: openai.OpenAI, image: Image.Image
) -> None:
    result = client.images.edit(
        image=[("image.png", png(image))],
        prompt="a red car",
        response_format="b64_json",
        extra_body={"extra": {"seed": 2, "strength": 0.5}},
    )
    assert result.data is not None
    expected = editing.image_to_image(server.pipe, "a red car", image, 0.5, seed=2, **QUIET)
    assert decoded(result.data[0]).tobytes() == expected[0].tobytes()


def test_images_create_variation(server: Running, client: openai.OpenAI, image: Image.Image) -> None:
    result = client.images.create_variation(
        image=("image.png", png(image)), n=2, response_format="b64_json", extra_body={"extra": {"seed": 2}}
    )
    assert result.data is not None
    for entry, seed in zip(result.data, (2, 3), strict=True):
        expected = editing.image_to_image(server.pipe, "", image, VARIATION_STRENGTH, seed=seed, **QUIET)
        assert decoded(entry).tobytes() == expected[0].tobytes()


def test_a_client_that_goes_away_cancels_its_work(server: Running) -> None:
    body = {"prompt": "a red apple", "size": "128x128", "extra": {"num_inference_steps": 150, "sampler": "heun"}}
    with httpx.Client(base_url=server.url, timeout=0.5) as impatient, pytest.raises(httpx.ReadTimeout):
        impatient.post("/v1/images/generations", json=body)
    before = len(list(server.service.gallery.folder.iterdir()))
    while server.http.get("/health").json()["running"]:
        time.sleep(0.01)
    assert len(list(server.service.gallery.folder.iterdir())) == before


def test_models_are_those_of_the_list(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    assert client.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        client.images.generate(prompt="a red apple", model="dall-e-3")


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_file_formats_hold_the_settings_too(
    server: Running, client: openai.OpenAI, image: Image.Image, output_format: Any
) -> None:
    extra = {"extra": {"seed": 3, "num_inference_steps": 2}}
    made = client.images.generate(prompt="a red apple", output_format=output_format, extra_body=extra)
    options: dict[str, Any] = {"output_format": output_format, "output_compression": 30, "response_format": "b64_json"}
    edited = client.images.edit(image=("a.png", png(image)), prompt="a red car", extra_body=extra, **options)
    assert made.data is not None
    assert edited.data is not None
    response = server.http.get(str(made.data[0].url)).raise_for_status()
    assert response.headers["content-type"] == f"image/{output_format}"
    expected = server.pipe("a red apple", seed=3, num_inference_steps=2, **QUIET)[0]
    for file, prompt in (
        (Image.open(io.BytesIO(response.content)), "a red apple"),
        (decoded(edited.data[0]), "a red car"),
    ):
        assert file.format == output_format.upper()
        record = read_record(file)
        assert (record["prompt"], record["seed"]) == (prompt, "3")
    if output_format == "webp":
        assert Image.open(io.BytesIO(response.content)).tobytes() == expected.tobytes()


def test_fields_without_effect_are_named_in_a_header(server: Running) -> None:
    body = {"prompt": "a red apple", "quality": "high", "style": "vivid", "user": "me"}
    response = server.http.post("/v1/images/generations", json=body).raise_for_status()
    assert response.headers["warning"] == '299 - "without effect here: quality, style"'


def test_errors_of_a_request_are_those_of_the_client(client: openai.OpenAI, image: Image.Image) -> None:
    for settings, message in (
        ({"size": "large"}, "write WIDTHxHEIGHT"),
        ({"size": f"{SIZE + 1}x{SIZE}"}, "not divisible"),
        ({"n": 100}, "allows at most"),
        ({"extra_body": {"extra": {"label": 1}}}, "reads no label"),
        ({"extra_body": {"stream": True}}, "not streamed"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.images.generate(prompt="a", **settings)
    with pytest.raises(openai.UnprocessableEntityError, match=r"extra\.steps"):
        client.images.generate(prompt="a", extra_body={"extra": {"steps": 3}})
    with pytest.raises(openai.UnprocessableEntityError, match=r"extra\.steps"):
        client.images.edit(prompt="a", image=("a.png", png(image)), extra_body={"extra": {"steps": 3}})
    with pytest.raises(openai.BadRequestError, match="not a PNG"):
        client.images.edit(prompt="a", image=("a.png", b"not an image"))
    with pytest.raises(openai.BadRequestError, match="allows from 1 to"):
        client.images.edit(prompt="a", image=("a.png", png(image)), size="99999x99999")  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="no transparency"):
        client.images.edit(prompt="a", image=("a.png", png(image)), mask=("a.png", png(image)))
    with pytest.raises(openai.BadRequestError, match="not divisible"):
        client.images.edit(prompt="a", image=("a.png", png(Image.new("RGB", (SIZE + 1, SIZE)))))
