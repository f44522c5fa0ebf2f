from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.errors import ConfigError, DataError
from ldm.evaluation.receipt import CONDITIONS, Conditions, Receipt, Receipts, read_receipts, split_of_all
from ldm.evaluation.table import of_several, rank

TEXT = st.text(max_size=8)
NUMBER = st.floats(-1e3, 1e3, allow_nan=False)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "str": TEXT,
    "int": st.integers(0, 10**6),
    "float": NUMBER,
    "str | None": st.none() | TEXT,
    "int | None": st.none() | st.integers(0, 10**6),
    "float | None": st.none() | NUMBER,
    "Sequence[int]": st.lists(st.integers(1, 512), max_size=3).map(tuple),
    "Mapping[str, Any]": st.dictionaries(TEXT, NUMBER | TEXT | st.none(), max_size=3),
    "Mapping[str, str]": st.dictionaries(TEXT, TEXT, max_size=3),
}
"""Values of a field by its annotation; a field of another type needs an entry here."""

FIELDS = {each.name: VALUES[str(each.type)] for each in dataclasses.fields(Conditions)}
CONDITIONS_OF = st.builds(Conditions, **FIELDS)


def receipt(conditions: Conditions, value: float = 1.0, half: float = 0.1, better: str = "lower") -> Receipt:
    return Receipt("weights", value, value - half, value + half, "", better, conditions)


def example(**changes: Any) -> Conditions:
    empty = {"str": "", "int": 0, "float": 0.0, "Sequence[int]": (), "Mapping[str, Any]": {}, "Mapping[str, str]": {}}
    values = {each.name: empty.get(str(each.type)) for each in dataclasses.fields(Conditions)}
    return Conditions(**{**values, "metric": "fid", **changes})


@settings(max_examples=6)  # of each field
@given(conditions=CONDITIONS_OF, data=st.data())
@pytest.mark.parametrize("name", CONDITIONS)
def test_receipts_that_differ_in_any_field_are_not_ranked(
    name: str, conditions: Conditions, data: st.DataObject
) -> None:
    value = data.draw(FIELDS[name].filter(lambda each: each != getattr(conditions, name)))
    other = dataclasses.replace(conditions, **{name: value})
    for pair in ((conditions, other), (other, conditions)):
        found = rank([receipt(pair[0], 1.0), receipt(pair[0], 2.0), receipt(pair[1], 3.0)])
        assert not found.order
        assert found.reason.split(" differs")[0].partition(".")[0] == name
    assert rank([receipt(conditions), receipt(other, 2.0)], across=[name]).order == [0, 1]


@given(conditions=CONDITIONS_OF, values=st.lists(NUMBER, min_size=2, max_size=5, unique=True))
def test_like_receipts_are_ranked(conditions: Conditions, values: list[float]) -> None:
    for better, reverse in (("lower", False), ("higher", True)):
        order = rank([receipt(conditions, each, better=better) for each in values]).order
        assert [values[i] for i in order] == sorted(values, reverse=reverse)
    assert not rank([receipt(conditions, each, better="neither") for each in values]).order


def test_unlike_directions_and_units_are_not_ranked() -> None:
    assert "better or unit" in rank([receipt(example()), receipt(example(), better="higher")]).reason
    decibels = dataclasses.replace(receipt(example()), unit="dB")
    assert "better or unit" in rank([receipt(example()), decibels]).reason


@given(conditions=CONDITIONS_OF, value=NUMBER, infinite=st.booleans())
def test_a_receipt_survives_json(conditions: Conditions, value: float, infinite: bool) -> None:
    found = receipt(conditions, value, math.inf if infinite else 0.5)
    assert Receipt.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_a_number_that_is_not_finite_is_written_and_not_ranked(tmp_path: Path) -> None:
    broken = receipt(example(), math.nan)
    text = json.dumps(broken.to_json(), allow_nan=False)
    assert math.isnan(Receipt.from_json(json.loads(text)).value)
    assert rank([broken, receipt(example())]).reason == "a value is not finite"


def written(folder: Path, name: str, *numbers: Receipt) -> Receipts:
    receipts = Receipts(name, "2026-01-01T00:00:00+00:00", {}, numbers)
    receipts.write(folder / f"{name}.json")
    assert read_receipts(folder / f"{name}.json") == dataclasses.replace(receipts, numbers=list(numbers))
    return receipts


def test_the_table_ranks_like_numbers_and_says_why_others_are_not(tmp_path: Path) -> None:
    psnr = example(metric="psnr")
    first = written(tmp_path, "first", receipt(example(), 1.0), receipt(psnr, 20, better="higher"))
    second = written(tmp_path, "second", receipt(example(dtype="bfloat16"), 2.0), receipt(psnr, 25, better="higher"))
    lines = of_several([first, second]).splitlines()
    row = {line.split()[0]: line for line in lines if line}
    assert row["fid"].endswith("not ranked")
    assert row["psnr"].endswith("A < B")
    assert "not ranked (fid): dtype differs (, bfloat16)" in lines
    assert row["fid"].split()[1:4] == ["1", "[0.9,", "1.1]"]
    assert "B < A" in of_several([first, second], across=["dtype"])
    assert "A = A" not in of_several([first, first])
    assert "B = A (intervals overlap)" in of_several([first, first])
    third = written(tmp_path, "third", receipt(example(), 1.05))
    assert "(intervals overlap)" in of_several([first, third])


def test_run_folders_are_compared_by_the_split_that_all_have(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, splits in zip(folders, (("val", "test"), ("val",)), strict=True):
        folder.mkdir()
        for split in splits:
            written(folder, f"receipts-{split}", receipt(example(split=split)))
    assert split_of_all(folders) == "val"
    assert split_of_all(folders[:1]) == "test"
    for split in ("val", "test"):
        assert read_receipts(folders[0], split).numbers[0].conditions.split == split
    assert read_receipts(folders[0]).numbers[0].conditions.split == "test"


def test_an_unknown_field_and_another_file_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown field of receipts 'step'; did you mean 'steps'"):
        rank([receipt(example()), receipt(example())], across=["step"])
    with pytest.raises(DataError, match=r"receipts-val\.json does not exist; write it"):
        read_receipts(tmp_path)
    for content in (
        "{",
        "[]",
        "[" * 100_000,
        '{"format": "other"}',
        '{"format": "ldm.evaluation.1", "numbers": [{"value": 1}]}',
    ):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(DataError, match=r"other\.json is not a file of receipts"):
            read_receipts(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("value", "one"),
        ("low", [1]),
        ("unit", 3),
        ("more", 3),
        ("metric", [1]),
        ("n", "many"),
        ("parameters", [1]),
        ("versions", None),
        ("conditions", 3),
        ("request", 3),
        ("numbers", [3]),
    ],
)
def test_a_value_of_another_type_is_one_sentence(place: str, value: Any, tmp_path: Path) -> None:
    written(tmp_path, "run", receipt(example()))
    content = json.loads((tmp_path / "run.json").read_text())
    number = content["numbers"][0]
    inner = content if place in content else number["conditions"] if place in number["conditions"] else number
    inner[place] = value
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"run\.json is not a file of receipts"):
        read_receipts(tmp_path / "run.json")
