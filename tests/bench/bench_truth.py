"""How fast known features are made, scored and matched: python tests/bench/bench_truth.py [WIDTH]

Prints rows/s of `forest` into a store, seconds of the matching and of all truth scores of a dictionary of WIDTH latents
against WIDTH features in 768 dimensions (half of them found), and seconds of the meta-dictionary. No check: numbers only.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from evaluate.scores.matching import best_matching
from evaluate.scores.truth import Truth, TruthScore
from harvest.truth.run import TruthConfig, run_truth
from pipeline.sae.nested import NestedSAE, SAEConfig

D_MODEL, N_ROWS = 768, 400_000


def store_rate() -> float:
    """Rows a second of `forest`, store and disk included."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run_truth(TruthConfig("forest", str(Path(folder) / "s.zarr"), tokens=N_ROWS, eval_tokens=12_800), quiet=True)
        return N_ROWS / (time.perf_counter() - start)


def scored(width: int) -> tuple[float, float]:
    """Seconds of the matching alone, and of making and reading all scores of one level."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(width, D_MODEL, generator=g), dim=1)
    sae = NestedSAE(SAEConfig(d_model=D_MODEL, width=width, levels=(width,))).requires_grad_(False)
    sae.W_dec.data = torch.nn.functional.normalize(torch.randn(width, D_MODEL, generator=g), dim=1)
    sae.W_dec.data[: width // 2] += 3 * directions[: width // 2]
    cosine = (torch.nn.functional.normalize(sae.W_dec, dim=1) @ directions.T).abs()
    start = time.perf_counter()
    best_matching(cosine)
    matching = time.perf_counter() - start
    nothing = torch.full((width,), -1)
    rows = torch.zeros(129, dtype=torch.int64)
    truth = Truth(directions, nothing, nothing + 1, torch.full((width,), 0.01).double(), rows, rows[:0])
    start = time.perf_counter()
    score = TruthScore(sae, truth)
    score.update(torch.zeros(128, width), 0)
    score.scores(0)
    return matching, time.perf_counter() - start


if __name__ == "__main__":
    width = int(sys.argv[1]) if len(sys.argv) > 1 else 16_384
    print(f"forest: {store_rate():,.0f} rows/s into a store")
    matching, whole = scored(width)
    print(f"{width} × {width}: matching {matching:.1f} s, all truth scores {whole:.1f} s")
