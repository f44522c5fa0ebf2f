"""Encoding of data, once for all trainings of the denoiser: ``tools/encode.py`` and ``ldm-encode``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from typer import Argument, Option

from ldm.cli.common import Debug, keep_freed_memory, new_app, run
from ldm.cli.cores import use_idle_cores
from ldm.errors import DataError, unknown

if TYPE_CHECKING:
    import torch

    from ldm.data.encoded_source import EncodedSource
    from ldm.training.experiment import Experiment

ENGINES = ("local", "ray")

LONGEST = timedelta(days=30)
"""Time that a rank may be ahead of others."""

app = new_app()


@app.command()
def encode(
    config: Annotated[Path, Option(help="YAML file of the experiment.")],
    overrides: Annotated[
        list[str] | None, Argument(help="Overrides of the config as key=value, such as data.encoded.folder=s3://b/set.")
    ] = None,
    engine: Annotated[
        str, Option(help="local: this process, or those of torchrun; ray: tasks and actors of a Ray cluster.")
    ] = "local",
    device: Annotated[str | None, Option(help="cpu or cuda. Default: the GPU if there is one.")] = None,
    encoders: Annotated[int, Option(help="With --engine ray: number of actors that encode.")] = 1,
    debug: Debug = False,
) -> None:
    """Encode the images and captions of an experiment into data.encoded.folder; repeating the command continues it."""
    if engine not in ENGINES:
        raise DataError(unknown("engine", engine, ENGINES))
    from ldm.training.encoders import frozen_encoders
    from ldm.training.experiment import load_config

    keep_freed_memory()
    use_idle_cores()
    experiment = load_config(config, overrides or [])
    place = _device(experiment, device)
    with _process_group() as ranks:
        source = frozen_encoders(experiment)
        for split in ("train", "val"):
            if experiment.data.has(split):
                _encode_split(source, split, place, ranks, encoders if engine == "ray" else 0)


class Ranks(NamedTuple):
    """Number of this process, number of all, and a function in which each waits for all."""

    rank: int
    world_size: int
    barrier: Callable[[], Any]


def _encode_split(source: EncodedSource, split: str, device: torch.device, ranks: Ranks, actors: int) -> None:
    """Encode the shards of this rank of a split; the first rank then writes the index."""
    from tqdm import tqdm

    from ldm.data.encoded_shards import EncodedShards, encode_shards, write_empty
    from ldm.data.encoding import Encoder, local_engine
    from ldm.data.mixture import source_sizes
    from ldm.data.storage import joined, shown

    images, crops, first = source.images(split), source.crops(split), ranks.rank == 0
    encoding = source.encoding(split, images)
    shards = EncodedShards(joined(source.folder, split), encoding, source.data.encoded, source_sizes(images))
    if not shards.finished():
        own = range(ranks.rank, len(shards), ranks.world_size)
        conditioner = source.conditioner if "text" in encoding else None
        encoder = Encoder(
            source.first_stage,
            conditioner,
            source.data.encoded,
            flips=source.flips(split),
            teacher=source.teacher_of(split),
            device=device,
        )
        engine = local_engine(images, encoder, crops)
        if actors:
            from ldm.data.ray_engine import ray_engine

            engine = ray_engine(images, encoder, crops, actors)
        total = sum(len(shards.index_of(number)) for number in own)
        with tqdm(desc=f"encoding {split}", total=total, unit="image", disable=None if first else True) as bar:
            encode_shards(shards, own, engine, bar.update)
        ranks.barrier()
        if first:
            if conditioner is not None:
                write_empty(source.folder, encoder)
            shards.finish()
    if first:
        shards.clean()
        print(f"{split}: {len(images):,} samples are encoded in {shown(shards.folder)}")


@contextmanager
def _process_group() -> Iterator[Ranks]:
    """Yield the ranks that torchrun has started, or a single one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(0, 1, lambda: None)
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=LONGEST)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), dist.barrier)
    finally:
        dist.destroy_process_group()


def _device(experiment: Experiment, name: str | None) -> torch.device:
    """Return the device of this rank."""
    import torch

    from ldm.devices import default_device, usable

    default = torch.device("cpu") if experiment.trainer.accelerator == "cpu" else default_device()
    device = torch.device(name) if name else default
    if str(device) == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local % torch.cuda.device_count())
    return usable(device)


def main() -> None:
    """Run the command."""
    run(app)
