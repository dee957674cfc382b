"""Steps with products over active latents alone (`--sparse`) against dense ones, in turn, by k. Last line JSON.

    python tests/bench/bench_sparse.py --device cuda --shape 2304x65536 --k 32 --k 64 --k 128

Members are trained a little first, so that what is active is spread as in a training. "shown" is the largest k at which a sparse
step took less time at the widest shape: what `train/step/sparse.py` wants to know of a GPU (SHOWN).
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import click
import torch

from bench.bench_train import floor_step, random_batch, seconds
from bench.options import placed
from train.config import RECIPES
from train.step.fused.choice import member_kind
from train.step.scratch import Scratch


def measure(
    recipe: str, k: int, shape: tuple[int, int, int], dtype: str, device: torch.device, rounds: int
) -> dict[str, float]:
    """Median milliseconds of a step, dense and sparse in turn, of the five dense products, and what sparse ÷ dense is."""
    d_model, width, rows = shape
    scratch, batch = Scratch(device), random_batch(d_model, rows, device)
    config = RECIPES[recipe](width=width, k=k, dtype=dtype, batch_size=rows, sparsity_warmup_steps=0)
    center, kind = torch.zeros(d_model, device=device), member_kind(config, device)
    ways = {
        "dense_ms": kind(config, d_model, center, 1.0, device, scratch).step,
        "sparse_ms": kind(config, d_model, center, 1.0, device, scratch, is_sparse=True).step,
    }
    floor = floor_step(*shape, torch.bfloat16 if dtype == "bf16" else torch.float32, device)
    times: dict[str, list[float]] = {name: [] for name in ("floor_ms", *ways)}
    for _ in range(rounds + 2):
        times["floor_ms"].append(seconds(floor, device))
        for name, step in ways.items():
            times[name].append(seconds(lambda step=step: step(batch), device))
    found = {name: 1e3 * statistics.median(taken[2:]) for name, taken in times.items()}
    return found | {"sparse_over_dense": found["sparse_ms"] / found["dense_ms"]}


@click.command(help=__doc__)
@click.option("--shape", "shapes", multiple=True, default=("2304x16384", "2304x65536"), show_default=True)
@click.option("--k", "ks", type=int, multiple=True, default=(32, 64, 128), show_default=True)
@click.option("--rows", default=2048, show_default=True)
@click.option("--rounds", default=20, show_default=True, help="timed steps after two of warm-up")
@placed("products")
def main(
    shapes: tuple[str, ...], ks: tuple[int, ...], rows: int, rounds: int, device: torch.device, dtype: str
) -> None:
    results: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        d_model, width = (int(number) for number in shape.split("x"))
        for recipe in ("topk", "batchtopk"):
            for k in ks:
                found = measure(recipe, k, (d_model, width, rows), dtype, device, rounds)
                results.setdefault(shape, {})[f"{recipe}, k {k}"] = found | {"k": k}
                print(f"{shape}, {recipe}, k {k}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    widest = max(shapes, key=lambda shape: int(shape.split("x")[1]))
    faster = [k for k in ks if all(f["sparse_over_dense"] < 1 for f in results[widest].values() if f["k"] == k)]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        json.dumps({"device": where, "dtype": dtype, "shape": widest, "shown": max(faster, default=0), "all": results})
    )


if __name__ == "__main__":
    main()
