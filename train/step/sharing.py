"""A sharing ratio that adapts: `alpha = "auto"`.

Fifty times over the first four fifths of training the shared dictionary grows by 1 % of the width when it explains less
than `shared_target` of what the whole dictionary explains, and shrinks by 1 % when it explains more. It begins at
α = 0.2, and the last fifth trains with the ratio that was reached.

What a dictionary explains is 1 − Σ‖x − x̂‖² / Σ‖x‖² over the rows since the last time (rows are centred on their mean).
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.sae.nested import level_size
from train.config import TrainConfig

ADAPTATIONS, ADAPTING, CHANGE = 50, 0.8, 0.01
"""How often the ratio may change, over which share of training, and by which share of the width."""


def adapts(config: TrainConfig, n_steps: int) -> bool:
    """Whether the ratio may change after so many finished steps."""
    if config.alpha != "auto":
        return False
    span = ADAPTING * config.steps
    return n_steps % max(1, int(span / ADAPTATIONS)) == 0 and n_steps <= span


def adapted(n_shared: int, width: int, errors: Sequence[float], square: float, target: float) -> int:
    """The next number of shared latents; `errors` of the shared and of the whole dictionary, `square` Σ‖x‖².

    The same as now while the whole dictionary explains nothing.
    """
    shared, whole = (1 - error / square for error in errors)
    if not whole > 0:
        return n_shared
    change = max(1, level_size(CHANGE, width))
    wanted = n_shared + (change if shared < target * whole else -change)
    return min(max(wanted, change), width - change)
