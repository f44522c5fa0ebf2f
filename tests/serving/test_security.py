from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import typer
from PIL import Image

from ldm.cli import serve
from ldm.errors import ConfigError, MissingExtraError, SamplingError
from ldm.image_marks import ImageMarks, watermark_bits
from ldm.serving.gallery import FORMATS, Gallery
from ldm.serving.limits import Limits
from ldm.serving.security import api_keys, is_loopback
from ldm.serving.uploads import read_upload
from tests.serving.servers import Running, serving

ROOT = Path(__file__).parents[2]
KEY, OTHER_KEY = "k" * 32, "o" * 32


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    limits = Limits(max_upload_bytes=200_000, upload_seconds=2.0)
    with serving(tmp_path_factory.mktemp("security"), limits=limits, origins=["https://good.example"]) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("guarded"), keys=(KEY, OTHER_KEY)) as running:
        yield running


BODY = {"prompt": "a red apple", "num_inference_steps": 1}


def test_a_key_is_required_for_everything_but_health_and_files(guarded: Running) -> None:
    for path in ("/v1/models", "/metrics", "/v1/jobs/1", "/docs", "/openapi.json", "/nothing"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"X-API-Key": KEY[:-1]}):
            response = httpx.get(guarded.url + path, headers=headers)
            assert response.status_code == 401, path
            assert "API key" in response.json()["error"]["message"]
    assert httpx.get(guarded.url + "/health").status_code == 200
    assert httpx.get(guarded.url + "/files/a.png").status_code == 404
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"X-API-Key": OTHER_KEY}):
        assert httpx.get(guarded.url + "/v1/models", headers=headers).status_code == 200


def test_a_job_is_visible_to_its_own_client_alone(guarded: Running) -> None:
    path = f"/v1/jobs/{guarded.http.post('/v1/jobs', json=BODY).json()['id']}"
    assert guarded.http.get(path).status_code == 200
    assert httpx.get(guarded.url + path, headers={"X-API-Key": OTHER_KEY}).status_code == 404


def test_an_address_that_others_reach_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LDM_API_KEY", raising=False)
    assert api_keys("127.0.0.1", None) == ()
    with pytest.raises(ConfigError, match="can be reached from other machines"):
        api_keys("0.0.0.0", None)
    with pytest.raises(ConfigError, match="cannot be read"):
        api_keys("0.0.0.0", tmp_path / "missing")
    (tmp_path / "keys").write_text(f"{KEY}\n{OTHER_KEY}\n")
    assert api_keys("0.0.0.0", tmp_path / "keys") == (KEY, OTHER_KEY)
    monkeypatch.setenv("LDM_API_KEY", "short")
    with pytest.raises(ConfigError, match="less than 16"):
        api_keys("127.0.0.1", None)
    monkeypatch.setenv("LDM_API_KEY", KEY)
    assert api_keys("::", None) == (KEY,)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "example.com")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_pages_of_other_origins_and_names_are_refused(server: Running) -> None:
    post = server.http.post("/v1/jobs", json=BODY, headers={"Origin": "https://evil.example"})
    assert post.status_code == 403
    assert "access-control-allow-origin" not in post.headers
    assert server.http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 421
    own = server.http.get("/v1/models", headers={"Origin": server.url})
    assert own.status_code == 200
    allowed = server.http.get("/v1/models", headers={"Origin": "https://good.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://good.example"


def test_large_requests_are_refused_before_they_are_read(server: Running) -> None:
    large = b"x" * 300_000
    assert server.http.post("/v1/jobs", content=large).status_code == 413

    def chunks() -> Iterator[bytes]:  # without a Content-Length
        for _ in range(30):
            yield b" " * 10_000

    headers = {"content-type": "application/json"}
    assert server.http.post("/v1/jobs", content=chunks(), headers=headers).status_code == 413
    files = {"image": ("a.png", large)}
    assert server.http.post("/v1/images/variations", files=files).status_code == 413
    for path in ("/v1/jobs", "/sdapi/v1/txt2img", "/v1/images/edits"):
        with contextlib.suppress(httpx.WriteError):  # the connection is closed while the client still sends
            assert server.http.post(path, content=bytes(50_000_000)).status_code == 413
    assert server.http.get("/health").status_code == 200


def test_a_slow_client_is_cut_off_and_others_are_served(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        slow.sendall(b"Content-Length: 100\r\n\r\n{")
        assert server.http.get("/health").status_code == 200
        slow.settimeout(20)
        assert b" 408 " in slow.recv(1000).split(b"\r\n")[0]


def bomb(width: int, height: int) -> bytes:
    """A small PNG of that many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_images_that_are_sent_are_bounded(server: Running) -> None:
    with pytest.raises(SamplingError, match="9000 x 9000 pixels"):
        read_upload(bomb(9_000, 9_000), Limits())
    with pytest.raises(SamplingError, match="decompression bomb"):
        read_upload(bomb(20_000, 20_000), Limits())
    assert read_upload(bomb(30, 20), Limits()).size == (30, 20)
    for kind in ("GIF", "BMP", "TIFF", "EPS", "PPM"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, kind)
        with pytest.raises(SamplingError, match="is not a PNG"):
            read_upload(file.getvalue(), Limits())
    for kind in ("PNG", "JPEG", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, kind)
        assert read_upload(file.getvalue(), Limits()).size == (8, 8)
        with pytest.raises(SamplingError, match="cannot be read"):
            read_upload(file.getvalue()[:30], Limits())
    response = server.http.post("/v1/images/variations", files={"image": ("a.png", bomb(9_000, 9_000))})
    assert response.status_code == 400
    assert "pixels" in response.json()["error"]["message"]


def test_the_log_has_no_prompts_unless_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = "a secret word"
    for log_prompts in (False, True):
        caplog.clear()
        (folder := tmp_path / str(log_prompts)).mkdir()
        with caplog.at_level(logging.INFO, "ldm.serving"), serving(folder, log_prompts=log_prompts) as running:
            body = {"prompt": secret, "extra": {"negative_prompt": secret, "num_inference_steps": 1}}
            response = running.http.post("/v1/images/generations", json=body)
            assert len(response.headers["x-request-id"]) == 16
            running.http.post("/v1/images/generations", json=body | {"size": secret})
        records = [str(vars(record)) for record in caplog.records if record.name == "ldm.serving"]
        assert any("tiny" in record for record in records)
        assert any(response.headers["x-request-id"] in record for record in records)
        assert any(secret in record for record in records) == log_prompts


def test_names_of_files_cannot_leave_the_gallery(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_text("secret")
    gallery = Gallery(tmp_path / "gallery")
    name = gallery.save(Image.new("RGB", (8, 8)))
    assert gallery.file(name) == tmp_path / "gallery" / name
    assert all(gallery.file(gallery.save(Image.new("RGB", (8, 8)), ending)) for ending in FORMATS)
    for wrong in ("../secret.png", "..", "", f"../gallery/{name}", f"{name}\n", name.upper(), "/etc/passwd"):
        assert gallery.file(wrong) is None


def test_names_in_requests_are_no_paths(server: Running) -> None:
    inside = server.service.gallery.folder
    (secret := inside.parent / "secret.png").write_text("secret")
    for name in ("..%2Fsecret.png", "%2e%2e/secret.png", "..%5Csecret.png", "%2Fetc%2Fpasswd", "a.png%00", "a" * 5000):
        assert server.http.get(f"/files/{name}").status_code == 404
    for model in ("../tiny", str(inside.parent / "tiny.safetensors"), "file:///etc/passwd", "org/model"):
        for path, body in (("/v1/jobs", BODY), ("/v1/images/generations", {"prompt": "a"})):
            assert server.http.post(path, json={**body, "model": model}).status_code == 404
    prompt = "a <lora:../../secret:1>"
    job = server.http.post("/v1/jobs", json={**BODY, "prompt": prompt, "prompt_syntax": "weighted", "lora_folder": "/"})
    assert job.status_code == 422
    secret.unlink()


def test_temporary_files_of_a_killed_server_are_removed(tmp_path: Path) -> None:
    (old := tmp_path / ".20260101-000000-ab.png.x1").write_text("half of a file")
    os.utime(old, (0, 0))
    (new := tmp_path / ".20260101-000001-ab.webp.x2").write_text("another server writes this")
    (foreign := tmp_path / ".thumbnails.db").write_text("of another program")
    os.utime(foreign, (0, 0))
    Gallery(tmp_path)
    assert not old.exists()
    assert new.exists()
    assert foreign.exists()


def test_images_of_a_server_are_marked(tmp_path: Path) -> None:
    with serving(tmp_path, marks=ImageMarks(watermark=True)) as running:
        body = {"prompt": "a", "size": "64x64", "response_format": "b64_json", "extra": {"num_inference_steps": 1}}
        response = running.http.post("/v1/images/generations", json=body).raise_for_status()
    image = Image.open(io.BytesIO(base64.b64decode(response.json()["data"][0]["b64_json"])))
    assert image.info["watermark"]
    assert watermark_bits(image) > watermark_bits(running.pipe("a", progress=False, height=64, width=64)[0])


# The command


@pytest.mark.slow
def test_the_command_serves_and_ends_within_ten_seconds_of_sigterm(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools" / "serve.py", "--port", "0", "--gallery", tmp_path, "--max-running", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        body = {"prompt": "a red apple", "num_inference_steps": 150, "sampler": "heun", "num_images_per_prompt": 8}
        job = httpx.post(f"{url}/v1/jobs", json=body).json()
        with httpx.stream("GET", f"{url}/v1/jobs/{job['id']}/events", timeout=60) as events:
            lines = events.iter_lines()
            next(lines)
            start = time.monotonic()
            process.terminate()
            last = [line for line in lines if line.startswith("data: ")][-1]
        state = json.loads(last.removeprefix("data: "))
        assert state["status"] == "cancelled"
        assert "shutting down" in state["error"]
        process.wait(60)
        assert time.monotonic() - start < 10 + 2  # and the start of a loaded machine
    assert process.returncode in (0, -15)


@pytest.mark.slow
def test_images_of_a_killed_server_are_complete(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools" / "serve.py", "--port", "0", "--gallery", tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        body = {"prompt": "a red apple", "num_inference_steps": 1, "num_images_per_prompt": 8}
        for _ in range(4):
            httpx.post(f"{url}/v1/jobs", json=body)
        while len(list(tmp_path.glob("2*.png"))) < 5:
            time.sleep(0.005)
        process.kill()
    gallery = Gallery(tmp_path)
    for path in tmp_path.glob("2*.png"):
        assert gallery.file(path.name) == path
        with Image.open(path) as image:
            image.load()
            assert image.info["prompt"] == "a red apple"


def command(*options: str) -> None:
    """Run the command up to its first error, which it raises."""
    typer.main.get_command(serve.app)(options, standalone_mode=False)


def test_mistakes_in_options_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LDM_API_KEY", raising=False)
    for options, message in (
        (["--host", "0.0.0.0"], "give a key in a file"),
        (["--model", "=emoji"], "write NAME=SOURCE"),
        (["--model", "emoji", "--model", "emoji"], "names 'emoji' twice"),
        (["--dtype", "fp17"], "unknown dtype"),
    ):
        with pytest.raises(ConfigError, match=message):
            command(*options)


def test_without_the_extra_the_command_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ldm\[serve\]'"):
        command()
