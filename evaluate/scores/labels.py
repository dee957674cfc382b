"""What rows are of, as labels: first letters of words and classes of characters; probes that find them in rows.

`read_probes` labels a store's rows, from the store alone: token ids, the tokenizer's text of each, and the cached rows, no
forward pass. Rows of words in prompts are made elsewhere (evaluate/probing/first_letter.py) and probed alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.base.runtime import numpy_rng

if TYPE_CHECKING:
    from pipeline.store.reader import Store

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CLASSES = ("word start", "capitalised", "digit", "punctuation", "whitespace")
LABELS = (*LETTERS, *CLASSES)

MAX_ROWS, PER_TYPE = 40_000, 16
"""Rows that are labelled, and occurrences of one token type among them, at most: frequent tokens must not be all there is."""
BLOCK_ROWS = 1 << 16
"""Rows whose tokens are looked at together while rows are chosen."""
TRAIN_SHARE = 0.7
"""Of token types: a probe is tested on tokens that it never saw."""
MIN_TYPES = 8
"""Types that a label needs in training and half as many in testing; with fewer there is no probe."""
MIN_F1 = 0.6
"""A label whose probe scores less on unseen types is left out and named."""
PENALTY, STEPS = 1e-3, 60
"""L2 on the probe's weights, for rows of mean square 1 a coordinate, and steps of L-BFGS."""


def labels_of(text: str) -> tuple[int, ...]:
    """Labels of one token's text, as 1, 0, or −1 where a label does not ask about it, in the order of LABELS.

    A word starts with a space and a letter; its first letter is that letter, whatever its case. Letters are asked about
    starts of words alone.
    """
    body = text[1:] if text.startswith(" ") else text
    first = body[:1].lower()
    starts = text.startswith(" ") and first.isalpha()
    letters = [int(first == letter) if starts and first in LETTERS else -1 for letter in LETTERS]
    if not body:  # spaces alone
        return (*letters, 0, 0, 0, 0, 1)
    blank = all(c.isspace() or c in "↵⇥⏎▁" for c in body)
    punctuation = not blank and not any(c.isalnum() or c.isspace() for c in body)
    return (*letters, int(starts), int(body[0].isupper()), int(body.isdecimal()), int(punctuation), int(blank))


@dataclass(frozen=True)
class Labelled:
    """Rows with their labels.

    position: ascending, counted through the evaluation split [row]; type: the token id [row]; label: 1, 0 or −1 (not
    asked) [row, LABELS]; train: of a type that probes are trained on [row]; kinds: what types are; names: the labels asked about.
    """

    position: npt.NDArray[np.int64]
    type: npt.NDArray[np.int64]
    label: npt.NDArray[np.int8]
    train: npt.NDArray[np.bool_]
    kinds: str = "token types"
    names: tuple[str, ...] = LABELS


def label_rows(
    blocks: Iterable[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]], text: Callable[[int], str], seed: int
) -> Labelled:
    """Choose and label rows: the first PER_TYPE occurrences of every type, fewer where that is more than MAX_ROWS.

    Types go to training or testing by `seed`. `blocks`: tokens of consecutive sequences and which of them count, both
    [sequence, context]. Memory beside a block's: 24 bytes for each of those occurrences, 8 a type.
    """
    first, seen, found = 0, np.zeros(0, np.int64), list[tuple[npt.NDArray[np.int64], ...]]()
    for tokens, kept in blocks:
        position = np.flatnonzero(kept.reshape(-1))
        ids = tokens.reshape(-1)[position].astype(np.int64)
        order = np.argsort(ids, kind="stable")
        starts = np.flatnonzero(np.diff(ids[order], prepend=-1))
        rank = np.empty(len(ids), np.int64)
        rank[order] = np.arange(len(ids)) - np.repeat(starts, np.diff(np.append(starts, len(ids))))
        here = np.bincount(ids, minlength=len(seen))
        seen = np.concatenate([seen, np.zeros(len(here) - len(seen), np.int64)])
        early = (rank := rank + seen[ids]) < PER_TYPE
        found.append((position[early] + first, ids[early], rank[early]))
        seen += here
        first += tokens.size
    position, ids, rank = (np.concatenate([*column, np.empty(0, np.int64)]) for column in zip(*found))
    counts = np.bincount(rank, minlength=PER_TYPE).cumsum()
    most = max(1, int(np.searchsorted(counts, MAX_ROWS, side="right")))
    chosen = np.flatnonzero(rank < most)[:MAX_ROWS]
    types, inverse = np.unique(ids[chosen], return_inverse=True)
    table = np.array([labels_of(text(int(token))) for token in types], np.int8).reshape(len(types), len(LABELS))
    train = np.zeros(len(types), np.bool_)
    train[numpy_rng("token types", seed).permutation(len(types))[: round(TRAIN_SHARE * len(types))]] = True
    return Labelled(position[chosen], ids[chosen], table[inverse], train[inverse])


@dataclass(frozen=True)
class Probes:
    """Directions that find labels in centred rows: weight [label, d_model], bias and f1 (of unseen types) [label].

    `names`: the labels that have a probe good enough, `left_out`: those that have not, and why. `rows` and `x` (centred,
    float32 [row, d_model]) are what the labels are asked of.
    """

    names: tuple[str, ...]
    weight: Float[Tensor, "label d_model"]
    bias: Float[Tensor, " label"]
    f1: tuple[float, ...]
    left_out: dict[str, str]
    rows: Labelled
    x: Float[Tensor, "row d_model"]

    @cached_property
    def projection(self) -> Float[Tensor, "row label"]:
        """Of every row on each probe's unit direction."""
        return self.x @ torch.nn.functional.normalize(self.weight, dim=1).T

    @cached_property
    def finds(self) -> Bool[Tensor, "row label"]:
        """On which rows each probe says yes."""
        logit: Tensor = self.projection * self.weight.norm(dim=1) + self.bias
        return logit > 0

    @property
    def n_letters(self) -> int:
        """Letters among the labels that have a probe."""
        return sum(name in LETTERS for name in self.names)

    def about(self) -> dict[str, Any]:
        """What results say of the probes."""
        return {
            "n_rows": len(self.rows.position),
            "n_types": len(np.unique(self.rows.type)),
            "probes": dict(zip(self.names, self.f1)),
            "left_out": self.left_out,
        }


@dataclass(frozen=True)
class Letters:
    """Words in prompts and probes of their first letters: what results say of them, beside what probes say of themselves.

    No probes where there is to be no number: `about` then has a sentence that says why. `center`: what was taken off rows.
    `read`: of transcoders, the words' rows that are encoded, where the probes look at those that are rebuilt.
    """

    about: dict[str, Any]
    probes: Probes | None
    center: Float[Tensor, " d_model"]
    read: Float[Tensor, "word d_in"] | None = None


def read_probes(store: Store, n_sequences: int, text: Callable[[int], str], seed: int, device: torch.device) -> Probes:
    """Label rows of the first sequences of the evaluation split and train a probe a label; `seed` splits token types."""
    split, context = store.eval, store.context
    each = max(1, BLOCK_ROWS // context)
    spans = [(first, min(first + each, n_sequences)) for first in range(0, n_sequences, each)]
    rows = label_rows(((split.tokens_of(*span), ~split.special_of(*span)) for span in spans), text, seed)
    x = torch.empty(len(rows.position), store.d_model)
    for first in range(0, n_sequences * context, step := 64 * context):
        a, b = np.searchsorted(rows.position, [first, first + step])
        if a < b:
            block = split.read(first, min(first + step, split.n_rows))
            x[a:b] = block[torch.from_numpy(rows.position[a:b] - first)].float() - store.mean
    return train_probes(x.to(device), rows)


def train_probes(x: Float[Tensor, "row d_model"], rows: Labelled) -> Probes:
    """A logistic probe a label that is asked about, all at once; thresholds are those of the best F1 on training types."""
    label = torch.from_numpy(rows.label).to(x.device)
    train = torch.from_numpy(rows.train).to(x.device)
    left_out = {}
    asked_about = [i for i, name in enumerate(LABELS) if name in rows.names]
    for i in asked_about:
        n_train, n_test = (
            len(np.unique(rows.type[(rows.label[:, i] == 1) & part])) for part in (rows.train, ~rows.train)
        )
        if n_train < MIN_TYPES or n_test < MIN_TYPES // 2:
            left_out[LABELS[i]] = f"{n_train} {rows.kinds} to train on and {n_test} to test on"
        elif not (rows.label[rows.train, i] == 0).any():
            left_out[LABELS[i]] = f"no {rows.kinds} without it to train on"
    some = [i for i in asked_about if LABELS[i] not in left_out]
    weight, bias = fit_logistic(x[train], label[train][:, some])
    good, f1s = [], []
    for k, i in enumerate(some):
        asked, is_one = label[:, i] >= 0, label[:, i] == 1
        logit = x @ weight[k] + bias[k]
        threshold = best_threshold(logit[asked & train], is_one[asked & train])
        bias[k] -= threshold
        f1 = f1_score(logit[asked & ~train] > threshold, is_one[asked & ~train])
        if f1 < MIN_F1:
            left_out[LABELS[i]] = f"its probe has an F1 of {f1:.2f} on unseen {rows.kinds}"
        else:
            good.append(k)
            f1s.append(f1)
    names = tuple(LABELS[some[k]] for k in good)
    return Probes(names, weight[good], bias[good], tuple(f1s), left_out, rows, x)


def fit_logistic(
    x: Float[Tensor, "row d_model"], label: Int[Tensor, "row label"]
) -> tuple[Float[Tensor, "label d_model"], Float[Tensor, " label"]]:
    """Weights and biases of logistic regressions of every label at once (L-BFGS, L2); labels of −1 do not count.

    The gradient is written out, and scipy's optimiser taken: torch's loads its compiler first, which takes seconds.
    """
    from scipy.optimize import minimize  # takes long to import

    scale = x.square().mean().sqrt().clamp(min=1e-12)
    rows, target = x / scale, label.clamp(min=0).float()
    asked = (label >= 0).float()
    asked = asked / asked.sum(0).clamp(min=1)
    n_labels, d_model = label.shape[1], x.shape[1]

    def loss(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        """The summed loss of all labels and its gradient, at weights [label, d_model + 1] whose last column is the bias."""
        at = torch.from_numpy(flat).to(x.device, x.dtype).view(n_labels, d_model + 1)
        weight, bias = at[:, :-1], at[:, -1]
        logit = rows @ weight.T + bias
        value = (torch.nn.functional.softplus(logit) - target * logit).mul(asked).sum(dtype=torch.float64)
        wrong = (logit.sigmoid() - target) * asked
        gradient = torch.cat([wrong.T @ rows + PENALTY * weight, wrong.sum(0)[:, None]], 1)
        total = float(value) + PENALTY * float(weight.double().square().sum()) / 2
        return total, gradient.flatten().double().cpu().numpy()

    start = np.zeros(n_labels * (d_model + 1))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS}).x
    best = torch.from_numpy(found).to(x.device, x.dtype).view(n_labels, d_model + 1)
    return best[:, :-1] / scale, best[:, -1].clone()


def best_threshold(logit: Float[Tensor, " row"], is_one: Bool[Tensor, " row"]) -> float:
    """Where to cut so that F1 is largest; 0 where nothing is one."""
    if not is_one.any():
        return 0.0
    value, order = logit.double().sort(descending=True)
    hits = is_one[order].double().cumsum(0)
    f1 = 2 * hits / (torch.arange(1, len(value) + 1, device=value.device) + hits[-1])
    f1[:-1][value[1:] == value[:-1]] = -1  # a cut between equal values is none
    best = int(f1.argmax())
    below = value[best + 1] if best + 1 < len(value) else value[best] - 1
    return float((value[best] + below) / 2)


def f1_score(said: Bool[Tensor, " row"], is_one: Bool[Tensor, " row"]) -> float:
    """2 · hits / (said + true); 0 where neither is."""
    total = int(said.sum() + is_one.sum())
    return 2 * int((said & is_one).sum()) / total if total else 0.0
