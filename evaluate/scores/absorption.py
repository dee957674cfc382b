"""Absorption and splitting: where the latents of a label stay silent though it is there, and others carry it instead.

After the first-letter protocol of arXiv 2409.14507 and SAEBench: for every label with a good probe (`labels.py`), its
latents are those whose k-sparse probes gain in F1; among test rows on which probe and label agree, *full* absorption is
where all of them are silent and the latent that projects most on the probe carries enough of the row's projection;
the *fraction* is the part of the projection that at most three others carry. An undertrained dictionary, in which
nothing fires where it should, scores falsely low: best-latent F1 and recall stand beside every figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from evaluate.scores.labels import CLASSES, LABELS, Probes, best_threshold, f1_score
from evaluate.scores.sample import Batch
from evaluate.scores.structure import t_interval
from pipeline.sae.nested import NestedSAE

MAX_K, F1_GAIN = 10, 0.03
SILENT = 1e-8
FULL_COSINE, FRACTION_COSINE, CARRIED, MAX_ABSORBERS = 0.025, 0.1, 0.4, 3
"""The published thresholds: cosine of the top latent, and of absorbers, with the probe; share of the projection carried."""
LABEL_INDEX = {name: i for i, name in enumerate(LABELS)}
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Absorbed:
    """Of each row: whether it is fully absorbed, and which fraction of the label's projection others carry."""

    full: Bool[Tensor, " row"]
    fraction: Float[Tensor, " row"]


def absorbed(
    z: csr_matrix, projection: Float[Tensor, " row"], cosine: Float[Tensor, " latent"], main: list[int]
) -> Absorbed:
    """SAEBench 0.6's `absorption_fraction` and `is_full_absorption` of every row.

    z: latents [row, latent] in units of unit decoder rows; projection: of the row on the unit probe; cosine: of the decoder
    rows with the probe; main: the label's own latents. Only latents that fire are looked at: the others carry nothing.
    """
    latent, value = fired(z)
    along = cosine[latent]
    own_latent = torch.isin(latent, torch.tensor(main)) & (value != 0)
    carried = value * along
    most, top = carried.max(1)
    silent = ~(own_latent & (value >= SILENT)).any(1)
    aligned = along.gather(1, top[:, None])[:, 0] >= FULL_COSINE
    full = silent & aligned & (most > 0) & (projection >= 0) & (most / projection >= CARRIED)
    own = torch.where(own_latent, carried, 0.0).sum(1)
    others = torch.where((along >= FRACTION_COSINE) & ~own_latent, carried, 0.0).clamp(min=0)
    taken = others.topk(min(MAX_ABSORBERS, others.shape[1]), 1).values.sum(1)
    part = torch.minimum(taken, projection - own)
    fraction = torch.where(own <= 0, torch.ones_like(part), (part / (part + own)).clamp(0, 1))
    nothing = (own >= projection) | (taken / projection < CARRIED)
    return Absorbed(full, torch.where(nothing, torch.zeros_like(part), fraction))


def fired(z: csr_matrix) -> tuple[Int[Tensor, "row slot"], Float[Tensor, "row slot"]]:
    """The latents that fire on each row and their values, as many slots as the fullest row has and one more; 0 in the rest."""
    counts = np.diff(z.indptr)
    row = np.repeat(np.arange(len(counts)), counts)
    slot = np.arange(len(row)) - np.repeat(z.indptr[:-1], counts)
    shape = (len(counts), 1 + int(counts.max(initial=0)))
    latent, value = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    at = (torch.from_numpy(row), torch.from_numpy(slot))
    latent[at] = torch.from_numpy(z.indices.astype(np.int64))
    value[at] = torch.from_numpy(z.data.astype(np.float32))
    return latent, value


class AbsorptionScore:
    """One SAE's latents on the labelled rows, kept sparse, and what becomes of each label in each level."""

    def __init__(self, sae: NestedSAE, probes: Probes, context: int) -> None:
        self.sae, self.probes, self.context = sae, probes, context
        self.rows: list[npt.NDArray[np.int64]] = []
        self.latents: list[npt.NDArray[np.int64]] = []
        self.values: list[npt.NDArray[np.float32]] = []

    def update(self, z: Float[Tensor, "row latent"], batch: Batch) -> None:
        """Take the labelled rows out of a batch's kept rows."""
        first = batch.first * self.context
        position = first + batch.index.cpu().numpy()
        wanted = self.probes.rows.position
        a, b = np.searchsorted(wanted, [first, first + batch.kept.numel()])
        some = z[torch.from_numpy(np.searchsorted(position, wanted[a:b])).to(z.device)]
        row, latent = some.nonzero(as_tuple=True)
        self.rows.append(row.cpu().numpy() + a)
        self.latents.append(latent.cpu().numpy())
        self.values.append(some[row, latent].float().cpu().numpy())

    def results(self, levels: list[int]) -> dict[str, Any]:
        """Per level what became of each label, with means over labels; and what the probes are."""
        norm = (self.sae.W_dec.float().norm(dim=1) / self.sae.scale).cpu().numpy()
        values, latents = np.concatenate(self.values), np.concatenate(self.latents)
        shape = (len(self.probes.rows.position), self.sae.config.width)
        z = csr_matrix((values * norm[latents], (np.concatenate(self.rows), latents)), shape=shape)
        decoder = torch.nn.functional.normalize(self.sae.W_dec.float(), dim=1)
        direction = torch.nn.functional.normalize(self.probes.weight, dim=1)
        cosine, projection = (decoder @ direction.T).cpu(), (self.probes.x @ direction.T).cpu()
        found = []
        for level in levels:
            part = z[:, : self.sae.config.levels[level]]
            labels = [self.label(part, i, cosine[: part.shape[1], i], projection[:, i]) for i in range(len(direction))]
            found.append({"level": level, "labels": labels, **averages(labels)})
        return {**self.probes.about(), "levels": found}

    def label(self, z: csr_matrix, i: int, cosine: Tensor, projection: Tensor) -> dict[str, Any]:
        """One label in one level: its latents, their F1, and absorption on test rows where the probe rightly says yes."""
        rows, name = self.probes.rows, self.probes.names[i]
        label = rows.label[:, LABEL_INDEX[name]]
        main, f1s = split_latents(z, label, rows.train)
        right = (label == 1) & ~rows.train & self.probes.finds(i).cpu().numpy()
        some = z[np.flatnonzero(right)]
        result = absorbed(some, projection[torch.from_numpy(right)], cosine, main)
        n = some.shape[0]
        fires = torch.from_numpy((some[:, main].toarray() > SILENT).any(1))
        return {
            "label": name,
            "n": n,
            "n_types": len(np.unique(rows.type[right])),
            "latents": main,
            "f1": f1s[0],
            "f1_split": f1s[-1],
            "recall": float(fires.float().mean()) if n else None,
            "full": float(result.full.float().mean()) if n else None,
            "fraction": float(result.fraction.mean()) if n else None,
        }


def split_latents(
    z: csr_matrix, label: npt.NDArray[np.int8], train: npt.NDArray[np.bool_]
) -> tuple[list[int], list[float]]:
    """A label's latents, and the F1 on test types of the probe with the first one, two … of them.

    Candidates are the latents whose mean over training rows of the label exceeds that over the others by most standard
    deviations; they are taken in the order in which least squares on the label would (orthogonal matching pursuit, latents
    that speak for the label only), one more while F1 gains F1_GAIN, up to MAX_K.
    """
    fit, test = np.flatnonzero((label >= 0) & train), np.flatnonzero((label >= 0) & ~train)
    y, y_test = label[fit] == 1, label[test] == 1
    ranked = pursuit(z[fit], y)
    f1s: list[float] = []
    for k in range(1, len(ranked) + 1):
        f1 = probe_f1(z[:, ranked[:k]], fit, test, y, y_test)
        if f1s and f1 <= f1s[-1] + F1_GAIN:
            break
        f1s.append(f1)
    return ranked[: len(f1s)], f1s


def pursuit(z: csr_matrix, y: npt.NDArray[np.bool_], n_candidates: int = 64) -> list[int]:
    """Up to MAX_K latents in the order of orthogonal matching pursuit of the label; at least one."""
    n = len(y)
    mean = np.asarray(z.mean(0), np.float64)[0]
    square = np.asarray(z.multiply(z).mean(0), np.float64)[0]
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    target = y - y.mean()
    gain = (z.T @ target) / n / np.maximum(deviation, 1e-12)
    gain[deviation <= 1e-12] = 0
    some = np.argsort(-gain, kind="stable")[: min(n_candidates, len(gain))]
    dense = (z[:, some].toarray() - mean[some]) / np.maximum(deviation[some], 1e-12)
    gram, toward = dense.T @ dense / n, gain[some]
    chosen: list[int] = [0]
    for _ in range(min(MAX_K, len(some)) - 1):
        solved = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], toward[chosen], rcond=None)[0]
        left = toward - gram[:, chosen] @ solved
        left[chosen] = 0
        if (best := int(left.argmax())) in chosen or left[best] <= 1e-9:
            break
        chosen.append(best)
    return [int(some[c]) for c in chosen]


def probe_f1(z: csr_matrix, fit: npt.NDArray[np.int64], test: npt.NDArray[np.int64], y: Bools, y_test: Bools) -> float:
    """F1 on test types of a logistic regression on some latents, cut where training F1 is best."""
    dense = z.toarray()
    spread = np.maximum(dense[fit].std(0), 1e-12)
    model = LogisticRegression(class_weight="balanced", max_iter=200).fit(dense[fit] / spread, y)
    logit, logit_test = (torch.from_numpy(model.decision_function(dense[part] / spread)) for part in (fit, test))
    silent = float(model.intercept_[0])  # what is said where no latent fires: never yes
    threshold = max(best_threshold(logit, torch.from_numpy(y)), silent)
    return f1_score(logit_test > threshold, torch.from_numpy(y_test))


AVERAGED = ("full", "fraction", "f1", "recall", "n_latents")
"""What is averaged over labels."""


def averages(labels: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over letters, over classes and over both, with 95 % intervals over labels (t), and how many there are."""
    groups = {"letters": [r for r in labels if r["label"] not in CLASSES]}
    groups |= {"classes": [r for r in labels if r["label"] in CLASSES], "all": labels}
    return {name: average(group) for name, group in groups.items()}


def average(labels: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, low, high of each of AVERAGED over labels that have rows; None without one."""
    found: dict[str, Any] = {"n_labels": 0, "n": sum(r["n"] for r in labels)}
    for name in AVERAGED:
        values = [len(r["latents"]) if name == "n_latents" else r[name] for r in labels if r["n"]]
        low, high = t_interval(np.array(values, np.float64))
        found |= {"n_labels": len(values)}
        found[name] = {"value": float(np.mean(values)) if values else None, "low": low, "high": high}
    return found
