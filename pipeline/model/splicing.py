"""The splice: a residual stream with some of its rows replaced. Evaluation and live models share it."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def splice(
    residual: Float[Tensor, "seq pos d_model"], kept: Bool[Tensor, "seq pos"], x_hat: Float[Tensor, "row d_model"]
) -> Float[Tensor, "seq pos d_model"]:
    """The residual stream with its kept rows replaced, in the residual's dtype; other positions stay as they are."""
    spliced = residual.clone()
    spliced[kept] = x_hat.to(spliced.dtype)
    return spliced
