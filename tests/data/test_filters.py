from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from ldm.cli.dry_run import describe
from ldm.config import from_dict, to_dict
from ldm.data import ShardsData, TrainStream
from ldm.data.caption_choice import CaptionConfig
from ldm.data.filters import FilterConfig, Selection
from ldm.data.indexing import IndexOptions, make_index
from ldm.data.shards import Shards
from ldm.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from ldm.report.page import page
from ldm.report.run import Run
from ldm.training.stages import train_stage
from tests.data.pictures import encoded, noise_picture, write_shards, write_tar
from tests.experiments import tiny_experiment

N = 24
CAPTIONS = {"en": "a red mug on a table", "de": "ein roter Becher auf dem Tisch", "fr": "une tasse rouge sur la table"}


def facts(i: int) -> dict[str, Any]:
    """Size, caption and fields of a sample, of which some lack the fields."""
    generator = np.random.default_rng(i)
    width, height = generator.integers(4, 13, 2).tolist()
    language = ("en", "de", "fr")[i % 3]
    fields = {
        "similarity": round(float(generator.random()), 2),
        "punsafe": int(generator.integers(0, 2)),
        "NSFW": ("UNLIKELY", "UNSURE", "NSFW", None)[i % 4],
        "approved": bool(i % 2),
    }
    caption = CAPTIONS[language] + " and more" * (i % 4)
    return {
        "width": width,
        "height": height,
        "language": language,
        "caption": caption,
        "fields": fields if i % 5 else {},
    }


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same shards without and with an index; two samples are incomplete."""
    folder = tmp_path_factory.mktemp("filters")
    for shard in range(3):
        members = [("lacking.txt", b"no image")]
        for i in range(shard * N // 3, (shard + 1) * N // 3):
            known = facts(i)
            members += [
                (f"{i:03d}.png", encoded(noise_picture(i, known["height"], known["width"]))),
                (f"{i:03d}.txt", known["caption"].encode()),
                (f"{i:03d}.json", json.dumps(known["fields"]).encode()),
            ]
        write_tar(folder / "plain" / f"{shard:03d}.tar", members)
    shutil.copytree(folder / "plain", folder / "indexed")
    with pytest.warns(UserWarning, match="no image"):
        make_index(str(folder / "indexed"), workers=1, options=IndexOptions(languages=("de", "en", "fr")))
    return {"plain": folder / "plain", "indexed": folder / "indexed"}


def conditions(filters: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Each filter as a function from the facts of a sample to True, False, or None where its value is not known."""

    def within(value: Any, low: Any, high: Any) -> bool | None:
        return None if value is None else (low is None or value >= low) and (high is None or value <= high)

    get = filters.get
    found: list[tuple[str, Any]] = [
        ("min_side", lambda s: within(min(s["width"], s["height"]), get("min_side"), None)),
        ("max_side", lambda s: within(max(s["width"], s["height"]), None, get("max_side"))),
        ("min_aspect_ratio", lambda s: within(s["width"] / s["height"], get("min_aspect_ratio"), None)),
        ("max_aspect_ratio", lambda s: within(s["width"] / s["height"], None, get("max_aspect_ratio"))),
        ("min_caption_length", lambda s: within(len(s["caption"]), get("min_caption_length"), None)),
        ("max_caption_length", lambda s: within(len(s["caption"]), None, get("max_caption_length"))),
        ("languages", lambda s: s["language"] in get("languages", ())),
    ]
    found = [(name, test) for name, test in found if get(name)]
    for name, condition in get("fields", {}).items():

        def holds(s: Any, name: str = name, condition: Any = condition) -> bool | None:
            value = s["fields"].get(name)
            if value is None:
                return True if condition.get("keep_missing") else None
            inside = within(value, condition.get("min"), condition.get("max"))
            return bool(
                inside and value in condition.get("one_of", [value]) and value not in condition.get("none_of", [])
            )

        found.append((f"fields.{name}", holds))
    return found


def random_filters(seed: int, *, languages: bool) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    every: dict[str, Any] = {
        "min_side": int(generator.integers(4, 7)),
        "max_side": int(generator.integers(9, 13)),
        "min_aspect_ratio": float(generator.uniform(0.4, 0.8)),
        "max_aspect_ratio": float(generator.uniform(1.2, 2.5)),
        "min_caption_length": int(generator.integers(1, 26)),
        "max_caption_length": int(generator.integers(30, 60)),
    }
    if languages:
        every["languages"] = ["en", "fr"]
    fields: dict[str, Any] = {
        "similarity": {"min": float(generator.uniform(0, 0.4)), "max": 0.95},
        "punsafe": {"max": 0.5, "keep_missing": True},
        "NSFW": {"none_of": ["NSFW"]} if seed % 2 else {"one_of": ["UNLIKELY", "UNSURE"], "keep_missing": True},
        "approved": {"one_of": [True]},
    }
    chosen = {name: value for name, value in every.items() if generator.random() < 0.3}
    return {**chosen, "fields": {name: value for name, value in fields.items() if generator.random() < 0.3}}


@pytest.mark.parametrize("kind", ["plain", "indexed"])
@pytest.mark.filterwarnings("ignore:.*samples are skipped")
def test_filters_keep_and_count_what_a_loop_over_the_samples_does(sets: dict[str, Path], kind: str) -> None:
    for seed in range(40):
        values = random_filters(seed, languages=kind == "indexed")
        source = [f"{sets[kind]}/{{002,000}}.tar", f"{sets[kind]}/001.tar"][: 1 + seed % 2]
        numbers = [*range(16, 24), *range(8), *(range(8, 16) if seed % 2 else ())]
        left, expected = numbers, []
        for name, holds in conditions(values):
            results = {i: holds(facts(i)) for i in left}
            left = [i for i in left if results[i]]
            missing = sum(result is None for result in results.values())
            expected.append((name, len(results) - len(left), missing, len(left)))
        data = ShardsData(tuple(source), size=4, workers=0, filters=from_dict(FilterConfig, values))
        if not left:
            with pytest.raises(DataError, match=r"leaves none of the \d+ samples of data\.train"):
                data.open("train")
            continue
        samples = data.open("train")
        assert list(samples.shards.keys) == [f"{i:03d}" for i in left]  # type: ignore[attr-defined]
        assert samples.selection is not None
        found = samples.selection.to_dict()
        assert found["samples"] == len(numbers)
        assert found["kept"] == len(left) == len(samples)
        assert [
            (each["filter"].partition(":")[0], each["dropped"], each["missing"], each["left"])
            for each in found["filters"]
        ] == expected


@pytest.mark.filterwarnings("ignore:.*samples are skipped")
def test_what_is_kept_is_what_is_trained_on_and_part_of_the_fingerprint(sets: dict[str, Path]) -> None:
    def opened(**filters: Any) -> Any:
        data = ShardsData(str(sets["indexed"]), size=4, workers=0, filters=from_dict(FilterConfig, filters))
        return data.open("train")

    everything, some, others = opened(), opened(languages=["en"]), opened(languages=["de"])
    same = opened(fields={"NSFW": {"none_of": ["other"], "keep_missing": True}})
    assert everything.selection == Selection(N)
    assert everything.fingerprint == same.fingerprint
    assert len({everything.fingerprint, some.fingerprint, others.fingerprint}) == 3
    seen = {key for batch in TrainStream(some, 4, 0, 4) for key in batch["key"]}
    assert seen == {f"{i:03d}" for i in range(0, N, 3)}
    assert len(opened(languages=["en"], splits=["val"])) == N


@pytest.mark.filterwarnings("ignore:.*samples are skipped")
@pytest.mark.parametrize(
    ("kind", "filters", "message"),
    [
        (
            "indexed",
            {"fields": {"similarty": {"min": 0.3}}},
            r"no column 'similarty'.*did you mean 'similarity'.*prepare\.py index",
        ),
        ("plain", {"languages": ["en"]}, r"plain/000\.tar has none; make it with tools/prepare\.py index --language"),
        ("indexed", {"fields": {"NSFW": {"max": 0.5}}}, r"fields\.NSFW \(max 0\.5\) does not suit .* type string"),
        ("indexed", {"fields": {"similarity": {"one_of": ["high"]}}}, r"fields\.similarity .* does not suit .* double"),
        (
            "indexed",
            {"min_side": 9, "min_caption_length": 900},
            r"leaves none of the 24 .*min_caption_length: 900 drops \d+\)",
        ),
    ],
)
def test_a_filter_that_cannot_be_applied_is_one_sentence(
    sets: dict[str, Path], kind: str, filters: dict[str, Any], message: str
) -> None:
    data = ShardsData(str(sets[kind]), size=4, filters=from_dict(FilterConfig, filters))
    with pytest.raises(DataError, match=message) as error:
        data.open("train")
    assert "\n" not in str(error.value)


def test_an_index_without_languages_names_the_command(tmp_path: Path) -> None:
    write_shards(tmp_path, [2])
    make_index(str(tmp_path))
    data = ShardsData(str(tmp_path), filters=FilterConfig(languages=("en",)))
    with pytest.raises(DataError, match=r"no column 'language'; add it with tools/prepare\.py index .* --language all"):
        data.open("train")


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"min_side": 9, "max_side": 8}, "min_side is 9, more than max_side"),
        ({"fields": {"similarity": {}}}, r"fields\.similarity: the filter has no condition"),
        ({"fields": {"similarity": {"least": 3}}}, "unknown key 'least'"),
        ({"splits": ["trian"]}, "did you mean 'train'"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(filters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(FilterConfig, filters)


def test_a_config_with_filters_survives_a_round_trip() -> None:
    values = random_filters(3, languages=True) | {
        "fields": {"a": {"one_of": [1, 0.5, True, "x"]}, "b": {"none_of": ["y"]}}
    }
    config = from_dict(FilterConfig, values)
    assert from_dict(FilterConfig, to_dict(config)) == config
    assert "filters" not in to_dict(ShardsData("emoji"))


def test_languages_are_told_apart_among_those_that_occur(tmp_path: Path) -> None:
    captions = ["a red mug", "una taza roja", "rotes Auto", "12345", "красная кружка"]
    png = encoded(noise_picture(0))
    members = [
        (f"{i}.{suffix}", data)
        for i, text in enumerate(captions)
        for suffix, data in (("png", png), ("txt", text.encode()))
    ]
    write_tar(tmp_path / "0.tar", members)
    make_index(str(tmp_path), options=IndexOptions(languages=("en", "es", "de", "ru")))
    assert Shards.open(str(tmp_path), "train").column("language").to_pylist() == ["en", "es", "de", None, "ru"]
    with pytest.raises(DataError, match="unknown language 'eng'"):
        make_index(str(tmp_path), options=IndexOptions(languages=("eng",)))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ldm.data.measures import language_identifier

    monkeypatch.setitem(__import__("sys").modules, "py3langid.langid", None)
    language_identifier.cache_clear()
    with pytest.raises(MissingExtraError, match=r"py3langid.*ldm\[language\]"):
        make_index(str(tmp_path), options=IndexOptions(languages=("all",)))


def shard_with_fields(path: Path, rows: Sequence[Mapping[str, Any] | None]) -> Path:
    """A shard with a JSON file for each sample, unless it is None."""
    members = []
    for i, fields in enumerate(rows):
        members += [(f"{path.stem}{i}.png", encoded(noise_picture(i))), (f"{path.stem}{i}.txt", b"a caption")]
        members += [] if fields is None else [(f"{path.stem}{i}.json", json.dumps(fields).encode())]
    return write_tar(path, members)


def kept(source: Sequence[str], **fields: Mapping[str, Any]) -> list[str]:
    return list(
        ShardsData(tuple(source), filters=from_dict(FilterConfig, {"fields": fields}))
        .open("train")
        .all_annotations()["key"]
    )


@pytest.mark.parametrize("indexed", [False, True])
def test_a_shard_in_which_a_field_is_null_everywhere_has_unknown_values(tmp_path: Path, indexed: bool) -> None:
    shard_with_fields(tmp_path / "a.tar", [{"score": None}, {"score": None}])
    shard_with_fields(tmp_path / "b.tar", [{"score": 0.2}, {"score": 0.8}])
    if indexed:
        make_index(str(tmp_path), workers=1, options=IndexOptions(fields=("score",)))
    assert kept([str(tmp_path)], score={"min": 0.5}) == ["b1"]
    assert kept([str(tmp_path)], score={"min": 0.5, "keep_missing": True}) == ["a0", "a1", "b1"]


@pytest.mark.parametrize("indexed", [False, True])
def test_a_field_that_one_source_lacks_is_missing_there(tmp_path: Path, indexed: bool) -> None:
    sources = [str(tmp_path / "with"), str(tmp_path / "without")]
    shard_with_fields(tmp_path / "with" / "a.tar", [{"score": 0.2}, {"score": 0.8}])
    shard_with_fields(tmp_path / "without" / "b.tar", [None, None])
    for source in sources if indexed else ():
        make_index(source, workers=1)
    assert kept(sources, score={"min": 0.5, "keep_missing": True}) == ["a1", "b0", "b1"]
    if indexed:  # a filter that would drop all of a source, and a misspelled one that would keep all of both
        for name, condition in {"score": {"min": 0.5}, "scor": {"min": 0.5, "keep_missing": True}}.items():
            with pytest.raises(DataError, match=f"no column '{name}'"):
                kept(sources, **{name: condition})


def test_a_field_named_language_needs_no_index(tmp_path: Path) -> None:
    shard_with_fields(tmp_path / "a.tar", [{"language": "en"}, {"language": "de"}])
    assert kept([str(tmp_path)], language={"one_of": ["de"]}) == ["a1"]


def test_captions_in_lists_are_measured_by_the_first(tmp_path: Path) -> None:
    png = encoded(noise_picture(0))
    write_tar(
        tmp_path / "0.tar", [("0.png", png), ("0.txt", b'["four", "seventeen"]'), ("1.png", png), ("1.txt", b"{")]
    )
    make_index(str(tmp_path), options=IndexOptions(caption_format="json"))
    assert Shards.open(str(tmp_path), "train").column("caption_length").to_pylist() == [4, None]


def test_lengths_of_other_captions_than_those_of_the_training_are_not_used(tmp_path: Path) -> None:
    shard_with_fields(tmp_path / "a.tar", [{"long": "a caption of a sidecar"}, {"long": "b"}])
    make_index(str(tmp_path), options=IndexOptions())
    short = FilterConfig(max_caption_length=3)
    for settings, measured, used, option in (
        ({"caption_field": "long"}, "in .txt as text", "the field 'long' as text", "--caption-field long"),
        ({"captions": CaptionConfig(format="lines")}, "in .txt as text", ".txt as lines", "--caption-format lines"),
    ):
        data = ShardsData(str(tmp_path), size=8, filters=short, **settings)
        with pytest.raises(
            DataError, match=f"{measured}, but data.caption_field and data.captions.format read {used}"
        ) as error:
            data.open("train")
        assert option in str(error.value)
        assert len(replace(data, filters=FilterConfig(min_side=1)).open("train")) == 2  # which no caption matters to
    make_index(str(tmp_path), options=IndexOptions(caption_field="long"))
    data = ShardsData(str(tmp_path), size=8, filters=short, caption_field="long")
    assert data.open("train").all_captions("") == ["b"]
    with pytest.raises(DataError, match=r"in the field 'long' as text, but .* read \.txt as text; make it again"):
        replace(data, caption_field=None).open("train")


def test_an_index_that_does_not_say_what_it_measured_is_used_with_a_warning(tmp_path: Path) -> None:
    shard_with_fields(tmp_path / "a.tar", [{}, {}])
    index = make_index(str(tmp_path))
    table = pq.read_table(index.location)
    content = json.loads(table.schema.metadata[b"ldm"])
    del content["captions"]
    pq.write_table(table.replace_schema_metadata({b"ldm": json.dumps(content)}), index.location)
    with pytest.warns(UserWarning, match="made by an earlier version and does not say which captions it measured"):
        ShardsData(str(tmp_path), size=8, filters=FilterConfig(min_caption_length=1)).open("train")


def test_a_training_reports_its_filters_and_is_not_resumed_with_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["vae.train.max_steps=1", "data.filters.max_caption_length=8"]  # "blue car", but not "green car"
    train_stage(tiny_experiment(tmp_path, *short), "vae")
    printed = capsys.readouterr().out
    assert "data.train: 5 of 8 samples are left by data.filters" in printed
    assert "  max_caption_length: 8: 3 dropped, 5 left" in printed
    split = {
        "samples": 8,
        "filters": [{"filter": "max_caption_length: 8", "dropped": 3, "missing": 0, "left": 5}],
        "kept": 5,
    }
    assert json.loads((tmp_path / "run" / "data.json").read_text()) == {"train": split, "val": split}
    text = " ".join(re.sub(r"<[^>]+>", " ", page(Run(tmp_path / "run"))).split())
    assert "filter dropped of unknown value left all samples 8 max_caption_length: 8 3 0 5" in text
    with pytest.raises(CheckpointError, match=r"data\.filters\.max_caption_length was 8 and is now 9"):
        train_stage(tiny_experiment(tmp_path, "vae.train.max_steps=2", "data.filters.max_caption_length=9"), "vae")


def test_a_dry_run_shows_what_the_filters_drop(tmp_path: Path) -> None:
    described = describe(tiny_experiment(tmp_path, "data.filters.min_caption_length=9"), [])
    assert (
        "data.train: 3 of 8 samples are left by data.filters\n  min_caption_length: 9: 5 dropped, 3 left" in described
    )


def test_a_dry_run_goes_on_where_the_filters_cannot_be_applied(tmp_path: Path) -> None:
    changes = ["data.filters.fields.similarity.min=0.3", "data.val=null"]
    described = describe(tiny_experiment(tmp_path, *changes), [])
    assert "data.filters cannot be applied to data.train: data.filters leaves none of the 8 samples" in described
    assert "fields.similarity: min 0.3 drops 8" in described
