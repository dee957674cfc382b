"""Windows of text around a latent's firings, by quantile, and windows on which it is silent: drawn from the store, by a seed.

Rows are read twice, the second time those of chosen sequences. Memory of each latent beside a batch's: a bit a row (whether it
fires) and 4 bytes a sequence (its peak there).
"""

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
    split, context, wanted = store.eval, store.context, torch.tensor(list(latents), device=sae.center.device)
    chunks = choose_chunks(split, rows, seed)
    numbers = np.concatenate([np.arange(a // context, b // context) for a, b in chunks])
    peak = np.empty((len(latents), len(numbers)), np.float32)
    fires = np.empty((len(latents), len(numbers), -(-context // 8)), np.uint8)
    done = 0
    for z, _ in stream(sae, split, context, chunks):
        acts = z[:, :, wanted].cpu().numpy().transpose(2, 0, 1)  # [latent, sequence, position]
        peak[:, done : done + len(z)] = acts.max(2)
        fires[:, done : done + len(z)] = np.packbits(acts > 0, axis=2)
        done += len(z)
    chosen = [choose(peak[i], fires[i], context, numpy_rng("explain", seed, k)) for i, k in enumerate(latents)]
    places: dict[int, list[tuple[int, int | None]]] = {}
    for i, one in enumerate(chosen):
        for s, middle in one.places:
            places.setdefault(int(numbers[s]), []).append((i, middle))
    windows: dict[tuple[int, int, int | None], Window] = {}
    again = [(a, b) for a, b in chunks if any(s in places for s in range(a // context, b // context))]
    for z, first in stream(sae, split, context, again):  # the same batches, so the same values
        tokens = split.tokens_of(first, first + len(z))
        for s in places.keys() & range(first, first + len(z)):
            for i, middle in places[s]:
                one_acts = z[s - first, :, latents[i]].cpu().numpy()
                at = int(one_acts.argmax()) if middle is None else middle
                windows[i, s, middle] = window(tokens[s - first], one_acts, at)
    for i, (latent, one) in enumerate(zip(latents, chosen)):
        found = [windows[i, int(numbers[s]), middle] for s, middle in one.places]
        n = len(one.explain)
        explain, score, silent = tuple(found[:n]), tuple(found[n : 2 * n]), tuple(found[2 * n :])
        yield Examples(latent, explain, score, silent, one.skipped)


@dataclass(frozen=True)
class Chosen:
    """Of one latent, by the number of a sequence among those read: sequences around whose peaks it is explained and, as many,
    scored; silent windows by their sequence and the position in the middle; `skipped` says why there are none."""

    explain: tuple[int, ...] = ()
    score: tuple[int, ...] = ()
    silent: tuple[tuple[int, int], ...] = ()
    skipped: str = ""

    @property
    def places(self) -> list[tuple[int, int | None]]:
        """Sequence and middle of every window, None for the peak, in this order."""
        return [*((s, None) for s in (*self.explain, *self.score)), *self.silent]


def choose(
    peak: npt.NDArray[np.float32], fires: npt.NDArray[np.uint8], context: int, rng: np.random.Generator
) -> Chosen:
    """Of one latent: `peak` [sequence], and on which of `context` positions it fires, packed, `fires` [sequence, byte]."""
    active = np.flatnonzero(peak > 0)
    if len(active) < 2 * QUANTILES:
        return Chosen(skipped=f"fires in {len(active)} sequences, {2 * QUANTILES} are needed")
    explain: list[int] = []
    score: list[int] = []
    for group in np.array_split(active[np.argsort(-peak[active], kind="stable")], QUANTILES):
        drawn = rng.permutation(group).tolist()
        each = min(EACH, len(drawn) // 2)
        explain += drawn[:each]
        score += drawn[each : 2 * each]
    silent = silent_windows(fires, context, len(score), rng)
    if not silent:
        return Chosen(skipped="fires in every window")
    return Chosen(tuple(explain), tuple(score), tuple(silent.items()))


def silent_windows(fires: npt.NDArray[np.uint8], context: int, n: int, rng: np.random.Generator) -> dict[int, int]:
    """Sequence → middle of at most `n` windows of other sequences each, on which the latent never fires."""
    found: dict[int, int] = {}
    for _ in range(TRIES * n):
        s, middle = int(rng.integers(len(fires))), int(rng.integers(context))
        if not np.unpackbits(fires[s], count=context)[around(middle)].any():
            found.setdefault(s, middle)
        if len(found) == n:
            break
    return found


def around(middle: int) -> slice:
    """The positions of the window around one of a sequence, which its end cuts."""
    return slice(max(middle - RADIUS, 0), middle + RADIUS + 1)


def window(tokens: npt.NDArray[np.int32], acts: npt.NDArray[np.float32], middle: int) -> Window:
    """The tokens around one of a sequence, cut at its ends."""
    span = around(middle)
    return Window(tuple(tokens[span].tolist()), tuple(acts[span].tolist()))
