"""Windows of text around a latent's firings, by quantile, and windows on which it is silent: drawn from the store, by a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from evaluate.latents.collect import choose_chunks, stream
from pipeline.base.runtime import numpy_rng
from pipeline.sae.nested import NestedSAE
from pipeline.store.reader import Store

QUANTILES, EACH = 5, 2
"""Groups of sequences by how strongly a latent fires in them; windows of each that explain, and that score."""
RADIUS = 12
"""Tokens shown before and after the one in the middle."""
TRIES = 50
"""Draws for every silent window that is wanted: a latent may fire nearly everywhere."""


@dataclass(frozen=True)
class Window:
    """Tokens of a sequence and the latent's activation on each."""

    tokens: tuple[int, ...]
    acts: tuple[float, ...]

    @property
    def fired(self) -> tuple[int, ...]:
        """Positions on which it fires."""
        return tuple(i for i, act in enumerate(self.acts) if act > 0)


@dataclass(frozen=True)
class Examples:
    """Of one latent: windows for the explainer and for scores, never the same sequence; silent ones; `skipped` says why there
    are none."""

    latent: int
    explain: tuple[Window, ...] = ()
    score: tuple[Window, ...] = ()
    silent: tuple[Window, ...] = ()
    skipped: str = ""


def find_examples(sae: NestedSAE, store: Store, latents: Sequence[int], rows: int, seed: int) -> Iterator[Examples]:
    """The examples of some latents on at most so many rows of the eval split. Raises DamagedError when the store changed."""
    split, wanted = store.eval, torch.tensor(list(latents), device=sae.center.device)
    chunks = choose_chunks(split, rows, seed)
    parts, numbers = [], []
    for z, first in stream(sae, split, store.context, chunks):
        parts.append(z[:, :, wanted].cpu().numpy())
        numbers.append(np.arange(first, first + len(z)))
    acts, tokens = np.concatenate(parts), split.tokens[np.concatenate(numbers)]
    for i, latent in enumerate(latents):
        yield examples_of(latent, tokens, acts[:, :, i], numpy_rng("explain", seed, latent))


def examples_of(
    latent: int, tokens: npt.NDArray[np.int32], acts: npt.NDArray[np.float32], rng: np.random.Generator
) -> Examples:
    """Of one latent: `tokens` and `acts` [sequence, position]."""
    peak = acts.max(1)
    active = np.flatnonzero(peak > 0)
    if len(active) < 2 * QUANTILES:
        return Examples(latent, skipped=f"fires in {len(active)} sequences, {2 * QUANTILES} are needed")
    explain: list[Window] = []
    score: list[Window] = []
    for group in np.array_split(active[np.argsort(-peak[active], kind="stable")], QUANTILES):
        drawn = rng.permutation(group)
        each = min(EACH, len(drawn) // 2)
        explain += [window(tokens[s], acts[s], int(acts[s].argmax())) for s in drawn[:each]]
        score += [window(tokens[s], acts[s], int(acts[s].argmax())) for s in drawn[each : 2 * each]]
    silent = silent_windows(tokens, acts, len(score), rng)
    if not silent:
        return Examples(latent, skipped="fires in every window")
    return Examples(latent, tuple(explain), tuple(score), tuple(silent))


def silent_windows(
    tokens: npt.NDArray[np.int32], acts: npt.NDArray[np.float32], n: int, rng: np.random.Generator
) -> list[Window]:
    """At most `n` windows of other sequences each, on which the latent never fires."""
    found: dict[int, Window] = {}
    for _ in range(TRIES * n):
        s, middle = int(rng.integers(len(tokens))), int(rng.integers(tokens.shape[1]))
        drawn = window(tokens[s], acts[s], middle)
        if not drawn.fired:
            found.setdefault(s, drawn)
        if len(found) == n:
            break
    return list(found.values())


def window(tokens: npt.NDArray[np.int32], acts: npt.NDArray[np.float32], middle: int) -> Window:
    """The tokens around one of a sequence, cut at its ends."""
    span = slice(max(middle - RADIUS, 0), middle + RADIUS + 1)
    return Window(tuple(tokens[span].tolist()), tuple(acts[span].tolist()))
