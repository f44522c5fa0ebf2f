"""Benchmarks against other libraries, as ratios within one run (``tools/bench.py``); needs the development extras."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ldm.cli.common import DTYPES, Debug, keep_freed_memory, new_app, run
from ldm.errors import LdmError, unknown

if TYPE_CHECKING:
    import torch

app = new_app()


@app.command()
def bench(
    names: Annotated[
        list[str] | None, Argument(help="Cases, or families of cases such as unet; all = every case. See --list.")
    ] = None,
    listed: Annotated[bool, Option("--list", help="Print the cases and exit.")] = False,
    device: Annotated[str | None, Option(help="cpu or cuda. Default: the GPU if there is one.")] = None,
    dtype: Annotated[str | None, Option(help="fp32, bf16 or fp16. Default: bf16 if it is native.")] = None,
    rounds: Annotated[int, Option(min=1, help="Number of times that each side is measured, in turn.")] = 5,
    small: Annotated[bool, Option(help="Tiny networks of the same structure, to see that a case works.")] = False,
    file: Annotated[Path | None, Option("--json", help="Write the results to this file too, after each case.")] = None,
    memory: Annotated[bool, Option(help="Measure the peak memory of each side, in new processes.")] = True,
    compiled: Annotated[
        str | None, Option("--compile", help="Backend of Pipeline.compile for our side, such as inductor or openvino.")
    ] = None,
    compile_peer: Annotated[bool, Option(help="Compile the networks of the other side with torch.compile.")] = False,
    batch_size: Annotated[
        int | None, Option("--batch-size", "--batch", min=1, help="Batch size. Default: the case's own.")
    ] = None,
    steps: Annotated[int | None, Option("--steps", min=1, help="Sampling steps. Default: the case's own.")] = None,
    threads: Annotated[int | None, Option(min=1, help="CPU threads. Default: those of torch.")] = None,
    folder: Annotated[
        Path, Option(help="Folder of files that are created if they do not exist (8.6 GB for load, 1 GB for index).")
    ] = Path("runs/bench"),
    samples: Annotated[int | None, Option(min=1, help="For index: number of samples. Default: ten million.")] = None,
    workers: Annotated[int, Option(min=0, help="For stream: number of processes that decode.")] = 0,
    experiment: Annotated[Path, Option(help="For latents: YAML file of the experiment.")] = Path(
        "configs/emoji_64.yaml"
    ),
    debug: Debug = False,
) -> None:
    """Measure cases against other libraries: time of ours, of theirs, ours / theirs (below 1, ours is faster), and memory."""
    import torch

    from ldm.benchmarks.case import Setup, all_cases, selected
    from ldm.benchmarks.peaks import measure_peaks
    from ldm.benchmarks.result import HEADER
    from ldm.formats.tensors import write_atomically

    if listed:
        for case in all_cases().values():
            print(f"{case.name:24}{case.title}; against {case.peer}")
        return
    if not names:
        raise LdmError("no case is given; --list shows the cases, and all runs every one.")
    cases = selected(names)
    if threads is not None:
        torch.set_num_threads(threads)
    place, precision = _place(device, dtype)
    options = {"samples": samples, "workers": workers, "experiment": experiment}
    setup = Setup(place, precision, small, rounds, batch_size, steps, folder, compiled, compile_peer, memory, options)
    keep_freed_memory()
    peaks = measure_peaks(setup)
    machine = {
        "device": _device_name(place),
        "dtype": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peak_matmul": peaks.matmul,
        "peak_convolution": peaks.convolution,
    }
    print(
        f"{machine['device']}, {machine['dtype']}, {machine['threads']} threads, torch {machine['torch']}; peaks: matrix "
        f"products {peaks.matmul / 1e9:,.0f} GFLOP/s, convolutions {peaks.convolution / 1e9:,.0f} GFLOP/s"
    )
    print(HEADER, flush=True)
    results: list[dict[str, Any]] = []
    for case in cases:
        try:
            result = case.measure(setup, peaks)
        except LdmError as error:
            if len(cases) == 1:
                raise
            print(f"{case.name:27}not measured: {error}", flush=True)
            results.append({"case": case.name, "error": str(error)})
        else:
            print("\n".join(result.rows()), flush=True)
            results.append(result.record(setup))
        if file is not None:
            text = json.dumps({"machine": machine, "results": results}, indent=2) + "\n"
            write_atomically(file, lambda path, text=text: path.write_text(text, "utf-8"))  # type: ignore[misc]


def _place(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype that the options name.

    Raises:
        LdmError: there is no such device or dtype.
    """
    import torch

    from ldm.devices import default_device, default_dtype, usable

    place = default_device() if device is None else usable(device)
    if dtype is None:
        return place, default_dtype(place)
    name = DTYPES.get(dtype, dtype)
    if name not in DTYPES.values():
        raise LdmError(unknown("dtype", dtype, [*DTYPES, *DTYPES.values()]))
    return place, getattr(torch, name)


def _device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor and its instructions that matter here."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"


def main() -> None:
    """The command."""
    run(app)
