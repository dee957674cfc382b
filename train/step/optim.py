"""The optimiser: clip, projection, Adam, renormalisation and the low-precision copy, in one pass over the weights.

Order of one update (DECISIONS 3): the norm over all gradients is clipped; the component of the decoder's gradient along
each row is removed; Adam, at each latent's own part of the learning rate; decoder rows are scaled back to unit norm; the
copy that products read is written. The big matrices go through in chunks of rows, so that the whole chain works on numbers
that are still in cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from train.config import TrainConfig

MATRICES = ("W_enc", "W_dec", "W_skip")
"""Weights that products read."""

LATENTS_AT = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "ln_gain": 0, "ln_bias": 0, "log_threshold": 0}
"""Which dimension of a weight goes over latents; the others have none."""

CHUNK_NUMBERS = 1 << 18
"""Numbers of a weight matrix that a CPU updates at a time: with gradient and both moments about 4 MB."""


class Adam:
    """Adam (Kingma & Ba 2015) over named weights, held in float32; `low` are the copies that products read.

    `low[name]` is the weight itself when the products have the weights' dtype. Moments and weights are changed in place.
    `rates` are the parts of the learning rate at which a weight's latents learn, by name: `set_rates`.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        low_dtype: torch.dtype,
        config: TrainConfig,
        rates: Float[Tensor, " latent"],
    ) -> None:
        self.config = config
        self.weights = weights
        self.rates = {name: torch.ones_like(weights["b_dec" if name == "b_dec" else "b_enc"]) for name in weights}
        self.set_rates(rates)
        self.first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.n_updates = torch.zeros((), dtype=torch.float32, device=weights["W_dec"].device)
        self.low = {name: weight.to(low_dtype) for name, weight in weights.items() if name in MATRICES}

    def state(self) -> dict[str, Tensor]:
        """Moments, count of updates and weights by name, not copied."""
        state = {"n_updates": self.n_updates}
        for name, weight in self.weights.items():
            state |= {name: weight, f"first.{name}": self.first[name], f"second.{name}": self.second[name]}
        return state

    def set_rates(self, rates: Float[Tensor, " latent"]) -> None:
        """From now on latents learn at these parts of the learning rate; their log-thresholds at `threshold_lr` times as much."""
        self.uneven: set[str] = set()
        for name in self.weights.keys() & LATENTS_AT.keys():
            own = rates * self.config.threshold_lr if name == "log_threshold" else rates
            self.rates[name].copy_(own)
            if bool((own != 1).any()):
                self.uneven.add(name)

    def refresh_low(self) -> None:
        """Write the low-precision copies again after the weights were changed from outside."""
        for name, low in self.low.items():
            low.copy_(self.weights[name])

    def update(self, gradients: Mapping[str, Tensor], lr: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """One update; returns the norm of the whole gradient before clipping, float64, on the device.

        `gradients` are overwritten; matrices may be in the products' dtype, all else is in the weights'. `lr` is float32
        on the device.
        """
        norm = gradient_norm(gradients)
        shrink = clip_factor(norm, self.config)
        self.n_updates += 1
        for name, weight in self.weights.items():
            gradient_in_memory = in_memory(gradients[name])
            for rows in weight_chunks(in_memory(weight)):
                gradient = gradient_in_memory[rows].to(weight.dtype).mul_(shrink.to(weight.dtype))
                self._update_rows(name, rows, gradient, lr)
        return norm

    def _update_rows(self, name: str, rows: slice, gradient: Tensor, lr: Tensor) -> None:
        weight = in_memory(self.weights[name])[rows]
        if name == "W_dec":
            remove_along_rows(gradient, weight)
        rates = self._rates(name, rows)
        before = None if rates is None else weight.clone()
        torch._fused_adam_(
            [weight],
            [gradient],
            [in_memory(self.first[name])[rows]],
            [in_memory(self.second[name])[rows]],
            [],
            [self.n_updates],
            lr=lr,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            weight_decay=0.0,
            eps=self.config.eps,
            amsgrad=False,
            maximize=False,
        )
        if before is not None and rates is not None:
            torch.lerp(before, weight, rates, out=weight)
        if name == "W_dec":
            weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True))
        if name in self.low and self.low[name].dtype != weight.dtype:
            in_memory(self.low[name])[rows].copy_(weight)

    def _rates(self, name: str, rows: slice) -> Tensor | None:
        """The latents' parts of the learning rate, to be multiplied with these rows of a weight as it lies in memory."""
        if name not in self.uneven:
            return None
        weight, rates = self.weights[name], self.rates[name]
        if weight.dim() == 1:
            return rates[rows]
        by_latent = (LATENTS_AT[name] == 0) == weight.is_contiguous()
        return rates[rows, None] if by_latent else rates


def in_memory(weight: Tensor) -> Tensor:
    """A tensor as it lies in memory: transposed where that is what makes it contiguous (W_enc by latents)."""
    return weight if weight.is_contiguous() else weight.T


def weight_chunks(weight: Tensor) -> Iterator[slice]:
    """Slices over the first dimension: pieces that stay in cache on a CPU, all of it on an accelerator."""
    n_rows = len(weight)
    size = max(1, CHUNK_NUMBERS * n_rows // max(weight.numel(), 1)) if weight.device.type == "cpu" else n_rows
    return (slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size))


def gradient_norm(gradients: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Euclidean norm over all gradients together; squares summed in float32 within a chunk, float64 over chunks."""
    wide = {torch.float64: torch.float64}
    norms = [
        torch.linalg.vector_norm(gradient[rows], dtype=wide.get(gradient.dtype, torch.float32)).double()
        for gradient in map(in_memory, gradients.values())
        for rows in weight_chunks(gradient)
    ]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def clip_factor(norm: Float[Tensor, ""], config: TrainConfig) -> Float[Tensor, ""]:
    """What gradients are multiplied by: 1/norm when normalised, else min(1, clip_norm / norm), else 1."""
    if config.normalize_gradients:
        return 1 / norm.clamp(min=1e-30)
    if config.clip_norm:
        return (config.clip_norm / norm.clamp(min=1e-30)).clamp(max=1.0)
    return torch.ones_like(norm)


def remove_along_rows(gradient: Float[Tensor, "latent d_model"], rows: Float[Tensor, "latent d_model"]) -> None:
    """Take from each gradient row, in place, its component along the weight row, which has unit norm."""
    along = (gradient * rows).sum(1, keepdim=True)
    gradient.addcmul_(rows, along, value=-1)
