"""How a dictionary is built: what its latents share (meta-dictionary), and which fire only inside which (hierarchy).

Both are compared with what chance and a flat dictionary give: a hierarchy is an excess over a null.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from scipy.sparse import csr_matrix
from torch import Tensor

from evaluate.scores.sample import Batch
from pipeline.base.runtime import numpy_rng, torch_rng
from pipeline.sae.nested import SAEConfig

META_SHARE, META_K, META_STEPS, META_BATCH, META_SEEDS = 4, 4, 300, 2048, 3
"""A meta-dictionary has a quarter as many latents as the dictionary, of which four a decoder row are kept on average."""
META_LR = 3e-3
META_POLISH = 100
"""Last steps, over which the learning rate falls to zero."""

N_PARTS = 1024
"""Specialised latents whose relatives are looked for, drawn by seed where there are more."""
MIN_COUNT = 20
"""Rows on which a specialised latent must fire to count."""
MAX_FIRINGS = 16_000_000
"""Firings kept (16 bytes each); rows beyond are left out, and the number of rows says so."""
CONTROL_SHARE = 0.2
"""Of a flat dictionary, the share of its latents, the densest, that stand for a shared level."""


def meta_dictionary(W_dec: Float[Tensor, "latent d_model"], seed: int) -> dict[str, float | int | None]:
    """Variance of the unit decoder rows that a BatchTopK dictionary of META_SHARE times fewer latents explains.

    The mean over META_SEEDS fits with its 95 % interval (t); lower: latents share less. None below 2 · META_SHARE latents.
    Needs the decoder alone (after "meta-SAE", arXiv 2503.17547). A different number of meta-latents is another figure.
    """
    n = len(W_dec) // META_SHARE
    found = [fit_meta(W_dec, n, torch_rng("meta", seed, i)) for i in range(META_SEEDS)] if n >= 2 else []
    low, high = t_interval(np.array(found)) if found else (None, None)
    value = float(np.mean(found)) if found else None
    return {"value": value, "low": low, "high": high, "n_latents": n, "k": META_K, "seeds": len(found)}


def fit_meta(W_dec: Float[Tensor, "latent d_model"], n: int, rng: torch.Generator) -> float:
    """Fit a BatchTopK dictionary of n latents to the unit rows, and return the share of their variance it explains."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.nn.functional.normalize(W_dec.detach().clone().float(), dim=1)
        x = x - x.mean(0)
        start = x[torch.randperm(len(x), generator=rng)[:n].to(x.device)]
        decoder = torch.nn.functional.normalize(start, dim=1).requires_grad_(True)
        encoder = decoder.detach().T.clone().requires_grad_(True)
        bias = torch.zeros(n, device=x.device, requires_grad=True)
        optimiser = torch.optim.Adam([encoder, bias, decoder], META_LR)
        for step in range(META_STEPS):
            optimiser.param_groups[0]["lr"] = META_LR * min(1.0, (META_STEPS - step) / META_POLISH)
            rows = x[torch.randint(len(x), (META_BATCH,), generator=rng).to(x.device)] if len(x) > META_BATCH else x
            error = (rows - batch_top_k(rows @ encoder + bias, META_K) @ decoder).square().sum(1).mean()
            optimiser.zero_grad()
            error.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():
                decoder.copy_(torch.nn.functional.normalize(decoder, dim=1))
    rest = 0.0
    with torch.no_grad():
        for first in range(0, len(x), META_BATCH):
            rows = x[first : first + META_BATCH]
            rest += float((rows - batch_top_k(rows @ encoder + bias, META_K) @ decoder).square().sum())
    return 1 - rest / float(x.square().sum())


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
        position = batch.first * self.context + batch.kept.flatten().nonzero()[:, 0]
        self.rows.append(position[row].cpu().numpy())
        self.latents.append(latent.cpu().numpy())
        self.n_firings += len(row)
        self.n_rows += len(z)
        self.n_positions = (batch.first + len(batch.kept)) * self.context

    def features(self) -> dict[str, Any]:
        """Containment of specialised latents in shared ones, over its null, for the levels and for the densest latents."""
        rows = np.concatenate([np.empty(0, np.int64), *self.rows])
        latents = np.concatenate([np.empty(0, np.int64), *self.latents])
        width, m = self.config.width, self.config.n_shared
        count = np.bincount(latents, minlength=width)
        order = np.argsort(-count, kind="stable")
        n_dense = m or max(1, round(CONTROL_SHARE * width))
        splits = {"densest": (order[:n_dense], order[n_dense:])}
        if m:
            splits["level"] = (np.arange(m), np.arange(m, width))
        found = {name: self.containment(rows, latents, count, *split) for name, split in splits.items()}
        return found | {"n_rows": self.n_rows, "min_count": MIN_COUNT}

    def containment(
        self,
        rows: npt.NDArray[np.int64],
        latents: npt.NDArray[np.int64],
        count: npt.NDArray[np.int64],
        shared: npt.NDArray[np.int64],
        special: npt.NDArray[np.int64],
    ) -> dict[str, Any]:
        """For specialised latents that fired on MIN_COUNT rows: the mean of max over shared s of P(s on | it on).

        The null takes their firings from the sequence before, position by position: what densities alone give. `excess`
        is the mean of the difference, a latent each, with its 95 % interval (normal, over latents). `lift` is the median
        of P(s | c) / P(s) at the latent's best s.
        """
        often = special[count[special] >= MIN_COUNT]
        some = np.sort(numpy_rng("hierarchy", self.seed).permutation(often)[:N_PARTS])
        about = {"n_shared": len(shared), "n": len(some), "n_special": len(special)}
        if not len(some) or not len(shared):
            return about | dict.fromkeys(("containment", "null", "excess", "low", "high", "inside", "lift"))
        fires = csr_matrix(
            (np.ones(len(rows), np.float32), (rows, latents)), shape=(self.n_positions, self.config.width)
        )
        parts, whole = fires[:, some], fires[:, shared]
        real = best_container(whole, parts)
        shifted = parts[np.roll(np.arange(self.n_positions), self.context)]
        null = best_container(whole, shifted)
        gain = real[0] - null[0]
        half = 1.96 * float(gain.std(ddof=1)) / math.sqrt(len(gain)) if len(gain) > 1 else None
        density = count[shared[real[1]]] / max(self.n_rows, 1)
        return about | {
            "containment": float(real[0].mean()),
            "null": float(null[0].mean()),
            "excess": float(gain.mean()),
            "low": None if half is None else float(gain.mean()) - half,
            "high": None if half is None else float(gain.mean()) + half,
            "inside": float(((real[0] >= 0.9) & (null[0] < 0.5)).mean()),
            "lift": float(np.median(real[0] / np.maximum(density, 1e-12))),
        }


def best_container(whole: csr_matrix, parts: csr_matrix) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """For every column of `parts`, the largest share of its rows on which a column of `whole` is on too, and which."""
    together = np.asarray((parts.T @ whole).todense(), np.float64)  # [part, whole]
    best = together.argmax(1)
    n = np.maximum(np.asarray(parts.sum(0), np.float64)[0], 1)
    return together[np.arange(len(best)), best] / n, best


def t_interval(values: npt.NDArray[np.float64]) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of a mean (Student's t); None of a single value."""
    from scipy.stats import t

    if len(values) < 2:
        return None, None
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half
