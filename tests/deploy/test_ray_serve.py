from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm import Pipeline
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, os, sys
from concurrent.futures import ThreadPoolExecutor
import httpx, ray
from ray import serve
from deploy.ray_serve import Arguments, build

model, gallery, port = sys.argv[1:]
ray.init(num_cpus=2, include_dashboard=False, configure_logging=False)
serve.start(http_options={"port": int(port)})
serve.run(build(Arguments(model=f"tiny={model}", gallery=gallery, min_replicas=2, max_replicas=2)))
url = f"http://127.0.0.1:{port}"

def generate(seed):
    body = {"prompt": "a red apple", "response_format": "b64_json", "extra": {"seed": seed}}
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=60).raise_for_status().json()["data"][0]

with ThreadPoolExecutor(8) as pool:
    images = list(pool.map(generate, range(16)))
replicas = serve.status().applications["default"].deployments["server"].replica_states
foreign = httpx.get(f"{url}/v1/models", headers={"Host": "evil.example"}).status_code
print("RESULT", json.dumps({"images": images, "replicas": replicas, "foreign": foreign}))
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.slow
def test_two_replicas_make_the_images_of_the_pipeline(tmp_path: Path) -> None:
    model = Pipeline(tiny_model()).save_pretrained(tmp_path / "tiny.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", SCRIPT, str(model), str(tmp_path / "gallery"), port]
    patience = {f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S": "60" for check in ("READY", "HEALTH")}  # of a busy machine
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **patience}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stderr[-3000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    assert result["replicas"] == {"RUNNING": 2}
    assert result["foreign"] == 421
    assert len(list((tmp_path / "gallery").iterdir())) == 16
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the replicas have
    try:
        pipe = Pipeline.from_pretrained(model, device="cpu")
        for seed, entry in enumerate(result["images"]):
            image = Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))
            assert image.tobytes() == pipe("a red apple", seed=seed, progress=False)[0].tobytes()
    finally:
        torch.set_num_threads(threads)
