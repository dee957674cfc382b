"""How fast what nesting buys is measured: python tests/bench/bench_truth.py [--width 16384] [--device cuda]

Prints rows/s of `forest` into a store; seconds of the matching and of all truth scores of a dictionary of WIDTH latents
against WIDTH features in 768 dimensions (half of them found); seconds of absorption's probes, and of its scores of a
checkpoint of WIDTH latents (flat, 64 a row), on the labelled rows of 500k tokens (40,000, 31 labels). Beside each the seconds
of processor that it took, all threads together: on a busy machine those say more. No check: numbers only; last line JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.options import placed
from evaluate.scores.absorption import AbsorptionScore
from evaluate.scores.labels import LABELS, MAX_ROWS, PER_TYPE, Labelled, Probes, labels_of, train_probes
from evaluate.scores.matching import best_matching
from evaluate.scores.truth import Truth, TruthScore
from harvest.truth.run import TruthConfig, run_truth
from pipeline.base.runtime import DTYPES
from pipeline.sae.config import SAEConfig
from pipeline.sae.nested import NestedSAE

D_MODEL, N_ROWS = 768, 400_000
AIMS = {"truth": 30.0, "absorption_once": 20.0, "absorption_checkpoint": 2.0}
"""Seconds that each may take on two cores at width 16,384."""
AIMS_ROWS = 200_000
"""Rows a second that are to be written of `forest`."""


def timed(run: Callable[[], object]) -> dict[str, float]:
    """Seconds on the clock and of processor, until a GPU is done too."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - processor}


def written(dtype: str) -> dict[str, float]:
    """`forest` into a store, disk included."""
    with tempfile.TemporaryDirectory() as folder:
        config = TruthConfig("forest", str(Path(folder) / "s.zarr"), tokens=N_ROWS, eval_tokens=12_800, dtype=dtype)
        found = timed(lambda: run_truth(config, quiet=True))
    return found | {"rows_per_second": N_ROWS / found["seconds"], "rows_per_cpu_second": N_ROWS / found["cpu_seconds"]}


def scored(width: int, device: torch.device) -> dict[str, dict[str, float]]:
    """The matching alone, and making and reading all scores of one level."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(width, D_MODEL, generator=g), dim=1)
    sae = NestedSAE(SAEConfig(d_model=D_MODEL, width=width, levels=(width,))).requires_grad_(False)
    sae.W_dec.data = torch.nn.functional.normalize(torch.randn(width, D_MODEL, generator=g), dim=1)
    sae.W_dec.data[: width // 2] += 3 * directions[: width // 2]
    sae, directions = sae.to(device), directions.to(device)
    nothing = torch.full((width,), -1, device=device)
    rows = torch.zeros(129, dtype=torch.int64, device=device)
    truth = Truth(directions, nothing, nothing + 1, torch.full((width,), 0.01, device=device).double(), rows, rows[:0])

    def whole() -> None:
        score = TruthScore(sae, truth)
        score.update(torch.zeros(128, width, device=device), 0)
        score.scores(0)

    cosine = (torch.nn.functional.normalize(sae.W_dec, dim=1) @ directions.T).abs()
    return {"matching": timed(lambda: best_matching(cosine)), "truth": timed(whole)}


def labelled(dtype: str) -> tuple[Labelled, torch.Tensor]:
    """MAX_ROWS rows of made-up tokens with every label, and centred rows, rounded as a store's are, in which each label has a
    direction."""
    rng = np.random.default_rng(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [f" {letters[i % 26]}{i}" for i in range(1600)] + [f" {letters[i % 26].upper()}{i}" for i in range(400)]
    texts += [f"{i}" for i in range(300)] + ["." * (i + 1) for i in range(100)] + [" " * (i + 1) for i in range(100)]
    table = np.array([labels_of(text) for text in texts], np.int8)
    types = np.tile(np.arange(len(texts)), PER_TYPE)[:MAX_ROWS]
    train = rng.random(len(texts)) < 0.7
    rows = Labelled(np.arange(len(types)), types.astype(np.int64), table[types], train[types])
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(len(LABELS), D_MODEL, generator=g) / D_MODEL**0.5
    on = torch.from_numpy((rows.label == 1).astype(np.float32))
    return rows, (6 * on @ directions + torch.randn(len(types), D_MODEL, generator=g) / 4).to(DTYPES[dtype]).float()


def absorbed(width: int, device: torch.device, dtype: str) -> dict[str, dict[str, float]]:
    """Probes, once a job; and the scores of one flat checkpoint."""
    rows, x = labelled(dtype)
    found: list[Probes] = []
    probes = timed(lambda: found.append(train_probes(x.to(device), rows)))
    sae = NestedSAE(SAEConfig(d_model=D_MODEL, width=width, levels=(width,))).requires_grad_(False).to(device)
    score, rng = AbsorptionScore(sae, found[0]), np.random.default_rng(0)
    latents = rng.integers(len(LABELS), width, (len(x), 64))
    value, i = rows.label, np.arange(len(LABELS))
    latents[:, : len(LABELS)] = np.where((value == 1) & (rng.random(value.shape) < 0.8), i, latents[:, : len(LABELS)])
    unique = np.unique(np.arange(len(x))[:, None] * width + latents)
    score.rows, score.latents = [unique // width], [unique % width]
    score.values = [rng.random(len(unique), dtype=np.float32) + 0.5]
    return {"absorption_once": probes, "absorption_checkpoint": timed(lambda: score.results([0]))}


@click.command()
@click.option("--width", default=16_384, show_default=True, help="Latents, and features.")
@placed("the rows, in the store of `forest` and those that absorption reads")
def main(width: int, device: torch.device, dtype: str) -> None:
    """Measure what the module's docstring lists; the last line is JSON."""
    results = {"forest": written(dtype), **scored(width, device), **absorbed(width, device, dtype)}
    print(f"{'width ' + str(width):24}{'seconds':>10}{'cpu':>10}{'aim':>10}")
    for name, row in results.items():
        aim = f"{AIMS[name]:10.2f}" if name in AIMS else ""
        print(f"{name:24}{row['seconds']:10.2f}{row['cpu_seconds']:10.2f}{aim}")
    rate, of_cpu = (results["forest"][f"rows_per_{name}"] for name in ("second", "cpu_second"))
    print(f"forest into a store: {rate:,.0f} rows/s, {of_cpu:,.0f} a second of processor (aim {AIMS_ROWS:,})")
    print(
        json.dumps(
            {"width": width, "threads": torch.get_num_threads(), "device": str(device), "dtype": dtype, **results}
        )
    )


if __name__ == "__main__":
    main()
