"""The scoring itself: batches outside, checkpoints inside; the clean model runs once a batch for all of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from evaluate import plan as planning
from evaluate.checkpoints.find import Checkpoint, Failure
from evaluate.job import Job
from evaluate.probing.first_letter import first_letters
from evaluate.probing.job import Probing, Texts, most_bytes, prepare
from evaluate.probing.texts import PooledLatents, pooling_bytes
from evaluate.scores.behaviour import Reference
from evaluate.scores.labels import Letters
from evaluate.scores.sample import GroupMeans, Sample, Survey
from evaluate.scores.scorer import Scorer, shared_work
from pipeline.base.errors import PipelineError
from pipeline.base.files import is_url
from pipeline.base.memory import available_memory
from pipeline.base.progress import Progress, say
from pipeline.base.runtime import DTYPES, memory_limit
from pipeline.store.split import open_bytes


@dataclass(frozen=True)
class Work:
    """What was prepared once for all checkpoints. `reference`: the clean model, when a score of behaviour is asked for;
    `probing` and `letters`: texts and probes, words in prompts and theirs, when scores of them are."""

    job: Job
    plan: planning.Plan
    sample: Sample
    survey: Survey
    reference: Reference | None
    probing: Probing | None
    letters: Letters | None


def text_bytes(job: Job, texts: Sequence[Texts]) -> int:
    """Memory that the residuals of texts take at most, before they were tokenised."""
    itemsize = DTYPES[job.models.dtype].itemsize
    return (
        0
        if job.config.probing is None
        else most_bytes(job.config.probing, texts, job.store.d_model, itemsize, 1 if job.source is job.store else 2)
    )


def plan(job: Job, todo: Sequence[Checkpoint], held: int, n_texts: int = 0) -> planning.Plan:
    """Batch, chunk and group that hold the memory limit; `held`: bytes of the host that the residuals of so many texts take.
    Raises UsageError when nothing fits."""
    store, config, lm = job.store, job.config, job.lm
    stores = {one.where: open_bytes(one.eval.shape, at_url=is_url(one.where)) for one in (store, job.source)}
    held_here = held + sum(stores.values()) if job.device.type == "cpu" else 0
    saes, n_rows = [c.sae for c in todo], job.n_sequences * store.context
    n_features = len(store.extra("truth/parent")) if "truth" in config.scores else 0
    n_words = len(job.words.text) if job.words is not None else 0
    widest = max(store.d_model, job.source.d_model)
    more = planning.kept(config.scores, saes, widest, store.context, n_rows, n_features, n_words)
    if job.source is not store:
        more = dataclasses.replace(more, sequence=more.sequence + store.context * job.source.d_model * 8)
    if config.probing is not None:
        width = max(sae.width for sae in saes)
        once, each = pooling_bytes(n_texts, config.probing.context, job.source.d_model, width, job.device.type)
        more = dataclasses.replace(more, fixed=more.fixed + once, checkpoint=more.checkpoint + each)
    parts = planning.sizes(saes, lm, widest, store.context, job.n_sequences, held_here, more)
    share = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    limit = memory_limit(config.max_memory, job.device, available_memory(), share)
    batch, vocab = min(config.batch_size, job.n_sequences), lm.vocab if lm is not None else 0
    return planning.make_plan(parts, len(todo), batch, store.context, vocab, limit, job.device.type)


def host_limit() -> int:
    """Bytes of the host's memory that the residuals of texts may take: four fifths of this process's share of what is free."""
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * 4 // 5


def prepare_texts(job: Job, texts: Sequence[Texts]) -> tuple[Probing | None, Letters | None]:
    """Run the prefix over texts and words in prompts and train the probes, then let the prefix go.

    None where no score reads them. Raises as `prepare` and `first_letters`.
    """
    if job.config.probing is None and job.words is None:
        return None, None
    from evaluate.probing.texts import text_model

    model = text_model(
        job.models.load("prefix"),
        job.models.tokenizer,
        job.models.point,
        job.store.config["bos"],
        parse_special=bool(job.store.config.get("parse_special")),
        special=job.store.config.get("special_ids"),
        reads=job.models.reads,
    )
    folder, letters, probing = job.config.out / "probes", None, None
    if job.words is not None:
        size, seed = job.config.batch_size, job.config.seed
        letters = first_letters(job.words, seed, model, job.store.mean, size, job.device, folder)
        if letters.probes is None:
            say(letters.about["why"])
    if job.config.probing is not None:
        probing = prepare(job.config.probing, texts, model, folder, host_limit())
    return probing, letters


@torch.inference_mode()
def prepare_work(job: Job, planned: planning.Plan, probing: Probing | None, letters: Letters | None) -> Work:
    """Read the rows once, and run what of the model no batch changes."""
    planning.settle_freed_memory(planned)
    sample = Sample(job.store, job.n_sequences, planned.batch, job.device, job.source)
    reference = None
    if job.lm is not None:
        rows = planned.batch * job.store.context
        reference = Reference.of(job.lm, job.store.mean, job.store.context, planned.chunk, rows)
    return Work(job, planned, sample, sample.survey(), reference, probing, letters)


def groups(todo: Sequence[Checkpoint], planned: planning.Plan) -> Iterator[Sequence[Checkpoint]]:
    """The checkpoints that are held in memory at once, in order."""
    return (todo[start : start + planned.group] for start in range(0, len(todo), planned.group))


@torch.inference_mode()
def score_group(work: Work, group: Sequence[Checkpoint], bar: Progress) -> tuple[list[Scorer], list[Failure]]:
    """One pass over the rows for some checkpoints; what cannot be loaded or is not finite from the start costs itself alone.

    Raises ModelError when the clean model's own output is not finite; asked after the first batch and the last.
    """
    scorers, failed = load_group(work, group)
    means = GroupMeans(work.sample)
    for batch in work.sample.batches():
        clean = work.reference.clean_pass(batch) if work.reference is not None and scorers else None
        if work.reference is not None and batch.first == 0:
            work.reference.require_finite()
        shared = shared_work(batch, clean, means)
        for scorer in list(scorers):
            scorer.update(work.job.lm, shared, work.plan.chunk)
            if batch.first == 0 and (error := not_finite(scorer)):
                scorers.remove(scorer)
                failed.append((scorer.checkpoint.path, error))
            bar.advance(len(batch.kept), scorer.checkpoint.member)
        if not scorers:
            break
    if work.reference is not None:
        work.reference.require_finite()
    return scorers, failed


def load_group(work: Work, group: Sequence[Checkpoint]) -> tuple[list[Scorer], list[Failure]]:
    """Load checkpoints; those that cannot be loaded, and why."""
    job, scorers, failed = work.job, list[Scorer](), list[Failure]()
    for checkpoint in group:
        try:
            scorers.append(
                Scorer(
                    checkpoint,
                    work.survey,
                    job.config.scores,
                    job.config.levels,
                    job.config.seed,
                    job.device,
                    job.store.context,
                    job.truth,
                    job.probes,
                    work.letters,
                )
            )
        except PipelineError as error:
            failed.append((checkpoint.path, error))
    return scorers, failed


@torch.inference_mode()
def fit_meta_dictionaries(scorers: Sequence[Scorer]) -> None:
    """Fit the meta-dictionaries of checkpoints whose structure is asked for, which takes longer than their pass over the rows."""
    if total := sum(scorer.n_meta_steps for scorer in scorers):
        with Progress(total, "meta-dictionaries", "step") as bar:
            for scorer in scorers:
                scorer.meta_dictionaries(partial(bar.advance, 1, scorer.checkpoint.member))


@torch.inference_mode()
def pool_texts(work: Work, scorers: Sequence[Scorer]) -> list[tuple[PooledLatents, ...] | None]:
    """What each checkpoint makes of the texts, which are read once for all; None where no score reads texts."""
    if work.probing is None or not scorers:
        return [None for _ in scorers]
    return list(work.probing.pool([scorer.sae for scorer in scorers]))


def not_finite(scorer: Scorer) -> PipelineError | None:
    """What is wrong with a checkpoint whose numbers so far are not finite: no need to go on."""
    try:
        scorer.require_finite()
    except PipelineError as error:
        return error
    return None
