"""Load test of the server on this machine: is every request answered, is each image bitwise the one alone, and how fast.

python tools/load_test.py --requests 200 --clients 16
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image

from ldm import Pipeline

ROOT = Path(__file__).parents[1]
SAMPLERS = ("euler", "dpmpp_2m", "heun", "euler_ancestral", "ddim", "unipc")
PROMPTS = ("red apple", "unicorn", "sunrise", "woman cook light skin tone", "mermaid dark skin tone")


def mixed(index: int, least: int = 4, most: int = 12) -> dict[str, Any]:
    """Settings that differ from request to request in prompt, seed, sampler, steps and guidance."""
    return {
        "prompt": PROMPTS[index % len(PROMPTS)],
        "seed": index,
        "sampler": SAMPLERS[index % len(SAMPLERS)],
        "num_inference_steps": least + index % (most - least + 1),
        "guidance_scale": 2.0 + index % 5,
    }


def generate(http: httpx.Client, settings: dict[str, Any]) -> tuple[int, float, bytes]:
    """Status, seconds and pixels of a request."""
    start = time.perf_counter()
    body = {
        "prompt": settings["prompt"],
        "response_format": "b64_json",
        "extra": {name: value for name, value in settings.items() if name != "prompt"},
    }
    response = http.post("/v1/images/generations", json=body)
    seconds = time.perf_counter() - start
    if response.status_code != 200:
        return response.status_code, seconds, b""
    content = base64.b64decode(response.json()["data"][0]["b64_json"])
    return 200, seconds, Image.open(io.BytesIO(content)).tobytes()


def resident(process: subprocess.Popen[str]) -> float:
    """Memory of the server in MB; 0 where there is no /proc."""
    path = Path(f"/proc/{process.pid}/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS")), 0.0)


def at_once(
    http: httpx.Client, requests: list[dict[str, Any]], clients: int, after: Callable[[], object] = lambda: None
) -> list[tuple[int, float, bytes]]:
    """Answers to some requests, of so many clients at once; ``after`` is called after each."""

    def request(settings: dict[str, Any]) -> tuple[int, float, bytes]:
        answer = generate(http, settings)
        after()
        return answer

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(request, requests))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--min-steps", type=int, default=4, help="least number of steps of a request")
    parser.add_argument("--max-steps", type=int, default=12, help="largest number of steps of a request")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the comparison with one after another")
    parser.add_argument("--steps", type=int, default=20, help="steps of the comparison")
    parser.add_argument("--beyond", type=int, default=500, help="requests beyond the queue")
    parser.add_argument("--no-check", action="store_true", help="do not compare the images with those of a pipeline")
    args = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "tools" / "serve.py"),
            "--port",
            "0",
            "--gallery",
            folder,
            "--dtype",
            "fp32",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        with subprocess.Popen(
            [*command, "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            limits = httpx.Limits(max_connections=args.beyond + 100)
            with httpx.Client(base_url=url, timeout=600, limits=limits) as http:
                measure(http, process, args)
            process.terminate()


def measure(http: httpx.Client, process: subprocess.Popen[str], args: argparse.Namespace) -> None:
    requests = [mixed(index, args.min_steps, args.max_steps) for index in range(args.requests)]
    generate(http, mixed(0))
    memory, start = [resident(process)], time.perf_counter()
    answers = at_once(http, requests, args.clients, lambda: memory.append(resident(process)))
    seconds = time.perf_counter() - start
    answered = [each for each in answers if each[0] == 200]
    times = sorted(each[1] for each in answered)
    print(f"{len(answered)} of {args.requests} requests of {args.clients} clients answered in {seconds:.1f} s")
    if len(times) > 1:
        p99 = statistics.quantiles(times, n=100)[98]
        print(f"p50 {statistics.median(times):.2f} s, p99 {p99:.2f} s")
    tenths = [round(index * (len(memory) - 1) / 10) for index in range(11)]
    print("memory in MB:", ", ".join(f"{memory[index]:.0f} after {index}" for index in dict.fromkeys(tenths)))

    compared = [{**mixed(index), "sampler": "dpmpp_2m", "num_inference_steps": args.steps} for index in range(8)]
    if args.rounds:
        at_once(http, compared, 8)
    ratios = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        alone = [generate(http, each) for each in compared]
        middle = time.perf_counter()
        together = at_once(http, compared, 8)
        end = time.perf_counter()
        ratios.append((middle - start) / (end - middle))
        assert [each[2] for each in alone] == [each[2] for each in together]
        print(
            f"8 requests of {args.steps} steps: {middle - start:.2f} s one after another, {end - middle:.2f} s at once"
        )
    if ratios:
        print(f"throughput, median: {statistics.median(ratios):.2f} x")

    if args.beyond:
        statuses = [each[0] for each in at_once(http, [mixed(index) for index in range(args.beyond)], args.beyond)]
        counts = {status: statuses.count(status) for status in sorted(set(statuses))}
        print(f"{args.beyond} requests at once: {', '.join(f'{n} x {status}' for status, n in counts.items())}")

    if not args.no_check:
        pipe = Pipeline.from_pretrained(device="cpu", dtype=torch.float32)
        equal = sum(
            pipe(**settings, progress=False)[0].tobytes() == answer[2]
            for settings, answer in zip(requests, answers, strict=True)
            if answer[0] == 200
        )
        print(f"{equal} of {len(answered)} images are bitwise those of a pipeline")


if __name__ == "__main__":
    main()
