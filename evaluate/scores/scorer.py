"""Scores one checkpoint while batches go by: encode once, decode level by level, run only the suffix for each level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evaluate.checkpoints.find import Checkpoint, resolve_levels
from evaluate.scores.absorption import AVERAGED, AbsorptionScore
from evaluate.scores.behaviour import Behaviour, Clean, behaviour_scores, score_residual, splice
from evaluate.scores.coding import SparseCoding
from evaluate.scores.features import Correlation, density_features, geometry
from evaluate.scores.firing import Firing
from evaluate.scores.labels import Letters, Probes
from evaluate.scores.reconstruction import Reconstruction, spread_in_group
from evaluate.scores.sample import WEIGHTINGS, Batch, GroupMeans, Survey
from evaluate.scores.structure import Hierarchy, meta_dictionary, n_meta_steps, nothing
from evaluate.scores.truth import Truth, TruthScore
from pipeline.base.errors import CheckpointError, PipelineError, UsageError
from pipeline.base.runtime import tf32

if TYPE_CHECKING:
    from pipeline.model.split_lm import SplitLM
    from pipeline.store.reader import Store

SCORES = ("kl", "ev", "l0", "coding", "features", "truth", "structure", "absorption", "first_letter")
"""Families computed from the store: behaviour (kl_*, ce*, top1), reconstruction, sparsity, sparse_coding_rate, features;
against known features; meta-dictionary and hierarchy; absorption of letters and classes of characters; and of first letters of
words in prompts, whose rows are made by the model."""
OF_TOKENS = {"absorption": "label them by", "first_letter": "make words of"}
"""Those that take a tokenizer, and what for."""
OF_A_MODEL = ("kl", "ev", "l0", "coding", "features")
"""Those computed unless others are asked for."""
OF_ROWS = ("ev", "l0", "coding", "features", "structure")
"""The same where rows are of no language model."""
OF_A_TRUTH = ("ev", "l0", "coding", "features", "truth", "structure")
"""The same where rows are sums of known features."""


def default_scores(store: Store) -> tuple[str, ...]:
    """The families computed unless others are asked for."""
    return {"truth": OF_A_TRUTH, "rows": OF_ROWS}.get(store.layout.kind, OF_A_MODEL)


def unfit_scores(scores: Sequence[str], store: Store) -> dict[str, PipelineError]:
    """Which of the families a store has not what it takes for, and why: found before any work."""
    found: dict[str, PipelineError] = {}
    if "kl" in scores and not store.layout.has_tokens:
        found["kl"] = UsageError(
            f"--scores kl: {store.where} was made without a language model, so there is none to splice into"
        )
    if "truth" in scores and "truth/directions" not in store.extras:
        found["truth"] = UsageError(
            f"--scores truth: {store.where} does not know its features; make one with python -m harvest --truth"
        )
    for name, purpose in OF_TOKENS.items():
        if name in scores and not store.layout.has_tokens:
            found[name] = UsageError(
                f"--scores {name}: the rows of {store.where} are of no text, so there is nothing to {purpose}"
            )
    return found


@dataclass(frozen=True)
class Batched:
    """A batch with what all checkpoints share of it."""

    batch: Batch
    clean: Clean | None
    spread: Tensor


def shared_work(batch: Batch, clean: Clean | None, means: GroupMeans) -> Batched:
    """Compute once what every checkpoint needs of a batch."""
    return Batched(batch, clean, spread_in_group(batch, means.of(batch)))


class Scorer:
    """One checkpoint on the device with its running sums. Raises CheckpointError when its file cannot be loaded.

    `scores` names families of SCORES; `levels` is all, last, or indices; `truth`, `probes` and `letters` go with the families
    truth, absorption and first_letter.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        survey: Survey,
        scores: Sequence[str],
        levels: str,
        seed: int,
        device: torch.device,
        context: int,
        truth: Truth | None,
        probes: Probes | None,
        letters: Letters | None,
    ) -> None:
        self.checkpoint, self.scores, self.levels = checkpoint, tuple(scores), resolve_levels(levels, checkpoint)
        self.sae = checkpoint.load().float().to(device).eval().requires_grad_(False)
        config = self.sae.config
        self.firing = Firing(config.levels, device)
        self.reconstruction = {level: Reconstruction(survey) for level in self.levels}
        self.behaviour = {level: Behaviour(device) for level in self.levels}
        self.coding = SparseCoding(self.sae, survey) if "coding" in scores else None
        self.correlation = Correlation(config, seed, device) if "features" in scores else None
        self.hierarchy = Hierarchy(config, context, seed) if "structure" in scores else None
        self.meta: list[dict[str, Any]] = []
        self.truth = TruthScore(self.sae, truth) if truth is not None else None
        self.absorption = AbsorptionScore(self.sae, probes) if probes is not None else None
        self.letters = letters
        self.context, self.seed = context, seed

    def update(self, lm: SplitLM | None, shared: Batched, chunk: int) -> None:
        """Add a batch."""
        batch = shared.batch
        with tf32(batch.x.device):
            z = self.sae.encode(batch.encoded)
        self.firing.update(z, batch)
        for level, x_hat in enumerate(self.sae.decode_levels(z, batch.encoded)):
            if level not in self.levels:
                continue
            self.reconstruction[level].update(batch, x_hat, shared.spread)
            if lm is not None and shared.clean is not None:
                scores = score_residual(lm, batch, shared.clean, splice(batch, x_hat), chunk)
                self.behaviour[level].update(batch, scores)
        if self.coding is not None:
            self.coding.update(z, batch, self.levels)
        if self.correlation is not None:
            self.correlation.update(z, batch)
        if self.hierarchy is not None:
            self.hierarchy.update(z, batch)
        if self.truth is not None:
            self.truth.update(z, batch.first * self.context)
        if self.absorption is not None:
            self.absorption.update(z, batch, self.context)

    def require_finite(self) -> None:
        """Raise CheckpointError when a reconstruction or a KL so far is not finite: no need to go on."""
        for level in self.levels:
            sums = (self.reconstruction[level].sums[:, :3], self.behaviour[level].sums)
            for what, values in zip(("reconstruction", "KL or CE"), sums):
                if not values.isfinite().all():
                    raise CheckpointError(
                        f"{self.checkpoint.path}: the {what} of level {level} is not finite (NaN or infinite); its weights "
                        "are damaged or overflow the model's dtype (try --dtype float32)"
                    )

    def level_results(self, baselines: Sequence[dict[str, float]] | None) -> list[dict[str, Any]]:
        """The results' `levels`: each with its scores over all kept rows and without massive ones."""
        self.require_finite()
        return [self._level(level, baselines) for level in self.levels]

    def _level(self, level: int, baselines: Sequence[dict[str, float]] | None) -> dict[str, Any]:
        reconstruction, firing = self.reconstruction[level].scores(), self.firing.scores(level)
        found: dict[str, Any] = {"level": level, "n_latents": self.sae.config.levels[level]}
        for k, name in enumerate(WEIGHTINGS):
            scores: dict[str, float | None] = {}
            if baselines is not None:
                scores |= behaviour_scores(self.behaviour[level], baselines[k], k)
            if "ev" in self.scores:
                scores |= reconstruction[k]
            if "l0" in self.scores:
                scores |= firing[k]
            if self.truth is not None and name == "scores":
                scores |= self.truth.scores(level)
            if self.absorption is not None and name == "scores":
                scores |= averaged("absorption", self.absorption_results, level, "all")
            if self.letters is not None and name == "scores":
                scores |= averaged("first_letter", self.letter_results, level, "letters")
            found[name] = {metric: defined(value) for metric, value in scores.items()}
        if "l0" in self.scores:
            found["l0_quantiles"] = self.firing.l0_quantiles(level)
            if level == self.sae.config.n_levels - 1 and "dead" in self.checkpoint.provenance:
                found["scores"]["dead_in_training"] = self.checkpoint.provenance["dead"]
        return found

    def series(self) -> dict[str, list[dict[str, Any]]]:
        """The results' `series` that need no texts: sparse coding by n and level, over all rows and without massive ones."""
        if self.coding is None:
            return {}
        found: dict[str, list[dict[str, Any]]] = {}
        for level in self.levels:
            reconstruction = self.reconstruction[level].scores()
            for k, suffix in enumerate(("", "_without_massive")):
                points = {
                    "sparse_coding_rate": self.coding.rates(level, reconstruction[k]["ev"], k),
                    "sparse_coding_ev": [(n, defined(ev)) for n, ev in self.coding.explained(level, k)],
                }
                for name, values in points.items():
                    rows = [{"n": n, "level": level, "value": value, "low": None, "high": None} for n, value in values]
                    found.setdefault(name + suffix, []).extend(rows)
        return found

    @cached_property
    def absorption_results(self) -> dict[str, Any]:
        """What became of every label in every level."""
        assert self.absorption is not None
        return self.absorption.results(self.levels)

    @cached_property
    def letter_results(self) -> dict[str, Any]:
        """The same for first letters of words in prompts, which are encoded here; where the model shows none, why."""
        assert self.letters is not None
        if self.letters.probes is None:
            return self.letters.about
        score = AbsorptionScore(self.sae, self.letters.probes)
        score.encode(self.letters.center, self.letters.read)
        return self.letters.about | score.results(self.levels)

    def beside(self) -> dict[str, Any]:
        """The results' `structure`, `truth`, `absorption` and `first_letter`, those that were asked for."""
        found: dict[str, Any] = {}
        if self.letters is not None:
            found["first_letter"] = self.letter_results
        if self.absorption is not None:
            found["absorption"] = self.absorption_results
        if self.hierarchy is not None:
            found["structure"] = {"meta": self.meta_dictionaries(), "hierarchy": self.hierarchy.features()}
        if self.truth is not None:
            found["truth"] = self.truth.about()
        return found

    @property
    def n_meta_steps(self) -> int:
        """Steps that `meta_dictionaries` takes; none where structure is not asked for."""
        return sum(n_meta_steps(self.sae.config.levels[i]) for i in self.levels) if self.hierarchy is not None else 0

    def meta_dictionaries(self, advance: Callable[[], None] = nothing) -> list[dict[str, Any]]:
        """The meta-dictionary of every level, fitted once; `advance` is called after each step."""
        if not self.meta:
            sizes = {level: self.sae.config.levels[level] for level in self.levels}
            W_dec = self.sae.W_dec
            self.meta = [
                {"level": level, **meta_dictionary(W_dec[:m], self.seed, advance)} for level, m in sizes.items()
            ]
        return self.meta

    def features(self) -> dict[str, Any]:
        """The results' `features`."""
        provenance = self.checkpoint.provenance
        training = {name: provenance[name] for name in ("dead", "fired_rows", "rows_seen") if name in provenance}
        found: dict[str, Any] = {"training": training} if training else {}
        if self.correlation is None:
            return found
        found |= density_features(self.sae.config, self.firing)
        return found | {"geometry": geometry(self.sae), "correlation": self.correlation.features()}


def averaged(family: str, results: dict[str, Any], level: int, labels: str) -> dict[str, float | None]:
    """Scores of one level by metric id: means over a group of labels; None where there were no probes."""
    found = next((r[labels] for r in results.get("levels", []) if r["level"] == level), None)
    return {f"{family}_{what}": found[what]["value"] if found else None for what in AVERAGED}


def defined(value: float | None) -> float | None:
    """NaN, the mean over no rows, as None; infinities stay and are refused when results are written."""
    return None if value is None or math.isnan(value) else value
