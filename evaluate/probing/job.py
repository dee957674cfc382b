"""Scores that need texts of their own: SCR, TPP and k-sparse probing. Prepared once a job, then one encode a checkpoint.

    texts = read_texts(config)
    job = prepare(config, texts, text_model(lm, tokenizer, layer=19, bos=2), probes_folder=out)  # the prefix may be freed
    for sae in checkpoints:
        scores = job.score(sae)            # scores.series["scr"] = [{"n", "level", "value", "low", "high"}, ...]

Preparing runs the language model's prefix once over every text that any task uses, keeps the residuals of real positions,
and trains every linear probe. A checkpoint then costs one encode of those rows.

Memory: on the host, for the whole job, Σ over groups of (rows · d_model · itemsize + texts · d_model · 4) bytes (8 for
transcoders, whose probes look at other rows than they encode), real positions only and in the model's dtype; where checkpoints
are, what `texts.pooling_bytes` says. Both are in the job's plan (`work.plan`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from evaluate.probing.ablation import ablations
from evaluate.probing.datasets import AttributeData, load_attribute_data
from evaluate.probing.probes import ProbeConfig, ProbedTexts, by_seed, load_or_train
from evaluate.probing.scr import DIRECTIONS, scr_scores
from evaluate.probing.series import Scores, SeriesRow, merge, series
from evaluate.probing.sparse_probing import k_sparse_scores, residual_accuracy
from evaluate.probing.tasks import Contrast, SetSizes, Task, class_tasks, scr_task
from evaluate.probing.texts import PooledLatents, TextBank, TextModel, make_bank, pool_all, raw_decoder
from evaluate.probing.tpp import tpp_scores
from pipeline.base.errors import UsageError
from pipeline.sae.nested import NestedSAE

SCORES = ("scr", "tpp", "k_sparse_probe")


@dataclass(frozen=True)
class ProbingConfig:
    """What to score on which texts. Defaults are SAEBench's protocol; `seeds` beyond the first give the intervals.

    sources: Hub ids (LabHC/bias_in_bios, canrager/amazon_reviews_mcauley_1and5), local folders, or `TRAIN,TEST`.
    text, attributes: columns of local data; found by themselves where there is no choice. pairs: (positive, negative)
    values of the first attribute that SCR compares, as they or their names are written; none: all there are of two
    values, SAEBench's of a Hub data set.
    n_values: latents ablated (scr, tpp); k_values: latents probed; each only where a level has as many.
    seeds: every further one repeats all draws and probes; resample: and uses other rows (tasks.py), at up to
    len(seeds) times the texts. train_size, test_size: SAEBench's; a data set that holds less gives what it has.
    context: positions a text is cut to; batch_size: texts a forward pass; probe: the linear probes' recipe.
    Raises UsageError when fields contradict.
    """

    sources: tuple[str, ...]
    scores: tuple[str, ...] = SCORES
    text: str | None = None
    attributes: tuple[str, str] | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    n_values: tuple[int, ...] = (2, 5, 10, 20, 50, 100, 500)
    k_values: tuple[int, ...] = (1, 2, 5)
    seeds: tuple[int, ...] = (42, 43, 44)
    resample: bool = True
    train_size: int = 4000
    test_size: int = 1000
    context: int = 128
    batch_size: int = 32
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.scores) - set(SCORES))
        if unknown:
            raise UsageError(f"probing scores are {', '.join(SCORES)}; {unknown[0]!r} is not one of them")
        if not self.sources or not self.scores or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError("probing needs at least one data set, one score and one seed, and no seed twice")
        if min((*self.n_values, *self.k_values, self.batch_size)) < 1 or self.context < 2:
            raise UsageError("n and k values and the batch size must be at least 1, the context at least 2")


@dataclass(frozen=True)
class Texts:
    """The texts that a group of tasks uses, in order, and the tasks, whose rows are counted among them."""

    name: str
    data: AttributeData
    texts: tuple[str, ...]
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class TextGroup:
    """Texts that share one bank of residuals, and the tasks that index them; one is encoded and pooled at a time."""

    name: str
    bank: TextBank
    tasks: tuple[Task, ...]
    probed: dict[str, list[ProbedTexts]]
    """Task name → its texts and probes, one a seed; only of tasks whose scores need linear probes."""


@dataclass(frozen=True)
class ProbingScores:
    """Of one checkpoint, plain JSON data. `series`: metric id → rows of FORMAT.md, means over tasks and then seeds.

    `tasks`: task name → its own series, without the mean over tasks.
    """

    series: dict[str, list[SeriesRow]]
    tasks: dict[str, dict[str, list[SeriesRow]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Probing:
    """A job's prepared data and probes. Made by `prepare`; `score` is then called for every checkpoint.

    `sample`: what the scores are over, plain JSON: for each task its rows, classes, clean accuracies and baselines.
    """

    config: ProbingConfig
    groups: tuple[TextGroup, ...]
    sample: dict[str, Any]

    @property
    def n_bytes(self) -> int:
        """Memory that the residuals take."""
        return sum(group.bank.n_bytes for group in self.groups)

    @property
    def n_rows(self) -> int:
        """Rows that a checkpoint encodes."""
        return sum(len(group.bank.rows) for group in self.groups)

    @property
    def n_texts(self) -> int:
        """Texts of all groups."""
        return sum(len(group.bank.n_real) for group in self.groups)

    def pool(self, saes: Sequence[NestedSAE]) -> list[tuple[PooledLatents, ...]]:
        """What `score` takes of each SAE, one a group of texts: every text comes to the device once for all of them."""
        by_group = [pool_all(saes, group.bank) for group in self.groups]
        return list(zip(*by_group))

    @torch.no_grad()
    def score(
        self, sae: NestedSAE, levels: Sequence[int] | None = None, pooled: Sequence[PooledLatents] | None = None
    ) -> ProbingScores:
        """Every score of one SAE at some levels (indices, default all); only a level's latents are ablated or probed there.

        Deterministic. The SAE's device does the encoding; weights are used as they are (float32 unless they were cast).
        `pooled`: what `pool` gave for it; None: taken now.
        """
        by_task: dict[str, Scores] = {}
        sizes = {
            level: sae.config.levels[level] for level in (range(sae.config.n_levels) if levels is None else levels)
        }
        for group, latents in zip(self.groups, pooled or self.pool([sae])[0], strict=True):
            for task in group.tasks:
                by_task[task.name] = self.score_task(task, group, latents, sae, sizes)
        return ProbingScores(
            series(merge(list(by_task.values()))), {name: series(scores) for name, scores in by_task.items()}
        )

    def score_task(
        self,
        task: Task,
        group: TextGroup,
        latents: PooledLatents,
        sae: NestedSAE,
        levels: Mapping[int, int],
    ) -> Scores:
        """The scores that a task is for and that were asked for; `levels`: index → number of latents."""
        scores: Scores = {}
        config = self.config
        if task.name in group.probed:
            seeds = ablations(group.probed[task.name], latents, raw_decoder(sae))
            if "scr" in task.scores:
                scores |= scr_scores(seeds, levels, config.n_values)
            if "tpp" in task.scores:
                scores |= tpp_scores(seeds, levels, config.n_values)
        if "k_sparse_probe" in task.scores:
            scores |= k_sparse_scores(task.draws, latents, levels, config.k_values, float(sae.made_scale))
        return scores


def read_texts(config: ProbingConfig) -> tuple[Texts, ...]:
    """Read every data set and draw the tasks.

    Raises CorpusError or UsageError for data that cannot serve; see `load_attribute_data` and `tasks.py`.
    """
    found = []
    for source in config.sources:
        data = load_attribute_data(source, config.text, config.attributes, config.pairs)
        for name, tasks in grouped(data, config):
            texts, tasks = only_used((*data.train.text, *data.test.text), tasks)
            found.append(Texts(name, data, tuple(texts), tuple(tasks)))
    return tuple(found)


def most_rows(config: ProbingConfig, texts: Sequence[Texts]) -> int:
    """Rows of texts that every checkpoint encodes: the most they can be, before they are tokenised."""
    return config.context * sum(len(part.texts) for part in texts)


def most_bytes(config: ProbingConfig, texts: Sequence[Texts], d_model: int, itemsize: int, n_means: int = 1) -> int:
    """Memory of the texts' residuals, likewise: rows in the model's dtype, means (two for transcoders) in float32."""
    return d_model * (most_rows(config, texts) * itemsize + 4 * n_means * sum(len(part.texts) for part in texts))


def prepare(
    config: ProbingConfig,
    collections: Sequence[Texts],
    model: TextModel,
    probes_folder: Path | None = None,
    limit: int | None = None,
) -> Probing:
    """Run the prefix over `read_texts(config)`, train probes; `probes_folder` keeps them as safetensors and finds them again.

    `limit`: bytes that all residuals may take. Raises CorpusError for a text without a token, UsageError beyond the limit.
    """
    groups: list[TextGroup] = []
    sample: dict[str, Any] = {}
    for part in collections:
        left = None if limit is None else limit - sum(group.bank.n_bytes for group in groups)
        bank = make_bank(part.texts, model, config.context, config.batch_size, part.name, left)
        identity = {**model.identity, "context": config.context, "data": part.data.sha256()}
        trained = {
            task.name: load_or_train(bank.probed, task, config.seeds, config.probe, identity, probes_folder)
            for task in part.tasks
            if {"scr", "tpp"} & set(task.scores)
        }
        probed = {t.name: by_seed(t, bank.probed, trained[t.name]) for t in part.tasks if t.name in trained}
        group = TextGroup(part.name, bank, part.tasks, probed)
        sample |= {t.name: describe(t, group, part.data) for t in part.tasks}
        groups.append(group)
    return Probing(config, tuple(groups), sample)


def grouped(data: AttributeData, config: ProbingConfig) -> list[tuple[str, list[Task]]]:
    """A data set's tasks that serve a score asked for, by the group they share texts in.

    Where both attributes have two values all tasks use the same rows: one group. Otherwise pairs and classes have little
    in common: a group each, which bounds the memory of pooled latents.
    """
    sizes = SetSizes(config.train_size, config.test_size)
    tasks = []
    if "scr" in config.scores:
        tasks = [scr_task(data, pair, config.seeds, config.resample, sizes) for pair in data.first_pairs]
    if {"tpp", "k_sparse_probe"} & set(config.scores):
        tasks += class_tasks(data, config.seeds, config.resample, sizes)
    asked = [
        dataclasses.replace(task, scores=wanted)
        for task in tasks
        if (wanted := tuple(score for score in task.scores if score in config.scores))
    ]
    return [(task.name, [task]) for task in asked] if data.classes else [(data.name, asked)]


def only_used(texts: Sequence[str], tasks: Sequence[Task]) -> tuple[list[str], list[Task]]:
    """The texts that some draw uses, in order, and the tasks with their rows counted among those."""
    draws = [contrast for task in tasks for draw in task.draws for pair in draw.values() for contrast in pair]
    used = np.unique(np.concatenate([contrast.rows for contrast in draws]))

    def renumbered(contrast: Contrast) -> Contrast:
        return Contrast(*(np.searchsorted(used, rows) for rows in (contrast.positive, contrast.negative)))

    moved = [
        dataclasses.replace(
            task,
            draws=tuple(
                {name: (renumbered(train), renumbered(test)) for name, (train, test) in draw.items()}
                for draw in task.draws
            ),
        )
        for task in tasks
    ]
    return [texts[i] for i in used], moved


def describe(task: Task, group: TextGroup, data: AttributeData) -> dict[str, Any]:
    """What a task's scores are over, and what there is to score: plain JSON for results.

    accuracy_clean: each probe on its own test rows, mean over seeds. SCR: accuracy_biased, the "both" probe on either
    attribute's rows; a direction whose gap to clean is small says little. k-sparse: accuracy_residual, the classifier on
    the whole pooled residual.
    """
    found: dict[str, Any] = {
        "scores": list(task.scores),
        "rows": task.n_rows(),
        "texts": len(group.bank.n_real),
        "blank_texts_left_out": data.train.n_blank + data.test.n_blank,
        "data_sha256": data.sha256(),
    }
    seeds = group.probed.get(task.name)
    if seeds:
        found["accuracy_clean"] = {name: mean(s.accuracy(name, name) for s in seeds) for name in task.probes}
    if seeds and "scr" in task.scores:
        found["accuracy_biased"] = {
            tested: mean(s.accuracy("both", tested) for s in seeds) for _, _, tested in DIRECTIONS
        }
    if "k_sparse_probe" in task.scores:
        found["accuracy_residual"] = mean(residual_accuracy(group.bank.mean, draw) for draw in task.draws)
    return found
