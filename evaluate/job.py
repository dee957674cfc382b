"""What all checkpoints of an evaluation share: what is asked for, the store, the language model, and where results lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evaluate.checkpoints.find import Checkpoint
from evaluate.config import EvaluateConfig
from evaluate.latents.files import has_pages
from evaluate.models import Models
from evaluate.results import is_done, result_path
from evaluate.scores.truth import Truth
from pipeline.base.errors import UsageError
from pipeline.base.files import hash_config
from pipeline.base.runtime import resolve_device
from pipeline.store.reader import Store

if TYPE_CHECKING:
    from pipeline.model.split_lm import SplitLM


@dataclass(frozen=True)
class Job:
    """One evaluation: the first `n_sequences` sequences of the store's eval split, on `device`. Made by `of`."""

    config: EvaluateConfig
    store: Store
    device: torch.device
    n_sequences: int
    models: Models

    @staticmethod
    def of(config: EvaluateConfig, store: Store) -> Job:
        """Raises UsageError when the evaluation split is empty or has fewer rows than asked for."""
        device, there = resolve_device(config.device), store.eval.n_sequences
        asked = there if config.rows is None else -(-config.rows // store.context)
        if asked > there:
            raise UsageError(
                f"--rows {config.rows}: the evaluation split of {store.path} has {store.eval.n_rows} rows; ask for fewer"
            )
        if not there:
            raise UsageError(f"{store.path}: its evaluation split is empty; harvest with --eval-tokens")
        return Job(config, store, device, asked, Models(config, store, device))

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
        return self.config.identity(self.n_sequences, self.store.statistics.massive_multiple, self.models.dtype)

    def key(self, checkpoint: Checkpoint) -> str:
        """What recognises finished work."""
        return hash_config({"checkpoint": checkpoint.sha256, "store": self.store.id, "evaluation": self.identity})

    def path(self, checkpoint: Checkpoint) -> Path:
        """The results file of a checkpoint."""
        return result_path(self.config.out, checkpoint.member, checkpoint.step, self.key(checkpoint))

    def is_finished(self, checkpoint: Checkpoint) -> bool:
        """Whether the results are there, and the pages of latents where they are asked for."""
        path = self.path(checkpoint)
        pages = not self.config.wants_latents(checkpoint.member) or has_pages(path)
        return pages and is_done(path, self.key(checkpoint))

    def entry(self, checkpoint: Checkpoint, *, skipped: bool) -> dict[str, Any]:
        """What --json says of one checkpoint: {path, checkpoint, member, step, skipped}."""
        about = {"path": str(self.path(checkpoint)), "checkpoint": str(checkpoint.path)}
        return about | {"member": checkpoint.member, "step": checkpoint.step, "skipped": skipped}
