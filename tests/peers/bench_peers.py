"""One training step of sae-lens and dictionary-learning, timed on request by bench_train.py, in their own environment.

    python tests/peers/bench_peers.py D_MODEL WIDTH ROWS DTYPE DEVICE

imports torch and the peers alone. It prints a JSON line of the trainers it has, then for each name read from stdin the
seconds of one step. DTYPE is that of our products: with bf16 they run under autocast, their fastest setting where the hardware
multiplies it; with float32 they do not (emulated, bf16 takes minutes a step).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator

import torch

Step = Callable[[torch.Tensor], object]


def sae_lens_steps(d_model: int, width: int, rows: int, low: bool, device: str) -> dict[str, Step]:
    """Its standard (L1) trainer and its Matryoshka BatchTopK with two levels."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = SAETrainerConfig(10**7, rows, lr_end=3e-5, autocast=low, device=device)
    standard = StandardTrainingSAE(
        StandardTrainingSAEConfig(d_in=d_model, d_sae=width, l1_coefficient=0.04, device=device)
    )
    levels = [round(0.2 * width), width]
    nested = MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(d_in=d_model, d_sae=width, k=64, matryoshka_widths=levels, device=device)
    )
    return {
        "sae-lens standard (L1)": SAETrainer(config, standard, iter(())).step,
        "sae-lens Matryoshka BatchTopK, 2 levels": SAETrainer(config, nested, iter(())).step,
    }


def dictionary_learning_steps(d_model: int, width: int, rows: int, low: bool, device: str) -> dict[str, Step]:
    """Its standard (L1, April update) trainer and its Matryoshka BatchTopK with two groups."""
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate

    del rows
    common = {
        "steps": 5000,
        "activation_dim": d_model,
        "dict_size": width,
        "layer": 0,
        "lm_name": "none",
        "device": device,
    }
    l1 = StandardTrainerAprilUpdate(**common, lr=3e-4, l1_penalty=0.04, warmup_steps=1000, sparsity_warmup_steps=None)
    nested = MatryoshkaBatchTopKTrainer(**common, k=64, group_fractions=[0.2, 0.8], lr=3e-4)

    def autocast(trainer: object) -> Step:
        def step(x: torch.Tensor) -> object:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=low):
                return trainer.update(0, x)

        return step

    return {
        "dictionary-learning April (L1)": autocast(l1),
        "dictionary-learning Matryoshka BatchTopK, 2 groups": autocast(nested),
    }


def timed(step: Step, x: torch.Tensor) -> Iterator[float]:
    """Seconds of one step after another, the device drained before and after."""
    drain = torch.cuda.synchronize if x.is_cuda else lambda: None
    while True:
        drain()
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            step(x)
        drain()
        yield time.perf_counter() - start


def main() -> None:
    """Serve timings until stdin closes."""
    d_model, width, rows = (int(argument) for argument in sys.argv[1:4])
    dtype, device = sys.argv[4:]
    steps: dict[str, Step] = {}
    for make in (sae_lens_steps, dictionary_learning_steps):
        try:
            steps |= make(d_model, width, rows, dtype == "bf16", device)
        except ImportError as error:
            print(f"not measured: {error}", file=sys.stderr)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(rows, d_model, generator=generator) / d_model**0.5).to(device)
    clocks = {name: timed(step, x) for name, step in steps.items()}
    print(json.dumps(list(steps)), flush=True)
    for line in sys.stdin:
        print(next(clocks[line.strip()]), flush=True)


if __name__ == "__main__":
    main()
