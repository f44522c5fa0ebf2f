from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm import Pipeline, editing
from ldm.control_images import ControlImage
from ldm.serving.batching import BatchedModel, BatchedPipeline, Batcher
from ldm.serving.limits import Limits
from tests.serving.servers import Running, serving
from tests.tiny import SIZE, tiny_controlnet, tiny_model

NAMES = ("edges", "depth", "foreign")
SETTINGS: dict[str, Any] = {"num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("controlnets")
    tiny_controlnet(folder / "edges", 1)
    tiny_controlnet(folder / "depth", 2)
    network = {"kind": "unet", "levels": [{"width": 8, "blocks": 1, "depth": 1}], "heads": 2, "groups": 4}
    tiny_controlnet(folder / "foreign", 3, model=tiny_model(denoiser=network | {"context_width": 16}))
    limits = Limits(max_upload_pixels=64 * 64)
    with serving(folder, limits=limits, controlnets={name: folder / name for name in NAMES}) as running:
        running.service.models.load("tiny")
        for name in ("edges", "depth"):
            running.pipe.load_controlnet(folder / name, name)
        yield running


def hint(seed: int, side: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def base64_png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def made(server: Running, **fields: Any) -> Image.Image:
    state = server.http.post("/v1/jobs", json={"prompt": "a red apple", **SETTINGS, **fields}).raise_for_status().json()
    while state["status"] in ("queued", "running"):
        time.sleep(0.02)
        state = server.http.get(f"/v1/jobs/{state['id']}").json()
    assert state["status"] == "succeeded", state
    return Image.open(io.BytesIO(server.http.get(state["images"][0]["url"]).content))


def error_of(server: Running, path: str = "/v1/jobs", **fields: Any) -> str:
    response = server.http.post(path, json={"prompt": "a", **fields})
    assert response.status_code in (400, 422), response.text
    return str(response.json()["error"]["message"])


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.tobytes() == b.tobytes()


def test_images_are_those_of_the_pipeline_and_are_made_again(server: Running) -> None:
    controls = [{"name": "edges", "image": base64_png(hint(1)), "scale": 0.7, "end": 0.5}]
    controls += [{"name": "depth", "image": base64_png(hint(2))}]
    image = made(server, controlnets=controls)
    given = [ControlImage("edges", hint(1), 0.7, end=0.5), ControlImage("depth", hint(2))]
    expected = server.pipe("a red apple", controlnets=given, progress=False, **SETTINGS)[0]
    assert same(image, expected)
    assert not same(image, server.pipe("a red apple", progress=False, **SETTINGS)[0])
    (entry,) = server.http.get("/v1/gallery?limit=1").json()["images"]
    assert [each["name"] for each in entry["request"]["controlnets"]] == ["edges", "depth"]
    assert same(made(server, **entry["request"]), image)


def test_edits_take_controlnets_too(server: Running) -> None:
    fields = {"image": base64_png(hint(5)), "strength": 0.8}
    image = made(server, controlnets=[{"name": "edges", "image": base64_png(hint(1))}], **fields)
    control = ControlImage("edges", hint(1))
    expected = editing.image_to_image(
        server.pipe, "a red apple", hint(5), 0.8, controlnets=control, progress=False, **SETTINGS
    )[0]
    assert same(image, expected)
    (entry,) = server.http.get("/v1/gallery?limit=1").json()["images"]
    assert {"image", "controlnets", "strength"} <= entry["request"].keys()
    assert same(made(server, **entry["request"]), image)


def test_mixed_requests_at_once_are_bitwise_those_made_alone(server: Running) -> None:
    wanted: list[list[tuple[str, int, float, float]]] = [
        [],
        [("edges", 1, 1.0, 1.0)],
        [("edges", 2, 0.5, 1.0)],
        [("edges", 1, 1.0, 0.5)],
        [("depth", 2, 1.0, 1.0)],
        [("edges", 1, 1.0, 1.0), ("depth", 2, 1.0, 1.0)],
    ]

    def request(index: int) -> Image.Image:
        controls = [
            {"name": name, "image": base64_png(hint(seed)), "scale": scale, "end": end}
            for name, seed, scale, end in wanted[index % len(wanted)]
        ]
        return made(server, controlnets=controls or None, seed=index)

    count = 2 * len(wanted)
    with ThreadPoolExecutor(count) as pool:
        images = list(pool.map(request, range(count)))
    for index, image in enumerate(images):
        given = [
            ControlImage(name, hint(seed), scale, end=end) for name, seed, scale, end in wanted[index % len(wanted)]
        ]
        settings = SETTINGS | {"seed": index, "controlnets": given or None, "progress": False}
        assert same(image, server.pipe("a red apple", **settings)[0]), index


def test_evaluations_on_which_the_same_controlnets_act_are_joined(server: Running) -> None:
    rows: list[int] = []
    batcher = Batcher(exact=False, observe=rows.append)
    pipe = BatchedPipeline(BatchedModel.of(server.pipe.model, batcher))
    settings: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "progress": False}

    def call(own: Pipeline, seed: int) -> Tensor:
        control = ControlImage("edges", hint(seed), 0.5 + seed, end=1 if seed else 0.5)
        result: Tensor = own("a", seed=seed, controlnets=control, **settings)
        return result

    def sampled(seed: int) -> Tensor:
        with batcher.sampling():
            return call(pipe, seed)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(sampled, range(3)))
    batcher.close()
    assert max(rows) > 2  # guidance alone takes two
    for seed, result in enumerate(results):
        assert torch.allclose(result, call(server.pipe, seed), atol=1e-4)


def test_requests_name_controlnets_of_the_list_alone(server: Running, tmp_path: Path) -> None:
    tiny_controlnet(tmp_path / "other")
    options = server.http.get("/v1/options").json()
    assert options["controlnets"] == list(NAMES)
    assert options["models"][0]["controlnets"] == ["edges", "depth"]  # the other is for another kind of model
    image = base64_png(hint(1))
    message = error_of(server, controlnets=[{"name": str(tmp_path / "other"), "image": image}])
    assert "this server has no ControlNet" in message
    assert "choose one of edges, depth, foreign" in message
    edges = {"name": "edges", "image": image}
    assert "is given twice" in error_of(server, controlnets=[edges, edges])
    assert "the end must be greater" in error_of(server, controlnets=[edges | {"start": 0.5, "end": 0.5}])
    assert "scale" in error_of(server, controlnets=[edges | {"scale": 1e9}])
    state = server.http.post("/v1/jobs", json={"prompt": "a", "controlnets": [edges | {"name": "foreign"}]}).json()
    while state["status"] in ("queued", "running"):
        time.sleep(0.02)
        state = server.http.get(f"/v1/jobs/{state['id']}").json()
    assert "unknown ControlNet 'foreign'" in state["error"]


def test_hints_have_the_limits_of_other_uploads(server: Running) -> None:
    def refused(image: str) -> str:
        return error_of(server, controlnets=[{"name": "edges", "image": image}])

    assert "this server reads at most 4096 pixels" in refused(base64_png(hint(1, 65)))
    assert "is not a PNG, JPEG or WebP file" in refused(base64.b64encode(b"GIF89a").decode())
    assert "is not valid base64" in refused("/etc/passwd")


def test_units_of_the_extension_of_automatic1111(server: Running) -> None:
    def body(**unit: Any) -> dict[str, Any]:
        given = {"model": "edges [d14c016b]", "image": base64_png(hint(1)), "weight": 0.7, "module": "none"}
        scripts = {"controlnet": {"args": [given | unit, {"enabled": False}]}}
        return {"prompt": "a red apple", "steps": 2, "seed": 3, "alwayson_scripts": scripts}

    response = server.http.post("/sdapi/v1/txt2img", json=body(guidance_end=0.5)).raise_for_status().json()
    image = Image.open(io.BytesIO(base64.b64decode(response["images"][0])))
    control = ControlImage("edges", hint(1), 0.7, end=0.5)
    expected = server.pipe("a red apple", controlnets=control, prompt_syntax="weighted", progress=False, **SETTINGS)[0]
    assert same(image, expected)
    assert "alwayson_scripts" not in response["parameters"]
    path = "/sdapi/v1/txt2img"
    assert "preprocessor 'canny'" in error_of(server, path, **body(module="canny"))
    assert "weight of a ControlNet is not valid" in error_of(server, path, **body(weight="much"))
    assert "model of a ControlNet is not valid" in error_of(server, path, **body(model=None))
    assert "is malformed" in error_of(server, path, alwayson_scripts={"ControlNet": {"args": 3}})


def test_an_image_of_the_pipeline_is_not_made_again_without_its_hint(server: Running, tmp_path: Path) -> None:
    control = ControlImage("edges", hint(1))
    (file,) = server.pipe("a", controlnets=control, progress=False, **SETTINGS).save(tmp_path / "image.png")
    found = server.http.post("/v1/gallery/read", files={"image": file.read_bytes()}).raise_for_status().json()
    assert "controlnets" not in found["request"]
    assert found["complete"] is False
