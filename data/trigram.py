"""Interpolated modified Kneser-Ney trigram model: the baseline that tiny-gemma2 has to beat.

Source: Chen & Goodman (1999), "An empirical study of smoothing techniques for language modeling", section 3. Three
discounts an order (for counts 1, 2 and 3 or more) are estimated from the counts of counts; the two lower orders use
continuation counts (the number of distinct tokens seen before the n-gram); the unigram is interpolated with 1/vocab.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Order:
    """One order's n-grams `context * vocab + token` with discounted counts, and its contexts, both sorted for lookup."""

    vocab: int
    grams: Ints  # [n_grams]
    discounted: Floats  # [n_grams], count - D(count)
    contexts: Ints  # [n_contexts]
    totals: Floats  # [n_contexts], sum of the counts after the context
    reserved: Floats  # [n_contexts], sum of the discounts after the context

    def interpolate(self, context: Ints, token: Ints, lower: Floats) -> Floats:
        """Return p(token | context) given the next lower order's probability of the token; all arrays are [n]."""
        at, seen = _find(self.contexts, context)
        total = np.where(seen, self.totals[at], 1.0)
        gamma = np.where(seen, self.reserved[at] / total, 1.0)
        gram, found = _find(self.grams, context * self.vocab + token)
        return np.where(found, self.discounted[gram], 0.0) / total + gamma * lower


class KneserNeyTrigram:
    """Trigram over token ids; a document is read as `bos bos t1 t2 ...` and `bos` is never predicted."""

    def __init__(self, documents: list[Ints], vocab: int, bos: int) -> None:
        """Count `documents` (arrays of ids below `vocab`, without bos)."""
        self.vocab, self.bos = vocab, bos
        before, previous, token = _concatenate_trigrams(documents, bos)
        grams, counts = np.unique((before * vocab + previous) * vocab + token, return_counts=True)
        pairs, continuations = np.unique(grams % vocab**2, return_counts=True)
        singles, pair_continuations = np.unique(pairs % vocab, return_counts=True)
        levels = ((singles, pair_continuations), (pairs, continuations), (grams, counts))
        self.orders = [_make_order(grams, counts, vocab) for grams, counts in levels]

    def log_prob(self, document: Ints) -> Floats:
        """Return the natural-log probability of every token of one document, [len(document)]."""
        return np.asarray(np.log(self._prob(*_trigrams(document, self.bos))))

    def distribution(self, before: int, previous: int) -> Floats:
        """Return p(. | before, previous) over the whole vocabulary, [vocab], summing to 1."""
        token = np.arange(self.vocab)
        return self._prob(np.full_like(token, before), np.full_like(token, previous), token)

    def _prob(self, before: Ints, previous: Ints, token: Ints) -> Floats:
        prob = np.full(len(token), 1.0 / self.vocab)
        for order, context in zip(self.orders, (0 * previous, previous, before * self.vocab + previous), strict=True):
            prob = order.interpolate(context, token, prob)
        return prob


def _trigrams(document: Ints, bos: int) -> tuple[Ints, Ints, Ints]:
    padded = np.concatenate([[bos, bos], document]).astype(np.int64)
    return padded[:-2], padded[1:-1], padded[2:]


def _concatenate_trigrams(documents: list[Ints], bos: int) -> tuple[Ints, Ints, Ints]:
    before, previous, token = zip(*(_trigrams(document, bos) for document in documents), strict=True)
    return np.concatenate(before), np.concatenate(previous), np.concatenate(token)


def _discounts(counts: Ints) -> Floats:
    """Return [D(0), D(1), D(2), D(3+)], Chen & Goodman equation 26, from n_k = number of n-grams with count k.

    Where some n_k is zero the formula is undefined (the unigrams of a BPE are nearly all frequent, so they often lack
    one): then KenLM's `--discount_fallback` values 0.5, 1 and 1.5.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    if not n[1:5].all():
        return np.array([0.0, 0.5, 1.0, 1.5])
    y = n[1] / (n[1] + 2 * n[2])
    discounts = np.array([0.0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]])
    return np.asarray(np.clip(discounts, 0.0, [0.0, 1.0, 2.0, 3.0]))  # only tiny corpora leave these bounds


def _make_order(grams: Ints, counts: Ints, vocab: int) -> Order:
    discount = _discounts(counts)[np.minimum(counts, 3)]
    contexts, start = np.unique(grams // vocab, return_index=True)
    totals = np.add.reduceat(counts.astype(np.float64), start)
    return Order(vocab, grams, counts - discount, contexts, totals, np.add.reduceat(discount, start))


def _find(keys: Ints, wanted: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Return for every wanted key a valid index into the sorted `keys`, and whether the key is there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, keys[at] == wanted
