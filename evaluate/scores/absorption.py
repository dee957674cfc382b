"""Absorption and splitting: where the latents of a label stay silent though it is there, and others carry it instead.

After the first-letter protocol of arXiv 2409.14507 and SAEBench, for rows of a store and for words in prompts alike: for every
label with a good probe (`labels.py`), its
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
from scipy.sparse import csc_matrix, csr_matrix
from torch import Tensor

from evaluate.scores.labels import CLASSES, LABELS, MAX_ROWS, Probes, best_threshold, f1_score
from evaluate.scores.sample import Batch
from evaluate.statistics import interval
from pipeline.sae.nested import NestedSAE

MAX_K, F1_GAIN = 10, 0.03
SILENT = 1e-8
FULL_COSINE, FRACTION_COSINE, CARRIED, MAX_ABSORBERS = 0.025, 0.1, 0.4, 3
"""The published thresholds: cosine of the top latent, and of absorbers, with the probe; share of the projection carried."""
CHUNK_ELEMENTS = 1 << 22
"""Latents encoded at once, where rows are not those of a batch."""
SECONDS_A_ROW_AND_LABEL = 6e-7
"""Of one level of a dictionary, on one core of a Xeon (40,000 rows: .78 s): for estimates of time."""
LABEL_INDEX = {name: i for i, name in enumerate(LABELS)}
Bools = npt.NDArray[np.bool_]


def absorption_seconds(n_rows: int) -> float:
    """Seconds that one level of a dictionary takes after its pass over so many rows, of which about half are labelled."""
    return SECONDS_A_ROW_AND_LABEL * len(LABELS) * min(MAX_ROWS, n_rows // 2)


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

    def __init__(self, sae: NestedSAE, probes: Probes) -> None:
        self.sae, self.probes = sae, probes
        self.rows: list[npt.NDArray[np.int64]] = []
        self.latents: list[npt.NDArray[np.int64]] = []
        self.values: list[npt.NDArray[np.float32]] = []

    def update(self, z: Float[Tensor, "row latent"], batch: Batch, context: int) -> None:
        """Take the labelled rows out of a batch's kept rows; sequences have `context` positions."""
        first = batch.first * context
        position = first + batch.index.cpu().numpy()
        wanted = self.probes.rows.position
        a, b = np.searchsorted(wanted, [first, first + batch.kept.numel()])
        found = torch.from_numpy(np.searchsorted(position, wanted[a:b])).to(z.device)
        self.add(int(a), z[found], batch.encoded[found])

    def encode(self, center: Float[Tensor, " d_model"], read: Float[Tensor, "row d_in"] | None = None) -> None:
        """Take all labelled rows, encoded here; `center` is what was taken off them. `read`: what a transcoder reads instead."""
        step = max(1, CHUNK_ELEMENTS // self.sae.config.width)
        for first in range(0, len(self.probes.x), step):
            part = slice(first, first + step)
            x = self.probes.x[part] + center if read is None else read[part]
            self.add(first, self.sae.encode(x), x)

    def add(self, first: int, z: Float[Tensor, "row latent"], x: Float[Tensor, "row d_in"]) -> None:
        """Take the latents of labelled rows that begin at the first-th; x: those rows, raw."""
        z = self.sae.weighed(z, x)
        row, latent = z.nonzero(as_tuple=True)
        self.rows.append(row.cpu().numpy() + first)
        self.latents.append(latent.cpu().numpy())
        self.values.append(z[row, latent].float().cpu().numpy())

    def results(self, levels: list[int]) -> dict[str, Any]:
        """Per level what became of each label, with means over labels; and what the probes are."""
        norm = (self.sae.W_dec.float().norm(dim=1) / self.sae.made_scale).cpu().numpy()
        values, latents = np.concatenate(self.values), np.concatenate(self.latents)
        shape = (len(self.probes.rows.position), self.sae.config.width)
        z = csr_matrix((values * norm[latents], (np.concatenate(self.rows), latents)), shape=shape)
        decoder = torch.nn.functional.normalize(self.sae.W_dec.float(), dim=1)
        direction = torch.nn.functional.normalize(self.probes.weight, dim=1)
        cosine, projection = (decoder @ direction.T).cpu(), self.probes.projection.cpu()
        found = []
        for level in levels:
            part = z[:, :size] if (size := self.sae.config.levels[level]) < z.shape[1] else z
            asked = self.asked(part)
            labels = [self.label(part, asked[i], i, cosine[:size, i], projection[:, i]) for i in range(len(direction))]
            found.append({"level": level, "labels": labels, **averages(labels)})
        return {**self.probes.about(), "levels": found}

    def asked(self, z: csr_matrix) -> list[Asked]:
        """Of each probe's label the rows that it asks about."""
        rows = self.probes.rows
        known: dict[bytes, Asked] = {}
        found = []
        for name in self.probes.names:
            asked = rows.label[:, LABEL_INDEX[name]] >= 0
            if (key := asked.tobytes()) not in known:
                known[key] = Asked.of(z, asked, rows.train)
            found.append(known[key])
        return found

    def label(self, z: csr_matrix, asked: Asked, i: int, cosine: Tensor, projection: Tensor) -> dict[str, Any]:
        """One label in one level: its latents, their F1, and absorption on test rows where the probe rightly says yes."""
        rows, name = self.probes.rows, self.probes.names[i]
        label = rows.label[:, LABEL_INDEX[name]]
        main, f1s = split_latents(asked, label)
        right = (label == 1) & ~rows.train & self.probes.finds[:, i].cpu().numpy()
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


@dataclass(frozen=True)
class Asked:
    """The rows that some labels ask about, and how latents fire on those of training types. Made by `of`, once for all labels
    that ask about the same rows.

    fit, test: rows of training and of test types; z_fit, z_test: their latents [row, latent], by column; mean, deviation
    [latent]: over those of fit rows.
    """

    fit: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]
    z_fit: csc_matrix
    z_test: csc_matrix
    mean: npt.NDArray[np.float64]
    deviation: npt.NDArray[np.float64]

    @staticmethod
    def of(z: csr_matrix, asked: Bools, train: Bools) -> Asked:
        """z [row, latent]; asked, train [row]."""
        fit, test = np.flatnonzero(asked & train), np.flatnonzero(asked & ~train)
        z_fit = z[fit].tocsc()
        mean = np.asarray(z_fit.mean(0), np.float64)[0]
        square = np.asarray(z_fit.multiply(z_fit).mean(0), np.float64)[0]
        deviation = np.sqrt(np.maximum(square - mean**2, 0))
        return Asked(fit, test, z_fit, z[test].tocsc(), mean, deviation)


def split_latents(asked: Asked, label: npt.NDArray[np.int8]) -> tuple[list[int], list[float]]:
    """A label's latents, and the F1 on test types of the probe with the first one, two … of them. label [row]: 1 where it is.

    Candidates are the latents whose mean over training rows of the label exceeds that over the others by most standard
    deviations; they are taken in the order in which least squares on the label would (orthogonal matching pursuit, latents
    that speak for the label only), one more while F1 gains F1_GAIN, up to MAX_K.
    """
    y, y_test = label[asked.fit] == 1, label[asked.test] == 1
    some, gain = candidates(asked, y)
    fit = asked.z_fit[:, some].toarray()
    ranked = pursuit((fit - asked.mean[some]) / np.maximum(asked.deviation[some], 1e-12), gain)
    test = asked.z_test[:, some[ranked]].toarray()
    f1s: list[float] = []
    for k in range(1, len(ranked) + 1):
        f1 = probe_f1(fit[:, ranked[:k]], test[:, :k], y, y_test)
        if f1s and f1 <= f1s[-1] + F1_GAIN:
            break
        f1s.append(f1)
    return [int(some[i]) for i in ranked[: len(f1s)]], f1s


def candidates(asked: Asked, y: Bools, n_candidates: int = 64) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The latents that speak most for a label of the fit rows, and each one's covariance with it in its standard deviations."""
    target = y - y.mean()
    gain = (asked.z_fit.T @ target) / len(y) / np.maximum(asked.deviation, 1e-12)
    gain[asked.deviation <= 1e-12] = 0
    some = np.argsort(-gain, kind="stable")[: min(n_candidates, len(gain))]
    return some, gain[some]


def pursuit(standard: npt.NDArray[np.float64], toward: npt.NDArray[np.float64]) -> list[int]:
    """Up to MAX_K columns in the order of orthogonal matching pursuit of the label, the first one first.

    standard: candidates of mean 0 and variance 1 [row, candidate]; toward: each one's covariance with the label.
    """
    gram = standard.T @ standard / len(standard)
    chosen: list[int] = [0]
    for _ in range(min(MAX_K, len(toward)) - 1):
        solved = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], toward[chosen], rcond=None)[0]
        left = toward - gram[:, chosen] @ solved
        left[chosen] = 0
        if (best := int(left.argmax())) in chosen or left[best] <= 1e-9:
            break
        chosen.append(best)
    return chosen


def probe_f1(fit: npt.NDArray[np.float32], test: npt.NDArray[np.float32], y: Bools, y_test: Bools) -> float:
    """F1 on test types of a logistic regression on some latents [row, latent], cut where training F1 is best."""
    logit, logit_test, quiet = probe_logits(fit, test, y)
    threshold = max(best_threshold(torch.from_numpy(logit), torch.from_numpy(y)), quiet)
    return f1_score(torch.from_numpy(logit_test) > threshold, torch.from_numpy(y_test))


def probe_logits(
    fit: npt.NDArray[np.float32], test: npt.NDArray[np.float32], y: Bools
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating], float]:
    """Logits of training and of test rows by a logistic regression on some latents, and what it says where none of them
    fires, which is never yes.

    Classes weigh alike. Rows on which none of the latents fires are one row a class, as heavy as all of them: the same
    objective, and most rows are such.
    """
    from sklearn.linear_model import LogisticRegression  # takes long to import

    spread = np.maximum(fit.std(0), 1e-12)
    x, fires = fit / spread, fit.any(1)
    heavy = len(y) / (2 * np.maximum([(~y).sum(), y.sum()], 1))  # of a row, by class
    silent = np.array([(~fires & ~y).sum(), (~fires & y).sum()])
    rows = np.concatenate([x[fires], np.zeros((2, x.shape[1]), x.dtype)])
    is_one = np.concatenate([y[fires], [False, True]])
    weight = np.concatenate([heavy[y[fires].astype(int)], heavy * silent])
    model = LogisticRegression(max_iter=200).fit(rows, is_one, sample_weight=weight)
    return model.decision_function(x), model.decision_function(test / spread), float(model.intercept_[0])


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
        low, high = interval(values)
        found |= {"n_labels": len(values)}
        found[name] = {"value": float(np.mean(values)) if values else None, "low": low, "high": high}
    return found
