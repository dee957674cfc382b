"""The evaluate stage: one clean pass of the layers after the cut serves every checkpoint; results appear one file each.

    find     checkpoints of folders and members                       checkpoints/find.py
    select   those that fit the store, by the score families that their results lack      select.py
    plan     batch, chunk and group that hold the memory limit        plan.py
    announce what it will take                                        announce.py
    score    for each group that fits in memory, for each batch of the store's evaluation split: clean suffix once; for
             each checkpoint: encode, decode, suffix                  work.py
    write    each checkpoint's results, then results.csv              write.py, results.py

Under torchrun, and with --processes, each process takes every WORLD_SIZE-th checkpoint; they meet only in the folder.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluate.announce import announce, announce_texts, announce_words
from evaluate.checkpoints.find import Checkpoint, Failure, find_checkpoints
from evaluate.config import EvaluateConfig
from evaluate.job import Job
from evaluate.probing.job import Texts, read_texts
from evaluate.probing.texts import PooledLatents
from evaluate.results import tabulate, working_in
from evaluate.scores.scorer import Scorer
from evaluate.select import only_fitting_scores, select
from evaluate.work import (
    Work,
    fit_meta_dictionaries,
    groups,
    plan,
    pool_texts,
    prepare_texts,
    prepare_work,
    score_group,
    text_bytes,
)
from evaluate.write import write
from pipeline.base.errors import PipelineError, UsageError
from pipeline.base.files import require_writable
from pipeline.base.processes import is_launched
from pipeline.base.progress import Progress, say
from pipeline.base.runtime import rank, require_world, world_size
from pipeline.base.spread import n_processes
from pipeline.store.cache import open_cache
from pipeline.store.pair import require_same_rows
from pipeline.store.staging import open_cached

__all__ = ["EvaluateConfig", "Outcome", "run"]


@dataclass(frozen=True)
class Outcome:
    """What a job did: one entry a results file ({path, checkpoint, member, step, skipped}), and what failed."""

    results: list[dict[str, Any]] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)

    def fail(self, failures: Iterable[Failure]) -> None:
        """Report failures and go on."""
        for path, error in failures:
            say(f"failed: {error}")
            self.failed.append((path, error))

    def take_in(self, others: Sequence[Mapping[str, Any]]) -> None:
        """Add what other processes of this job printed as JSON, each of which took every n-th checkpoint like this one."""
        turns = itertools.zip_longest(self.results, *(other["results"] for other in others))
        self.results[:] = [entry for turn in turns for entry in turn if entry is not None]
        for other in others:
            self.fail((Path(one["path"]), PipelineError(one["error"])) for one in other["failed"])


def processes_for(config: EvaluateConfig, places: Sequence[Path], asked: int | str, *, all_steps: bool) -> int:
    """How many processes share out the checkpoints that lack results. Raises UsageError, and as `run`."""
    if asked == 1:
        return 1
    if config.device_map is not None:
        raise UsageError(f"--processes {asked} gives each process a device, --device-map one model all; leave one out")
    job, _ = open_job(config, reads_texts=False)  # the others start the sooner; one that finds nothing to do ends
    todo = select(job, find_checkpoints(places, all_steps)[0]).todo
    return n_processes(asked, sum(map(len, todo.values())), job.device)


def open_job(config: EvaluateConfig, *, reads_texts: bool = True) -> tuple[Job, list[Failure]]:
    """The job that a config means on its stores, and the scores that do not fit them (`reads_texts`: those included that need the
    model's tokenizer, and it is not there). Raises PipelineError."""
    cache = open_cache(config.cache, config.cache_size) if config.cache is not None else None
    source = open_cached(config.store, cache)
    store = source if config.target is None else open_cached(config.target, cache)
    if store is not source:
        require_same_rows(source, store)
    config, unfit = only_fitting_scores(config, store, reads_texts=reads_texts)
    return Job.of(config, store, source), unfit


def run(config: EvaluateConfig, places: Sequence[Path], *, all_steps: bool = False, dry_run: bool = False) -> Outcome:
    """Evaluate checkpoints; what is done is skipped, what fails is reported and the others are finished.

    Raises PipelineError for what concerns all of them: store, model, texts, memory.
    """
    require_world()
    (job, unfit), outcome = open_job(config), Outcome()
    config = job.config
    paths, lost = find_checkpoints(places, all_steps)
    outcome.fail([*unfit, *lost] if rank() == 0 else ())
    if not dry_run:
        require_writable(config.out)
    mine = paths[rank() :: world_size()]
    if world_size() > 1:
        alone = "" if is_launched() else " but not torchrun's; unset both to evaluate all of them here"
        say(
            f"process {rank()} of {world_size()}: {len(mine)} of {len(paths)} checkpoints, as RANK and WORLD_SIZE in the "
            f"environment say{alone}"
        )
    selection = select(job, mine)
    outcome.fail(selection.failed)
    outcome.results.extend(job.entry(checkpoint, skipped=True) for checkpoint in selection.done)
    if not selection.todo:
        say(f"nothing to evaluate: {len(outcome.results)} done, {len(outcome.failed)} failed")
    elif config.latents or config.probing is not None or {"absorption", "first_letter"} & set(config.scores):
        _ = job.models.tokenizer  # it is that of the store, or this ends here
    if selection.todo:
        job.models.require_room()
    with job.source.steady(), job.store.steady(), nullcontext() if dry_run else working_in(config.out):
        for families, todo in selection.todo.items():
            part = job.only(families)
            texts = read_texts(part.config.probing) if part.config.probing is not None else ()
            announce_texts(part, todo, texts)
            announce_words(part, todo)
            if dry_run:
                n_texts = sum(len(one.texts) for one in texts)
                announce(part, todo, plan(part, todo, text_bytes(part, texts), n_texts))
            else:
                score_all(part, todo, texts, outcome)
    if not dry_run and outcome.results:
        tabulate(config.out)
    return outcome


def score_all(job: Job, todo: Sequence[Checkpoint], texts: Sequence[Texts], outcome: Outcome) -> None:
    """Score checkpoints in groups that fit in memory, writing each group's results when its pass is over."""
    probing, letters = prepare_texts(job, texts)
    planned = plan(job, todo, *((probing.n_bytes, probing.n_texts) if probing is not None else (0, 0)))
    announce(job, todo, planned)
    work = prepare_work(job, planned, probing, letters)
    n_begun = 0
    for group in groups(todo, planned):
        with Progress(len(todo) * job.n_sequences, "evaluate", "sequence", done=n_begun * job.n_sequences) as bar:
            scorers, failed = score_group(work, group, bar)
        outcome.fail(failed)
        fit_meta_dictionaries(scorers)
        pooled = pool_texts(work, scorers)
        with Progress(len(todo), "results", "checkpoint", done=n_begun) as bar:
            for scorer, latents in zip(scorers, pooled):
                write_one(work, scorer, latents, outcome)
                bar.advance(1, scorer.checkpoint.member)
        n_begun += len(group)


def write_one(work: Work, scorer: Scorer, pooled: Sequence[PooledLatents] | None, outcome: Outcome) -> None:
    """Write what was found of one checkpoint; what is wrong with it costs itself alone."""
    try:
        write(work, scorer, pooled)
    except PipelineError as error:
        outcome.fail([(scorer.checkpoint.path, error)])
    else:
        outcome.results.append(work.job.entry(scorer.checkpoint, skipped=False))
