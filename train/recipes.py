"""Recipes: plain functions that return a training config. Any field can be given to replace the recipe's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from train.config import TrainConfig


def paper(**changes: Any) -> TrainConfig:
    """The paper's: LayerNorm, ReLU, L1 0.04, Adam 3e-4 with 1000 warm-up steps, clip 1.0, 4882 steps of 2048 rows.

    Order of one update: clip the gradient's norm, remove its component along the decoder rows, Adam, renormalise them.
    """
    return make("paper", {}, changes)


def batchtopk(**changes: Any) -> TrainConfig:
    """Matryoshka BatchTopK: k latents a row on average over the batch, auxiliary loss for dead latents, lr decay.

    Bussmann et al. 2024 (BatchTopK) and 2025 (Matryoshka SAEs); the auxiliary loss is Gao et al. 2024, appendix A.2.
    """
    own = {"activation": "batchtopk", "k": 64, "aux_k": 512, "lr_decay_steps": 976}
    return make("batchtopk", NO_PENALTY | own, changes)


def topk(**changes: Any) -> TrainConfig:
    """TopK: the k largest latents of each row over the whole dictionary, auxiliary loss, lr decay (Gao et al. 2024)."""
    own = {"activation": "topk", "k": 64, "aux_k": 512, "lr_decay_steps": 976}
    return make("topk", NO_PENALTY | own, changes)


def jumprelu(**changes: Any) -> TrainConfig:
    """JumpReLU with an L0 penalty and straight-through gradients for the thresholds (Rajamanoharan et al. 2024)."""
    own = {"activation": "jumprelu", "penalty": "l0", "lambda_shared": 1e-3, "lambda_specialised": 1e-3}
    return make("jumprelu", PLAIN | own, changes)


SCHEDULES = ("lr_warmup_steps", "sparsity_warmup_steps", "lr_decay_steps")
PLAIN: dict[str, Any] = {"layernorm": "none"}
NO_PENALTY: dict[str, Any] = PLAIN | {
    "penalty": "none",
    "lambda_shared": 0.0,
    "lambda_specialised": 0.0,
    "sparsity_warmup_steps": 0,
}


def make(name: str, own: dict[str, Any], changes: dict[str, Any]) -> TrainConfig:
    """A config of the recipe's own fields, replaced by `changes`; `levels` without `alpha` turns the recipe's α off.

    Schedules that are not given take at most a fifth of a training shorter than the recipe's.
    """
    if changes.get("levels") and "alpha" not in changes:
        changes = {"alpha": None} | changes
    whole = TrainConfig.from_dict({"recipe": name} | own)
    steps = changes.get("steps", whole.steps)
    if steps < whole.steps:
        own = own | {schedule: min(getattr(whole, schedule), steps // 5) for schedule in SCHEDULES}
    return TrainConfig.from_dict({"recipe": name} | own | changes)


DEFAULT = "batchtopk"
"""The best at equal L0 of those measured on a real model and on the demo's (NOTES.md): LayerNorm and L1 cost most."""

RECIPES: dict[str, Callable[..., TrainConfig]] = {
    "paper": paper,
    "batchtopk": batchtopk,
    "topk": topk,
    "jumprelu": jumprelu,
}
