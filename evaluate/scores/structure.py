"""How a dictionary is built: what its latents share (meta-dictionary), and which fire only inside which (hierarchy).

Both are compared with what chance and a flat dictionary give: a hierarchy is an excess over a null.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from scipy.sparse import csr_matrix
from torch import Tensor

from evaluate.scores.sample import Batch
from evaluate.statistics import interval
from pipeline.base.runtime import numpy_rng, torch_rng
from pipeline.sae.config import SAEConfig

META_SHARE, META_K, META_STEPS, META_BATCH, META_SEEDS = 4, 4, 300, 2048, 3
"""A meta-dictionary has a quarter as many latents as the dictionary, of which four a decoder row are kept on average."""
META_LR = 3e-3
META_POLISH = 100
"""Last steps, over which the learning rate falls to zero."""

N_PARTS = 1024
"""Latents whose containment is asked about, drawn by seed where there are more."""
MIN_COUNT = 20
"""Rows on which a latent must fire to be asked about."""
MAX_FIRINGS = 16_000_000
"""Firings kept (16 bytes each); rows beyond are left out, and the number of rows says so."""
CONTROL_SHARES, CONTROL_OFFSETS = (0.1, 0.2, 0.3, 0.5), (0.0, 0.25, 0.5, 1.0, 2.0)
"""Of a flat dictionary, shares of its latents that stand for a shared level; and the ranks by density at which such a set
begins, in sizes of the set: 0 takes the densest, so that a level of any density finds sets as large on either side."""


def n_meta(size: int) -> int:
    """Latents of the meta-dictionary of so many latents; 0 where there are too few for one."""
    return size // META_SHARE if size // META_SHARE >= 2 else 0


def n_meta_steps(size: int) -> int:
    """Steps that `meta_dictionary` takes for so many latents."""
    return META_SEEDS * META_STEPS if n_meta(size) else 0


def meta_seconds(size: int, d_model: int, device: torch.device) -> float:
    """Seconds that `meta_dictionary` will take for so many latents, by two steps that are measured now."""
    if not n_meta(size):
        return 0.0
    clock: list[float] = []

    def tick() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        clock.append(time.perf_counter())

    fit_meta(torch.randn(size, d_model, device=device), n_meta(size), torch_rng("meta seconds"), tick, steps=3)
    return (clock[2] - clock[0]) / 2 * n_meta_steps(size)


def nothing() -> None:
    """Do nothing."""


def meta_dictionary(
    W_dec: Float[Tensor, "latent d_model"], seed: int, advance: Callable[[], None] = nothing
) -> dict[str, float | int | None]:
    """Variance of the unit decoder rows that a BatchTopK dictionary of META_SHARE times fewer latents explains.

    The mean over META_SEEDS fits with its 95 % interval (t); lower: latents share less. None below 2 · META_SHARE latents.
    Needs the decoder alone (after "meta-SAE", arXiv 2503.17547). A different number of meta-latents is another figure.
    `advance` is called after each step.
    """
    n = n_meta(len(W_dec))
    found = [fit_meta(W_dec, n, torch_rng("meta", seed, i), advance) for i in range(META_SEEDS)] if n else []
    low, high = interval(found)
    value = float(np.mean(found)) if found else None
    return {
        "value": value,
        "low": low,
        "high": high,
        "n_latents": len(W_dec) // META_SHARE,
        "k": META_K,
        "seeds": len(found),
    }


def fit_meta(
    W_dec: Float[Tensor, "latent d_model"],
    n: int,
    rng: torch.Generator,
    advance: Callable[[], None] = nothing,
    steps: int = META_STEPS,
) -> float:
    """Fit a BatchTopK dictionary of n latents to the unit rows, and return the share of their variance it explains."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.nn.functional.normalize(W_dec.detach().clone().float(), dim=1)
        x = x - x.mean(0)
        start = x[torch.randperm(len(x), generator=rng)[:n].to(x.device)]
        decoder = torch.nn.functional.normalize(start, dim=1).requires_grad_(True)
        encoder = decoder.detach().T.clone().requires_grad_(True)
        bias = torch.zeros(n, device=x.device, requires_grad=True)
        weights = [encoder, bias, decoder]
        moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
        for step in range(steps):
            rows = x[torch.randint(len(x), (META_BATCH,), generator=rng).to(x.device)] if len(x) > META_BATCH else x
            error = (rows - batch_top_k(rows @ encoder + bias, META_K) @ decoder).square().sum(1).mean()
            gradients = torch.autograd.grad(error, weights)
            with torch.no_grad():
                for weight, gradient, moment in zip(weights, gradients, moments):
                    adam(weight, gradient, moment, META_LR * min(1.0, (steps - step) / META_POLISH), step + 1)
                decoder.copy_(torch.nn.functional.normalize(decoder, dim=1))
            advance()
    rest = 0.0
    with torch.no_grad():
        for first in range(0, len(x), META_BATCH):
            rows = x[first : first + META_BATCH]
            rest += float((rows - batch_top_k(rows @ encoder + bias, META_K) @ decoder).square().sum())
    return 1 - rest / float(x.square().sum())


def adam(weight: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], lr: float, step: int) -> None:
    """One step of Adam, in place (β .9 and .999, ε 1e-8): torch's own loads its compiler first, which takes seconds."""
    mean, square = moments
    mean.lerp_(gradient, 0.1)
    square.lerp_(gradient.square(), 0.001)
    weight.sub_(lr / (1 - 0.9**step) * mean / ((square / (1 - 0.999**step)).sqrt() + 1e-8))


def batch_top_k(a: Float[Tensor, "row latent"], k: int) -> Float[Tensor, "row latent"]:
    """Positive entries that are among the k · rows largest of all."""
    z = a.relu()
    least = z.flatten().topk(min(k * len(z), z.numel())).values[-1]
    return torch.where(z >= least, z, 0.0)


class Hierarchy:
    """The firings of one SAE on the sample's rows, kept sparse, and how specialised latents fire inside shared ones."""

    def __init__(self, config: SAEConfig, context: int, seed: int) -> None:
        self.config, self.context, self.seed = config, context, seed
        self.rows: list[npt.NDArray[np.int64]] = []
        self.latents: list[npt.NDArray[np.int64]] = []
        self.n_firings, self.n_rows, self.n_positions = 0, 0, 0

    def update(self, z: Float[Tensor, "row latent"], batch: Batch) -> None:
        """Add the kept rows of a batch, while there is room."""
        if self.n_firings >= MAX_FIRINGS:
            return
        row, latent = (z != 0).nonzero(as_tuple=True)
        position = batch.first * self.context + batch.index
        self.rows.append(position[row].cpu().numpy())
        self.latents.append(latent.cpu().numpy())
        self.n_firings += len(row)
        self.n_rows += len(z)
        self.n_positions = (batch.first + len(batch.kept)) * self.context

    def features(self) -> dict[str, Any]:
        """Containment over its null in the shared level, and in controls: sets of latents as large, by rank of density."""
        rows = np.concatenate([np.empty(0, np.int64), *self.rows])
        latents = np.concatenate([np.empty(0, np.int64), *self.latents])
        width, m = self.config.width, self.config.n_shared
        count = np.bincount(latents, minlength=width)
        often = np.flatnonzero(count >= MIN_COUNT)
        some = np.sort(numpy_rng("hierarchy", self.seed).permutation(often)[:N_PARTS])
        together = self.together(rows, latents, some)
        order = np.argsort(-count, kind="stable")
        found: dict[str, Any] = {"n_rows": self.n_rows, "min_count": MIN_COUNT}
        if m:
            found["level"] = self.containment(together, some, count, np.arange(m))
        found["controls"] = [
            {
                "share": size / width,
                "rank": first,
                **self.containment(together, some, count, order[first : first + size]),
            }
            for size in ([m] if m else sorted({max(1, round(share * width)) for share in CONTROL_SHARES}))
            for first in sorted({round(offset * size) for offset in CONTROL_OFFSETS})
            if first + size <= width
        ]
        return found

    def together(
        self, rows: npt.NDArray[np.int64], latents: npt.NDArray[np.int64], some: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Rows on which each of `some` latents fires with each latent, and likewise with their firings taken from the
        sequence before, position by position: float32 [some, latent], exact below 2^24."""
        fires = csr_matrix(
            (np.ones(len(rows), np.float32), (rows, latents)), shape=(self.n_positions, self.config.width)
        )
        parts = fires[:, some]
        moved = parts[np.roll(np.arange(self.n_positions), self.context)]
        return (parts.T @ fires).toarray(), (moved.T @ fires).toarray()

    def containment(
        self,
        together: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]],
        some: npt.NDArray[np.int64],
        count: npt.NDArray[np.int64],
        shared: npt.NDArray[np.int64],
    ) -> dict[str, Any]:
        """For the other latents among `some`: the mean of max over shared s of P(s on | it on).

        The null takes their firings from the sequence before: what densities alone give. `excess` is the mean of the
        difference, a latent each, with its 95 % interval (normal, over latents). `lift` is the median of P(s | c) / P(s) at
        the latent's best s; `density` the geometric mean of the shared latents'.
        """
        others = np.flatnonzero(~np.isin(some, shared))
        density = np.maximum(count[shared], 1) / max(self.n_rows, 1)
        about = {"n_shared": len(shared), "n": len(others), "density": float(np.exp(np.log(density).mean()))}
        if not len(others):
            return about | dict.fromkeys(("containment", "null", "excess", "low", "high", "inside", "lift"))
        n = count[some[others]]
        counts, moved = (part[others][:, shared] for part in together)
        best = counts.argmax(1)
        real, null = counts.max(1) / n, moved.max(1) / n
        gain = (real - null).astype(np.float64)
        half = 1.96 * float(gain.std(ddof=1)) / math.sqrt(len(gain)) if len(gain) > 1 else None
        return about | {
            "containment": float(real.mean()),
            "null": float(null.mean()),
            "excess": float(gain.mean()),
            "low": None if half is None else float(gain.mean()) - half,
            "high": None if half is None else float(gain.mean()) + half,
            "inside": float(((real >= 0.9) & (null < 0.5)).mean()),
            "lift": float(np.median(real / density[best])),
        }
