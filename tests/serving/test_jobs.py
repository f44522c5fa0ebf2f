from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from safetensors.torch import save_file

from ldm import editing
from ldm.sampling_settings import SamplingSettings
from ldm.serving.fields import SamplingFields, settings_of
from ldm.serving.gallery import NAME
from ldm.serving.jobs import Job
from ldm.serving.limits import Limits
from ldm.serving.scheduler import Scheduler
from tests.serving.servers import Running, serving
from tests.tiny import SIZE, tiny_lora


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "loras").mkdir()
    save_file(tiny_lora(), folder / "loras" / "style.safetensors")
    with serving(folder, lora_folder=folder / "loras") as running:
        yield running


def ended(server: Running, body: dict[str, Any]) -> dict[str, Any]:
    """The state of a job at its end."""
    response = server.http.post("/v1/jobs", json=body)
    assert response.status_code == 202, response.text
    job = response.json()
    while job["status"] in ("queued", "running"):
        time.sleep(0.01)
        job = server.http.get(f"/v1/jobs/{job['id']}").json()
    return job


def image_at(server: Running, url: str) -> Image.Image:
    return Image.open(io.BytesIO(server.http.get(url).raise_for_status().content))


def in_base64(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_images_of_a_job_are_bitwise_those_of_the_pipeline_with_their_settings(server: Running) -> None:
    settings = {"prompt": "a red apple", "num_inference_steps": 3, "sampler": "heun", "guidance": {"rescale": 0.5}}
    job = ended(server, {**settings, "seed": 5, "num_images_per_prompt": 2})
    assert job["status"] == "succeeded"
    assert [image["seed"] for image in job["images"]] == [5, 6]
    for image in job["images"]:
        found = image_at(server, image["url"])
        fields = SamplingFields(**settings, seed=image["seed"])
        expected = server.pipe.sample(settings_of(fields)).result()[0]
        assert found.tobytes() == expected.tobytes()
        assert found.info == expected.info
        assert image["done"] == image["total"] == 3


def test_events_show_each_step_with_a_preview_and_the_end(server: Running) -> None:
    body = {"prompt": "a blue car", "num_inference_steps": 30, "seed": 1}
    job = server.http.post("/v1/jobs", json=body).json()
    events = []
    with server.http.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                events.append((name, json.loads(line.removeprefix("data: "))))
    assert [name for name, _ in events] == ["progress"] * (len(events) - 1) + ["end"]
    steps = [state["images"][0]["done"] for _, state in events]
    assert steps == sorted(steps)
    assert len(set(steps)) > 3
    assert events[-1][1]["status"] == "succeeded"
    previews = [state["images"][0]["preview"] for _, state in events if "preview" in state["images"][0]]
    preview = Image.open(io.BytesIO(base64.b64decode(previews[0].partition(",")[2])))
    assert preview.size == (SIZE, SIZE)


def test_a_cancelled_job_ends_and_leaves_no_image(server: Running) -> None:
    body = {"prompt": "a red apple", "num_inference_steps": 150, "sampler": "heun", "width": 64, "height": 64}
    job = server.http.post("/v1/jobs", json=body).json()
    while server.http.get(f"/v1/jobs/{job['id']}").json()["images"][0]["done"] < 2:
        time.sleep(0.01)
    state = server.http.delete(f"/v1/jobs/{job['id']}").json()
    assert state["status"] == "cancelled"
    while server.http.get("/health").json()["running"]:
        time.sleep(0.01)
    state = server.http.get(f"/v1/jobs/{job['id']}").json()
    assert "url" not in state["images"][0]
    assert state["images"][0]["done"] < 140


def test_image_to_image_and_inpainting_are_those_of_the_pipeline(server: Running) -> None:
    image, mask = Image.effect_noise((SIZE, SIZE), 60).convert("RGB"), Image.new("L", (SIZE, SIZE))
    mask.paste(255, (0, 0, SIZE // 2, SIZE))
    body = {"prompt": "a red car", "seed": 3, "image": in_base64(image), "strength": 0.5}
    found = image_at(server, ended(server, body)["images"][0]["url"])
    expected = editing.image_to_image(server.pipe, "a red car", image, 0.5, seed=3, progress=False)[0]
    assert found.tobytes() == expected.tobytes()
    found = image_at(server, ended(server, body | {"mask": in_base64(mask)})["images"][0]["url"])
    expected = editing.inpaint(server.pipe, "a red car", image, mask, 0.5, seed=3, progress=False)[0]
    assert found.tobytes() == expected.tobytes()


@pytest.mark.slow
def test_prompts_name_loras_of_the_servers_folder_and_no_others(server: Running) -> None:
    body = {"prompt": "a red apple <lora:style:0.8>", "prompt_syntax": "weighted", "seed": 1}
    job = ended(server, body)
    assert job["status"] == "succeeded"
    plain = ended(server, body | {"prompt": "a red apple"})
    assert image_at(server, job["images"][0]["url"]).tobytes() != image_at(server, plain["images"][0]["url"]).tobytes()
    job = ended(server, body | {"prompt": "a red apple <lora:../tiny:0.8>"})
    assert job["status"] == "failed"
    assert "unknown LoRA" in job["error"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": "a", "num_inference_steps": 0}, 400, "num_inference_steps is 0"),
        ({"prompt": "a", "num_inference_steps": 1000}, 400, "allows at most 150"),
        ({"prompt": "a", "height": SIZE + 1}, 400, "not divisible by 2"),
        ({"prompt": "a", "height": 10**5, "width": 10**5}, 400, "pixels"),
        ({"prompt": "a", "num_images_per_prompt": 100}, 400, "n is 100"),
        ({"prompt": "a" * 9000}, 400, "characters"),
        ({"prompt": "a", "sampler": "eular"}, 400, "did you mean 'euler'"),
        ({"prompt": "a", "seed": -1}, 400, "seed"),
        ({"prompt": "a", "guidance": {"rescale": 2}}, 400, "rescale"),
        ({"prompt": "a", "guidance": {"scala": 2}}, 400, "scala"),
        ({"prompt": "a", "model": "../../etc/passwd"}, 404, "unknown model"),
        ({"prompt": "a", "image": "%"}, 400, "base64"),
        ({"prompt": "a", "image": base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0").decode()}, 400, "not a PNG"),
        ({"prompt": 1}, 422, "prompt: input should be a valid string"),
        ({"prompt": "a", "promt": "b"}, 422, "promt"),
        ({"prompt": "a", "num_inference_steps": True}, 422, "num_inference_steps"),
        ({"prompt": "a", "lora_folder": "/"}, 422, "lora_folder"),
        ({"prompt": "a", "output_type": "pt"}, 422, "output_type"),
        ([], 422, "dict"),
    ],
)
def test_a_wrong_request_gets_one_sentence(server: Running, body: Any, status: int, message: str) -> None:
    response = server.http.post("/v1/jobs", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]["message"]
    assert message in error
    assert error.count("\n") == 0


@pytest.mark.parametrize("body", ["{", '{"prompt": "a", "guidance_scale": NaN}', '{"seed": ' + "9" * 5000 + "}"])
def test_broken_json_and_numbers_that_are_none_are_errors_of_the_request(server: Running, body: str) -> None:
    response = server.http.post("/v1/jobs", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422), response.text
    assert response.json()["error"]["message"]


def test_unknown_jobs_and_files_are_not_found(server: Running) -> None:
    for path in ("/v1/jobs/1", "/v1/jobs/1/events", "/files/../tiny.safetensors", "/files/a.png", "/nothing"):
        response = server.http.get(path)
        assert response.status_code == 404
        assert response.json()["error"]["message"]


def test_every_setting_that_json_can_give_is_a_field() -> None:
    fields = set(SamplingFields.model_fields)
    assert {"prompt", "negative_prompt", "sampler", "sigmas", "guidance", "seed", "clip_skip", "shift"} <= fields
    assert not {"lora_folder", "callback", "latents", "generator", "edit", "output_type"} & fields


# The scheduler


def test_more_than_the_queue_holds_is_refused_with_a_time(tmp_path: Path) -> None:
    limits = Limits(max_waiting=4, max_running=2)
    with serving(tmp_path, limits=limits) as server:
        body = {"prompt": "a red apple", "num_inference_steps": 20}

        def post(seed: int) -> httpx.Response:
            return server.http.post("/v1/jobs", json=body | {"seed": seed})

        with ThreadPoolExecutor(16) as pool:
            responses = list(pool.map(post, range(20)))
        accepted = [each.json()["id"] for each in responses if each.status_code == 202]
        refused = [each for each in responses if each.status_code == 429]
        assert len(accepted) + len(refused) == 20
        assert len(accepted) >= 6
        assert all(int(each.headers["retry-after"]) >= 1 for each in refused)
        for job_id in accepted:
            with server.http.stream("GET", f"/v1/jobs/{job_id}/events") as response:
                assert "succeeded" in list(response.iter_lines())[-2]


def test_clients_take_turns(server: Running) -> None:
    order: list[str] = []
    release = threading.Event()

    def work(pipe: Any, settings: SamplingSettings) -> Any:
        release.wait()
        order.append(str(settings.prompt))
        return pipe("a red apple", num_inference_steps=1, progress=False)

    scheduler = Scheduler(server.service.models, server.service.gallery, Limits(max_running=1))
    try:
        jobs = []
        for client, n in (("first", 1), ("greedy", 5), ("modest", 2), ("other", 1)):
            settings = [(SamplingSettings(client), seed) for seed in range(n)]
            jobs.append(Job(client, "tiny", work, settings))
            scheduler.submit(jobs[-1])
            while not scheduler.running:  # the first is computed while the others come
                time.sleep(0.01)
        release.set()
        while not all(job.ended for job in jobs):
            time.sleep(0.01)
        assert [job.status for job in jobs] == ["succeeded"] * 4
        assert order == ["first", "greedy", "modest", "other", "greedy", "modest", "greedy", "greedy", "greedy"]
    finally:
        scheduler.close()


def test_an_image_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with serving(tmp_path, limits=Limits(max_seconds=0.2)) as server:
        options = {"rtol": 1e-9, "atol": 1e-9}
        job = ended(server, {"prompt": "a", "sampler": "dpm_adaptive", "sampler_options": options})
        assert job["status"] == "failed"
        assert "took more than 0.2 seconds" in job["error"]


def test_the_model_that_was_not_used_for_longest_is_unloaded(tmp_path: Path) -> None:
    with serving(tmp_path, memory=1) as server:
        for name in ("tiny", "other"):
            assert ended(server, {"prompt": "a", "model": name, "num_inference_steps": 1})["status"] == "succeeded"
            while server.service.models.loaded != (name,):
                time.sleep(0.01)


def test_a_defect_of_the_server_is_named_by_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as server:
        monkeypatch.setattr(server.service.gallery, "save", lambda *arguments: 1 / 0)
        job = ended(server, {"prompt": "a", "num_inference_steps": 1})
        assert job["status"] == "failed"
        assert job["id"] in job["error"]


def test_running_images_finish_at_the_end_and_others_are_told(tmp_path: Path) -> None:
    with serving(tmp_path, limits=Limits(max_running=1)) as server:
        body = {"prompt": "a red apple", "num_inference_steps": 20}
        running, waiting = (server.http.post("/v1/jobs", json=body).json()["id"] for _ in range(2))
        while server.http.get(f"/v1/jobs/{running}").json()["status"] == "queued":
            time.sleep(0.01)
        server.service.scheduler.drain(20)
        assert server.http.post("/v1/jobs", json=body).status_code == 503
        state = server.http.get(f"/v1/jobs/{waiting}").json()
        assert state["status"] == "cancelled"
        assert "shutting down" in state["error"]
        with server.http.stream("GET", f"/v1/jobs/{running}/events") as response:
            assert "succeeded" in list(response.iter_lines())[-2]


def test_images_in_the_gallery_are_complete(server: Running) -> None:
    assert ended(server, {"prompt": "a red apple", "num_inference_steps": 1})["status"] == "succeeded"
    files = [path for path in server.service.gallery.folder.iterdir() if NAME.fullmatch(path.name)]
    assert files
    for path in files:
        with Image.open(path) as image:
            image.load()
            assert {"prompt", "seed", "settings"} <= image.info.keys()
