"""From one format of models to another, or a look at what a source holds: ``tools/convert.py`` and ``ldm-convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from ldm.cli.common import DTYPES, Debug, new_app, run
from ldm.errors import CheckpointError, LdmError, unknown

if TYPE_CHECKING:
    from ldm.formats.checkpoint import Checkpoint, Part

PUBLISHED = {"SD 1": 859_520_964, "SD 2": 865_910_724, "SDXL": 2_567_463_684}
"""Parameters of the U-Nets that the kinds are named after."""

app = new_app()


@app.command()
def convert(
    source: Annotated[str, Argument(help="Run, file, diffusers folder, hub id, or the name of the shipped model.")],
    target: Annotated[Path | None, Argument(help="A file that ends in .safetensors, or a folder.")] = None,
    to: Annotated[
        str,
        Option(help="native, ldm (single file) or diffusers (folder); of a CLIP native, transformers or open_clip."),
    ] = "native",
    inspect: Annotated[bool, Option("--inspect", help="Say what the source holds, and how that is known.")] = False,
    dtype: Annotated[str | None, Option(help="fp32, bf16 or fp16. As the source has it.")] = None,
    vae: Annotated[str | None, Option(help="Source of a VAE in place of its own.")] = None,
    unet: Annotated[str | None, Option(help="Source of a U-Net in place of its own.")] = None,
    text_encoder: Annotated[str | None, Option(help="Source of a text encoder in place of its own.")] = None,
    text_encoder_2: Annotated[str | None, Option(help="Source of a second text encoder in place of its own.")] = None,
    prediction_type: Annotated[str | None, Option(help="epsilon or v_prediction, which weights do not tell.")] = None,
    no_ema: Annotated[bool, Option("--no-ema", help="Leave the averaged weights of an LDM file.")] = False,
    revision: Annotated[str | None, Option(help="Branch, tag or commit of a hub id.")] = None,
    debug: Debug = False,
) -> None:
    """Convert a model to another format, whole, with its tokenizer and all that is known of how it was trained."""
    if dtype is not None and dtype not in DTYPES:
        raise LdmError(unknown("dtype", dtype, DTYPES))
    if target is None and not inspect:
        raise LdmError("name a target behind the source, or ask for --inspect.")
    import torch

    from ldm.formats import read, save
    from ldm.formats.single_network import save_single_network

    try:
        found = read(
            source,
            vae=vae,
            denoiser=unet,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            revision=revision,
            prediction_type=prediction_type,
            ema=not no_ema,
        )
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


def description(found: Checkpoint) -> list[str]:
    """What a source holds, line by line."""
    from ldm.formats.native import LARGE

    lines = [found.source, f"layout           {found.layout}", f"kind             {found.kind}{_other_sizes(found)}"]
    for name, part in found.parts.items():
        lines.append(f"{name:<16} {part.parameters:>13,} parameters in {len(part.weights)} tensors, {_dtypes(part)}")
    if not found.missing():
        told = f"more than {LARGE >> 30} GiB of weights; not computed"
        lines.append(f"fingerprint      {found.build().fingerprint or told}")
    if found.diffusion is not None and "denoiser" in found.parts:
        diffusion, sampling = found.diffusion, found.sampling
        lines.append(f"prediction type  {diffusion.parametrization.kind}, schedule {diffusion.schedule.kind}")
        lines.append(
            f"sampled by       {sampling.sampler}, {sampling.num_inference_steps} steps, spacing {sampling.spacing}, "
            f"guidance scale {sampling.guidance_scale:g}"
        )
    if found.size is not None:
        lines.append(f"pictures of      {found.size[0]} x {found.size[1]} pixels")
    if found.tokenizer is not None:
        lines.append(
            f"tokenizer        {found.tokenizer.vocab_size:,} tokens, {found.tokenizer.context_length} a caption"
        )
    lines += [f"known how        {note}" for note in found.notes]
    lines += [f"missing          {name}" for name in found.missing()]
    lines += [f"unused           {name}" for name in found.unused]
    return lines


def _other_sizes(found: Checkpoint) -> str:
    unet = found.parts.get("denoiser")
    other = unet is not None and found.kind in PUBLISHED and unet.parameters != PUBLISHED[found.kind]
    return ", but of other sizes than those published" if other else ""


def _dtypes(part: Part) -> str:
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in part.weights.values()})
    return " and ".join(kinds)


def main() -> None:
    """The command."""
    run(app)
