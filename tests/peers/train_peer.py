"""One SAE by a peer's own trainer on rows that `rows.py` wrote; runs in the peers' environment, imports nothing of ours.

    PEERS/bin/python tests/peers/train_peer.py ROWS.npy OUT '{"trainer": "sae-lens", "levels": [0.2, 1.0], "k": 32,
        "width": 1536, "lr": 0.005, "seed": 0, "steps": 2000, "batch_size": 512}'

Every setting that the cell does not name is the trainer's published default, in float32, but for what a short run needs:
the learning rate falls to 0 over the last fifth (dictionary_learning's demo, SAELens' tutorials), and dictionary_learning
warms up over a twentieth of the run (its default of 1000 steps would be half of one), after which its running threshold
begins. Neither normalises the rows: they come centred and scaled. OUT gets the trainer's own folder and run.json.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

Cell = dict[str, Any]
Trainer = tuple[Callable[[int, torch.Tensor], object], Callable[[Path], None], Any]
"""A step on a batch, saving into a folder, and what it was made of."""


def sizes(cell: Cell) -> list[int]:
    """Cumulative sizes of the levels, as ours: multiples of 8 from 1024 latents on."""
    step = 8 if cell["width"] >= 1024 else 1
    return [step * round(share * cell["width"] / step) for share in cell["levels"]]


def dictionary_learning(cell: Cell, d_model: int) -> Trainer:
    """BatchTopK for one level, Matryoshka BatchTopK for more."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    steps, ends = cell["steps"], sizes(cell)
    warmup = cell.get("warmup_steps", steps // 20)
    common = {
        "steps": steps,
        "activation_dim": d_model,
        "dict_size": cell["width"],
        "k": cell["k"],
        "layer": 0,
        "lm_name": "rows",
        "lr": cell["lr"],
        "warmup_steps": warmup,
        "decay_start": int(steps * 0.8),
        "threshold_start_step": warmup,
        "seed": cell["seed"],
        "device": "cpu",
    }
    if len(ends) == 1:
        trainer = BatchTopKTrainer(**common)
    else:
        groups = [(b - a) / cell["width"] for a, b in zip([0, *ends], ends)]
        trainer = MatryoshkaBatchTopKTrainer(**common, group_fractions=groups)
        assert trainer.group_sizes == [b - a for a, b in zip([0, *ends], ends)], "its groups are not our levels"

    def save(folder: Path) -> None:
        torch.save(trainer.ae.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": trainer.config}) + "\n")

    return trainer.update, save, trainer.config


def sae_lens(cell: Cell, d_model: int) -> Trainer:
    """BatchTopK for one level, Matryoshka BatchTopK for more."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.training.sae_trainer import SAETrainer

    steps, ends = cell["steps"], sizes(cell)
    common = {"d_in": d_model, "d_sae": cell["width"], "k": cell["k"]}
    torch.manual_seed(cell["seed"])
    if len(ends) == 1:
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common))
    else:
        sae = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**common, matryoshka_widths=ends))
    config = SAETrainerConfig(
        total_training_samples=steps * cell["batch_size"],
        train_batch_size_samples=cell["batch_size"],
        lr=cell["lr"],
        lr_warm_up_steps=cell.get("warmup_steps", 0),
        lr_decay_steps=steps // 5,
        lr_end=0.0,
    )
    trainer = SAETrainer(config, sae, iter(()))

    def step(index: int, x: torch.Tensor) -> object:
        trainer.maybe_reset_sparsity()
        out = trainer.step(x)
        trainer.n_training_steps += 1
        return out

    def save(folder: Path) -> None:
        sae.save_inference_model(str(folder))

    about = {"trainer": vars(config) | {"logger": None}, "sae": sae.cfg.to_dict()}
    return step, save, about


TRAINERS = {"dictionary-learning": dictionary_learning, "sae-lens": sae_lens}


def batches(rows: np.ndarray, steps: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Batches in order, each a copy of its own."""
    for step in range(steps):
        yield torch.from_numpy(np.array(rows[step * batch_size : (step + 1) * batch_size]))


def main() -> None:
    """Train one cell and save it."""
    path, out, cell = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    rows = np.load(path, mmap_mode="r")
    step, save, about = TRAINERS[cell["trainer"]](cell, rows.shape[1])
    clock = time.process_time()
    for index, x in enumerate(batches(rows, cell["steps"], cell["batch_size"])):
        step(index, x)
    seconds = time.process_time() - clock
    out.mkdir(parents=True, exist_ok=True)
    save(out)
    n_rows = cell["steps"] * cell["batch_size"]
    run = {"cell": cell, "cpu_s_per_1m": seconds / n_rows * 1e6, "made_of": about, "torch": torch.__version__}
    (out / "run.json").write_text(json.dumps(run, default=str) + "\n")
    print(json.dumps({"cpu_s_per_1m": run["cpu_s_per_1m"]}))


if __name__ == "__main__":
    main()
