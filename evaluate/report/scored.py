"""What was scored of one checkpoint, as typed values; `reading.py` makes them of a results file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluate.latents.files import has_pages
from evaluate.statistics import Replicate
from pipeline.base.files import canonical_json, sha256
from pipeline.definitions import Metric

NOT_SETTINGS = frozenset({"alpha", "levels", "seed", "data_seed"})
SHAPING = ("n_sequences", "rows", "massive_multiple")
"""What of an evaluation's config decides which rows averages are over; how they are computed its families say."""
OF_TEXTS = frozenset({"first_letter", "scr", "tpp", "k_sparse_probe"})
"""Families whose numbers are no averages over the store's rows."""
SILENT, MISSED, ABSORBED = "truth_parent_silent", "truth_parent_missed", "truth_absorption"
"""How often a known parent's latent is silent under a child of it, and without one; what the first is beyond the second."""
BLOCKS = ("shared", "specialised")
"""Blocks of latents of a dictionary of two levels; a flat one has the second alone."""
Sharing = tuple[float, ...]
"""Cumulative shares of the width: () is flat, (0.2,) the paper's two levels at α = 0.2."""
AUTO: Sharing = (1.0,)
"""A sharing ratio that adapted in training, to another one in every run: a share that no fixed α can be, behind them all."""
TRUTH = "truth:"
"""What stands before the spec's hash in place of a model's name."""
Histogram = tuple[list[float], list[float]]
"""Edges and counts."""


@dataclass(frozen=True)
class Level:
    """Scores of one level, a prefix of the dictionary, by metric id: None where it is undefined."""

    number: int
    n_latents: int
    scores: Mapping[str, float | None]
    without_massive: Mapping[str, float | None]

    def score(self, metric: str, *, massive: bool) -> float | None:
        """A score; its average leaves massive rows out unless they are asked for, or it has no such average."""
        lead = self.scores if massive or metric not in self.without_massive else self.without_massive
        return lead.get(metric)


@dataclass(frozen=True)
class Held:
    """A known feature's latent in one level: |cosine| of directions, share of the feature's rows on which it is on."""

    latent: int
    cosine: float
    recall: float | None


@dataclass(frozen=True)
class Node:
    """A known feature in its tree (parent −1: the root), and its latent in every level alone."""

    feature: int
    parent: int
    depth: int
    levels: tuple[Held, ...]


@dataclass(frozen=True)
class Labels:
    """What absorption was measured on: labels with a probe, those left out, and rows with a label that its probe finds."""

    n_labels: int
    n_left_out: int
    n_rows: int


@dataclass(frozen=True)
class Container:
    """Latents that others are contained in: their share of the dictionary, (geometric) mean density, containment over chance."""

    share: float
    density: float
    excess: float


@dataclass(frozen=True)
class Structure:
    """Of the whole dictionary: variance that a meta-dictionary explains; its shared level, and sets as large by density."""

    meta: float | None = None
    level: Container | None = None
    controls: tuple[Container, ...] = ()


@dataclass(frozen=True)
class Point:
    """A score of one level at n latents."""

    n: int
    level: int | None
    value: float


@dataclass(frozen=True)
class Checkpoint:
    """What was scored. `train` is its training config, empty for an SAE made elsewhere; `whole` is everything, to show."""

    path: str
    sha256: str
    step: int
    width: int
    sizes: tuple[int, ...]
    member: str
    train: Mapping[str, Any]
    rows_seen: int | None
    fired_rows: int | None
    corpus: object
    versions: Mapping[str, str]
    git: str
    whole: Mapping[str, Any]


@dataclass(frozen=True)
class StoreFacts:
    """The rows that it was scored on. `reads`: where a transcoder reads, in words; of an SAE nothing."""

    id: str
    model: str
    layer: int | None
    corpus: object
    hook: str | None = None
    """None: the stream after the layer, or rows of a place that nobody named."""
    reads: str = ""
    name: str = ""
    """What a person calls the model, or the known features."""


@dataclass(frozen=True, eq=False)
class Run:
    """One results file: one checkpoint, scored. `curve` holds the terms of the training loss by step."""

    path: Path
    checkpoint: Checkpoint
    store: StoreFacts
    evaluation: Mapping[str, Any]
    sample: Mapping[str, int]
    baselines: Mapping[str, float]
    levels: tuple[Level, ...]
    series: Mapping[str, tuple[Point, ...]]
    features: Mapping[str, Any]
    density: Mapping[str, Histogram]
    curve: Mapping[str, Mapping[int, float]]
    definitions: Mapping[str, Metric]
    versions: Mapping[str, str]
    git: str
    trees: tuple[tuple[Node, ...], ...] = ()
    parents: tuple[int, int] | None = None
    """Cases, over rows and features, of a parent with a child of it on, and of a parent on alone."""
    labels: Mapping[str, Labels] = field(default_factory=dict)
    """What absorption was measured on, by its family: absorption, first_letter."""
    no_letters: str = ""
    """Why first letters that were asked for have no number, a sentence; nothing where they have one."""
    structure: Structure = Structure()
    scored_with: Mapping[str, str] = field(default_factory=dict)
    """Settings of scores that are not those of all runs it stands beside (`runs.told_apart`)."""

    @property
    def families(self) -> Mapping[str, Mapping[str, Any]]:
        """The families of scores it has, each with what shaped its numbers."""
        families = self.evaluation.get("families")
        return {
            name: settings
            for name, settings in (families.items() if isinstance(families, Mapping) else ())
            if isinstance(settings, Mapping)
        }

    @property
    def train(self) -> Mapping[str, Any]:
        """The training config; empty for an SAE made elsewhere."""
        return self.checkpoint.train

    @property
    def is_known(self) -> bool:
        """Whether its rows are sums of known features, of no model and no layer."""
        return self.store.model.startswith(TRUTH)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.checkpoint.step

    @property
    def seed(self) -> int:
        """The member's seed; 0 when the SAE was made elsewhere."""
        return int(self.train.get("seed") or 0)

    @property
    def data_seed(self) -> int:
        """The seed of the order of its data; 0 when the SAE was made elsewhere."""
        return int(self.train.get("data_seed") or 0)

    @property
    def replicate(self) -> Replicate:
        """What tells it from trainings that are the same but for chance."""
        return self.data_seed, self.seed

    @cached_property
    def sharing(self) -> Sharing:
        """How the dictionary is nested: as asked for, else as its sizes say."""
        if self.train.get("alpha") == "auto":
            return AUTO
        if self.train.get("alpha") is not None:
            return (float(self.train["alpha"]),) if self.train["alpha"] else ()
        if self.train.get("levels"):
            return tuple(float(share) for share in self.train["levels"][:-1])
        return tuple(round(m / self.checkpoint.width, 4) for m in self.checkpoint.sizes[:-1])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What may differ between experiments, by name; not α, levels or seed."""
        settings: dict[str, Any] = {"model": self.store.model or None, "layer": self.store.layer}
        hook = self.store.hook or "resid_post"
        settings |= {
            "hook": hook,
            "reads": self.store.reads or hook,
        }  # named where others of these results have another
        settings |= {name: value for name, value in self.train.items() if name not in NOT_SETTINGS}
        settings |= {"store": self.store.id[:10]}
        if not self.train:
            source = "/".join(Path(self.checkpoint.path).parts[-3:])
            settings |= {"recipe": "made elsewhere", "source": source, "weights": self.checkpoint.sha256[:10]}
        shaping = {name: self.evaluation[name] for name in SHAPING if name in self.evaluation}
        return settings | {"evaluation": sha256(canonical_json(shaping))[:8]} | dict(self.scored_with)

    @cached_property
    def identity(self) -> str:
        """Equal for results of the same checkpoint on the same store, whatever was scored."""
        return canonical_json([self.checkpoint.sha256 or str(self.path), self.store.id])

    @property
    def place(self) -> tuple[str, int | None, str, str]:
        """Model, layer, hook and store: only scores of one place are compared."""
        return self.store.model, self.store.layer, self.store.hook or "", self.store.id

    @cached_property
    def has_latents(self) -> bool:
        """Whether latent pages lie beside the file."""
        return has_pages(self.path)

    @property
    def name(self) -> str:
        """The member and its step, for tooltips and CSV."""
        return f"{self.checkpoint.member}, step {self.step:,}"

    @property
    def configuration(self) -> str:
        """Checkpoint, training and evaluation as indented JSON."""
        checkpoint = {name: value for name, value in self.checkpoint.whole.items() if name != "provenance"}
        provenance = self.checkpoint.whole.get("provenance") or {}
        full = {"checkpoint": checkpoint, "provenance": provenance, "evaluation": self.evaluation}
        return json.dumps(full, indent=1, ensure_ascii=False, sort_keys=True)

    def score(self, metric: str, level: int = -1, *, massive: bool = False) -> float | None:
        """One score of one level, the whole dictionary by default; None when it was not computed or is undefined.

        `sparse_coding_rate@20` reads the series of that metric at n = 20. Averages leave massive rows out unless asked.
        Absorption of known features is the difference of the two scores of silence.
        """
        name, _, n = metric.partition("@")
        if n:
            return self.at(name, massive=massive).get(int(n))
        if not -len(self.levels) <= level < len(self.levels):
            return None
        if name == ABSORBED:
            silent, missed = (self.levels[level].score(part, massive=massive) for part in (SILENT, MISSED))
            return None if silent is None or missed is None else silent - missed
        return self.levels[level].score(name, massive=massive)

    def at(self, metric: str, level: int | None = None, *, massive: bool = False) -> dict[int, float]:
        """A series by n, of the whole dictionary or of one level; undefined values are left out, and massive rows too unless
        they are asked for, where it is an average over rows."""
        last = self.levels[-1].number
        wanted = last if level is None else level
        without = () if massive else self.series.get(f"{metric}_without_massive", ())
        points = without or self.series.get(metric, ())
        return {p.n: p.value for p in points if (last if p.level is None else p.level) == wanted}

    def feature(self, *path: str) -> float | None:
        """A number deep in the features; None where any part of the path is not there."""
        at: Any = self.features
        for name in path:
            at = at.get(name) if isinstance(at, Mapping) else None
        return float(at) if isinstance(at, int | float) else None


def merged(one: Run, other: Run) -> Run:
    """Two evaluations of one checkpoint as one: of what both scored, that on more tokens; of the rest, whichever has it.

    The sample is that of scores over the store's rows, where only one of the two has any.
    """

    def weight(run: Run) -> tuple[bool, int, bool]:
        return not run.families or bool(run.families.keys() - OF_TEXTS), run.sample.get("n_tokens", 0), run.has_latents

    more, less = sorted((one, other), key=weight, reverse=True)
    level = {(level.number, level.n_latents): level for level in less.levels}
    levels = [
        replace(a, scores={**b.scores, **a.scores}, without_massive={**b.without_massive, **a.without_massive})
        if (b := level.get((a.number, a.n_latents)))
        else a
        for a in more.levels
    ]
    return replace(
        more,
        path=more.path if more.has_latents or not less.has_latents else less.path,
        evaluation={**more.evaluation, "families": {**less.families, **more.families}},
        levels=tuple(levels),
        baselines={**less.baselines, **more.baselines},
        series={**less.series, **more.series},
        features={**less.features, **more.features},
        density={**less.density, **more.density},
        curve={**less.curve, **more.curve},
        definitions={**less.definitions, **more.definitions},
        trees=more.trees or less.trees,
        parents=more.parents or less.parents,
        labels={**less.labels, **more.labels},
        no_letters="" if "first_letter" in {**less.labels, **more.labels} else more.no_letters or less.no_letters,
        structure=more.structure if more.structure != Structure() else less.structure,
    )
