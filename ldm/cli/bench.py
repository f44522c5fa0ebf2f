"""Benchmarks against other libraries, as ratios within one run (``tools/bench.py``); needs the development extras."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from typer import Argument, Option

from ldm.cli.bench_data import bench_index, bench_stream
from ldm.cli.bench_latents import bench_latents
from ldm.cli.bench_load import bench_load
from ldm.cli.common import Debug, keep_freed_memory, new_app, run
from ldm.errors import LdmError, missing_extra, unknown

OTHERS = ("load", "index", "stream", "latents")
"""Benchmarks that have a module of their own."""

Side = tuple[Any, Callable[[], Any]]
"""A network, and a call of it that returns a tensor."""

app = new_app()


@app.command()
def bench(
    names: Annotated[
        list[str] | None, Argument(help="unet, vae, text (default: all three), load, index, stream, or latents.")
    ] = None,
    device: Annotated[str | None, Option(help="cpu or cuda. Default: the GPU if there is one.")] = None,
    dtype: Annotated[str | None, Option(help="float32 or bfloat16. Default: bfloat16 if it is native.")] = None,
    batch: Annotated[int, Option(help="Batch size.")] = 8,
    rounds: Annotated[int, Option(help="Number of measured rounds, alternating between both sides.")] = 7,
    folder: Annotated[
        Path, Option(help="For load and index: folder of the files, created if they do not exist (8.6 GB for load).")
    ] = Path("runs/bench"),
    samples: Annotated[int, Option(help="For index: number of samples.")] = 10_000_000,
    workers: Annotated[int, Option(help="For stream: number of processes that decode.")] = 0,
    experiment: Annotated[Path, Option(help="For latents: YAML file of the experiment.")] = Path(
        "configs/emoji_64.yaml"
    ),
    compiled: Annotated[bool, Option("--compile", help="Compile both sides with torch.compile.")] = False,
    debug: Debug = False,
) -> None:
    """Time forward, and forward with backward, of each network and of its counterpart in another library."""
    import torch

    from ldm.devices import default_device, default_dtype

    for name in names or []:
        if name not in (*PAIRS, *OTHERS):
            raise LdmError(unknown("benchmark", name, [*PAIRS, *OTHERS]))
    if names and "index" in names:
        bench_index(folder, samples)
    if names and "stream" in names:
        bench_stream(rounds, workers)
    keep_freed_memory()
    if names and "latents" in names:
        bench_latents(experiment, rounds, compare)
    if names and "load" in names:
        bench_load(folder, dtype or "float32", rounds)
    names = [name for name in names or PAIRS if name in PAIRS]
    if not names:
        return
    place = torch.device(device) if device else default_device()
    precision = getattr(torch, dtype) if dtype else default_dtype(place)
    print(f"{place}, {precision}, batch {batch}, {torch.get_num_threads()} threads, median of {rounds} rounds")
    print(f"{'':24}{'ours':>10}{'peer':>10}{'peer/ours':>11}")
    for name in names:
        sides = PAIRS[name](batch, {"device": place, "dtype": precision})
        for network, _ in sides:
            network.to(place, precision).to(memory_format=torch.channels_last)
            if compiled:
                network.compile()
        for what, work in (("forward", _forward), ("forward + backward", _backward)):
            ours, peer = compare(partial(work, *sides[0]), partial(work, *sides[1]), rounds)
            print(f"{name + ' ' + what:24}{1e3 * ours:8.1f}ms{1e3 * peer:8.1f}ms{peer / ours:11.2f}")


def compare(ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the median seconds of each after two warm-up rounds; the two alternate, so that drift affects both equally."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 2):
        for work, seconds in zip((ours, peer), times, strict=True):
            start = time.perf_counter()
            work()
            if number >= 2:
                seconds.append(time.perf_counter() - start)
    return median(times[0]), median(times[1])


def _forward(network: Any, call: Callable[[], Any]) -> None:
    import torch

    with torch.inference_mode():
        float(call().sum())  # a number on the host: waits for the GPU


def _backward(network: Any, call: Callable[[], Any]) -> None:
    loss = call().square().mean()
    loss.backward()
    network.zero_grad()
    float(loss.detach())


def _unet(batch: int, to: dict[str, Any]) -> tuple[Side, Side]:
    """U-Net of SD 1 at a quarter of its width, on latents of 32 x 32."""
    import torch

    from ldm.denoiser import LevelSpec, UNetConfig
    from ldm.nn.conditioning import Conditioning

    widths = (80, 160, 320, 320)
    levels = tuple(LevelSpec(width, 2, int(i < 3)) for i, width in enumerate(widths))
    ours = UNetConfig(levels=levels, context_width=192, heads=8, projection="conv", groups=16).build()
    peer = _diffusers().UNet2DConditionModel(
        block_out_channels=widths, cross_attention_dim=192, attention_head_dim=8, norm_num_groups=16
    )
    x = torch.randn(batch, 4, 32, 32, **to).to(memory_format=torch.channels_last)
    t, context = torch.full((batch,), 500, device=to["device"]), torch.randn(batch, 77, 192, **to)
    return (ours, lambda: ours(x, t, Conditioning(context=context))), (peer, lambda: peer(x, t, context).sample)


def _vae(batch: int, to: dict[str, Any]) -> tuple[Side, Side]:
    """KL-f8 autoencoder at a quarter of its width, encoding and decoding, on images of 128 x 128."""
    import torch

    from ldm.vae import AutoencoderKLConfig

    widths = (32, 64, 128, 128)
    ours = AutoencoderKLConfig(widths=widths, groups=16).build()
    peer = _diffusers().AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        norm_num_groups=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    x = torch.randn(batch, 3, 128, 128, **to).to(memory_format=torch.channels_last)
    return (
        (ours, lambda: ours.decode(ours.encode(x).mode.to(x.dtype))),
        (peer, lambda: peer.decode(peer.encode(x).latent_dist.mean).sample),
    )


def _text(batch: int, to: dict[str, Any]) -> tuple[Side, Side]:
    """Text tower of SD 1 at half its depth, on 77 tokens."""
    import torch

    from ldm.clip.text import TextTowerConfig

    try:
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError:
        raise missing_extra("transformers", "this benchmark", "dev") from None
    ours = TextTowerConfig(layers=6, activation="quick_gelu").build()
    peer = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=12
        )
    )
    tokens = torch.randint(49407, (batch, 77), device=to["device"])
    return (ours, lambda: ours(tokens).context), (peer, lambda: peer(tokens).last_hidden_state)


PAIRS: dict[str, Callable[[int, dict[str, Any]], tuple[Side, Side]]] = {"unet": _unet, "vae": _vae, "text": _text}
"""Benchmarks by name: our network and the peer's of the same shape."""


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise missing_extra("diffusers", "this benchmark", "dev") from None
    return diffusers


def main() -> None:
    """The command."""
    run(app)
