"""What changes during a training besides the weights: learning rate, sparsity, a wanted L0, a sharing ratio.

The first three are functions of the config and the step. A wanted L0 is held by a factor on the penalty, a sharing ratio
(`alpha = "auto"`) moves with what the levels explain; both have a state, which checkpoints of a training keep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.sae.config import level_size
from train.config import TrainConfig

FIRST_OVER_K = 8
"""With a sparsity warm-up, topk and batchtopk begin with so many times k."""

RATE, FASTEST, SPAN = 24.0, 0.06, 1.0
"""Log-factor over a run per unit of the expected log(L0 / target), the most of it a step, and the largest such log-ratio it
reacts to."""
SMOOTHING = 0.1
"""Weight of the newest step in the running log L0 and in its running slope."""
HORIZON, NEAREST, FARTHEST = 1 / 20, 30.0, 100.0
"""How far to look ahead: a share of the run, at least and at most so many steps."""

ADAPTATIONS, ADAPTING, CHANGE = 50, 0.8, 0.01
"""How often the ratio may change, over which share of training, and by which share of the width."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the update that follows `step` finished ones: linear warm-up from lr/warmup, linear decay to lr/decay at the end."""
    warm = min(1.0, (step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
    decay = min(1.0, (config.steps - step) / config.lr_decay_steps) if config.lr_decay_steps else 1.0
    return config.lr * warm * max(decay, 0.0)


def level_rates(config: TrainConfig, levels: Sequence[int]) -> Float[Tensor, " latent"]:
    """Each latent's part of the learning rate, float64: its level's cumulative size to the power −`level_lr`, with mean 1.

    A small dictionary learns best at a higher rate than a large one (`rate_for_width`), and a level is a dictionary of its
    cumulative size; one rate for all leaves the last level's latents dead or the first level behind.
    """
    sizes = torch.tensor([size - start for start, size in zip((0, *levels), levels)])
    rates = torch.tensor(levels, dtype=torch.float64).pow(-config.level_lr).repeat_interleave(sizes)
    return rates / rates.mean() if len(levels) > 1 and config.level_lr else torch.ones_like(rates)


def sparsity_ramp(config: TrainConfig, step: int) -> float:
    """Warm-up of the penalty at the update that follows `step` finished ones: linear from 0 to 1."""
    return min(1.0, step / config.sparsity_warmup_steps) if config.sparsity_warmup_steps else 1.0


def kept_a_row(config: TrainConfig, step: int) -> int:
    """Latents that topk and batchtopk keep at the update after `step` finished ones: k, to which a warm-up falls
    geometrically from FIRST_OVER_K · k (at most the width)."""
    first = min(FIRST_OVER_K * config.k, config.width)
    left = 1 - sparsity_ramp(config, step)
    return round(config.k * (first / config.k) ** left) if config.k else 0


class Schedule:
    """What changes from step to step by the config alone, on the device: tensors, so that a recorded step can read them.

    lr: float32, of Adam. ramp: float64, of the penalty.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.lr = torch.zeros((), dtype=torch.float32, device=device)
        self.ramp = torch.zeros((), dtype=torch.float64, device=device)
        self.set(0)

    def set(self, n_steps: int) -> None:
        """To the step that follows `n_steps` finished ones."""
        self.lr.fill_(learning_rate(self.config, n_steps))
        self.ramp.fill_(sparsity_ramp(self.config, n_steps))


class Controller:
    """Holds a wanted L0 by a factor on the sparsity penalty that follows where L0 is going, not only where it is.

    L0 answers the penalty late, by hundreds of steps with LayerNorm; a factor that grows as long as L0 is too large has
    long been too large itself when L0 comes down. So what the factor reacts to is log L0 as it will be in `horizon` steps
    if it goes on changing as it does now: the gap is closed over about that many steps, and not overshot.

    `state` is float64 [3]: log-factor, running log L0, its running slope a step. Fetches nothing from the device.
    """

    def __init__(self, target: float, n_steps: int, device: torch.device) -> None:
        self.target = target
        self.rate = min(FASTEST, RATE / n_steps)
        self.horizon = min(FARTHEST, max(NEAREST, HORIZON * n_steps))
        self.state = torch.zeros(3, dtype=torch.float64, device=device)

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
        excess = (running + self.horizon * slope - torch.log(torch.full_like(now, self.target))).clamp(-SPAN, SPAN)
        self.state.copy_(torch.stack([log_factor + self.rate * excess if acts else log_factor, running, slope]))


def adapts(config: TrainConfig, n_steps: int) -> bool:
    """Whether an adapting sharing ratio may change after so many finished steps: fifty times over the first four fifths."""
    if config.alpha != "auto":
        return False
    span = ADAPTING * config.steps
    return n_steps % max(1, int(span / ADAPTATIONS)) == 0 and n_steps <= span


def adapted(n_shared: int, width: int, errors: Sequence[float], square: float, target: float) -> int:
    """The next number of shared latents: 1 % of the width more when they explain less than `target` of what the whole
    dictionary explains, 1 % fewer when they explain more, the same while the whole explains nothing.

    errors: Σ‖x − x̂‖² of the shared and of the whole dictionary, square: Σ‖x‖², over the rows since the last time (rows
    are centred on their mean). What a dictionary explains is 1 − error / square.
    """
    shared, whole = (1 - error / square for error in errors)
    if not whole > 0:
        return n_shared
    change = max(1, level_size(CHANGE, width))
    wanted = n_shared + (change if shared < target * whole else -change)
    return min(max(wanted, change), width - change)
