from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm import Pipeline, editing
from ldm.diffusion import SPECS
from ldm.errors import SamplingError
from ldm.sampling_settings import SamplingSettings
from ldm.serving.edits import Edit, enlarging_factor
from ldm.serving.gallery import NAME, Gallery
from ldm.serving.records import request_of
from tests.serving.servers import Running, serving
from tests.serving.test_jobs import ended, image_at, in_base64
from tests.tiny import SIZE, tiny_model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("gallery")) as running:
        yield running


def newest(server: Running) -> dict[str, Any]:
    return server.http.get("/v1/gallery?limit=1").raise_for_status().json()["images"][0]


SETTINGS: list[dict[str, Any]] = [
    {"prompt": "a red apple", "negative_prompt": "car", "seed": 3, "spacing": "karras", "clip_skip": 0},
    {"prompt": "a (red:1.2) apple", "prompt_syntax": "weighted", "sampler": "unipc", "sampler_options": {"order": 3}},
    {"prompt": "a", "sampler": "euler_ancestral", "eta": 0.5, "guidance": {"scale": 4.0, "rescale": 0.5}},
    {"prompt": "a", "guidance": {"projection": {"eta": 0.5}, "interval": [0.2, 5.0]}, "width": 2 * SIZE},
    {"prompt": "a", "sigmas": [10.0, 3.0, 1.0]},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_image_is_made_again_by_its_request(server: Running, settings: dict[str, Any]) -> None:
    job = ended(server, {"num_inference_steps": 3} | settings if "sigmas" not in settings else settings)
    first, described = image_at(server, job["images"][0]["url"]), newest(server)
    assert described["complete"]
    assert described["url"] == job["images"][0]["url"]
    again = ended(server, described["request"])
    assert image_at(server, again["images"][0]["url"]).tobytes() == first.tobytes()


IMAGE = Image.effect_noise((SIZE, SIZE), 60).convert("RGB")
MASK = Image.new("L", (SIZE, SIZE), 0)
MASK.paste(255, (0, 0, SIZE // 2, SIZE))


@pytest.mark.parametrize(
    "edit",
    [
        {"strength": 0.5},
        {"mask": in_base64(MASK), "blur": 1.0},
        {"outpaint": {"left": 4, "bottom": 8}},
        {"enlarge": 2, "strength": 0.5},
    ],
)
def test_an_edit_is_made_again_by_its_request(server: Running, edit: dict[str, Any]) -> None:
    job = ended(server, {"prompt": "a car", "seed": 1, "image": in_base64(IMAGE), **edit})
    assert job["status"] == "succeeded", job
    first, described = image_at(server, job["images"][0]["url"]), newest(server)
    assert described["request"]["image"].startswith("input-")
    assert described["request"].keys() >= edit.keys()
    kept = image_at(server, f"/files/{described['request']['image']}")
    assert kept.tobytes() == IMAGE.tobytes()
    again = ended(server, described["request"])
    assert image_at(server, again["images"][0]["url"]).tobytes() == first.tobytes()
    assert newest(server)["request"] == described["request"]


def test_outpainting_and_enlarging_are_those_of_the_pipeline(server: Running) -> None:
    body = {"prompt": "a car", "seed": 1, "num_inference_steps": 3, "image": in_base64(IMAGE)}
    found = image_at(server, ended(server, {**body, "outpaint": {"right": 8}})["images"][0]["url"])
    expected = editing.outpaint(server.pipe, "a car", IMAGE, right=8, seed=1, num_inference_steps=3, progress=False)
    assert found.tobytes() == expected[0].tobytes()
    found = image_at(server, ended(server, {**body, "enlarge": 2, "strength": 0.4})["images"][0]["url"])
    large = IMAGE.resize((2 * SIZE, 2 * SIZE), Image.Resampling.LANCZOS)
    expected = editing.image_to_image(server.pipe, "a car", large, 0.4, seed=1, num_inference_steps=3, progress=False)
    assert found.tobytes() == expected[0].tobytes()


def test_a_model_that_was_trained_to_enlarge_does_so_by_its_factor(tmp_path: Path) -> None:
    low_res = {"kind": "low_res", "factor": 2, "latent_factor": 2, "width": 8}
    network = {"kind": "unet", "levels": [{"width": 16, "blocks": 1, "depth": 1}], "heads": 2, "groups": 4}
    widths = {"context_width": None, "vector_width": 8, "in_channels": 7}
    pipe, keep = (
        Pipeline(tiny_model("none", conditioner=low_res, denoiser=network | widths)),
        Gallery(tmp_path).save_input,
    )
    small = IMAGE.resize((SIZE // 2, SIZE // 2))
    settings: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "progress": False}
    found = Edit(small, keep, enlarge=2)(pipe, SamplingSettings.of(**settings))
    assert found[0].tobytes() == editing.upscale(pipe, small, **settings)[0].tobytes()
    assert enlarging_factor(pipe) == 2
    with pytest.raises(SamplingError, match="trained to enlarge by 2"):
        Edit(small, keep, enlarge=4)(pipe, SamplingSettings.of(**settings))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"strength": 0.5}, "strength is about an image"),
        ({"image": in_base64(IMAGE), "mask": in_base64(MASK), "enlarge": 2}, "mask and enlarge are different edits"),
        ({"image": in_base64(IMAGE), "blur": 2.0}, "blur is about the edge of a mask"),
        ({"image": in_base64(IMAGE), "outpaint": {"left": 10**6}}, "pixels"),
        ({"image": in_base64(IMAGE), "enlarge": 100}, "enlarge"),
        ({"image": "20260101-000000-" + 32 * "0" + ".png"}, "base64"),
    ],
)
def test_a_wrong_edit_gets_one_sentence(server: Running, body: dict[str, Any], message: str) -> None:
    response = server.http.post("/v1/jobs", json={"prompt": "a"} | body)
    assert response.status_code in (400, 422)
    assert message in response.json()["error"]["message"]


def test_pages_of_the_gallery_follow_each_other(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    names = sorted((gallery.save(Image.new("RGB", (8, 8))) for _ in range(5)), reverse=True)
    (tmp_path / "other.png").write_bytes(b"")
    first, more = gallery.newest("", 3)
    assert more
    second, more = gallery.newest("", 3, first[-1].name)
    assert not more
    assert [path.name for path in first + second] == names


def test_damaged_files_are_left_out(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        name = server.service.gallery.save(Image.new("RGB", (8, 8)))
        (tmp_path / "gallery" / f"20300101-000000-{32 * '0'}.png").write_bytes(b"no image")
        (tmp_path / "gallery" / f"20300101-000001-{32 * '0'}.png").write_bytes(png(settings="{}")[:40])
        images = server.http.get("/v1/gallery").raise_for_status().json()["images"]
        assert [image["name"] for image in images] == [name]
        assert images[0]["request"] is None


def test_each_api_key_has_a_gallery_of_its_own(tmp_path: Path) -> None:
    keys = ("first-key-of-the-server", "second-key-of-the-server")
    with serving(tmp_path, keys=keys) as server:
        job = ended(server, {"prompt": "a", "num_inference_steps": 1})
        assert image_at(server, job["images"][0]["url"]).size == (SIZE, SIZE)
        assert newest(server)["url"] == job["images"][0]["url"]
        second = {"Authorization": f"Bearer {keys[1]}"}
        assert server.http.get("/v1/gallery", headers=second).json() == {"images": [], "more": False}
        assert not any(NAME.fullmatch(path.name) for path in server.service.gallery.folder.iterdir())


def png(**chunks: str) -> bytes:
    text, file = PngInfo(), io.BytesIO()
    for name, value in chunks.items():
        text.add_text(name, value)
    IMAGE.save(file, "PNG", pnginfo=text)
    return file.getvalue()


def test_settings_are_read_from_a_file(server: Running) -> None:
    ended(server, {"prompt": "a blue car", "seed": 9, "num_inference_steps": 2})
    content = server.http.get(newest(server)["url"]).content
    before = len(list(server.service.gallery.folder.iterdir()))
    response = server.http.post("/v1/gallery/read", files={"image": content})
    described = newest(server)
    assert response.json() == {name: described[name] for name in ("width", "height", "model", "request", "complete")}
    assert described["model"] == "tiny"
    assert len(list(server.service.gallery.folder.iterdir())) == before


@pytest.mark.parametrize(
    "content",
    [
        png(),
        b"no image",
        png(settings="{", seed="1"),
        png(settings="[]", seed="1"),
        png(settings="[" * 10**5, seed="1"),
        png(settings="{}", seed="9" * 5000),
        png(settings="{}", seed="1", request='{"image": 3}'),
        png(settings="{}", seed="1", request='{"model": "/etc/passwd"}'),
    ],
)
def test_an_image_without_valid_settings_is_refused(server: Running, content: bytes) -> None:
    response = server.http.post("/v1/gallery/read", files={"image": content})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_an_edit_of_another_api_is_not_complete() -> None:
    record = {"seed": "1", "settings": json.dumps({"num_inference_steps": 2, "task": "ImageToImage", "strength": 0.5})}
    assert request_of(record) == {"seed": 1, "num_inference_steps": 2}


def test_options_have_the_models_samplers_and_limits(server: Running) -> None:
    ended(server, {"prompt": "a", "num_inference_steps": 1})
    options = server.http.get("/v1/options").json()
    model, other = options["models"]
    assert model["defaults"]["num_inference_steps"] == 4
    assert (model["defaults"]["width"], model["divisor"]) == (SIZE, 2)
    assert other == {"name": "other", "defaults": None}
    assert {sampler["name"] for sampler in options["samplers"]} == set(SPECS)
    assert options["limits"]["max_n"] == server.service.limits.max_n
    settings = {setting["name"]: setting for setting in options["settings"]}
    assert "karras" in settings["spacing"]["choices"]
    assert settings["token_merging"]["type"] == "number"


def test_pages_forbid_whatever_is_not_theirs(server: Running) -> None:
    for path in ("/", "/page/style.css", "/page/main.js"):
        response = server.http.get(path).raise_for_status()
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
    for path in ("/page/../service.py", "/page/main.py", "/page/%2e%2e%2fservice.py", "/page/none.js"):
        assert server.http.get(path).status_code == 404
