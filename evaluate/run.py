"""The evaluate stage: one clean pass of the layers after the cut serves every checkpoint; results appear one file each.

    find checkpoints → skip what is done → open store and model, check that all fit → plan memory
      for each group of checkpoints that fits in memory:
        for each batch of the store's evaluation split: clean suffix once; for each checkpoint: encode, decode, suffix
        write each checkpoint's results → results.csv

Under torchrun each process takes every WORLD_SIZE-th checkpoint; they meet only in the folder.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evaluate import plan as planning
from evaluate.checkpoints.find import (
    Checkpoint,
    Failure,
    find_checkpoints,
    loss_curve,
    open_checkpoint,
    require_fit,
    resolve_levels,
)
from evaluate.config import EvaluateConfig
from evaluate.latents.files import has_pages, latents_folder
from evaluate.models import Models
from evaluate.probing.job import Probing, Texts, prepare, read_texts
from evaluate.results import definitions, is_done, result_path, write_csv, write_result
from evaluate.scores.behaviour import Baselines, clean_pass
from evaluate.scores.sample import Sample, Survey
from evaluate.scores.scorer import Scorer, shared_work, unfit_scores
from evaluate.scores.truth import Truth
from pipeline.base.errors import PipelineError, UsageError
from pipeline.base.files import hash_config, human_bytes
from pipeline.base.progress import Progress, format_seconds, say
from pipeline.base.runtime import DTYPES, available_memory, git_state, rank, resolve_device, versions, world_size
from pipeline.store.reader import Store

if TYPE_CHECKING:
    from pipeline.model.split_lm import SplitLM

__all__ = ["EvaluateConfig", "Outcome", "run"]


@dataclass
class Outcome:
    """What a job did: one entry a results file ({path, checkpoint, member, step, skipped}), and what failed."""

    results: list[dict[str, Any]] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)

    def fail(self, path: Path, error: PipelineError) -> None:
        """Report a failure and go on."""
        say(f"failed: {error}")
        self.failed.append((path, error))


def run(config: EvaluateConfig, places: Sequence[Path], *, all_steps: bool = False, dry_run: bool = False) -> Outcome:
    """Evaluate checkpoints; what is done is skipped, what fails is reported and the others are finished.

    Raises PipelineError for what concerns all of them: store, model, texts, memory.
    """
    store, outcome = Store.open(config.store), Outcome()
    job = Job(leave_out_unfit(config, store, outcome), store)
    paths, failed = find_checkpoints(places, all_steps)
    for path, error in failed if rank() == 0 else []:
        outcome.fail(path, error)
    todo = job.select(paths[rank() :: world_size()], outcome)
    if not todo:
        say(f"nothing to evaluate: {len(outcome.results)} done, {len(outcome.failed)} failed")
    elif dry_run:
        job.announce_texts(todo)
        job.announce(job.plan(todo), todo)
    else:
        job.score_all(todo, outcome)
    if not dry_run and outcome.results:
        write_csv(config.out)
    return outcome


def leave_out_unfit(config: EvaluateConfig, store: Store, outcome: Outcome) -> EvaluateConfig:
    """The config without scores that the store cannot give; each is reported. Raises the first one's error when none is left."""
    unfit = unfit_scores(config.scores, store)
    left = tuple(name for name in config.scores if name not in unfit)
    if unfit and not left and config.probing is None and not config.latents:
        raise next(iter(unfit.values()))
    for error in unfit.values() if rank() == 0 else ():
        outcome.fail(config.store, error)
    return dataclasses.replace(config, scores=left) if unfit else config


class Job:
    """What all checkpoints of a job share: the store, the language model's remaining layers, texts, survey, baselines."""

    def __init__(self, config: EvaluateConfig, store: Store) -> None:
        self.config, self.store, self.device = config, store, resolve_device(config.device)
        context, eval_sequences = store.context, store.eval.n_sequences
        asked = eval_sequences if config.rows is None else -(-config.rows // context)
        if asked > eval_sequences:
            raise UsageError(
                f"--rows {config.rows}: the evaluation split of {store.path} has {store.eval.n_rows} rows; ask for fewer"
            )
        if not eval_sequences:
            raise UsageError(f"{store.path}: its evaluation split is empty; harvest with --eval-tokens")
        self.n_sequences = asked
        self.models = Models(config, store, self.device)
        self.baselines: Baselines | None = None
        self.probing: Probing | None = None

    @property
    def lm(self) -> SplitLM | None:
        """The layers after the cut and the head, when a score of behaviour is asked for."""
        return self.models.suffix

    @cached_property
    def truth(self) -> Truth | None:
        """The features that the store's rows were made of, when they are asked about."""
        return Truth.read(self.store, self.device) if "truth" in self.config.scores else None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The evaluation config as results carry it."""
        multiple = self.store.statistics.massive_multiple
        return self.config.identity(self.n_sequences, multiple, self.models.dtype)

    def key(self, checkpoint: Checkpoint) -> str:
        """What recognises finished work."""
        return hash_config({"checkpoint": checkpoint.sha256, "store": self.store.id, "evaluation": self.identity})

    def path(self, checkpoint: Checkpoint) -> Path:
        """The results file of a checkpoint."""
        return result_path(self.config.out, checkpoint.member, checkpoint.step, self.key(checkpoint))

    def select(self, paths: Sequence[Path], outcome: Outcome) -> list[Checkpoint]:
        """Open every checkpoint and check that it fits; those not done yet."""
        todo = []
        for path in paths:
            try:
                checkpoint = open_checkpoint(path)
                require_fit(checkpoint, self.store, self.config.allow_other_store)
                resolve_levels(self.config.levels, checkpoint)
            except PipelineError as error:
                outcome.fail(path, error)
                continue
            if self.is_finished(checkpoint):
                outcome.results.append(self.entry(checkpoint, skipped=True))
            else:
                todo.append(checkpoint)
        return todo

    def is_finished(self, checkpoint: Checkpoint) -> bool:
        """Whether the results are there, and the pages of latents where they are asked for."""
        path = self.path(checkpoint)
        pages = not self.config.wants_latents(checkpoint.member) or has_pages(path)
        return pages and is_done(path, self.key(checkpoint))

    def entry(self, checkpoint: Checkpoint, *, skipped: bool) -> dict[str, Any]:
        """What --json says of one checkpoint."""
        about = {"path": str(self.path(checkpoint)), "checkpoint": str(checkpoint.path)}
        return about | {"member": checkpoint.member, "step": checkpoint.step, "skipped": skipped}

    @cached_property
    def texts(self) -> tuple[Texts, ...]:
        """What SCR, TPP and sparse probing read; empty when none of them is asked for."""
        return read_texts(self.config.probing) if self.config.probing is not None else ()

    def prepare_probing(self) -> None:
        """Run the prefix over the texts and train the probes, then let the prefix go."""
        if self.config.probing is None or self.probing is not None:
            return
        from evaluate.probing.texts import text_model

        model = text_model(
            self.models.load("prefix"),
            self.models.tokenizer,
            self.models.layer,
            self.store.config["bos"],
            parse_special=bool(self.store.config.get("parse_special")),
        )
        self.probing = prepare(self.config.probing, self.texts, model, self.config.out / "probes")

    def plan(self, todo: Sequence[Checkpoint]) -> planning.Plan:
        """Batch, chunk and group that hold the memory limit."""
        store, config = self.store, self.config
        held = self.text_bytes() if self.device.type == "cpu" else 0
        parts = planning.sizes([c.sae for c in todo], self.lm, store.d_model, store.context, self.n_sequences, held)
        share = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        limit = planning.memory_limit(config.max_memory, self.device, available_memory(), share)
        batch, vocab = min(config.batch_size, self.n_sequences), self.lm.vocab if self.lm is not None else 0
        return planning.make_plan(parts, len(todo), batch, store.context, vocab, limit, self.device.type)

    def text_rows(self) -> int:
        """Rows of texts that every checkpoint encodes; the most they can be until the texts were tokenised."""
        if self.probing is not None:
            return self.probing.n_rows
        context = self.config.probing.context if self.config.probing is not None else 0
        return context * sum(len(part.texts) for part in self.texts)

    def text_bytes(self) -> int:
        """Memory of the texts' residuals, likewise."""
        if self.probing is not None:
            return self.probing.n_bytes
        n_texts = sum(len(part.texts) for part in self.texts)
        return self.store.d_model * (self.text_rows() * DTYPES[self.models.dtype].itemsize + 4 * n_texts)

    def announce_texts(self, todo: Sequence[Checkpoint]) -> None:
        """Say what the texts of SCR, TPP and sparse probing will take."""
        if not self.texts:
            return
        assert self.config.probing is not None
        n_texts, rows = sum(len(part.texts) for part in self.texts), self.text_rows()
        _, both_ways = planning.sae_cost([c.sae for c in todo], self.store.d_model, self.device)
        (_, prefix), _ = self.models.costs
        say(
            f"texts for {', '.join(self.config.probing.scores)}: {n_texts:,} of at most {self.config.probing.context} tokens; "
            f"at most about {format_seconds(rows * prefix)} once for the layers up to "
            f"{self.models.layer}, {format_seconds(rows * both_ways / 2)} to encode them for all checkpoints"
        )

    def announce(self, plan: planning.Plan, todo: Sequence[Checkpoint]) -> None:
        """Say what the job will take."""
        tokens, groups = self.n_sequences * self.store.context, -(-len(todo) // plan.group)
        passes = planning.suffix_passes(todo, self.config.levels) + groups + 1
        flop, seconds = planning.sae_cost([c.sae for c in todo], self.store.d_model, self.device)
        if self.lm is not None:
            _, (suffix_flop, suffix_seconds) = self.models.costs
            flop, seconds = flop + passes * suffix_flop, seconds + passes * suffix_seconds
        say(
            f"evaluate: {len(todo)} checkpoints on {tokens:,} tokens of {self.store.path}; "
            + (f"{passes} passes of the layers after {self.store.config['layer']}, " if self.lm is not None else "")
            + f"{flop * tokens / 1e12:,.3g} TFLOP in all, about {format_seconds(seconds * tokens)}"
        )
        say(
            f"  {plan.batch} sequences a batch, {plan.group} checkpoints at once ({groups} pass{'es' * (groups > 1)} over the "
            f"rows), peak memory at most {human_bytes(plan.peak)} on {self.device}"
        )

    def score_all(self, todo: Sequence[Checkpoint], outcome: Outcome) -> None:
        """Score checkpoints in groups that fit in memory, writing each group's results when its pass is over."""
        self.announce_texts(todo)
        self.prepare_probing()
        plan = self.plan(todo)
        self.announce(plan, todo)
        planning.settle_freed_memory(plan)
        sample = Sample(self.store, self.n_sequences, plan.batch, self.device)
        with torch.inference_mode():
            found = sample.survey()
            with Progress(len(todo) * self.n_sequences, "evaluate", "sequence") as bar:
                for start in range(0, len(todo), plan.group):
                    group = todo[start : start + plan.group]
                    for scorer in self.score_group(group, sample, found, plan, bar, outcome):
                        self.finish(scorer, sample, found, outcome)

    def score_group(
        self,
        group: Sequence[Checkpoint],
        sample: Sample,
        found: Survey,
        plan: planning.Plan,
        bar: Progress,
        outcome: Outcome,
    ) -> list[Scorer]:
        """One pass over the rows for some checkpoints: batches outside, checkpoints inside. Those that did not fail."""
        scorers = list(self.load_group(group, found, outcome))
        baselines, clean, context = None, None, self.store.context
        if self.lm is not None:
            space = torch.empty(plan.batch * context, self.lm.vocab, device=self.device)
            baselines = self.baselines or Baselines.empty(self.lm, self.store.mean, context, plan.chunk)
        for batch in sample.batches():
            if self.lm is not None and baselines is not None:
                clean = clean_pass(self.lm, batch, plan.chunk, space)
                if baselines is not self.baselines:
                    baselines.update(batch, clean)
            shared = shared_work(batch, clean, found)
            for scorer in list(scorers):
                scorer.update(self.lm, shared, plan.chunk)
                if batch.first == 0 and not self.still_finite(scorer, outcome):
                    scorers.remove(scorer)
                bar.advance(len(batch.kept), scorer.checkpoint.member)
            if not scorers:
                return []
        self.baselines = baselines
        return scorers

    def load_group(self, group: Sequence[Checkpoint], found: Survey, outcome: Outcome) -> Iterator[Scorer]:
        """Load checkpoints; one that cannot be loaded is reported."""
        config = self.config
        for checkpoint in group:
            try:
                yield Scorer(
                    checkpoint,
                    found,
                    config.scores,
                    config.levels,
                    config.seed,
                    self.device,
                    self.store.context,
                    self.truth,
                )
            except PipelineError as error:
                outcome.fail(checkpoint.path, error)

    def still_finite(self, scorer: Scorer, outcome: Outcome) -> bool:
        """Whether a checkpoint's numbers are finite so far; reported when not."""
        try:
            scorer.require_finite()
        except PipelineError as error:
            outcome.fail(scorer.checkpoint.path, error)
            return False
        return True

    def finish(self, scorer: Scorer, sample: Sample, found: Survey, outcome: Outcome) -> None:
        """Compute what is left of one checkpoint and write its results; a failure is reported."""
        checkpoint = scorer.checkpoint
        try:
            data = self.results(scorer, sample, found)
            if self.config.wants_latents(checkpoint.member):
                self.write_latents(scorer)
            write_result(self.path(checkpoint), data)
        except PipelineError as error:
            outcome.fail(checkpoint.path, error)
            return
        outcome.results.append(self.entry(checkpoint, skipped=False))

    def results(self, scorer: Scorer, sample: Sample, found: Survey) -> dict[str, Any]:
        """Everything FORMAT.md lists under "Results" but format and version."""
        baselines = [self.baselines.numbers(k) for k in range(2)] if self.baselines is not None else None
        series, features = scorer.series(), scorer.features()
        if self.probing is not None:
            probed = self.probing.score(scorer.sae, scorer.levels)
            series |= {name: [dict(row) for row in rows] for name, rows in probed.series.items()}
            features = {**features, "probing": probed.tasks}
        return {
            "key": self.key(scorer.checkpoint),
            "checkpoint": scorer.checkpoint.to_dict(),
            "store": {"id": self.store.id, "d_model": self.store.d_model, "context": self.store.context}
            | {name: self.store.config[name] for name in ("model", "revision", "weights_sha256", "layer", "corpus")},
            "evaluation": self.identity,
            "sample": self.sample_facts(sample, found),
            "baselines": baselines[0] | {"without_massive": baselines[1]} if baselines else {},
            "levels": scorer.level_results(baselines),
            "series": series,
            "features": features,
            **scorer.structure(),
            "curve": loss_curve(scorer.checkpoint),
            "definitions": definitions(),
            "versions": versions(),
            "git": git_state(),
        }

    def sample_facts(self, sample: Sample, found: Survey) -> dict[str, Any]:
        """What the averages are over."""
        kept, normal = (int(n) for n in found.n_rows)
        rows = sample.n_sequences * self.store.context
        facts: dict[str, Any] = {"split": "eval", "n_sequences": sample.n_sequences, "n_rows": rows}
        facts |= {"n_tokens": kept, "n_tokens_without_massive": normal, "n_special": rows - kept}
        facts |= {"n_massive": kept - normal, "batch_size": sample.batch_size, "device": str(self.device)}
        return facts | {"probing": self.probing.sample if self.probing is not None else {}}

    def write_latents(self, scorer: Scorer) -> None:
        """Pages of every latent, beside the results file."""
        from evaluate.latents.collect import write_latents

        unembedding = self.lm.unembedding if self.lm is not None else None
        folder = latents_folder(self.path(scorer.checkpoint))
        write_latents(scorer.sae, self.store, self.models.tokenizer, folder, unembedding=unembedding, quiet=True)
