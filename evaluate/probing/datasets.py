"""Texts with two attributes: where probing scores take their rows from. Hub data sets, or local JSON lines.

A data set is two tables (train, test) of rows (text, first attribute, second attribute), in file order. The two Hub sets
are SAEBench's, with its columns, pairs and classes (EVALUATION.md 2.1); a local one is a folder with train.* and test.*,
or two files, `TRAIN,TEST`, in any format that `pipeline.base.records` reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.base import network
from pipeline.base.errors import CorpusError, UsageError, first_line
from pipeline.base.fields import problems
from pipeline.base.files import canonical_json, sha256
from pipeline.base.record_files import regular_files
from pipeline.base.records import READERS, kind_of, whole_records

Value = str | int | float | bool
Pair = tuple[Value, Value]
"""A positive and a negative value of an attribute."""
MAX_VALUES = 64
"""A column with more distinct values than this is not taken for an attribute."""


@dataclass(frozen=True)
class Columns:
    """Names of a data set's columns: the text, the first attribute (what a probe is for), the second (the spurious one)."""

    text: str
    first: str
    second: str


@dataclass(frozen=True)
class Table:
    """Rows in file order: three columns of equal length. Rows whose text is blank are left out and counted."""

    text: tuple[str, ...]
    first: tuple[Value, ...]
    second: tuple[Value, ...]
    n_blank: int = 0

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class AttributeData:
    """A data set read whole: what it is called, its columns and tables, and which values its tasks compare.

    `first_pairs`: (positive, negative) values of the first attribute, one SCR task each; `second_pair`: of the second.
    `classes`: values of the first attribute that class tasks tell apart; empty where it has but two values.
    """

    name: str
    columns: Columns
    train: Table
    test: Table
    first_pairs: tuple[Pair, ...]
    second_pair: Pair
    classes: tuple[Value, ...] = ()
    names: Mapping[Value, str] = field(default_factory=dict)

    def label(self, value: Value) -> str:
        """What people call a value of the first attribute."""
        return self.names.get(value, str(value))

    def sha256(self) -> str:
        """Hash of every row of both tables: names the data in cache keys and results."""
        parts = [[t.text, t.first, t.second] for t in (self.train, self.test)]
        return sha256(canonical_json(parts))


@dataclass(frozen=True)
class HubSpec:
    """What SAEBench takes from a Hub data set. `first_pairs` and `classes` are column values, `names` are for people."""

    columns: Columns
    first_pairs: tuple[Pair, ...]
    second_pair: Pair
    classes: tuple[Value, ...]
    names: Mapping[Value, str] = field(default_factory=dict)


PROFESSIONS: dict[Value, str] = {
    0: "accountant",
    1: "architect",
    2: "attorney",
    6: "dentist",
    9: "filmmaker",
    11: "journalist",
    13: "nurse",
    21: "professor",
    22: "psychologist",
    25: "surgeon",
    26: "teacher",
}
CATEGORIES: dict[Value, str] = {
    1: "Toys_and_Games",
    2: "Cell_Phones_and_Accessories",
    3: "Industrial_and_Scientific",
    5: "Musical_Instruments",
    6: "Electronics",
    11: "Office_Products",
    18: "Pet_Supplies",
    24: "Books",
    26: "CDs_and_Vinyl",
    30: "Software",
}
HUB: dict[str, HubSpec] = {
    "LabHC/bias_in_bios": HubSpec(
        Columns("hard_text", "profession", "gender"),
        ((21, 13), (1, 11), (25, 22), (2, 26)),
        (0, 1),  # male, female
        (0, 1, 2, 6, 9),
        PROFESSIONS,
    ),
    "canrager/amazon_reviews_mcauley_1and5": HubSpec(
        Columns("text", "category", "rating"),
        ((24, 26), (30, 6), (18, 11), (3, 1)),
        (1.0, 5.0),
        (1, 2, 3, 5, 6),
        CATEGORIES,
    ),
}


def load_attribute_data(
    source: str,
    text: str | None = None,
    attributes: tuple[str, str] | None = None,
    pairs: Sequence[tuple[str, str]] = (),
) -> AttributeData:
    """Read a data set: one of HUB by id, a local folder with train.* and test.*, or `TRAIN,TEST`.

    `text` and `attributes` name the columns of a local set; without them the one text column and the two columns with
    few values are found, or UsageError says why not. `pairs` are the (positive, negative) values of the first attribute
    that SCR compares, as they or their names are written; a local set of more than two values needs them. Raises
    CorpusError for files that are missing or malformed.
    """
    if source in HUB:
        spec = HUB[source]
        train, test = (to_table(hub_rows(source, split), spec.columns, source) for split in ("train", "test"))
        first_pairs = named_pairs(pairs, distinct(train.first), spec.names, source) or spec.first_pairs
        return AttributeData(source, spec.columns, train, test, first_pairs, spec.second_pair, spec.classes, spec.names)
    train_path, test_path = local_paths(source)
    train_rows, test_rows = whole_records(train_path), whole_records(test_path)
    columns = find_columns(train_path, train_rows, text, attributes)
    train, test = to_table(train_rows, columns, train_path), to_table(test_rows, columns, test_path)
    first, second = distinct(train.first), distinct(train.second)
    if len(second) != 2:
        raise UsageError(
            f"{source}: the second attribute {columns.second!r} has {len(second)} values, two are needed; swap or name the "
            f"attributes"
        )
    if not pairs and len(first) != 2:
        raise UsageError(
            f"{source}: {columns.first!r} has {len(first)} values ({listed(first)}); say which two of them SCR compares: "
            f"--scr-pair {first[0]},{first[1]}"
        )
    first_pairs = named_pairs(pairs, first, {}, source) or ((first[0], first[1]),)
    second_pair = oriented(train, first_pairs[0], (second[0], second[1]))
    return AttributeData(source, columns, train, test, first_pairs, second_pair, first if len(first) > 2 else ())


def named_pairs(
    pairs: Sequence[tuple[str, str]], values: Sequence[Value], names: Mapping[Value, str], source: str
) -> tuple[Pair, ...]:
    """Pairs of values from how they, or their names, are written. Raises UsageError for one that is not there."""
    written = {str(value): value for value in values} | {names[value]: value for value in values if value in names}
    for name in (name for pair in pairs for name in pair if name not in written):
        raise UsageError(f"{source}: the first attribute has no value {name!r}; it has {listed(sorted(written))}")
    return tuple((written[positive], written[negative]) for positive, negative in pairs)


def listed(values: Iterable[Value]) -> str:
    """The first few of some values, for a message."""
    held = list(values)
    return ", ".join(str(value)[:80] for value in held[:12]) + (", …" if len(held) > 12 else "")


def oriented(table: Table, first: Pair, second: Pair) -> Pair:
    """The second attribute's values, swapped where that makes the two cells in which both attributes agree larger.

    SCR confounds the attributes by using those cells alone, and needs twice as many rows of them.
    """
    count = Counter(zip(table.first, table.second))
    agree, differ = (min(count[first[0], a], count[first[1], b]) for a, b in (second, second[::-1]))
    return (second[1], second[0]) if differ > agree else second


def hub_rows(source: str, split: str) -> Iterable[Mapping[str, Any]]:
    """Rows of one split of a Hub data set, in its order. Raises CorpusError when it cannot be had."""
    import datasets

    def load() -> Iterable[Mapping[str, Any]]:
        return datasets.load_dataset(source, split=split)  # type: ignore[no-any-return]

    try:
        with network.hub_errors(source, CorpusError, f"https://huggingface.co/datasets/{source}"):
            return network.retried(load, source)
    except CorpusError:
        raise
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"{source}: split {split!r} cannot be loaded ({first_line(error)}); give a local folder instead"
        ) from error


def require_source(source: str) -> None:
    """Raise CorpusError unless texts are there by this name: files here, or a data set of the Hub that is known."""
    if source not in HUB:
        local_paths(source)


def local_paths(source: str) -> tuple[Path, Path]:
    """The train and test file of a folder or of `TRAIN,TEST`. Raises CorpusError when one is not there."""
    if "," in source:
        train, test = (Path(part) for part in source.split(",", 1))
    elif Path(source).is_dir():
        train, test = (only_file(Path(source), split) for split in ("train", "test"))
    else:
        raise CorpusError(
            f"{source}: not a folder with train.jsonl and test.jsonl, nor TRAIN,TEST, nor one of {', '.join(HUB)}"
        )
    for path in (train, test):
        if not path.exists():
            raise CorpusError(f"{path}: no such file")
    return train, test


def only_file(folder: Path, split: str) -> Path:
    """`train.jsonl`, `train.parquet` and the like. Raises CorpusError unless exactly one is there."""
    found = [path for path in regular_files(sorted(folder.glob(f"{split}.*"))) if kind_of(path) in READERS]
    if len(found) != 1:
        raise CorpusError(f"{folder}: expected one file {split}.jsonl, .csv, .parquet or the like, found {len(found)}")
    return found[0]


def find_columns(
    path: Path, rows: list[dict[str, Any]], text: str | None, attributes: tuple[str, str] | None
) -> Columns:
    """The columns named, or the only ones they can be: attributes are the two columns with exactly two values, or else
    the two with few. Raises UsageError naming what there is."""
    names = list(rows[0])
    wanted = [name for name in (text, *(attributes or ())) if name is not None]
    absent = [name for name in wanted if name not in names]
    if absent:
        raise UsageError(f"{path}: no column {absent[0][:80]!a}; there are {listed(names)}")
    few = {name: n for name in names if name != text and (n := n_values(rows, name))}
    found = [name for name, n in few.items() if n == 2] or list(few)
    if attributes is None and len(found) != 2:
        raise UsageError(f"{path}: {len(found)} columns may be the attributes ({listed(found)}); name the two to use")
    first, second = attributes or (found[0], found[1])
    texts = [n for n in names if n not in (first, second) and isinstance(rows[0][n], str)]
    if text is None and "text" not in texts and len(texts) != 1:
        raise UsageError(f"{path}: {len(texts)} columns look like text ({listed(texts)}); name the one to use")
    return Columns(text or ("text" if "text" in texts else texts[0]), first, second)


def n_values(rows: list[dict[str, Any]], name: str) -> int:
    """How many distinct plain values a column has; 0 where it cannot be an attribute: one value, too many, or others."""
    values = [row.get(name) for row in rows]
    if not all(isinstance(value, str | int | float | bool) for value in values):
        return 0
    n = len(set(values))
    return n if 2 <= n <= min(MAX_VALUES, len(rows) // 2) else 0


def to_table(rows: Iterable[Mapping[str, Any]], columns: Columns, where: object) -> Table:
    """Rows as columns, in order. Raises CorpusError naming the first row that lacks a column."""
    kept: list[tuple[str, Value, Value]] = []
    n_blank = 0
    for number, row in enumerate(rows):
        try:
            text, first, second = row[columns.text], row[columns.first], row[columns.second]
        except KeyError as error:
            raise CorpusError(f"{where}: row {number} has no column {str(error)[:80]}; it has {listed(row)}") from error
        if not isinstance(text, str):
            raise CorpusError(f"{where}: row {number}: {columns.text[:80]!a} is {type(text).__name__}, not text")
        for name, value in ((columns.first, first), (columns.second, second)):
            if not isinstance(value, str | int | float | bool):
                raise CorpusError(
                    f"{where}: row {number}: {name[:80]!a} is {type(value).__name__}, not text or a number"
                )
        if problem := next(problems({columns.text: text, columns.first: first, columns.second: second}), None):
            raise CorpusError(f"{where}: row {number}: {problem}; put it right, or leave the row out")
        if text.strip():
            kept.append((text, first, second))
        else:
            n_blank += 1
    texts, first_values, second_values = zip(*kept) if kept else ((), (), ())
    return Table(texts, first_values, second_values, n_blank)


def distinct(values: Iterable[Value]) -> tuple[Value, ...]:
    """Each value once, in rising order (as text where types are mixed)."""
    found = set(values)
    return tuple(sorted(found, key=None if len({type(v) for v in found}) == 1 else str))
