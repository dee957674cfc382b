"""What fixes one SAE in training: every field is an option of `python -m train`, and the whole is saved in its checkpoints."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from pipeline.base.errors import UsageError
from pipeline.sae.nested import Activation, LayerNorm, SAEConfig, level_size, levels_for_alpha

Objective = Literal["nested", "additive"]
Penalty = Literal["l1", "l0", "none"]
LevelWeighting = Literal["equal", "size", "random"]
Dtype = Literal["auto", "bf16", "float32", "float64"]
FIRST_ALPHA = 0.2
"""Where an adapting sharing ratio begins."""


@dataclass(frozen=True)
class TrainConfig:
    """One SAE's training. Raises UsageError when a field is out of range or two contradict each other.

    Shape
        recipe: the name of the recipe this began as; a label.
        width: latents of the whole dictionary.
        alpha: share of latents that are shared, the paper's two levels; 0 is flat; "auto" adapts it (`sharing.py`). None
            when `levels` is given.
        shared_target: with alpha "auto", the part of what the whole dictionary explains that the shared one is to explain.
        levels: cumulative shares of the width, increasing to 1, for any number of levels. Empty when `alpha` is given.
        activation, k: `k` latents a row for topk and batchtopk, else 0.
        layernorm, layernorm_rescale, layernorm_eps: as in `SAEConfig`.
    Objective (squared error summed over dimensions, rows averaged, mean ‖x‖² is 1)
        objective: `nested` has a reconstruction term a level; `additive` is the paper's Eq. 5, one term.
        level_weighting: `equal` 1 each; `size` proportional to the level's size, mean 1; `random` as many prefixes as
            there are levels, drawn log-uniform between the first level and the width at every step, the last the whole.
        penalty: `l1` on latents, `l0` (jumprelu), `none` (topk, batchtopk).
        lambda_shared, lambda_specialised: its weights. A flat SAE has only specialised latents.
        sparsity_warmup_steps: the penalty grows linearly from 0 over so many steps; what topk and batchtopk keep falls
            from 8k to k.
        target_l0: mean latents a row that a controller holds by adapting a factor on the penalty; 0 is off.
        aux_k, aux_coefficient: of the auxiliary loss for dead latents (topk, batchtopk); 0 is off.
        dead_after_rows: a latent that did not fire for so many rows is dead.
        threshold_decay: of the running estimate of batchtopk's inference threshold, a step.
        bandwidth, initial_threshold: of jumprelu's rectangle kernel; where its thresholds begin.
    Optimiser (Adam)
        lr, beta1, beta2, eps; lr_warmup_steps: linear from 0; lr_decay_steps: linear to 0 at the end.
        clip_norm: the gradient's norm is clipped here, 0 is off; normalize_gradients: it is always scaled to norm 1.
    Run
        steps, batch_size (activation rows over all processes), seed (initialisation, own draws), data_seed (order of rows).
        max_norm: rows beyond this multiple of the median norm are left out; None: the store's own; 0: none is.
        dtype: of matrix products; weights are float32 always (float64 computes all in float64, for tests).
        log_every, checkpoint_every: steps.
        init_from: checkpoint of an SAE to start from; empty: fresh weights. A run adds "#" and a hash of the file.
    """

    recipe: str = "paper"
    width: int = 16384
    alpha: float | Literal["auto"] | None = 0.2
    shared_target: float = 0.9
    levels: tuple[float, ...] = ()
    activation: Activation = "relu"
    k: int = 0
    layernorm: LayerNorm = "pre"
    layernorm_rescale: bool = True
    layernorm_eps: float = 1e-8

    objective: Objective = "nested"
    level_weighting: LevelWeighting = "equal"
    penalty: Penalty = "l1"
    lambda_shared: float = 0.04
    lambda_specialised: float = 0.04
    sparsity_warmup_steps: int = 1000
    target_l0: float = 0.0
    aux_k: int = 0
    aux_coefficient: float = 1 / 32
    dead_after_rows: int = 100_000
    threshold_decay: float = 0.99
    bandwidth: float = 0.001
    initial_threshold: float = 0.001

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    lr_warmup_steps: int = 1000
    lr_decay_steps: int = 0
    clip_norm: float = 1.0
    normalize_gradients: bool = False

    steps: int = 4882
    batch_size: int = 2048
    seed: int = 0
    data_seed: int = 0
    max_norm: float | None = None
    dtype: Dtype = "auto"
    log_every: int = 10
    checkpoint_every: int = 100
    init_from: str = ""

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_ranges()
        self._check_agreement()
        self.sae_config(d_model=1)

    def _check_choices(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            choices = get_args(hint)
            value = getattr(self, name)
            if choices and isinstance(choices[0], str) and value not in choices:
                raise UsageError(f"{name} {value!r} is not one of {', '.join(choices)}")

    def _check_ranges(self) -> None:
        for name in ("width", "steps", "batch_size", "dead_after_rows", "log_every", "checkpoint_every"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "eps", "bandwidth", "initial_threshold", "layernorm_eps"):
            require(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "above 0")
        for name in ("beta1", "beta2", "threshold_decay"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        at_least_0 = ("lambda_shared", "lambda_specialised", "sparsity_warmup_steps", "target_l0", "aux_k")
        for name in (*at_least_0, "aux_coefficient", "lr_warmup_steps", "lr_decay_steps", "clip_norm"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "at least 0")
        require("shared_target", self.shared_target, 0 < self.shared_target < 1, "between 0 and 1")
        bounded = self.max_norm is None or 0 <= self.max_norm < math.inf
        require("max_norm", self.max_norm, bounded, "at least 0, or none")

    def _check_agreement(self) -> None:
        if (self.alpha is None) == (not self.levels):
            raise UsageError(f"give either alpha or levels, got alpha {self.alpha} and levels {self.levels}")
        if self.alpha == "auto" and self.level_weighting == "random":
            raise UsageError("alpha auto moves the shared level, random prefixes have none; choose one of the two")
        if self.lr_warmup_steps + self.lr_decay_steps > self.steps:
            raise UsageError(
                f"lr_warmup_steps {self.lr_warmup_steps} and lr_decay_steps {self.lr_decay_steps} exceed the {self.steps} "
                "steps; lower them (a fifth of the steps is enough)"
            )
        if self.sparsity_warmup_steps > self.steps:
            raise UsageError(
                f"sparsity_warmup_steps {self.sparsity_warmup_steps} exceed the {self.steps} steps; lower it"
            )
        allowed = {"relu": ("l1",), "jumprelu": ("l0", "l1")}.get(self.activation, ("none",))
        if self.penalty not in allowed:
            raise UsageError(f"{self.activation} goes with penalty {' or '.join(allowed)}, not with {self.penalty}")
        if self.target_l0 and self.penalty == "none":
            raise UsageError(f"{self.activation} has the L0 that k asks for; target_l0 is for relu and jumprelu")
        if self.target_l0 and not self.lambda_shared + self.lambda_specialised:
            raise UsageError("target_l0 adapts the penalty, but both lambdas are 0")
        if self.penalty == "none" and self.lambda_shared + self.lambda_specialised:
            raise UsageError(
                f"{self.activation} has no sparsity penalty, so no lambda: leave it out, or choose --recipe paper"
            )
        if self.aux_k and self.penalty != "none":
            raise UsageError(
                f"aux_k {self.aux_k}: the auxiliary loss goes with topk and batchtopk, not {self.activation}"
            )

    def level_sizes(self) -> tuple[int, ...]:
        """Cumulative sizes of the levels, the last one the width; those that training begins with."""
        if self.alpha is not None:
            return levels_for_alpha(FIRST_ALPHA if self.alpha == "auto" else self.alpha, self.width)
        return tuple(level_size(share, self.width) for share in self.levels)

    def sae_config(self, d_model: int) -> SAEConfig:
        """The SAE this trains. Raises UsageError for levels that do not increase to the width."""
        return SAEConfig(
            d_model=d_model,
            width=self.width,
            levels=self.level_sizes(),
            activation=self.activation,
            k=self.k,
            layernorm=self.layernorm,
            layernorm_rescale=self.layernorm_rescale,
            layernorm_eps=self.layernorm_eps,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return dataclasses.asdict(self) | {"levels": list(self.levels)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> TrainConfig:
        """Raises UsageError naming fields that this version does not know."""
        unknown = sorted(data.keys() - {field.name for field in dataclasses.fields(TrainConfig)})
        if unknown:
            raise UsageError(f"unknown training fields: {', '.join(unknown)}")
        return TrainConfig(**(data | {"levels": tuple(data.get("levels", ()))}))


def require(name: str, value: object, holds: bool, what: str) -> None:
    """Raise UsageError unless `holds`."""
    if not holds:
        raise UsageError(f"{name} must be {what}, got {value}")
