"""Runs sorted into groups by the settings that differ, and into rows by how latents are shared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluate.report.reading import read_run
from evaluate.report.scored import AUTO, TRUTH, Run, Sharing, merged
from evaluate.statistics import Replicate
from pipeline.base.errors import UsageError
from pipeline.base.files import canonical_json
from pipeline.base.results import names_apart
from pipeline.definitions import METRICS, Metric

FIRST_SETTINGS = (
    "model",
    "layer",
    "hook",
    "reads",
    "recipe",
    "objective",
    "width",
    "lr",
    "lambda_shared",
    "lambda_specialised",
    "source",
)
SPARSITY = ("k", "lambda_shared", "lambda_specialised", "target_l0")
"""Settings that move a dictionary along its front and leave it what it is."""
OF_NESTED = ("level_weighting", "shared_target")
"""Settings of the terms of several levels, or of how large the shared one is: nothing that a flat dictionary has."""


@dataclass(frozen=True, eq=False)
class Row:
    """Runs that differ only by chance, in their seed or the order of their data: the last checkpoint of each."""

    sharing: Sharing
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """α = 0.2, or the levels."""
        return sharing_label(self.sharing)

    def values(self, metric: str, level: int = -1, *, massive: bool = False) -> dict[Replicate, float]:
        """A score by replicate, of those that have it."""
        found = {run.replicate: run.score(metric, level, massive=massive) for run in self.runs}
        return {replicate: value for replicate, value in found.items() if value is not None}


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that share every setting but how latents are shared. `lent`: the flat row of a group that differs from this one in
    settings of nested dictionaries alone, where it has none of its own."""

    settings: dict[str, Any]
    rows: tuple[Row, ...]
    lent: Row | None = None

    @property
    def label(self) -> str:
        """The settings that tell this group from the others; empty when there is only one."""
        target = self.runs[0].settings.get("target_l0")
        wanted = f"target L0 {target:g}" if target else ""
        plain = {"model": self.runs[0].store.name, "recipe": self.settings.get("recipe"), "target_l0": wanted}
        if self.settings.get("k") == 0:  # a penalty's, which has no k
            plain["k"] = wanted
        told = (plain.get(name, f"{name} {value}") for name, value in self.settings.items())
        return ", ".join(dict.fromkeys(one for one in told if one))

    @property
    def family(self) -> str:
        """Equal for groups that differ in how sparse they are asked to be, and in nothing else."""
        return canonical_json({name: value for name, value in self.settings.items() if name not in SPARSITY})

    @property
    def flat_family(self) -> str:
        """Equal for groups whose flat dictionaries would differ in how sparse they are asked to be, and in nothing else."""
        return canonical_json({k: v for k, v in self.settings.items() if k not in (*SPARSITY, *OF_NESTED)})

    @property
    def baseline(self) -> Row | None:
        """The flat row: its own, or one that is lent; None where there is neither."""
        return own_flat(self.rows) or self.lent

    @property
    def runs(self) -> list[Run]:
        """The last checkpoints of all rows."""
        return [run for row in self.rows for run in row.runs]


@dataclass(frozen=True)
class Results:
    """All runs given, and the last checkpoints in groups: of a language model's rows first, the largest of them first."""

    runs: tuple[Run, ...]
    groups: tuple[Group, ...]

    @property
    def main(self) -> Group:
        """The group with most runs; one of known features only where there is no other."""
        return self.groups[0]

    @cached_property
    def sharings(self) -> list[Sharing]:
        """Every way of sharing there is, flat first: the order of colours."""
        return sorted({run.sharing for run in self.runs}, key=lambda s: (len(s), s))

    @cached_property
    def places(self) -> list[tuple[str, list[Run]]]:
        """Runs of each model, layer and store, under what tells it from the others: nothing where there is one. The main
        group's comes first."""
        by_place: dict[tuple[str, int | None, str, str], list[Run]] = {}
        main = self.main.runs[0]
        for run in sorted(self.runs, key=lambda run: (run.place != main.place, [in_order(part) for part in run.place])):
            by_place.setdefault(run.place, []).append(run)
        parts = [
            (runs[0].store.name, where(runs[0], layer, hook), f"store {id[:8]}")
            for (_, layer, hook, id), runs in by_place.items()
        ]
        told = [i for i in range(3) if len({part[i] for part in parts}) > 1]
        if len({tuple(part[i] for i in told[:-1]) for part in parts}) == len(parts):
            told = told[:-1]
        return [(", ".join(part[i] for i in told if part[i]), runs) for part, runs in zip(parts, by_place.values())]

    def flats(self, group: Group) -> list[Row]:
        """Flat rows of groups that differ from one in nothing but how sparse they are asked to be, itself among them; where
        these have none, of those that differ in settings of nested dictionaries too."""
        like = [other for other in self.groups if other.flat_family == group.flat_family]
        own = [row for other in like if other.family == group.family if (row := own_flat(other.rows))]
        return own or [row for other in like if (row := own_flat(other.rows))]

    def metric(self, id: str) -> Metric:
        """A metric as the results define it (they explain themselves), with the label known here."""
        name, _, n = id.partition("@")
        known = METRICS.get(name)
        label = known.label if known else name
        told = next((run.definitions[name] for run in self.runs if name in run.definitions), known)
        if told is None:
            return Metric(id, with_n(label, n), "", "neither", "no definition came with the results")
        better = known.better if known else told.better
        return replace(told, id=id, better=better, label=with_n(label, n))


def with_n(label: str, n: str) -> str:
    """A label that says at which n: explained variance at n = 20; SCR, n = 20; without n as it is."""
    if not n:
        return label
    return label.replace(" at n", f" at n = {n}") if " at n" in label else f"{label}, n = {n}"


def where(run: Run, layer: int | None, hook: str) -> str:
    """A hook point in words; rows of known features are of none."""
    if run.is_known:
        return ""
    return f"{hook} of layer {layer}" if hook else f"layer {layer}"


def sharing_label(sharing: Sharing) -> str:
    """α = 0.2 or α auto for two levels, α = 0 for a flat dictionary, the shares for more."""
    if sharing == AUTO:
        return "α auto"
    if len(sharing) <= 1:
        return f"α = {sharing[0] if sharing else 0:g}"
    fractions = [Fraction(share).limit_denominator(64) for share in (*sharing, 1)]
    exact = all(abs(float(fraction) - share) < 1e-3 for fraction, share in zip(fractions, (*sharing, 1)))
    return "levels " + ", ".join(str(f) if exact else f"{s:.3g}" for f, s in zip(fractions, (*sharing, 1)))


def called(run: Run) -> str:
    """What a person calls a checkpoint: how it shares latents, its recipe, seed and step; one made elsewhere by its name."""
    if not run.train:
        return run.name
    parts = (sharing_label(run.sharing), run.train.get("recipe"), f"seed {run.seed}", f"step {run.step:,}")
    return ", ".join(str(part) for part in parts if part)


def read_results(paths: Iterable[Path]) -> Results:
    """Read results files, and those in folders; group them. Each checkpoint counts once, however often it was scored.

    Raises UsageError when there are none or two checkpoints claim the same step of the same run; DamagedError when a file
    is not results of our version.
    """
    runs: dict[str, Run] = {}
    for path in sorted(expand(paths)):
        run = read_run(path)
        runs[run.identity] = merged(runs[run.identity], run) if run.identity in runs else run
    if not runs:
        raise UsageError("no results: give results files, or folders that `python -m evaluate --out` wrote")
    found = tuple(told_apart(with_names_apart(with_members_apart(list(runs.values())))))
    return Results(found, make_groups(found))


def expand(paths: Iterable[Path]) -> set[Path]:
    """The results files among or in the paths given."""
    files: set[Path] = set()
    for path in paths:
        if path.is_dir():
            files |= set(path.rglob("*-step_*.json"))
        elif path.is_file():
            files.add(path)
        else:
            raise UsageError(f"{path}: no such results file or folder")
    return files


def make_groups(runs: Sequence[Run]) -> tuple[Group, ...]:
    """Sort the last checkpoint of each member into groups by the settings that differ, and rows by sharing."""
    names = telling_settings(runs)
    last: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: run.step):
        identity = canonical_json([shown(run, names), run.sharing, run.replicate])
        if identity in last and last[identity].step == run.step:
            raise UsageError(
                f"{run.path} and {last[identity].path}: two checkpoints of the same run and step; give one of them"
            )
        last[identity] = run
    grouped: dict[str, list[Run]] = {}
    for run in last.values():
        grouped.setdefault(canonical_json(shown(run, names)), []).append(run)
    groups = [Group(shown(members[0], names), make_rows(members)) for members in grouped.values()]
    return tuple(sorted(lend_flats(groups), key=place_in_report))


def lend_flats(groups: Sequence[Group]) -> list[Group]:
    """The groups; one without a flat row is lent that of another which differs in settings of nested dictionaries alone."""
    flats: dict[str, Row] = {}
    for group in groups:
        if row := own_flat(group.rows):
            flats.setdefault(nested_aside(group), row)
    return [replace(group, lent=flats.get(nested_aside(group))) for group in groups]


def nested_aside(group: Group) -> str:
    """Equal for groups that differ in settings of nested dictionaries alone."""
    return canonical_json({name: value for name, value in group.settings.items() if name not in OF_NESTED})


def own_flat(rows: Sequence[Row]) -> Row | None:
    """The flat one of the rows, if there is one."""
    return next((row for row in rows if not row.sharing), None)


def place_in_report(group: Group) -> tuple[bool, int, list[tuple[bool, float, str]]]:
    """Sorts groups as they are reported: rows of a language model before those of known features, large before small."""
    return group.runs[0].is_known, -len(group.runs), [in_order(value) for value in group.settings.values()]


def with_members_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs; where several folders' members are called alike, each by more of its folder's path."""
    names = names_apart([(run.checkpoint.member, run.checkpoint.path) for run in runs])
    return [replace(run, checkpoint=replace(run.checkpoint, member=name)) for run, name in zip(runs, names)]


def with_names_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs; where several models, or specs of known features, are called alike, each by more of what it is."""
    models: dict[str, set[str]] = {}
    for run in runs:
        models.setdefault(run.store.name, set()).add(run.store.model)
    return [
        run if len(models[run.store.name]) == 1 else replace(run, store=replace(run.store, name=fuller_name(run)))
        for run in runs
    ]


def fuller_name(run: Run) -> str:
    """A model with its folder or organisation; known features with the digits of their spec's hash."""
    return f"{run.store.name}, spec {run.store.model.removeprefix(TRUTH)}" if run.is_known else run.store.model


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, with a setting more for every family of scores that some made otherwise than others: what differs in it.

    Numbers of one score that were made with other texts or sizes are no replicates of each other. A run without the family
    goes with the first of those that have it.
    """
    scored: dict[str, dict[str, Mapping[str, Any]]] = {}
    for run in runs:
        for family, settings in run.families.items():
            scored.setdefault(family, {})[canonical_json(settings)] = settings
    apart: list[dict[str, str]] = [{} for _ in runs]
    for family, kinds in scored.items():
        if len(kinds) == 1:
            continue
        names = sorted({name for kind in kinds.values() for name in kind})
        differ = [name for name in names if len({canonical_json(kind.get(name)) for kind in kinds.values()}) > 1]
        first = next(iter(kinds.values()))
        for run, told in zip(runs, apart):
            kind = run.families.get(family, first)
            told[f"{family} scored with"] = ", ".join(f"{name} {canonical_json(kind.get(name))}" for name in differ)
    return [replace(run, scored_with=told) for run, told in zip(runs, apart)]


def in_order(value: Any) -> tuple[bool, float, str]:
    """Sorts numbers by size, before all else by its text."""
    number = isinstance(value, int | float)
    return (not number, float(value) if number else 0.0, str(value))


def shown(run: Run, names: Sequence[str]) -> dict[str, Any]:
    """A run's values of the settings that tell groups apart; those it lacks are left out."""
    return {name: run.settings[name] for name in names if name in run.settings}


def telling_settings(runs: Sequence[Run]) -> list[str]:
    """As few settings as tell apart what all of them together do, the well-known ones first."""
    names = dict.fromkeys((*FIRST_SETTINGS, *sorted({name for run in runs for name in run.settings})))
    chosen: list[str] = []
    parts = 1
    for name in names:
        finer = len({canonical_json(shown(run, [*chosen, name])) for run in runs})
        if finer > parts:
            chosen, parts = [*chosen, name], finer
    return chosen


def make_rows(runs: Sequence[Run]) -> tuple[Row, ...]:
    """Rows by sharing, flat first, replicates in order."""
    rows: dict[Sharing, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (len(run.sharing), run.sharing, run.replicate)):
        rows.setdefault(run.sharing, []).append(run)
    return tuple(Row(sharing, tuple(members)) for sharing, members in rows.items())
