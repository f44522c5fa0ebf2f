"""Ray Serve application of the server, whose number of replicas follows the number of requests.

serve run deploy.ray_serve:build model=emoji gallery=gallery max_replicas=4
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel
from ray import serve

if TYPE_CHECKING:
    from fastapi import FastAPI


class Arguments(BaseModel):
    """Arguments of the application, as NAME=VALUE."""

    model: str = "emoji"
    """Models, NAME=SOURCE or SOURCE, separated by commas; the first is the default."""
    gallery: Path = Path("gallery")
    """Folder of the generated images, which all replicas share."""
    controlnet: str = ""
    """ControlNets that requests can name, NAME=SOURCE or SOURCE, separated by commas."""
    lora_folder: Path | None = None
    """Folder of the LoRAs that prompts can name."""
    min_replicas: int = 1
    max_replicas: int = 2
    cpus: float = 1
    """CPU cores of each replica, and its number of threads."""
    gpus: float = 0
    """GPUs of each replica."""


def build(arguments: Arguments) -> serve.Application:
    """Return the application. Each replica has models and a queue of its own; its API keys are those of ``LDM_API_KEY``."""

    def application() -> FastAPI:
        import torch

        from ldm.cli.serve import model_sources
        from ldm.serving.app import create_app
        from ldm.serving.security import api_keys, trusted_hosts
        from ldm.serving.service import Service, exact_by_default

        torch.set_num_threads(max(1, int(arguments.cpus)))
        device = torch.device("cuda" if arguments.gpus else "cpu")
        sources = model_sources(arguments.model.split(","))
        controlnets = model_sources(list(filter(None, arguments.controlnet.split(","))), "controlnet")
        service = Service(
            sources,
            arguments.gallery,
            exact=exact_by_default(device),
            device=str(device),
            lora_folder=arguments.lora_folder,
            controlnets=controlnets,
        )
        service.models.load(service.models.names[0])  # the replica is ready when it is loaded
        keys = api_keys("127.0.0.1", None)
        return create_app(service, keys, None if keys else trusted_hosts("127.0.0.1"))

    from ldm.serving.limits import Limits

    limits = Limits()
    deployment = serve.deployment(
        serve.ingress(application)(),
        name="server",
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        # another replica when more requests than this replica computes at once have come
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": limits.max_running,
        },
        # more than the queue holds, so that the replica itself answers those beyond it with status 429
        max_ongoing_requests=2 * (limits.max_running + limits.max_waiting),
        graceful_shutdown_timeout_s=10,
    )
    return deployment.bind()
