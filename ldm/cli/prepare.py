"""Data preparation (``tools/prepare.py``, ``ldm-prepare``): shards from images, and a tokenizer from captions."""

from __future__ import annotations

import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.cli.common import Debug, new_app, run
from ldm.errors import DataError

if TYPE_CHECKING:
    from ldm.data.preparation_report import Report

app = new_app()


class CaptionFormat(str, Enum):
    """Values of ``data.captions.format``."""

    text = "text"
    lines = "lines"
    json = "json"


Format = Annotated[
    CaptionFormat,
    typer.Option(help="Format of the captions, as data.captions.format; of several the first is measured."),
]
ShardSize = Annotated[int, typer.Option(help="Images per shard.")]
MinSize = Annotated[int, typer.Option(help="Shortest side in pixels; smaller images are skipped.")]
MaxSize = Annotated[int | None, typer.Option(help="Longest side in pixels; larger images are scaled down.")]
Workers = Annotated[int, typer.Option(help="Number of decoding threads.")]
Shares = Annotated[
    str | None,
    typer.Option(
        help="Fractions of train, val and test; the split of an image is chosen by a hash of its name. Default: train, "
        "validation and test by the names of the folders or files, if all have such names, else 0.98,0.01,0.01."
    ),
]
Template = Annotated[
    str | None, typer.Option(help="Caption of images without one: {} is replaced by the name of the class.")
]
Duplicates = Annotated[
    int | None,
    typer.Option(
        metavar="BITS",
        help="Drops near duplicates, whose perceptual hashes of 64 bits differ in at most BITS (4 finds copies that were "
        "scaled or compressed again); the largest stays.",
    ),
]
Language = Annotated[
    str | None,
    typer.Option(
        metavar="CODES",
        help="Adds the language of each caption to the index, for data.filters.languages: the languages that occur, as ISO "
        "639-1 codes with commas (the fewer, the more reliable), or all.",
    ),
]


@app.command()
def folder(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="Folder of images with captions: x.jpg with x.txt, or metadata.csv / .jsonl.",
        ),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="Output folder; gets DST/train, DST/val and DST/test.")
    ],
    shard_size: ShardSize = 1000,
    min_size: MinSize = 1,
    max_size: MaxSize = None,
    shares: Shares = None,
    caption_field: Annotated[
        str, typer.Option(help="Column of metadata.csv, or field of metadata.jsonl and x.json, that holds the caption.")
    ] = "text",
    class_folders: Annotated[
        bool, typer.Option("--class-folders", help="Class number of an image by the name of its folder (.cls).")
    ] = False,
    caption_template: Template = None,
    drop_duplicates: Duplicates = None,
    language: Language = None,
    workers: Workers = 4,
    debug: Debug = False,
) -> None:
    """Convert a folder of images with captions to shards; DST/report.json lists the images that were skipped."""
    from ldm.data.folder import prepare_folder

    fractions = _shares(shares)
    report = prepare_folder(
        source,
        destination,
        shard_size=shard_size,
        min_size=min_size,
        max_size=max_size,
        shares=fractions,
        workers=workers,
        caption_field=caption_field,
        languages=_listed(language),
        drop_duplicates=drop_duplicates,
        class_folders=class_folders,
        caption_template=caption_template,
    )
    _print_report(report, destination, fractions)


@app.command()
def parquet(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...",
            help="Parquet files with images, as of Hugging Face: files, folders or patterns, also as s3:// and https://.",
        ),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="Output folder; gets DST/train, DST/val and DST/test.")
    ],
    image_column: Annotated[
        str | None, typer.Option(help="Column of the images. Default: the one that holds images.")
    ] = None,
    caption_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the captions, texts or lists of texts. Default: text, caption, captions or prompt."
        ),
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of class numbers (.cls). Default: none.")] = None,
    caption_template: Template = None,
    shard_size: ShardSize = 1000,
    min_size: MinSize = 1,
    max_size: MaxSize = None,
    shares: Shares = None,
    drop_duplicates: Duplicates = None,
    language: Language = None,
    workers: Workers = 4,
    debug: Debug = False,
) -> None:
    """Convert parquet files with an image column to shards; DST/report.json lists the rows that were skipped."""
    from ldm.data.parquet_images import prepare_parquet

    fractions = _shares(shares)
    report = prepare_parquet(
        sources,
        destination,
        image_column=image_column,
        caption_column=caption_column,
        label_column=label_column,
        caption_template=caption_template,
        shard_size=shard_size,
        min_size=min_size,
        max_size=max_size,
        shares=fractions,
        workers=workers,
        languages=_listed(language),
        drop_duplicates=drop_duplicates,
    )
    _print_report(report, destination, fractions)


@app.command()
def index(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Shards that others made: a folder, local or as s3://, or a pattern, as https://host/{00000..00099}.tar.",
        ),
    ],
    out: Annotated[
        str | None, typer.Option(help="Path or URL of the index. Default: index.parquet in the folder of the shards.")
    ] = None,
    fields: Annotated[
        str | None,
        typer.Option(help="Fields of the .json files to include, with commas. Default: all numbers and short texts."),
    ] = None,
    caption_field: Annotated[
        str | None, typer.Option(help="Field of the .json files that holds the caption. Default: it is in .txt.")
    ] = None,
    caption_format: Format = CaptionFormat.text,
    language: Language = None,
    workers: Annotated[int, typer.Option(help="Number of processes.")] = 4,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder of intermediate results, with which an interrupted command continues."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the index of shards, by which training starts without reading their headers, and reads remote ones at all."""
    from ldm.data.indexing import IndexOptions, make_index
    from ldm.data.storage import shown

    options = IndexOptions(
        _listed(fields) if fields is not None else None, caption_field, caption_format.value, _listed(language)
    )
    made = make_index(source, out, workers=workers, work=work, options=options)
    samples = sum(shard.samples for shard in made.shards)
    print(f"{shown(made.location)}: {samples} samples in {len(made.shards)} shards")
    print(f"Columns: {', '.join(made.columns)}")


@app.command()
def emoji(
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Output folder of the shards.")],
    font: Annotated[
        Path | None, typer.Option(help="NotoColorEmoji.ttf. Default: the path of Debian's package.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Render the emoji set; the package already contains the result."""
    from ldm.data.emoji import FONT_PATH, write_emoji_shards

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counts = write_emoji_shards(destination, font or FONT_PATH)
    for warning in caught:
        typer.echo(f"warning: {warning.message}", err=True)
    print(", ".join(f"{count} {split}" for split, count in counts.items()) + f" in {destination}")


@app.command()
def stamps(
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="Output folder; gets DST/train, DST/val and DST/test.")
    ],
    source: Annotated[
        Path | None,
        typer.Option(help="Folder of the stamps. Default: that of Debian's package tuxpaint-stamps-default."),
    ] = None,
    language: Annotated[
        str, typer.Option(help="Language of the captions: en, or one of the translations, such as de or pt_BR.")
    ] = "en",
    shard_size: ShardSize = 1000,
    min_size: MinSize = 1,
    max_size: MaxSize = None,
    shares: Annotated[
        str | None,
        typer.Option(
            help="Fractions of train, val and test; the split of an image is chosen by a hash of its name. Default: 0.8,0.1,0.1."
        ),
    ] = None,
    drop_duplicates: Duplicates = None,
    workers: Workers = 4,
    debug: Debug = False,
) -> None:
    """Convert the stamps of Tux Paint (GPL-2; not part of ldm) to shards; DST/report.json lists those that were skipped."""
    from ldm.data.stamps import SHARES, STAMPS_PATH, prepare_stamps

    fractions = _shares(shares) or [*SHARES]
    report = prepare_stamps(
        source or STAMPS_PATH,
        destination,
        language=language,
        shard_size=shard_size,
        min_size=min_size,
        max_size=max_size,
        shares=fractions,
        workers=workers,
        drop_duplicates=drop_duplicates,
    )
    _print_report(report, destination, fractions)


@app.command()
def tokenizer(
    data: Annotated[
        list[str] | None,
        typer.Option(help="Shards whose captions are used, written as data.train; repeatable."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of an experiment, instead of --data: its data.train, captions and filters are used."
        ),
    ] = None,
    caption_field: Annotated[
        str | None, typer.Option(help="With --data: field of the .json files that holds the caption. Default: .txt.")
    ] = None,
    caption_format: Annotated[
        CaptionFormat, typer.Option(help="With --data: format of the captions, as data.captions.format.")
    ] = CaptionFormat.text,
    out: Annotated[Path, typer.Option(help="Output file.")] = Path("tokenizer.json"),
    vocab_size: Annotated[int, typer.Option(help="Number of tokens, including the 256 bytes.")] = 2048,
    context_length: Annotated[int, typer.Option(help="Tokens per caption; longer captions are truncated.")] = 32,
    debug: Debug = False,
) -> None:
    """Train a byte-level BPE tokenizer on all captions of the training shards."""
    from ldm.clip.tokenizer import train_byte_bpe
    from ldm.formats.tensors import write_atomically

    captions = _captions(data, config, caption_field, caption_format)
    trained = train_byte_bpe(captions, vocab_size, context_length)
    write_atomically(out, lambda path: path.write_text(trained.to_json(), encoding="utf-8"))
    print(f"{out}: {trained.vocab_size} tokens from {len(captions)} captions")


def _captions(
    data: list[str] | None, config: Path | None, caption_field: str | None, caption_format: CaptionFormat
) -> list[str]:
    """Return all captions of the training data, as a training reads them."""
    from ldm.data import DataConfig, ShardsData
    from ldm.data.caption_choice import CaptionConfig

    if bool(data) == (config is not None):
        raise DataError("the captions come from --data or from --config; give one of them.")
    if config is not None:
        if caption_field is not None or caption_format != CaptionFormat.text:
            raise DataError(f"--caption-field and --caption-format are set by {config}; leave them out.")
        from ldm.training.experiment import load_config

        source: DataConfig = load_config(config).data.without_cache()
    else:
        captions = CaptionConfig(format=caption_format.value)
        source = ShardsData(tuple(data or ()), caption_field=caption_field, captions=captions, workers=0)
    return source.open("train").all_captions("the tokenizer")


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(each.strip() for each in (text or "").split(",") if each.strip())


def _print_report(report: Report, destination: Path, shares: list[float] | None) -> None:
    from ldm.data.set_writer import DEFAULT_SHARES
    from ldm.data.shard_set import REPORT

    print(report.summary())
    advice = None if report.named_splits else report.advice_on_shares(shares or DEFAULT_SHARES)
    if advice:
        typer.echo(f"warning: {advice}", err=True)
    print(f"Skipped images are listed in {destination / REPORT}")
    sources = ", ".join(f"{split}: {destination / split}" for split, count in report.images.items() if count)
    captions = "" if report.caption_format == "text" else f", captions: {{format: {report.caption_format}}}"
    print(f"For the config: data: {{kind: shards, {sources}{captions}}}")


def _shares(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(share) for share in text.split(",")]
    except ValueError:
        raise DataError(
            f"the shares {text!r} are not numbers with commas between them; example: 0.9,0.05,0.05."
        ) from None


def main() -> None:
    """The command."""
    run(app)
