"""Our absorption against sae-bench's own calculator: same probe, same activations, same SAE, same label latents.

Needs sae-bench, sae-lens and transformer-lens (an environment of their own: tests/peers/README.md). The language model is a
stand-in that returns given activations, so that nothing but the arithmetic is compared. Run from the repository's root:

    PYTHONPATH=. python tests/peers/differential_absorption.py
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from sae_bench.evals.absorption import feature_absorption_calculator as theirs
from scipy.sparse import csr_matrix

from evaluate.scores.absorption import absorbed

D_MODEL, WIDTH, N_WORDS = 32, 128, 400


class Model:
    """Gives out the rows asked for in order, at position −2 of two."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.at = rows, 0

    def run_with_cache(self, prompts: list[str], names_filter: list[str]) -> tuple[None, dict[str, torch.Tensor]]:
        """The next rows, one a prompt."""
        rows = self.rows[self.at : self.at + len(prompts)]
        self.at += len(prompts)
        return None, {names_filter[0]: torch.stack([rows, torch.zeros_like(rows)], 1)}

    def to_tokens(self, prompt: str) -> torch.Tensor:
        """All prompts are as long."""
        return torch.zeros(1, 2)


def case(seed: int) -> tuple[torch.Tensor, Any, torch.Tensor, list[int]]:
    """Rows, an SAE with unit decoder rows of which some lean to the probe, the probe, and its label's latents."""
    g = torch.Generator().manual_seed(seed)
    probe = torch.nn.functional.normalize(torch.randn(D_MODEL, generator=g), dim=0)
    decoder = torch.randn(WIDTH, D_MODEL, generator=g)
    decoder[:20] += 6 * torch.rand(20, 1, generator=g) * probe
    decoder = torch.nn.functional.normalize(decoder, dim=1)
    z = torch.rand(N_WORDS, WIDTH, generator=g) * (torch.rand(N_WORDS, WIDTH, generator=g) < 0.06)
    rows = z @ decoder + 0.1 * torch.randn(N_WORDS, D_MODEL, generator=g)
    main = torch.randperm(20, generator=g)[: 1 + seed % 3].tolist()
    at = iter(range(0, N_WORDS, 10))
    sae = SimpleNamespace(W_dec=decoder, device=torch.device("cpu"))
    sae.encode = lambda x: z[(a := next(at)) : a + len(x)]
    sae.z = z
    return rows, sae, probe, main


def main() -> None:
    """Compare every word of ten cases; exits 1 where a difference is beyond float32 rounding."""
    n_full, worst, unequal = 0, 0.0, 0
    for seed in range(10):
        rows, sae, probe, label_latents = case(seed)
        words = [f"w{i}" for i in range(N_WORDS)]
        calculator = theirs.FeatureAbsorptionCalculator(model=Model(rows), icl_word_list=words, max_icl_examples=1)
        found = calculator.calculate_absorption(sae, words, probe, label_latents, 0, show_progress=False).word_results
        cosine = torch.nn.functional.cosine_similarity(sae.W_dec, probe[None], dim=1)
        ours = absorbed(csr_matrix(sae.z.numpy()), rows @ probe, cosine, label_latents)
        full = torch.tensor([bool(word.is_full_absorption) for word in found])
        fraction = torch.tensor([float(word.absorption_fraction) for word in found])
        n_full += int(full.sum())
        unequal += int((full != ours.full).sum())
        worst = max(worst, float((fraction - ours.fraction).abs().max()))
    print(f"{10 * N_WORDS} words, {n_full} fully absorbed; full differs on {unequal}, fraction by at most {worst:.2g}")
    sys.exit(unequal > 0 or worst > 1e-5)


if __name__ == "__main__":
    main()
