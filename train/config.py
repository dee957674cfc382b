"""What fixes one SAE in training, and the recipes: plain functions that return such a config.

Every field is an option of `python -m train`, described once, beside the field; the whole is saved in its checkpoints. What a
recipe says of schedules, dead latents and the learning rate follows the run: see `make`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from pipeline.base.errors import UsageError
from pipeline.sae.config import Activation, LayerNorm, SAEConfig, level_size, levels_for_alpha

Objective = Literal["nested", "additive"]
Penalty = Literal["l1", "l0", "none"]
Dtype = Literal["auto", "bf16", "float32", "float64"]
Mode = Literal["auto", "global", "window"]
"""Orders of rows; of the run, not of a member, as what follows."""
Sparse = Literal["auto", "on", "off"]
"""Whether products are over active latents alone."""
LOGS = ("jsonl", "tensorboard", "wandb")
"""Where metrics go; the first always."""
FIRST_ALPHA = 0.2
"""Where an adapting sharing ratio begins."""


def option(default: Any, text: str, only: Callable[[TrainConfig], bool] | None = None) -> Any:
    """A field with its description. `only`: the configs to which it means something; None: all."""
    return field(default=default, metadata={"text": text, "only": only})


def penalised(config: TrainConfig) -> bool:
    """Whether a penalty, and not a count, sets the sparsity."""
    return config.penalty != "none"


def selects(config: TrainConfig) -> bool:
    """Whether the largest latents of a row or of a batch are kept."""
    return config.activation in ("topk", "batchtopk")


def is_jumprelu(config: TrainConfig) -> bool:
    """Whether each latent has a trained threshold."""
    return config.activation == "jumprelu"


def inner_weight(weighting: str) -> float | None:
    """What each level but the last weighs, of a weighting like inner:0.75; None of equal, size and random.

    Raises UsageError for any other text, and a weight that is not above 0.
    """
    if weighting in ("equal", "size", "random"):
        return None
    name, _, text = weighting.partition(":")
    try:
        weight = float(text) if name == "inner" else math.nan
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UsageError(
            f"level_weighting {weighting!r}: use equal, size, random, or inner:W with W above 0, like inner:0.75"
        )
    return weight


@dataclass(frozen=True)
class TrainConfig:
    """One SAE's training. Every field says what it is (`option`), which is the text of `python -m train --help`.

    Raises UsageError when a field is out of range or two contradict each other. A flat SAE has only specialised latents.
    """

    # Shape
    recipe: str = option(
        "paper", "what to begin with, the paper's own reading or the better one; every other option replaces its values"
    )
    width: int = option(16384, "latents of the whole dictionary")
    alpha: float | Literal["auto"] | None = option(
        0.2,
        "share of latents that are shared, the paper's two levels; 0 is flat, auto adapts it in training, none when "
        "--levels is given",
    )
    shared_target: float = option(
        0.9,
        "with --alpha auto: the shared level grows while it explains less than this part of what the whole dictionary "
        "explains, and shrinks while it explains more",
    )
    levels: tuple[float, ...] = option(
        (), "cumulative shares of the width, increasing to 1, as 0.0625,0.125,0.25,0.5,1; instead of --alpha"
    )
    activation: Activation = option("relu", "which latents a row keeps")
    k: int = option(0, "latents a row that topk and batchtopk keep", selects)
    layernorm: LayerNorm = option("pre", "LayerNorm inside each level: pre on pre-activations, post after the ReLU")
    layernorm_rescale: bool = option(True, "multiply the row's scale back into the latents, which LayerNorm takes away")
    layernorm_eps: float = option(1e-8, "LayerNorm's eps; the variance it stands beside is about 1/d_model")
    layernorm_bias: float = option(
        -1.0,
        "where LayerNorm's bias begins, in units of its gain, which decides how many latents fire at first: a sixth at "
        "-1, half at 0",
    )
    encoder_scale: float = option(
        0.0,
        "the encoder begins as the decoder's transpose, a transcoder's as directions of its own, times this (with LayerNorm: its "
        "gain); 0: so that the first reconstruction error is as small as it can be",
    )

    # Objective: squared error summed over dimensions, rows averaged, where mean ‖x‖² is 1
    objective: Objective = option(
        "nested", "nested: a reconstruction term a level; additive: one term, the paper's Eq. 5"
    )
    level_weighting: str = option(
        "equal",
        "of the levels' terms: equal, 1 each; size, by size (mean 1); random, as many prefixes as levels, drawn at every "
        "step; inner:0.75, so much for each but the last, whose weight is 1",
    )
    penalty: Penalty = option("l1", "on latents: l1, l0 (jumprelu), none (topk, batchtopk)")
    lambda_shared: float = option(0.04, "weight of the penalty on shared latents", penalised)
    lambda_specialised: float = option(
        0.04, "weight of the penalty on specialised latents; a flat SAE has only those", penalised
    )
    sparsity_warmup_steps: int = option(
        1000, "steps over which the penalty grows from 0 (topk, batchtopk: latents kept fall from 8k to k)"
    )
    target_l0: float = option(0.0, "mean latents a row to hold by adapting the penalty; 0: off", penalised)
    aux_k: int = option(0, "dead latents that the auxiliary loss revives (topk, batchtopk); 0: off", selects)
    aux_coefficient: float = option(1 / 32, "weight of the auxiliary loss", selects)
    dead_after_rows: int = option(4882 * 2048 // 100, "rows without firing after which a latent is dead")
    initial_l0: float = option(
        64.0,
        "latents a row that jumprelu's thresholds let through at first, or --target-l0 where that is given",
        is_jumprelu,
    )
    bandwidth: float = option(0.5, "of jumprelu's rectangle kernel, as a share of each threshold", is_jumprelu)
    threshold_lr: float = option(10.0, "learning rate of jumprelu's log-thresholds over --lr", is_jumprelu)
    threshold_pull: float = option(
        0.0,
        "how fast log-thresholds of jumprelu's dead latents fall until they fire, as a part of their learning rate; 0: not",
        is_jumprelu,
    )

    # Optimiser: Adam
    lr: float = option(3e-4, "learning rate of Adam")
    level_lr: float = option(
        0.0,
        "how much faster small levels learn: their rate is as their cumulative size to minus this power, and --lr on average; "
        "0: all alike",
    )
    beta1: float = option(0.9, "of Adam")
    beta2: float = option(0.999, "of Adam")
    eps: float = option(1e-8, "of Adam")
    lr_warmup_steps: int = option(1000, "steps over which the learning rate grows from 0")
    lr_decay_steps: int = option(0, "last steps, over which the learning rate falls to 0")
    clip_norm: float = option(1.0, "largest norm of the gradient; 0: off")
    normalize_gradients: bool = option(False, "scale every gradient to norm 1")

    # Run
    steps: int = option(
        4882, "optimiser steps; schedules that are not given take the same share of them as in the recipe"
    )
    batch_size: int = option(2048, "activation rows a step, over all processes")
    seed: int = option(0, "of initialisation and own draws")
    data_seed: int = option(0, "of the order of rows, the same for all members of a run")
    max_norm: float | None = option(
        None, "leave out rows beyond this multiple of the median norm; none: as the store says; 0: keep all"
    )
    dtype: Dtype = option(
        "auto",
        "of matrix products; auto is bf16 where the hardware multiplies it, float32 is TF32 on CUDA, float64 exact; weights are "
        "float32 at least",
    )
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    eval_every: int = option(
        500,
        "steps between scores of held-out rows in metrics.jsonl, by the rule of inference: eval_ev and eval_l0 of every level; "
        "the last step always; 0: never",
    )
    checkpoint_every: int = option(100, "steps between checkpoints")
    init_from: str = option("", "checkpoint of an SAE of the same shape to start from")
    skip: bool = option(False, "with --target: a linear path from the rows of the store beside the latents")

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_ranges()
        self._check_agreement()
        self.sae_config(d_model=1, d_out=1 if self.skip else None)

    def _check_choices(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            choices = get_args(hint)
            value = getattr(self, name)
            if choices and isinstance(choices[0], str) and value not in choices:
                raise UsageError(f"{name} {value!r} is not one of {', '.join(choices)}")

    def _check_ranges(self) -> None:
        for name in ("width", "steps", "batch_size", "dead_after_rows", "log_every", "checkpoint_every"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "eps", "bandwidth", "initial_l0", "threshold_lr", "layernorm_eps"):
            require(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "above 0")
        for name in ("beta1", "beta2"):
            require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        at_least_0 = (
            "lambda_shared",
            "lambda_specialised",
            "sparsity_warmup_steps",
            "target_l0",
            "aux_k",
            "eval_every",
        )
        for name in (
            *at_least_0,
            "aux_coefficient",
            "lr_warmup_steps",
            "lr_decay_steps",
            "clip_norm",
            "encoder_scale",
            "level_lr",
            "threshold_pull",
        ):
            require(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "at least 0")
        require("layernorm_bias", self.layernorm_bias, abs(self.layernorm_bias) <= 4, "between -4 and 4")
        require("shared_target", self.shared_target, 0 < self.shared_target < 1, "between 0 and 1")
        bounded = self.max_norm is None or 0 <= self.max_norm < math.inf
        require("max_norm", self.max_norm, bounded, "at least 0, or none")

    def _check_agreement(self) -> None:
        if (self.alpha is None) == (not self.levels):
            raise UsageError(f"give either alpha or levels, got alpha {self.alpha} and levels {self.levels}")
        inner_weight(self.level_weighting)
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
        for name, most in (
            ("k", self.width),
            ("aux_k", self.width),
            ("target_l0", self.width),
            ("initial_l0", self.width),
        ):
            applies = name != "initial_l0" or self.activation == "jumprelu"
            require(name, getattr(self, name), not applies or getattr(self, name) <= most, f"at most the width, {most}")
        if self.aux_k and self.penalty != "none":
            raise UsageError(
                f"aux_k {self.aux_k}: the auxiliary loss goes with topk and batchtopk, not {self.activation}"
            )

    def level_sizes(self) -> tuple[int, ...]:
        """Cumulative sizes of the levels, the last one the width; those that training begins with."""
        if self.alpha is not None:
            return levels_for_alpha(FIRST_ALPHA if self.alpha == "auto" else self.alpha, self.width)
        return tuple(level_size(share, self.width) for share in self.levels)

    def sae_config(self, d_model: int, d_out: int | None = None) -> SAEConfig:
        """The SAE this trains, or with `d_out` the transcoder. Raises UsageError for levels that do not increase to the
        width, and for a skip connection of an SAE."""
        return SAEConfig(
            d_model=d_model,
            width=self.width,
            levels=self.level_sizes(),
            activation=self.activation,
            k=self.k,
            layernorm=self.layernorm,
            layernorm_rescale=self.layernorm_rescale,
            layernorm_eps=self.layernorm_eps,
            d_out=d_out,
            skip=self.skip,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return dataclasses.asdict(self) | {"levels": list(self.levels)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> TrainConfig:
        """Raises UsageError naming fields that this version does not know."""
        unknown = sorted(data.keys() - {one.name for one in dataclasses.fields(TrainConfig)})
        if unknown:
            raise UsageError(f"unknown training fields: {', '.join(unknown)}")
        return TrainConfig(**(data | {"levels": tuple(data.get("levels", ()))}))


def require(name: str, value: object, holds: bool, what: str) -> None:
    """Raise UsageError unless `holds`."""
    if not holds:
        raise UsageError(f"{name} must be {what}, got {value}")


STEPS, WIDTH = 4882, 16384
"""Length and width that recipes are written for."""


def paper(**changes: Any) -> TrainConfig:
    """The paper's: LayerNorm, ReLU, L1 0.04, Adam 3e-4 with 1000 warm-up steps, clip 1.0, 4882 steps of 2048 rows.

    Order of one update: clip the gradient's norm, remove its component along the decoder rows, Adam, renormalise them.
    """
    return make("paper", {"lr": 3e-4}, changes)


def batchtopk(**changes: Any) -> TrainConfig:
    """Matryoshka BatchTopK: k latents a row on average over the batch, auxiliary loss for dead latents, lr decay.

    Bussmann et al. 2024 (BatchTopK) and 2025 (Matryoshka SAEs); the auxiliary loss is Gao et al. 2024, appendix A.2.
    """
    own = {"activation": "batchtopk", "k": 64, "aux_k": 512, "level_lr": LEVEL_LR}
    return make("batchtopk", NO_PENALTY | SHORT | own, changes)


def topk(**changes: Any) -> TrainConfig:
    """TopK: the k largest latents of each row over the whole dictionary, auxiliary loss, lr decay (Gao et al. 2024)."""
    own = {"activation": "topk", "k": 64, "aux_k": 512, "level_lr": LEVEL_LR}
    return make("topk", NO_PENALTY | SHORT | own, changes)


def jumprelu(**changes: Any) -> TrainConfig:
    """JumpReLU with an L0 penalty and straight-through gradients for the thresholds (Rajamanoharan et al. 2024)."""
    own = {"activation": "jumprelu", "penalty": "l0", "lambda_shared": 1e-3, "lambda_specialised": 1e-3}
    own |= {"initial_l0": 64, "threshold_pull": THRESHOLD_PULL}
    own |= {"lr_warmup_steps": 244, "lr_decay_steps": 976}  # a long decay leaves too little to bring L0 back with
    return make("jumprelu", PLAIN | own, changes)


SCHEDULES = ("lr_warmup_steps", "sparsity_warmup_steps", "lr_decay_steps")
PLAIN: dict[str, Any] = {"layernorm": "none"}
SHORT: dict[str, Any] = {"lr_warmup_steps": 244, "lr_decay_steps": 2441}
"""A twentieth of the run to warm up, half of it to decay. For two levels (width 1536, 2000 steps; explained variance of the first
level and the whole) .8634, .9105; a decay over four fifths .8607, .9109; over a fifth .8647, .9078."""
LEVEL_LR = 0.35
"""Two levels of .2 and 1 learn at 1.53 and .87 of the rate, five from a sixteenth on at 2.0 to .76 of it. Width 1536, 2000 steps,
first level's and whole explained variance, dead latents, at 0, .35, .5: two levels at L0 16 .8024, .8783, .027; .8019, .8816,
.014; .7987, .8820, .013; five at L0 32 .7397, .8967, .068; .7445, .9025, .014; .7415, .9030, .014."""
THRESHOLD_PULL = 1.0
"""Nothing else revives a jumprelu latent; those of the outer level die while the penalty comes up. Width 1536, 2000 steps, L0 32,
two levels; first level's and whole explained variance, dead latents: .8496, .8820, .348 at 0; .8498, .8994, .003 at 1, down to a
quarter of the other thresholds (to half: .8471, .8976, .009; to the others: .8483, .8912, .158; no end: .7403, .8742, .001)."""
NO_PENALTY: dict[str, Any] = PLAIN | {
    "penalty": "none",
    "lambda_shared": 0.0,
    "lambda_specialised": 0.0,
    "sparsity_warmup_steps": 0,
}


def make(name: str, own: dict[str, Any], changes: dict[str, Any]) -> TrainConfig:
    """A config of the recipe's own fields, replaced by `changes`; `levels` without `alpha` turns the recipe's α off.

    What is not given follows the run: schedules take the same share of it as in STEPS; a latent is dead after a hundredth of
    its rows (at least 10,000); k is at most a sixteenth of the width, auxiliary latents an eighth; and where the recipe has no
    learning rate of its own, that is `rate_for_width`.
    """
    if changes.get("levels") and "alpha" not in changes:
        changes = {"alpha": None} | changes
    whole = TrainConfig.from_dict({"recipe": name} | own)
    steps, width = changes.get("steps", whole.steps), changes.get("width", whole.width)
    rows = steps * changes.get("batch_size", whole.batch_size)
    own = own | {schedule: round(getattr(whole, schedule) * steps / STEPS) for schedule in SCHEDULES}
    for one, other in (("lr_warmup_steps", "lr_decay_steps"), ("lr_decay_steps", "lr_warmup_steps")):
        own[one] = min(own[one], max(0, steps - changes.get(other, 0)))
    own = {"lr": RATE_PARTS.get(name, 1.0) * rate_for_width(width), "dead_after_rows": max(10_000, rows // 100)} | own
    own |= {
        name: min(own[name], max(1, width // part))
        for name, part in (("k", 16), ("initial_l0", 16), ("aux_k", 8))
        if name in own
    }
    return TrainConfig.from_dict({"recipe": name} | own | changes)


RATE_PARTS = {"jumprelu": 0.5}
"""Recipes that take a part of `rate_for_width`. jumprelu with all of it left 62 % of latents dead (two levels, width 768, 2000
steps: explained variance .836, with half .858; flat .898 and .901)."""


def rate_for_width(width: int) -> float:
    """Adam's learning rate for a dictionary of this width: 7e-3 at 1536, in inverse proportion to it, at most 1e-2.

    Measured at width 1536 on a real model (of 2.5e-3 to 1e-2, with decays over .2 to .95 of the run); a rule of thumb elsewhere.
    """
    return min(1e-2, 7e-3 * 1536 / width)


DEFAULT = "batchtopk"
"""The best at equal L0 of those measured on real models (NOTES.md)."""

RECIPES: dict[str, Callable[..., TrainConfig]] = {
    "paper": paper,
    "batchtopk": batchtopk,
    "topk": topk,
    "jumprelu": jumprelu,
}
