"""The files of deploy/ against the command, the extras and the paths that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import typer
import yaml

from ldm.cli import serve
from ldm.serving.security import KEY_VARIABLE, MIN_KEY

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def entrypoint() -> dict[str, Any]:
    """The parameters of the command that the container runs."""
    (line,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    program, *options = json.loads(line)
    assert f'{program} = "ldm.cli.serve:main"' in PROJECT
    return typer.main.get_command(serve.app).make_context(program, options).params


def test_the_container_copies_what_is_there_and_not_ignored() -> None:
    sources = [name for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()]
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert {"ldm", "pyproject.toml", "constraints.txt"} <= set(sources)
    for name in sources:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored


def test_the_container_installs_extras_that_exist() -> None:
    extras = re.findall(r"^ARG EXTRAS=(.*)$", DOCKERFILE, re.MULTILINE)[0].split(",")
    assert set(extras) <= set(re.findall(r"^([\w-]+) = \[", PROJECT, re.MULTILINE))


def test_ports_and_paths_are_those_of_the_command() -> None:
    parameters, server = entrypoint(), COMPOSE["services"]["server"]
    port, gallery = parameters["port"], str(parameters["gallery"])
    assert parameters["host"] == "0.0.0.0"
    assert f"EXPOSE {port}\n" in DOCKERFILE
    assert f"VOLUME {gallery}\n" in DOCKERFILE
    assert f"http://127.0.0.1:{port}/health" in DOCKERFILE
    assert server["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert server["volumes"] == [f"gallery:{gallery}"]
    assert KEY_VARIABLE in server["environment"]
    assert str(MIN_KEY) in server["environment"][KEY_VARIABLE]
    assert int(server["stop_grace_period"].removesuffix("s")) > serve.DRAIN_SECONDS + 2


def test_compose_names_files_and_arguments_that_exist() -> None:
    build = COMPOSE["services"]["server"]["build"]
    context = (DEPLOY / build["context"]).resolve()
    assert (context / build["dockerfile"]).is_file()
    assert all(f"ARG {name}=" in DOCKERFILE for name in build["args"])
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).is_file() if source.startswith(".") else source in COMPOSE["volumes"]


def test_prometheus_reads_the_metrics_of_the_server_with_its_key() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"server:{entrypoint()['port']}"]
    (secret,) = COMPOSE["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert COMPOSE["secrets"][secret] == {"environment": KEY_VARIABLE}
