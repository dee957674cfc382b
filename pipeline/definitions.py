"""Every metric once: name, label, unit, which way is better, and what exactly it is. No torch: the report reads it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher", "neither"]
SHIPPED_SPECS = {"fb6325a093": "tree", "0aaab54dbb": "forest", "059951545e": "large"}
"""What `harvest --truth` calls the specs of known features that come with it, by the digits of their hash that stand for a
model in their stores and results."""


@dataclass(frozen=True)
class Metric:
    """One score. `id` names the definition in results and legends; a changed definition gets a new id."""

    id: str
    label: str
    unit: str
    better: Better
    definition: str


# What has no better way carries none: L0 and L1 say how sparse, evenness of use is good or bad with what is used for what.
METRICS: dict[str, Metric] = {
    m.id: m
    for m in (
        Metric("kl_nats", "KL", "nats/token", "lower", "KL(clean ‖ spliced) of next-token distributions"),
        Metric(
            "kl_score",
            "KL score",
            "fraction",
            "higher",
            "(KL_zero − KL_spliced) / KL_zero: share of the zero-ablation KL removed (SAEBench's kl_div_score)",
        ),
        Metric("kl_score_mean", "KL score (mean ablation)", "fraction", "higher", "(KL_mean − KL_spliced) / KL_mean"),
        Metric(
            "ce", "CE", "nats/token", "lower", "cross-entropy of the spliced model, next token, kept source positions"
        ),
        Metric(
            "ce_score",
            "CE score",
            "fraction",
            "higher",
            "(CE_zero − CE_spliced) / (CE_zero − CE_clean): CE recovered against zero ablation",
        ),
        Metric(
            "ce_score_mean",
            "CE score (mean ablation)",
            "fraction",
            "higher",
            "(CE_mean − CE_spliced) / (CE_mean − CE_clean)",
        ),
        Metric(
            "top1",
            "top-1 agreement",
            "fraction",
            "higher",
            "share of kept tokens on which clean and spliced argmax agree",
        ),
        Metric(
            "ev",
            "explained variance",
            "fraction",
            "higher",
            "1 − E‖x−x̂‖² / (E‖x‖² − ‖E x‖²), float64 sums over all kept tokens (centred)",
        ),
        Metric(
            "ev_legacy",
            "explained variance (legacy)",
            "fraction",
            "higher",
            "mean over tokens of 1 − ‖x−x̂‖² / ‖x − batch mean‖²: the published SAEBench and Neuronpedia figure",
        ),
        Metric(
            "ev_saebench",
            "explained variance (SAEBench 0.6)",
            "fraction",
            "higher",
            "1 − R / (S − q²) as sae-bench 0.6.0 computes it: not centred, may exceed 1; for comparison only",
        ),
        Metric("mse", "MSE", "squared activation/token", "lower", "mean over tokens of ‖x−x̂‖², dimensions summed"),
        Metric("mse_per_dim", "MSE per dimension", "squared activation", "lower", "mse / d_model"),
        Metric("cosine", "cosine", "fraction", "higher", "mean over tokens of cos(x, x̂)"),
        Metric("l2_ratio", "L2 ratio", "fraction", "neither", "mean over tokens of ‖x̂‖ / ‖x‖; below 1 is shrinkage"),
        Metric(
            "relative_reconstruction_bias",
            "relative reconstruction bias",
            "fraction",
            "neither",
            "E‖x̂‖² / E[x·x̂]; below 1 is shrinkage",
        ),
        Metric("l0", "L0", "latents/token", "neither", "mean count of non-zero latents a token"),
        Metric("sparsity", "sparsity", "fraction", "neither", "share of latents that are zero: 1 − l0 / width"),
        Metric("l1", "L1", "activation/token", "neither", "mean over tokens of Σ|z|"),
        Metric("dead", "dead", "fraction", "lower", "share of latents that never fired on the stated sample"),
        Metric("alive", "alive", "fraction", "higher", "1 − dead"),
        Metric(
            "sparse_coding_rate",
            "sparse coding rate",
            "fraction",
            "higher",
            "share of the full ev kept when only the n latents of a token largest by |z_j|·‖W_dec,j‖ are kept; "
            "undefined where ev ≤ 0",
        ),
        Metric(
            "sparse_coding_ev",
            "explained variance at n",
            "fraction",
            "higher",
            "ev when only the n latents of a token largest by |z_j|·‖W_dec,j‖ are kept",
        ),
        Metric(
            "sparse_coding_rate_without_massive",
            "sparse coding rate, no massive rows",
            "fraction",
            "higher",
            "sparse_coding_rate over the rows that are not massive",
        ),
        Metric(
            "sparse_coding_ev_without_massive",
            "explained variance at n, no massive rows",
            "fraction",
            "higher",
            "sparse_coding_ev over the rows that are not massive",
        ),
        Metric(
            "scr",
            "SCR",
            "fraction",
            "higher",
            "spurious correlation removal after zero-ablating n latents (SAEBench's scr_metric_threshold_n)",
        ),
        Metric(
            "scr_dir1",
            "SCR, direction 1",
            "fraction",
            "higher",
            "scr when the latents of the spurious attribute are ablated and the other attribute is tested",
        ),
        Metric(
            "scr_dir2",
            "SCR, direction 2",
            "fraction",
            "higher",
            "scr when the latents of the other attribute are ablated and the spurious one is tested",
        ),
        Metric("tpp", "TPP", "fraction", "higher", "targeted probe perturbation after zero-ablating n latents"),
        Metric(
            "tpp_intended",
            "TPP, intended",
            "accuracy",
            "higher",
            "accuracy that a class's own probe loses when the n latents of that class are ablated",
        ),
        Metric(
            "tpp_unintended",
            "TPP, unintended",
            "accuracy",
            "lower",
            "mean accuracy that the other classes' probes lose by it; tpp is intended − unintended",
        ),
        Metric(
            "k_sparse_probe",
            "k-sparse probe",
            "fraction",
            "higher",
            "test accuracy of a logistic regression on the k latents (of pooled z / scale) whose class means differ most",
        ),
        Metric(
            "dead_in_training",
            "dead in training",
            "fraction",
            "lower",
            "share of latents that never fired on the last rows of training; features.training.fired_rows says how many",
        ),
        Metric(
            "density",
            "density",
            "fraction of tokens",
            "neither",
            "share of kept tokens on which a latent fires; histogram of log10 a block, latents that never fired apart",
        ),
        Metric(
            "freq_over_1_percent",
            "latents over 1 %",
            "fraction",
            "neither",
            "share of a block's latents of density > 0.01",
        ),
        Metric(
            "freq_over_10_percent",
            "latents over 10 %",
            "fraction",
            "neither",
            "share of a block's latents of density > 0.1",
        ),
        Metric(
            "mass_over_1_percent",
            "firings over 1 %",
            "fraction",
            "neither",
            "share of a block's firings that latents of density > 0.01 make",
        ),
        Metric(
            "mass_over_10_percent",
            "firings over 10 %",
            "fraction",
            "neither",
            "share of a block's firings that latents of density > 0.1 make",
        ),
        Metric(
            "entropy",
            "utilisation (entropy)",
            "fraction",
            "neither",
            "entropy of the shares of a block's firings over its maximum, ln of the number of latents; 1 is even use",
        ),
        Metric(
            "gini",
            "utilisation (Gini)",
            "fraction",
            "neither",
            "Gini coefficient of a block's densities; 0 is even use",
        ),
        Metric(
            "encoder_decoder",
            "encoder–decoder cosine",
            "cosine",
            "neither",
            "cos of each encoder column and decoder row",
        ),
        Metric(
            "nearest",
            "nearest neighbour",
            "cosine",
            "neither",
            "largest cosine of each decoder row with another of the block named",
        ),
        Metric(
            "pearson",
            "correlation (Pearson)",
            "correlation",
            "neither",
            "of the activations of pairs of sampled latents over kept tokens that are not massive",
        ),
        Metric(
            "truth_mcc",
            "MCC",
            "cosine",
            "higher",
            "mean |cos| of decoder rows and true directions under the best one-to-one matching",
        ),
        Metric(
            "truth_f1",
            "F1 of features",
            "fraction",
            "higher",
            "mean over true features that fired of F1 of the firing of its latent (largest |cos|)",
        ),
        Metric("truth_precision", "precision of features", "fraction", "higher", "likewise: precision"),
        Metric("truth_recall", "recall of features", "fraction", "higher", "likewise: recall"),
        Metric(
            "truth_found", "features found", "fraction", "higher", "share of true features with a latent of |cos| > 0.9"
        ),
        Metric(
            "truth_unique",
            "latents claimed once",
            "fraction",
            "higher",
            "share of latents that are the best match of exactly one true feature",
        ),
        Metric(
            "truth_distinct",
            "uniqueness",
            "fraction",
            "higher",
            "distinct true features that latents match best, over latents",
        ),
        Metric(
            "truth_absorption",
            "absorption",
            "fraction",
            "lower",
            "truth_parent_silent − truth_parent_missed: how much more often the parent’s latent is silent under a child of it "
            "than it is missed anyway",
        ),
        Metric(
            "truth_parent_silent",
            "parent silent under its child",
            "fraction",
            "lower",
            "P(the parent's latent is off | the parent and a child of it are on): absorption",
        ),
        Metric(
            "truth_parent_missed",
            "parent missed alone",
            "fraction",
            "lower",
            "P(the parent's latent is off | the parent is on, no child of it is): mere misses",
        ),
        Metric(
            "truth_hedging",
            "hedging",
            "fraction",
            "lower",
            "mean part of a child's direction in the decoder row of its parent's latent; 0 is the parent alone",
        ),
        Metric(
            "absorption_full",
            "absorption, full",
            "fraction",
            "lower",
            "share of rows with a label, found by its probe, on which all the label's latents are silent and one other carries "
            "0.4 of the projection; mean over letters and classes of characters",
        ),
        Metric(
            "absorption_fraction",
            "absorption, fraction",
            "fraction",
            "lower",
            "part of a label's projection that at most three other latents carry, mean over the same rows and labels",
        ),
        Metric(
            "absorption_n_latents",
            "latents a label",
            "latents",
            "lower",
            "latents whose k-sparse probe gains 0.03 in F1",
        ),
        Metric(
            "absorption_f1",
            "best-latent F1",
            "fraction",
            "higher",
            "F1 on unseen token types of a label's best latent, mean over labels; low: absorption is falsely low",
        ),
        Metric(
            "absorption_recall",
            "recall of label latents",
            "fraction",
            "higher",
            "share of the same rows on which a latent of the label fires, mean over labels",
        ),
        Metric(
            "first_letter_full",
            "first letter, absorbed in full",
            "fraction",
            "lower",
            "absorption, full, of first letters: words in prompts that ask for it, mean over letters that have a probe",
        ),
        Metric(
            "first_letter_fraction",
            "first letter, absorbed fraction",
            "fraction",
            "lower",
            "absorption, fraction, of first letters, mean over the same words and letters",
        ),
        Metric(
            "first_letter_n_latents",
            "latents a letter",
            "latents",
            "lower",
            "latents whose k-sparse probe of a first letter gains 0.03 in F1",
        ),
        Metric(
            "first_letter_f1",
            "best-latent F1, letters",
            "fraction",
            "higher",
            "F1 on unseen words of a letter's best latent, mean over letters; low: absorption is falsely low",
        ),
        Metric(
            "first_letter_recall",
            "recall of letter latents",
            "fraction",
            "higher",
            "share of the same words on which a latent of the letter fires, mean over letters",
        ),
        Metric(
            "structure_meta",
            "meta-dictionary",
            "fraction",
            "lower",
            "variance of the unit decoder rows that a dictionary of a quarter as many latents, four a row, explains",
        ),
        Metric(
            "structure_excess",
            "containment over chance",
            "fraction",
            "neither",
            "mean over specialised latents of the largest share of their tokens on which one shared latent fires, less the same "
            "with their firings taken from another sequence",
        ),
        Metric(
            "structure_control",
            "the same, flat",
            "fraction",
            "neither",
            "likewise in flat dictionaries, with a set of latents as large and as dense as the shared level in its place",
        ),
        Metric(
            "jaccard",
            "co-activation (Jaccard)",
            "fraction",
            "neither",
            "tokens on which both latents of a pair fire over tokens on which either does, same tokens and pairs",
        ),
    )
}
