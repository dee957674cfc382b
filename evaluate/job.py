"""What all checkpoints of an evaluation share: what is asked for, the store, the language model, and where results lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evaluate.checkpoints.find import Checkpoint
from evaluate.config import EvaluateConfig
from evaluate.latents.files import has_pages
from evaluate.models import Models
from evaluate.probing.first_letter import Words, draw_words, read_words, vocabulary
from evaluate.results import families_done, result_path
from evaluate.scores.labels import Probes, read_probes
from evaluate.scores.truth import Truth
from pipeline.base.errors import UsageError
from pipeline.base.files import hash_config
from pipeline.base.runtime import resolve_device
from pipeline.base.token_text import TokenText
from pipeline.store.reader import Store

if TYPE_CHECKING:
    from pipeline.model.split_lm import SplitLM


@dataclass(frozen=True)
class Job:
    """One evaluation: the first `n_sequences` sequences of the store's eval split, on `device`. Made by `of`.

    `store` holds the rows that are rebuilt and spliced, `source` those that are encoded: the same one, but for transcoders.
    """

    config: EvaluateConfig
    store: Store
    device: torch.device
    n_sequences: int
    models: Models
    source: Store

    @staticmethod
    def of(config: EvaluateConfig, store: Store, source: Store | None = None) -> Job:
        """Raises UsageError when the evaluation split is empty or has fewer rows than asked for."""
        device, there = resolve_device(config.device), store.eval.n_sequences
        asked = there if config.rows is None else -(-config.rows // store.context)
        if asked > there:
            raise UsageError(
                f"--rows {config.rows}: the evaluation split of {store.where} has {store.eval.n_rows} rows; ask for fewer"
            )
        if not there:
            raise UsageError(f"{store.where}: its evaluation split is empty; harvest with --eval-tokens")
        return Job(config, store, device, asked, Models(config, store, device, source), source or store)

    def only(self, families: Sequence[str]) -> Job:
        """The same job for some of its score families; models are shared."""
        return dataclasses.replace(self, config=self.config.only(families))

    @property
    def lm(self) -> SplitLM | None:
        """The layers after the cut and the head, when a score of behaviour is to be computed."""
        return self.models.suffix if "kl" in self.config.scores else None

    @cached_property
    def truth(self) -> Truth | None:
        """The features that the store's rows were made of, when they are asked about."""
        return Truth.read(self.store, self.device) if "truth" in self.config.scores else None

    @cached_property
    def probes(self) -> Probes | None:
        """Labels of the store's tokens and probes that find them, when absorption is asked about."""
        if "absorption" not in self.config.scores:
            return None
        text = TokenText(self.models.tokenizer)
        return read_probes(self.store, self.n_sequences, text, self.config.seed, self.device)

    @cached_property
    def words(self) -> Words | None:
        """Words whose first letters are asked for in prompts, when they are asked about. Raises UsageError for --words."""
        if "first_letter" not in self.config.scores:
            return None
        given = self.config.words
        return draw_words(vocabulary(self.models.tokenizer) if given is None else read_words(given), self.config.seed)

    @cached_property
    def families(self) -> dict[str, dict[str, Any]]:
        """Each family asked for, with the settings that shape its numbers."""
        return self.config.family_identities(self.models.dtype)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The evaluation config as results carry it."""
        found = self.config.sample_identity(self.n_sequences, self.store.statistics.massive_multiple)
        if any("dtype" in settings for settings in self.families.values()):
            found["dtype"] = self.models.dtype
        return found | {"families": self.families}

    def key(self, checkpoint: Checkpoint) -> str:
        """What names a results file: checkpoint, store and sample. Which families are in it, it says itself."""
        sample = self.config.sample_identity(self.n_sequences, self.store.statistics.massive_multiple)
        return hash_config({"checkpoint": checkpoint.sha256, "store": self.store.id, "sample": sample})

    def path(self, checkpoint: Checkpoint) -> Path:
        """The results file of a checkpoint."""
        return result_path(self.config.out, checkpoint.member, checkpoint.step, self.key(checkpoint))

    def missing(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Families asked for that the results do not hold with these settings. Raises DamagedError for what is no results."""
        done = families_done(self.path(checkpoint), self.key(checkpoint))
        return tuple(name for name, settings in self.families.items() if done.get(name) != settings)

    def lacks_pages(self, checkpoint: Checkpoint) -> bool:
        """Whether pages of the checkpoint's latents are asked for and not there."""
        return self.config.wants_latents(checkpoint.member) and not has_pages(self.path(checkpoint))

    def entry(self, checkpoint: Checkpoint, *, skipped: bool) -> dict[str, Any]:
        """What --json says of one checkpoint: {path, checkpoint, member, step, skipped}."""
        about = {"path": str(self.path(checkpoint)), "checkpoint": str(checkpoint.path)}
        return about | {"member": checkpoint.member, "step": checkpoint.step, "skipped": skipped}
