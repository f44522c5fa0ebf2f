"""Convert models between formats, and report what a source holds: ``tools/convert.py`` and ``ldm-convert``."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ldm.cli.common import DTYPES, Debug, new_app, options_from, run
from ldm.errors import CheckpointError, LdmError, unknown
from ldm.load_options import LoadOptions

if TYPE_CHECKING:
    from ldm.formats.checkpoint import Checkpoint, Part

PUBLISHED = {"SD 1": 859_520_964, "SD 2": 865_910_724, "SDXL": 2_567_463_684}
"""Numbers of parameters of the published U-Nets, by family."""

app = new_app()


@app.command()
@options_from(LoadOptions, into="options")
def convert(
    source: Annotated[str, Argument(help="Run, file, diffusers folder, hub id, or the name of the shipped model.")],
    target: Annotated[Path | None, Argument(help="File that ends in .safetensors, or folder.")] = None,
    to: Annotated[
        str,
        Option(
            help="native, ldm (single file) or diffusers (folder); for a CLIP native, transformers or open_clip; for a "
            "text encoder ldm or transformers."
        ),
    ] = "native",
    inspect: Annotated[
        bool, Option("--inspect", help="Report what the source holds, and the evidence for inferred settings.")
    ] = False,
    dtype: Annotated[str | None, Option(help="fp32, bf16 or fp16; default: as the source has it.")] = None,
    ema_length: Annotated[
        float | None,
        Option(
            help="Use averaged weights of this length, a share of the training such as 0.1, of a run that was trained with "
            "train.ema_snapshots."
        ),
    ] = None,
    debug: Debug = False,
    *,
    options: dict[str, Any],
) -> None:
    """Convert a model to another format, with its tokenizer and settings."""
    if dtype is not None and dtype not in DTYPES:
        raise LdmError(unknown("dtype", dtype, DTYPES))
    if target is None and not inspect:
        raise LdmError("name a target behind the source, or ask for --inspect.")
    import torch

    from ldm.formats import read, save
    from ldm.formats.single_network import save_single_network

    with TemporaryDirectory() as folder:
        try:
            if ema_length is not None:
                source = averaged(source, options, ema_length, Path(folder) / "averaged.safetensors")
            found = read(source, LoadOptions(**options))
        except CheckpointError as error:
            if inspect and error.details:
                print("\n".join(error.details))
            raise
        if inspect:
            print("\n".join(description(found)))
        if target is not None:
            precision = getattr(torch, DTYPES[dtype]) if dtype else None
            if found.missing():
                print(f"wrote {save_single_network(found, target, to, precision)}")
            else:
                print(f"wrote {save(found.build(precision), target, to)}")


def averaged(source: str, options: dict[str, Any], length: float, target: Path) -> str:
    """Write the model of a run with averaged weights of a length, and return its path; ``options`` then belong to it.

    Raises:
        CheckpointError: the source is not in a run folder with snapshots of averages.
    """
    from ldm.formats import find
    from ldm.formats.ema_snapshots import write_model

    where = {name: options.pop(name, None) for name in ("revision", "subfolder", "variant", "checkpoint")}
    write_model(find(source, **where), length, target)
    return str(target)


def description(found: Checkpoint) -> list[str]:
    """Return a report of what a source holds, line by line."""
    from ldm.formats.native import LARGE

    lines = [found.source, f"layout           {found.layout}", f"kind             {found.kind}{_other_sizes(found)}"]
    for name, part in found.parts.items():
        lines.append(f"{name:<16} {part.parameters:>13,} parameters in {len(part.weights)} tensors, {_dtypes(part)}")
    if not found.missing():
        absent = f"more than {LARGE >> 30} GiB of weights; not computed"
        lines.append(f"fingerprint      {found.build().fingerprint or absent}")
    if found.diffusion is not None and "denoiser" in found.parts:
        diffusion, sampling = found.diffusion, found.sampling
        lines.append(f"prediction type  {diffusion.parametrization.kind}, schedule {diffusion.schedule.kind}")
        lines.append(
            f"sampled by       {sampling.sampler}, {sampling.num_inference_steps} steps, spacing {sampling.spacing}, "
            f"guidance scale {sampling.guidance_scale:g}"
        )
    if found.size is not None:
        lines.append(f"image size       {found.size[0]} x {found.size[1]} pixels")
    if found.tokenizer is not None:
        lines.append(
            f"tokenizer        {found.tokenizer.vocab_size:,} tokens, at most {found.tokenizer.context_length} in a caption"
        )
    lines += [f"evidence         {note}" for note in found.notes]
    lines += [f"mark             {name}" for name in found.marks]
    lines += [f"missing          {name}" for name in found.missing()]
    lines += [f"unused           {name}" for name in found.unused]
    return lines


def _other_sizes(found: Checkpoint) -> str:
    denoiser = found.parts.get("denoiser")
    other = denoiser is not None and found.kind in PUBLISHED and denoiser.parameters != PUBLISHED[found.kind]
    return ", but of other sizes than those published" if other else ""


def _dtypes(part: Part) -> str:
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in part.weights.values()})
    return " and ".join(kinds)


def main() -> None:
    """Run the command."""
    run(app)
