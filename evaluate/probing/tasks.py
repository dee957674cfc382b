"""Which rows each probe is trained and tested on: the tasks of SCR, TPP and k-sparse probing, drawn for every seed.

A task has, for each seed, named contrasts: rows that are positive against rows that are negative, in train and in test.
SCR has three ("second", "first", "both": the spurious attribute, the one of interest, and the two confounded); a class
task has one a class. Rows index the texts of the task's group. Protocol: SAEBench 0.6 (EVALUATION.md 2.1, 2.3).

What a seed changes: the shuffles, the draw of negatives in class tasks, the probes' initialisation and batch order; and,
with `resample`, which rows are used: the first seed takes SCR rows in file order as SAEBench does, every further one
takes each cell's rows in an order of its own. Class tasks draw their rows by seed in SAEBench too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluate.probing.datasets import AttributeData, Table, Value, distinct
from pipeline.base.errors import CorpusError
from pipeline.base.runtime import numpy_rng

Rows = npt.NDArray[np.int64]
MIN_ROWS = 8
"""Fewest rows a cell must hold for a task to be worth scoring."""


@dataclass(frozen=True)
class Contrast:
    """Rows of one probe's data: `positive` against `negative`, each int64 [row]."""

    positive: Rows
    negative: Rows

    @property
    def rows(self) -> Rows:
        """Positives, then negatives."""
        return np.concatenate([self.positive, self.negative])

    @property
    def labels(self) -> npt.NDArray[np.float32]:
        """1 for positives, 0 for negatives, in the order of `rows`."""
        return np.repeat(np.array([1, 0], np.float32), [len(self.positive), len(self.negative)])

    def moved(self, offset: int) -> Contrast:
        """The same contrast in a table whose rows begin at `offset`."""
        return Contrast(self.positive + offset, self.negative + offset)


Draw = dict[str, tuple[Contrast, Contrast]]
"""Of one seed: probe name → its (train, test) contrast."""


@dataclass(frozen=True)
class Task:
    """One data set of probes, drawn once for each seed; `scores` says which scores it is for."""

    name: str
    scores: tuple[str, ...]
    draws: tuple[Draw, ...]

    @property
    def probes(self) -> tuple[str, ...]:
        """Names of its probes, the same for every seed."""
        return tuple(self.draws[0])

    def n_rows(self) -> dict[str, int]:
        """Rows a probe is trained and tested on."""
        train, test = next(iter(self.draws[0].values()))
        return {"train": len(train.rows), "test": len(test.rows)}


@dataclass(frozen=True)
class SetSizes:
    """SAEBench's set sizes: a quarter of each is one cell's rows. A data set that holds less gives what it has."""

    train: int = 4000
    test: int = 1000


def scr_task(
    data: AttributeData, pair: tuple[Value, Value], seeds: Sequence[int], resample: bool, sizes: SetSizes
) -> Task:
    """SCR on one pair of values of the first attribute. Raises CorpusError when a cell holds too few rows."""
    name = f"{data.name}: {data.label(pair[0])} / {data.label(pair[1])}"
    draws = []
    for i, seed in enumerate(seeds):
        splits = [
            scr_contrasts(cells(table, pair, data.second_pair), size // 4, seed, resample and i > 0, name)
            for table, size in ((data.train, sizes.train), (data.test, sizes.test))
        ]
        draws.append(joined(splits, len(data.train)))
    return Task(name, ("scr",), tuple(draws))


def cells(table: Table, first: tuple[Value, Value], second: tuple[Value, Value]) -> dict[tuple[bool, bool], Rows]:
    """Rows of each (first is positive, second is positive), in file order."""
    signs = {True: 0, False: 1}
    a = {sign: np.array([v == first[i] for v in table.first], bool) for sign, i in signs.items()}
    b = {sign: np.array([v == second[i] for v in table.second], bool) for sign, i in signs.items()}
    return {(x, y): np.flatnonzero(a[x] & b[y]) for x in signs for y in signs}


def scr_contrasts(
    cell: dict[tuple[bool, bool], Rows], n: int, seed: int, permute: bool, where: str
) -> dict[str, Contrast]:
    """The six lists of 2n rows of one split, shuffled one after another by one default_rng(seed), as three contrasts.

    The cells where both attributes agree give the "both" contrast and need more than 2n rows, as SAEBench asks.
    """
    n = min(n, *map(len, cell.values()), (min(len(cell[True, True]), len(cell[False, False])) - 1) // 2)
    if n < MIN_ROWS:
        counts = ", ".join(f"{len(rows)}" for rows in cell.values())
        raise CorpusError(
            f"{where}: its cells hold {counts} rows; at least {MIN_ROWS} of each, twice that + 1 where both agree"
        )
    if permute:
        cell = {key: numpy_rng("scr rows", seed, *map(int, key)).permutation(rows) for key, rows in cell.items()}
    pp, pn, neg_pos, nn = (cell[key].tolist() for key in ((True, True), (True, False), (False, True), (False, False)))
    lists = [pp[:n] + neg_pos[:n], pn[:n] + nn[:n], pp[:n] + pn[:n], neg_pos[:n] + nn[:n], pp[: 2 * n], nn[: 2 * n]]
    rng = np.random.default_rng(seed)
    for rows in lists:
        rng.shuffle(rows)
    arrays = [np.array(rows, np.int64) for rows in lists]
    return {name: Contrast(arrays[2 * i], arrays[2 * i + 1]) for i, name in enumerate(("second", "first", "both"))}


def joined(splits: Sequence[dict[str, Contrast]], n_train: int) -> Draw:
    """Train and test contrasts by probe; test rows come after the training table's."""
    train, test = splits
    return {name: (train[name], test[name].moved(n_train)) for name in train}


def class_tasks(data: AttributeData, seeds: Sequence[int], resample: bool, sizes: SetSizes) -> list[Task]:
    """Tasks of one-against-the-rest classes, for TPP and k-sparse probing.

    With more than two classes: one task for both scores, each class balanced over the second attribute. With two by two
    values: TPP on the four cells, since the two classes of one attribute are each other's mirror image (what hurts one
    probe hurts the other, and TPP is zero by construction); k-sparse probing on each attribute, balanced over the other.
    """
    if data.classes:
        strata = [class_strata(t, t.first, t.second, data.classes) for t in (data.train, data.test)]
        return [class_task(data, "classes", ("tpp", "k_sparse_probe"), strata, seeds, resample, sizes)]
    both = [tuple(zip(t.first, t.second)) for t in (data.train, data.test)]
    values = sorted({*both[0]}, key=str)
    strata = [
        {f"{a}, {b}": [np.array([i for i, v in enumerate(rows) if v == (a, b)], np.int64)] for a, b in values}
        for rows in both
    ]
    tasks = [class_task(data, "cells", ("tpp",), strata, seeds, resample, sizes)]
    for name, columns in (
        (data.columns.first, [(t.first, t.second) for t in (data.train, data.test)]),
        (data.columns.second, [(t.second, t.first) for t in (data.train, data.test)]),
    ):
        strata = [class_strata(t, of, over, distinct(of)) for t, (of, over) in zip((data.train, data.test), columns)]
        tasks.append(one_of_two(class_task(data, name, ("k_sparse_probe",), strata, seeds, resample, sizes)))
    return tasks


def one_of_two(task: Task) -> Task:
    """Only the first class of two: the other one's classifier is the same with its sign turned."""
    return dataclasses.replace(task, draws=tuple(dict([next(iter(draw.items()))]) for draw in task.draws))


Strata = dict[str, list[Rows]]
"""Class name → its rows, apart for each value that the draw is balanced over."""


def class_strata(table: Table, of: Sequence[Value], over: Sequence[Value], classes: Sequence[Value]) -> Strata:
    """Rows of each class by the other attribute's values in rising order, in file order within."""
    values = distinct(over)
    return {
        str(c): [np.array([i for i in range(len(table)) if of[i] == c and over[i] == v], np.int64) for v in values]
        for c in classes
    }


def class_task(
    data: AttributeData,
    name: str,
    scores: tuple[str, ...],
    strata: Sequence[Strata],
    seeds: Sequence[int],
    resample: bool,
    sizes: SetSizes,
) -> Task:
    """A class task from the strata of train and test. Raises CorpusError when a stratum holds too few rows."""
    draws = []
    for seed in seeds:
        splits = []
        for split, split_strata, size in zip(("train", "test"), strata, (sizes.train, sizes.test)):
            positives = balanced(split_strata, size // 2, seed if resample else seeds[0], f"{data.name}: {name}")
            splits.append(one_against_rest(positives, seed, split))
        draws.append(joined(splits, len(data.train)))
    return Task(f"{data.name}: {name}", scores, tuple(draws))


def balanced(strata: Strata, size: int, seed: int, where: str) -> dict[str, Rows]:
    """As many rows from each stratum of every class, at most `size` a class, as pandas' groupby(...).sample draws them.

    (pandas draws each group with a fresh RandomState(seed); the result is bit-equal to it.)
    """
    n = min(size // len(next(iter(strata.values()))), *(len(rows) for parts in strata.values() for rows in parts))
    if n < MIN_ROWS:
        raise CorpusError(f"{where}: a class has only {n} rows in one stratum, at least {MIN_ROWS} are needed")
    return {
        name: np.concatenate([rows[np.random.RandomState(seed).choice(len(rows), n, replace=False)] for rows in parts])
        for name, parts in strata.items()
    }


def one_against_rest(positives: dict[str, Rows], seed: int, split: str) -> dict[str, Contrast]:
    """Each class against as many rows drawn evenly from the others: ceil(P / others) of each, then P of those.

    Drawn once a seed and kept, where SAEBench draws test negatives anew at every call: one source of noise less.
    """
    contrasts = {}
    for name, rows in positives.items():
        others = [other for key, other in positives.items() if key != name]
        rng = numpy_rng("negatives", split, seed, name)
        each = math.ceil(len(rows) / len(others))
        pool = np.concatenate([rng.permutation(other)[:each] for other in others])
        contrasts[name] = Contrast(rows, rng.permutation(pool)[: len(rows)])
    return contrasts
