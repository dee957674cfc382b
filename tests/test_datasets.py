"""Attribute data: columns found or refused, SAEBench's selection of rows, what bad files say."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from evaluate.probing import datasets as module
from evaluate.probing.datasets import HUB, AttributeData, Columns, Table, find_columns, load_attribute_data, oriented
from evaluate.probing.tasks import SetSizes, balanced, cells, class_tasks, one_against_rest, scr_contrasts, scr_task
from pipeline.base.errors import CorpusError, PipelineError, UsageError
from support.fuzzing import BAD, as_bytes, hurt, mutated, one_line_or_none


def rows(n: int, seed: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Texts with an author of two and a gender of two, cells of unequal size, in an order without a pattern."""
    rng = np.random.default_rng(seed)
    pairs = [("austen", "female")] * 4 + [("other", "male")] * 4 + [("austen", "male"), ("other", "female")] * 2
    return [
        {"text": f"text {i}", "author": author, "gender": gender, **more}
        for i, (author, gender) in enumerate(pairs[j] for j in rng.integers(0, len(pairs), n))
    ]


def write(path: Path, data: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in data).encode()
    path.write_bytes(zstandard.ZstdCompressor().compress(text) if path.suffix == ".zst" else text)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl.zst", rows(300, 0, source="book", document="7"))
    write(tmp_path / "test.jsonl", rows(150, 1, source="book", document="8"))
    return tmp_path


def test_folder_and_file_pair_read_alike(folder: Path) -> None:
    """A folder and a pair of files read the same."""
    one = load_attribute_data(str(folder))
    two = load_attribute_data(f"{folder / 'train.jsonl.zst'},{folder / 'test.jsonl'}")
    assert (one.train, one.test) == (two.train, two.test)
    assert one.columns == Columns("text", "author", "gender")
    assert len(one.train) == 300
    assert (
        one.sha256() == two.sha256() != load_attribute_data(f"{folder / 'test.jsonl'},{folder / 'test.jsonl'}").sha256()
    )


def test_named_columns_win_over_found_ones(folder: Path) -> None:
    """Named columns win over found ones."""
    data = load_attribute_data(str(folder), "text", ("gender", "author"))
    assert data.columns == Columns("text", "gender", "author")


def test_two_valued_columns_are_the_attributes() -> None:
    """Two-valued columns are the attributes even beside others of few values."""
    data = [row | {"place": "abc"[i % 3]} for i, row in enumerate(rows(60))]
    assert find_columns(Path("x"), data, None, None) == Columns("text", "author", "gender")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: {"third": "xy"[i % 2]}, "3 columns may be the attributes"),
        (lambda i: {"gender": "same"}, "1 columns may be the attributes"),
    ],
)
def test_ambiguous_columns_are_refused_by_name(folder: Path, change: Any, message: str) -> None:
    """Ambiguous columns are refused by name."""
    write(folder / "test.jsonl", rows(60))
    (folder / "train.jsonl.zst").unlink()
    write(folder / "train.jsonl", [row | change(i) for i, row in enumerate(rows(60))])
    with pytest.raises(UsageError, match=message):
        load_attribute_data(str(folder))


def test_missing_column_is_named(folder: Path) -> None:
    """A column that is not there is named."""
    with pytest.raises(UsageError, match=r"no column 'sex'; there are text, author"):
        load_attribute_data(str(folder), None, ("author", "sex"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\nnot json\n', "jsonl:2: is not JSON"),
        (b"[1, 2]\n", "jsonl:1: is a list, expected a JSON object"),
        (b"\n", "there is no row"),
        (b"\xff\xfe\n", "is not UTF-8"),
    ],
)
def test_malformed_file_says_where(folder: Path, content: bytes, message: str) -> None:
    """A malformed file says where."""
    (folder / "test.jsonl").write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        load_attribute_data(str(folder))


def test_missing_files_are_refused(tmp_path: Path) -> None:
    """Missing files are refused."""
    with pytest.raises(CorpusError, match=r"expected one file train.jsonl"):
        load_attribute_data(str(tmp_path))
    with pytest.raises(CorpusError, match="not a folder"):
        load_attribute_data(str(tmp_path / "nowhere"))
    with pytest.raises(CorpusError, match="no such file"):
        load_attribute_data("a.jsonl,b.jsonl")


@pytest.mark.parametrize("name", ["train.jsonl.zst", "test.jsonl"])
def test_pipe_among_texts_is_named(folder: Path, name: str) -> None:
    """A pipe where texts of probing should be is refused by name, and not waited for."""
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for source in (str(folder), f"{folder / 'train.jsonl.zst'},{folder / 'test.jsonl'}"):
        with pytest.raises(PipelineError, match=rf"{re.escape(name)}: a pipe, expected a regular file"):
            load_attribute_data(source)


def test_blank_texts_are_counted(folder: Path) -> None:
    """Blank texts are left out and counted."""
    write(folder / "test.jsonl", [*rows(40), rows(1)[0] | {"text": "  \n"}])
    data = load_attribute_data(str(folder))
    assert (len(data.test), data.test.n_blank) == (40, 1)


def test_row_without_the_column_is_named(folder: Path) -> None:
    """A row without the column is named."""
    write(folder / "test.jsonl", [*rows(40), {"text": "a", "author": "austen"}])
    with pytest.raises(CorpusError, match="row 40 has no column 'gender'"):
        load_attribute_data(str(folder))


def test_many_values_need_pairs(folder: Path) -> None:
    """More than two first values need pairs and give classes."""
    more = [row | {"author": ["a", "b", "c"][i % 3]} for i, row in enumerate(rows(120))]
    write(folder / "train.jsonl.zst", more)
    write(folder / "test.jsonl", more)
    with pytest.raises(UsageError, match=r"'author' has 3 values \(a, b, c\); .* --scr-pair a,b"):
        load_attribute_data(str(folder), None, ("author", "gender"))
    data = load_attribute_data(str(folder), None, ("author", "gender"), (("c", "a"),))
    assert (data.first_pairs, data.classes) == ((("c", "a"),), ("a", "b", "c"))
    with pytest.raises(UsageError, match="has no value 'd'; it has a, b, c"):
        load_attribute_data(str(folder), None, ("author", "gender"), (("c", "d"),))


def test_second_pair_is_turned_to_agree() -> None:
    """The second pair is turned so that the larger cells agree."""
    first = ("a",) * 6 + ("b",) * 6
    second = ("x",) * 2 + ("y",) * 4 + ("x",) * 4 + ("y",) * 2
    table = Table(("t",) * 12, first, second)
    assert oriented(table, ("a", "b"), ("x", "y")) == ("y", "x")
    assert oriented(table, ("b", "a"), ("x", "y")) == ("x", "y")


# ---- the Hub sets, from local tables of the same shape ----


def hub_table(source: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Rows as the Hub has them: columns, types and values."""
    columns, rng = HUB[source].columns, np.random.default_rng(seed)
    values = sorted({v for pair in HUB[source].first_pairs for v in pair} | set(HUB[source].classes))
    return [
        {
            columns.text: f"{source} {i}",
            columns.first: int(rng.choice(values)),
            columns.second: rng.choice(HUB[source].second_pair).item(),
        }
        for i in range(n)
    ]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: dict[tuple[str, str], list[dict[str, Any]]] = {
        (source, split): hub_table(source, n, seed)
        for source in HUB
        for seed, (split, n) in enumerate({"train": 900, "test": 700}.items())
    }

    def rows_of(source: str, split: str) -> list[Mapping[str, Any]]:
        return list(tables[source, split])

    monkeypatch.setattr(module, "hub_rows", rows_of)


@pytest.mark.parametrize("source", list(HUB))
def test_hub_sets_give_saebench_pairs(hub: None, source: str) -> None:
    """Hub sets give SAEBench pairs and classes."""
    data = load_attribute_data(source)
    assert len(data.first_pairs) == 4
    a, b = data.first_pairs[1]
    assert load_attribute_data(source, pairs=((data.label(b), str(a)),)).first_pairs == ((b, a),)
    assert len(data.classes) == 5
    task = scr_task(data, data.first_pairs[0], (42,), True, SetSizes(60, 40))
    expected = {
        "LabHC/bias_in_bios": "professor / nurse",
        "canrager/amazon_reviews_mcauley_1and5": "Books / CDs_and_Vinyl",
    }
    assert task.name == f"{source}: {expected[source]}"
    assert task.n_rows() == {"train": 4 * 15, "test": 4 * 10}
    (classes,) = class_tasks(data, (42,), True, SetSizes(40, 32))
    assert classes.scores == ("tpp", "k_sparse_probe")
    assert classes.probes == tuple(str(c) for c in HUB[source].classes)


def saebench_lists(
    frame: pd.DataFrame, pair: tuple[Any, Any], second: tuple[Any, Any], n: int, seed: int
) -> list[list[str]]:
    """The six lists as EVALUATION.md 2.1 gives them, with pandas and shuffled texts."""
    q = {(a, b): frame[(frame["c1"] == a) & (frame["c2"] == b)]["text"].tolist() for a in pair for b in second}
    (p, m), (ng, f) = (pair[0], second[0]), (pair[1], second[1])
    lists = [
        q[p, m][:n] + q[ng, m][:n],
        q[p, f][:n] + q[ng, f][:n],
        q[p, m][:n] + q[p, f][:n],
        q[ng, m][:n] + q[ng, f][:n],
        q[p, m][: 2 * n],
        q[ng, f][: 2 * n],
    ]
    rng = np.random.default_rng(seed)
    for texts in lists:
        rng.shuffle(texts)
    return lists


def table_of(n: int, seed: int) -> Table:
    rng = np.random.default_rng(seed)
    return Table(
        tuple(f"t{i}" for i in range(n)),
        tuple(rng.integers(0, 3, n).tolist()),
        tuple(rng.choice([1.0, 5.0], n).tolist()),
    )


@given(seed=st.integers(0, 20), n=st.integers(8, 20))
def test_first_seed_takes_saebench_rows(seed: int, n: int) -> None:
    """The first seed takes SAEBench rows in file order."""
    table = table_of(600, seed)
    frame = pd.DataFrame({"text": table.text, "c1": table.first, "c2": table.second})
    found = scr_contrasts(cells(table, (2, 0), (1.0, 5.0)), n, 42, False, "x")
    lists = [part for name in ("second", "first", "both") for part in (found[name].positive, found[name].negative)]
    assert [[table.text[i] for i in part] for part in lists] == saebench_lists(frame, (2, 0), (1.0, 5.0), n, 42)


@given(seed=st.integers(0, 20), n=st.integers(8, 25))
def test_class_rows_are_what_pandas_samples(seed: int, n: int) -> None:
    """Class rows are what pandas samples."""
    table = table_of(400, seed)
    frame = pd.DataFrame({"text": table.text, "c1": table.first, "c2": table.second})
    strata = {
        str(c): [np.array([i for i in range(400) if table.first[i] == c and table.second[i] == v]) for v in (1.0, 5.0)]
        for c in range(3)
    }
    found = balanced(strata, 2 * n, 42, "x")
    for c in range(3):
        expected = [
            t for _, group in frame[frame["c1"] == c].groupby("c2") for t in group.sample(n=n, random_state=42)["text"]
        ]
        assert [table.text[i] for i in found[str(c)]] == expected


def local_data(n: int = 400) -> AttributeData:
    data = [Table(*zip(*((r["text"], r["author"], r["gender"]) for r in rows(n, seed)))) for seed in (0, 1)]
    return AttributeData(
        "local", Columns("text", "author", "gender"), data[0], data[1], (("austen", "other"),), ("female", "male")
    )


def test_further_seeds_take_other_rows() -> None:
    """Further seeds use other rows of the same cells or the same rows."""
    data = local_data()
    fixed, resampled = (scr_task(data, ("austen", "other"), (42, 43), r, SetSizes(40, 40)) for r in (False, True))
    first = {name: [set(c.positive.tolist()) for c in pair] for name, pair in fixed.draws[0].items()}
    assert all([set(c.positive.tolist()) for c in pair] == first[name] for name, pair in fixed.draws[1].items())
    assert fixed.draws[0]["first"][0].positive.tolist() != fixed.draws[1]["first"][0].positive.tolist()  # other order
    assert set(resampled.draws[1]["first"][0].positive.tolist()) != first["first"][0]
    for train, test in resampled.draws[1].values():
        assert train.rows.max() < len(data.train) <= test.rows.min()
    positive = resampled.draws[1]["both"][0].positive
    assert {(data.train.first[i], data.train.second[i]) for i in positive} == {("austen", "female")}


def test_two_by_two_serves_both_tasks() -> None:
    """Two by two values give cells to TPP and each attribute to probing."""
    tasks = class_tasks(local_data(), (42,), True, SetSizes(80, 80))
    assert [(t.name, t.scores) for t in tasks] == [
        ("local: cells", ("tpp",)),
        ("local: author", ("k_sparse_probe",)),
        ("local: gender", ("k_sparse_probe",)),
    ]
    assert tasks[0].probes == ("austen, female", "austen, male", "other, female", "other, male")
    assert tasks[2].probes == ("female",)  # the other class is its mirror image


@given(n_classes=st.integers(2, 6), n=st.integers(1, 30))
def test_negatives_match_positives(n_classes: int, n: int) -> None:
    """Negatives are as many as positives and even over the other classes."""
    positives = {str(c): np.arange(c * 100, c * 100 + n) for c in range(n_classes)}
    for name, contrast in one_against_rest(positives, 1, "train").items():
        assert len(contrast.positive) == len(contrast.negative) == n
        classes = contrast.negative // 100
        assert int(name) not in classes
        counts = np.bincount(classes, minlength=n_classes)
        assert counts.max() <= -(-n // (n_classes - 1))
        assert len(set(contrast.negative.tolist())) == n


def test_too_small_a_set_is_refused() -> None:
    """A data set that holds less gives what it has and too little is refused."""
    data = local_data(200)
    sizes = scr_task(data, ("austen", "other"), (42,), True, SetSizes()).n_rows()
    cell = cells(data.train, ("austen", "other"), ("female", "male"))
    n = min(*(len(v) for v in cell.values()), (min(len(cell[True, True]), len(cell[False, False])) - 1) // 2)
    assert sizes["train"] == 4 * n
    with pytest.raises(CorpusError, match="at least 8 of each"):
        scr_task(local_data(20), ("austen", "other"), (42,), True, SetSizes())
    with pytest.raises(CorpusError, match="at least 8 are needed"):
        class_tasks(local_data(20), (42,), True, SetSizes())


def test_unreachable_hub_set_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub set that cannot be had says so."""
    import datasets

    def fail(*_args: Any, **_kw: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(CorpusError, match=r"^LabHC/bias_in_bios: .*the Hub cannot be reached"):
        load_attribute_data("LabHC/bias_in_bios")


def fuzz_texts(folder: Path, n: int, seed: int) -> int:
    """Read n data sets of which one row, or the bytes of one file, were changed; how many were refused."""
    rng, refused = random.Random(seed), 0
    whole = {name: rows(24, i, source="book") for i, name in enumerate(("train.jsonl", "test.jsonl"))}
    for _ in range(n):
        for name, data in whole.items():
            at = rng.randrange(len(data))
            lines = [json.dumps(row).encode() for row in data]
            lines[at] = as_bytes(mutated(data[at], rng), rng)
            raw = b"\n".join(lines) + b"\n"
            (folder / name).write_bytes(hurt(raw, rng) if rng.random() < 0.2 else raw)
        text = rng.choice([None, "text", str(rng.choice(BAD))])
        attributes = rng.choice([None, ("author", "gender"), ("gender", "source")])
        pairs = rng.choice([(), (("austen", "other"),)])
        read = partial(load_attribute_data, str(folder), text, attributes, pairs)
        refused += one_line_or_none(lambda read=read: read().sha256(), folder / "train.jsonl")  # type: ignore[misc]
    return refused


def test_hostile_texts_end_in_one_line(tmp_path: Path) -> None:
    """Whatever a data set of probing holds, it is read or refused in one line that names it."""
    assert 100 < fuzz_texts(tmp_path, 300, seed=1) < 300


@pytest.mark.slow
def test_hostile_texts_end_in_line(tmp_path: Path) -> None:
    """Likewise, ten thousand."""
    assert 3000 < fuzz_texts(tmp_path, 10_000, seed=2) < 10_000
