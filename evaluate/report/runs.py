"""Results files as a report sees them: runs, sorted into groups by what differs, and into rows by how latents are shared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluate.latents.files import has_pages
from evaluate.results import read_result
from pipeline.base.errors import DamagedError, UsageError
from pipeline.base.files import canonical_json, sha256
from pipeline.definitions import METRICS, Metric

FIRST_SETTINGS = ("model", "layer", "recipe", "objective", "width", "lr", "lambda_shared", "lambda_specialised")
NOT_SETTINGS = frozenset({"alpha", "levels", "seed"})
Sharing = tuple[float, ...]
"""Cumulative shares of the width: () is flat, (0.2,) the paper's two levels at α = 0.2."""
AUTO: Sharing = (1.0,)
"""A sharing ratio that adapted in training, to another one in every run: a share that no fixed α can be, behind them all."""


@dataclass(frozen=True, eq=False)
class Run:
    """One results file: one checkpoint, scored."""

    path: Path
    data: dict[str, Any]

    @cached_property
    def train(self) -> dict[str, Any]:
        """The training config; empty for an SAE made elsewhere."""
        return dict((self.data["checkpoint"].get("provenance") or {}).get("train") or {})

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.data["checkpoint"].get("step") or 0)

    @property
    def seed(self) -> int:
        """The member's seed; 0 when the SAE was made elsewhere."""
        return int(self.train.get("seed", 0))

    @cached_property
    def sharing(self) -> Sharing:
        """How the dictionary is nested: as asked for, else as its sizes say."""
        if self.train.get("alpha") == "auto":
            return AUTO
        if self.train.get("alpha") is not None:
            return (float(self.train["alpha"]),) if self.train["alpha"] else ()
        if self.train.get("levels"):
            return tuple(float(share) for share in self.train["levels"][:-1])
        sae = self.data["checkpoint"]["sae"]
        return tuple(round(m / sae["width"], 4) for m in sae["levels"][:-1])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What may differ between experiments, by name; not α, levels or seed."""
        store = self.data["store"]
        settings = {"model": store.get("model"), "layer": store.get("layer")}
        settings |= {name: value for name, value in self.train.items() if name not in NOT_SETTINGS}
        settings |= {"store": store.get("id", "")[:10]}
        if not self.train:
            settings |= {"recipe": "made elsewhere", "source": Path(str(self.data["checkpoint"].get("path"))).name}
        return settings | {"evaluation": sha256(canonical_json(self.evaluation))[:8]}

    @property
    def evaluation(self) -> dict[str, Any]:
        """What shapes the scores."""
        return dict(self.data.get("evaluation") or {})

    @cached_property
    def identity(self) -> str:
        """Equal for results of the same checkpoint, scored the same way on the same store."""
        data = self.data
        return canonical_json([data["checkpoint"].get("sha256"), data["store"].get("id"), self.evaluation])

    @property
    def has_latents(self) -> bool:
        """Whether latent pages lie beside the file."""
        return has_pages(self.path)

    @property
    def levels(self) -> list[dict[str, Any]]:
        """Scores by level, innermost first."""
        return list(self.data["levels"])

    @property
    def name(self) -> str:
        """The member and its step, for tooltips and CSV."""
        provenance = self.data["checkpoint"].get("provenance") or {}
        member = provenance.get("member") or Path(str(self.data["checkpoint"].get("path"))).stem
        return f"{member}, step {self.step:,}"

    def score(self, metric: str, level: int = -1, scores: str = "scores") -> float | None:
        """One score of one level, the whole dictionary by default; None when it was not computed or is undefined.

        `sparse_coding_rate@20` reads the series of that metric at n = 20.
        """
        name, _, n = metric.partition("@")
        if n:
            return self.at(name).get(int(n))
        if not -len(self.levels) <= level < len(self.levels):
            return None
        value = self.levels[level].get(scores, {}).get(name)
        return None if value is None else float(value)

    def at(self, metric: str, level: int | None = None) -> dict[int, float]:
        """A series by n, of the whole dictionary or of one level; undefined values are left out."""
        points = (self.data.get("series") or {}).get(metric) or []
        last = self.levels[-1]["level"]
        wanted = last if level is None else level
        return {
            int(p["n"]): float(p["value"])
            for p in points
            if p.get("value") is not None and (last if p.get("level") is None else p["level"]) == wanted
        }


@dataclass(frozen=True, eq=False)
class Row:
    """Runs that differ only in their seed: the last checkpoint of each."""

    sharing: Sharing
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """α = 0.2, or the levels."""
        return sharing_label(self.sharing)

    def values(self, metric: str, level: int = -1, scores: str = "scores") -> dict[int, float]:
        """A score by seed, of the seeds that have it."""
        found = {run.seed: run.score(metric, level, scores) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that share every setting but how latents are shared."""

    settings: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        """The settings that tell this group from the others; empty when there is only one."""
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())

    @property
    def baseline(self) -> Row | None:
        """The flat row, if there is one."""
        return next((row for row in self.rows if not row.sharing), None)

    @property
    def runs(self) -> list[Run]:
        """The last checkpoints of all rows."""
        return [run for row in self.rows for run in row.runs]


@dataclass(frozen=True)
class Results:
    """All runs given, and the last checkpoints in groups, the largest group first."""

    runs: tuple[Run, ...]
    groups: tuple[Group, ...]

    @property
    def main(self) -> Group:
        """The group with most runs."""
        return self.groups[0]

    @cached_property
    def sharings(self) -> list[Sharing]:
        """Every way of sharing there is, flat first: the order of colours."""
        return sorted({run.sharing for run in self.runs}, key=lambda s: (len(s), s))

    def metric(self, id: str) -> Metric:
        """A metric as the results define it (they explain themselves), with the label known here."""
        name, _, n = id.partition("@")
        known = METRICS.get(name)
        said = next((d[name] for run in self.runs if name in (d := run.data.get("definitions") or {})), None)
        label = known.label if known else name
        if said is None and known is None:
            return Metric(id, label, "", "neither", "no definition came with the results")
        unit, better, definition = (
            (said["unit"], said["better"], said["definition"]) if said else (known.unit, known.better, known.definition)  # type: ignore[union-attr]
        )
        return Metric(id, f"{label}, n = {n}" if n else label, unit, better, definition)


def sharing_label(sharing: Sharing) -> str:
    """α = 0.2 or α auto for two levels, α = 0 for a flat dictionary, the shares for more."""
    if sharing == AUTO:
        return "α auto"
    if len(sharing) <= 1:
        return f"α = {sharing[0] if sharing else 0:g}"
    fractions = [Fraction(share).limit_denominator(64) for share in (*sharing, 1)]
    exact = all(abs(float(fraction) - share) < 1e-3 for fraction, share in zip(fractions, (*sharing, 1)))
    return "levels " + ", ".join(str(f) if exact else f"{s:.3g}" for f, s in zip(fractions, (*sharing, 1)))


def read_results(paths: Iterable[Path]) -> Results:
    """Read results files, and those in folders; group them. Each checkpoint counts once, however often it is given.

    Raises UsageError when there are none or two checkpoints claim the same step of the same run; DamagedError when a file
    is not results of our version.
    """
    runs: dict[str, Run] = {}
    for path in sorted(expand(paths)):
        run = read_run(path)
        if run.identity not in runs or run.has_latents:
            runs[run.identity] = run
    if not runs:
        raise UsageError("no results: give results files, or folders that `python -m evaluate --out` wrote")
    found = tuple(runs.values())
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


def read_run(path: Path) -> Run:
    """One results file, its format checked."""
    data = read_result(path)
    missing = [name for name in ("key", "checkpoint", "store", "levels") if not data.get(name)]
    if missing:
        raise DamagedError(f"{path}: results without {', '.join(missing)}; evaluate this checkpoint again")
    return Run(path, data)


def make_groups(runs: Sequence[Run]) -> tuple[Group, ...]:
    """Sort the last checkpoint of each member into groups by the settings that differ, and rows by sharing."""
    names = telling_settings(runs)
    last: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: run.step):
        identity = canonical_json([shown(run, names), run.sharing, run.seed])
        if identity in last and last[identity].step == run.step:
            raise UsageError(
                f"{run.path} and {last[identity].path}: two checkpoints of the same run and step; give one of them"
            )
        last[identity] = run
    grouped: dict[str, list[Run]] = {}
    for run in last.values():
        grouped.setdefault(canonical_json(shown(run, names)), []).append(run)
    groups = [Group(shown(members[0], names), make_rows(members)) for members in grouped.values()]
    return tuple(sorted(groups, key=lambda group: (-len(group.runs), [in_order(v) for v in group.settings.values()])))


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
    """Rows by sharing, flat first, seeds in order."""
    rows: dict[Sharing, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (len(run.sharing), run.sharing, run.seed)):
        rows.setdefault(run.sharing, []).append(run)
    return tuple(Row(sharing, tuple(members)) for sharing, members in rows.items())
