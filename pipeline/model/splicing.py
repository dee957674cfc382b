"""The splice: a residual stream with some of its rows replaced. Evaluation and live models share it."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor


def splice(
    residual: Float[Tensor, "seq pos d_model"], kept: Bool[Tensor, "seq pos"], x_hat: Float[Tensor, "row d_model"]
) -> Float[Tensor, "seq pos d_model"]:
    """The residual stream with its kept rows replaced, in the residual's dtype; other positions stay as they are."""
    return splice_at(residual, kept.flatten().nonzero()[:, 0], x_hat)


def splice_at(
    residual: Float[Tensor, "seq pos d_model"], index: Int[Tensor, " row"], x_hat: Float[Tensor, "row d_model"]
) -> Float[Tensor, "seq pos d_model"]:
    """The same for rows at these places in the order of all positions: nothing is fetched from a device."""
    return residual.flatten(0, 1).index_copy(0, index, x_hat.to(residual.dtype)).view_as(residual)
