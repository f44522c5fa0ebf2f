from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from ldm import editing
from ldm.diffusion import SAMPLERS, SPACINGS
from ldm.serving import a1111_api
from tests.serving.servers import Running, serving
from tests.tiny import SIZE


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("a1111")) as running:
        yield running


def images_of(response: Any) -> list[Image.Image]:
    encoded = response.raise_for_status().json()["images"]
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in encoded]


def test_txt2img_makes_the_images_of_the_pipeline(server: Running) -> None:
    body = {
        "prompt": "a (red:1.3) apple",
        "negative_prompt": "blue",
        "seed": 4,
        "sampler_name": "Euler a",
        "scheduler": "Karras",
        "steps": 3,
        "cfg_scale": 4,
        "batch_size": 2,
        "override_settings": {"sd_model_checkpoint": "any"},
    }
    response = server.http.post("/sdapi/v1/txt2img", json=body)
    expected = server.pipe(
        "a (red:1.3) apple",
        "blue",
        prompt_syntax="weighted",
        seed=4,
        sampler="euler_ancestral",
        spacing="karras",
        num_inference_steps=3,
        guidance_scale=4,
        num_images_per_prompt=2,
        batch_size=1,
        progress=False,
    )
    assert [image.tobytes() for image in images_of(response)] == [image.tobytes() for image in expected]
    assert json.loads(response.json()["info"])["all_seeds"] == [4, 5]


def test_img2img_changes_an_image(server: Running) -> None:
    image = Image.effect_noise((SIZE, SIZE), 60).convert("RGB")
    image.save(file := io.BytesIO(), "PNG")
    encoded = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    body = {"prompt": "a red car", "seed": 1, "init_images": [encoded], "denoising_strength": 0.5}
    found = images_of(server.http.post("/sdapi/v1/img2img", json=body))[0]
    settings: dict[str, Any] = {"seed": 1, "prompt_syntax": "weighted", "progress": False}
    assert found.tobytes() == editing.image_to_image(server.pipe, "a red car", image, 0.5, **settings)[0].tobytes()


def test_progress_is_that_of_the_clients_images_and_interrupt_ends_them(server: Running) -> None:
    assert server.http.get("/sdapi/v1/progress").json()["progress"] == 0
    responses: list[Any] = []
    body = {"prompt": "a red apple", "steps": 150, "sampler_name": "Heun"}
    thread = threading.Thread(target=lambda: responses.append(server.http.post("/sdapi/v1/txt2img", json=body)))
    thread.start()
    state: dict[str, Any] = {"current_image": None}
    while state["current_image"] is None:
        state = server.http.get("/sdapi/v1/progress").json()
        time.sleep(0.01)
    assert 0 < state["progress"] < 1
    assert state["state"]["sampling_steps"] == 150
    server.http.post("/sdapi/v1/interrupt").raise_for_status()
    thread.join()
    assert responses[0].status_code == 499


def test_names_of_the_web_ui_stand_for_samplers_and_spacings(server: Running) -> None:
    assert set(a1111_api.SAMPLERS.values()) <= set(SAMPLERS)
    assert {each for each in a1111_api.SPACINGS.values() if each} <= set(SPACINGS)
    names = [each["name"] for each in server.http.get("/sdapi/v1/samplers").json()]
    assert "DPM++ 2M" in names
    for body, message in (
        ({"sampler_name": "Eular"}, "unknown sampler"),
        ({"scheduler": "Karas"}, "unknown scheduler"),
        ({"batch_size": 100}, "allows at most"),
    ):
        response = server.http.post("/sdapi/v1/txt2img", json={"prompt": "a", **body})
        assert response.status_code == 400
        assert message in response.json()["detail"]
