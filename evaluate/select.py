"""Which checkpoints a job has to score: those that fit it and have no results yet. Found before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evaluate.checkpoints.find import (
    Checkpoint,
    Failure,
    loss_curve,
    open_checkpoint,
    require_fit,
    require_kind,
    require_module,
    resolve_levels,
)
from evaluate.checkpoints.place import placed
from evaluate.config import EvaluateConfig
from evaluate.job import Job
from evaluate.models import Models
from evaluate.scores.scorer import OF_TOKENS, unfit_scores
from pipeline.base.errors import PipelineError, UsageError
from pipeline.base.runtime import resolve_device
from pipeline.store.reader import Store


@dataclass(frozen=True)
class Selection:
    """Checkpoints to score by the families they lack, those whose results are there, and what cannot be scored and why."""

    todo: dict[tuple[str, ...], list[Checkpoint]] = field(default_factory=dict)
    done: list[Checkpoint] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)


def select(job: Job, paths: Sequence[Path]) -> Selection:
    """Open every checkpoint and check that it fits."""
    found = Selection()
    for path in paths:
        try:
            checkpoint = open_checkpoint(path)
            require_kind(checkpoint, job.source is not job.store)
            checkpoint = placed(checkpoint, job.source, job.models.checked)
            for store, makes in (
                ((job.source, False), (job.store, True)) if job.config.target else ((job.store, False),)
            ):
                require_fit(
                    checkpoint,
                    store,
                    allow_other_store=job.config.allow_other_store,
                    allow_other_model=job.config.allow_other_model,
                    makes=makes,
                )
            if "module" in checkpoint.made_for:
                require_module(checkpoint, job.models.module)
            resolve_levels(job.config.levels, checkpoint)
            missing = job.missing(checkpoint)
            loss_curve(checkpoint)  # read again when results are written: what is wrong with it is better known now
        except PipelineError as error:
            found.failed.append((path, error))
        else:
            work = missing or job.lacks_pages(checkpoint)
            (found.todo.setdefault(missing, []) if work else found.done).append(checkpoint)
    return found


def only_fitting_scores(
    config: EvaluateConfig, store: Store, *, reads_texts: bool = True
) -> tuple[EvaluateConfig, list[Failure]]:
    """The config without scores that the store cannot give, and those. Raises the first one's error when none is left.

    `reads_texts`: whether the tokenizer is looked for, which takes a second, by scores that need it.
    """
    if not store.layout.has_tokens and (config.probing is not None or config.latents):
        asked = (
            "--latents" if config.latents else f"--scores {','.join(config.probing.scores if config.probing else ())}"
        )
        raise UsageError(
            f"{asked}: the rows of {config.store} are of no text, so there is nothing to show or read; leave it out"
        )
    unfit = unfit_scores(config.scores, store)
    for family in [name for name in OF_TOKENS if reads_texts and name in config.scores and name not in unfit]:
        try:
            _ = Models(config, store, resolve_device(config.device)).tokenizer
        except PipelineError as error:
            unfit[family] = UsageError(f"--scores {family}: no tokenizer to {OF_TOKENS[family]}: {error}")
    left = tuple(name for name in config.scores if name not in unfit)
    if unfit and not left and config.probing is None and not config.latents:
        raise next(iter(unfit.values()))
    return config.of_rows(left), [(Path(config.store), error) for error in unfit.values()]
