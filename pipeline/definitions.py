"""Every metric once: name, label, unit, which way is better, and what exactly it is. No torch: the report reads it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True)
class Metric:
    """One score. `id` names the definition in results and legends; a changed definition gets a new id."""

    id: str
    label: str
    unit: str
    better: Better
    definition: str


METRICS: dict[str, Metric] = {
    m.id: m
    for m in (
        Metric("kl_nats", "KL", "nats/token", "lower", "KL(clean ‖ spliced) of next-token distributions"),
        Metric(
            "kl_score", "KL score", "fraction", "higher",
            "(KL_zero − KL_spliced) / KL_zero: share of the zero-ablation KL removed (SAEBench's kl_div_score)",
        ),
        Metric("kl_score_mean", "KL score (mean ablation)", "fraction", "higher", "(KL_mean − KL_spliced) / KL_mean"),
        Metric("ce", "CE", "nats/token", "lower", "cross-entropy of the spliced model, next token, kept source positions"),
        Metric(
            "ce_score", "CE score", "fraction", "higher",
            "(CE_zero − CE_spliced) / (CE_zero − CE_clean): CE recovered against zero ablation",
        ),
        Metric(
            "ce_score_mean", "CE score (mean ablation)", "fraction", "higher",
            "(CE_mean − CE_spliced) / (CE_mean − CE_clean)",
        ),
        Metric("top1", "top-1 agreement", "fraction", "higher", "share of kept tokens on which clean and spliced argmax agree"),
        Metric(
            "ev", "explained variance", "fraction", "higher",
            "1 − E‖x−x̂‖² / (E‖x‖² − ‖E x‖²), float64 sums over all kept tokens (centred)",
        ),
        Metric(
            "ev_legacy", "explained variance (legacy)", "fraction", "higher",
            "mean over tokens of 1 − ‖x−x̂‖² / ‖x − batch mean‖²: the published SAEBench and Neuronpedia figure",
        ),
        Metric(
            "ev_saebench", "explained variance (SAEBench 0.6)", "fraction", "higher",
            "1 − R / (S − q²) as sae-bench 0.6.0 computes it: not centred, may exceed 1; for comparison only",
        ),
        Metric("mse", "MSE", "squared activation/token", "lower", "mean over tokens of ‖x−x̂‖², dimensions summed"),
        Metric("mse_per_dim", "MSE per dimension", "squared activation", "lower", "mse / d_model"),
        Metric("cosine", "cosine", "fraction", "higher", "mean over tokens of cos(x, x̂)"),
        Metric("l2_ratio", "L2 ratio", "fraction", "neither", "mean over tokens of ‖x̂‖ / ‖x‖; below 1 is shrinkage"),
        Metric(
            "relative_reconstruction_bias", "relative reconstruction bias", "fraction", "neither",
            "E‖x̂‖² / E[x·x̂]; below 1 is shrinkage",
        ),
        Metric("l0", "L0", "latents/token", "lower", "mean count of non-zero latents a token"),
        Metric("sparsity", "sparsity", "fraction", "higher", "share of latents that are zero: 1 − l0 / width"),
        Metric("l1", "L1", "activation/token", "lower", "mean over tokens of Σ|z|"),
        Metric("dead", "dead", "fraction", "lower", "share of latents that never fired on the stated sample"),
        Metric("alive", "alive", "fraction", "higher", "1 − dead"),
        Metric(
            "sparse_coding_rate", "sparse coding rate", "fraction", "higher",
            "share of the full ev kept when only the n latents of a token largest by |z_j|·‖W_dec,j‖ are kept; "
            "undefined where ev ≤ 0",
        ),
        Metric(
            "scr", "SCR", "fraction", "higher",
            "spurious correlation removal after zero-ablating n latents (SAEBench's scr_metric_threshold_n)",
        ),
        Metric("tpp", "TPP", "fraction", "higher", "targeted probe perturbation after zero-ablating n latents"),
    )
}  # fmt: skip
