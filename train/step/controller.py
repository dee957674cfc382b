"""Holding a wanted L0: a factor on the sparsity penalty that follows where L0 is going, not only where it is.

L0 answers the penalty late, by hundreds of steps with LayerNorm; a factor that grows as long as L0 is too large has long
been too large itself when L0 comes down. So what the factor reacts to is log L0 as it will be in `HORIZON` steps if it
goes on changing as it does now: the gap is closed over about that many steps, and not overshot.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

RATE, SPAN = 0.01, 0.5
"""Log-factor a step per unit of the expected log(L0 / target), and the largest such log-ratio it reacts to."""
SMOOTHING, HORIZON = 0.1, 100.0
"""Weight of the newest step in the running log L0 and in its running slope; steps to look ahead."""


class Controller:
    """`state` is float64 [3]: log-factor, running log L0, its running slope a step. Fetches nothing from the device."""

    def __init__(self, target: float, device: torch.device) -> None:
        self.target, self.state = target, torch.zeros(3, dtype=torch.float64, device=device)

    @property
    def factor(self) -> Float[Tensor, ""]:
        """What the penalty is multiplied by."""
        return self.state[0].exp()

    def see(self, l0: Float[Tensor, ""], *, first: bool, acts: bool) -> None:
        """Take in one step's L0; the factor changes only where it `acts`. `first`: there was none before."""
        log_factor, running, slope = self.state
        now = torch.log(l0.clamp(min=1e-3))
        change = torch.zeros_like(now) if first else SMOOTHING * (now - running)
        running = now if first else running + change
        slope = slope + SMOOTHING * (change - slope)
        excess = (running + HORIZON * slope - torch.log(torch.full_like(now, self.target))).clamp(-SPAN, SPAN)
        self.state.copy_(torch.stack([log_factor + RATE * excess if acts else log_factor, running, slope]))
