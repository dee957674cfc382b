"""The rows that every trainer sees: our batches in our order, centred and scaled as ours, written once as a .npy file.

    python tests/peers/rows.py STORE OUT.npy --steps 2000 --batch-size 512

OUT.npy holds float32 [row, d_model] in training order, special and massive rows left out; OUT.json beside it says where
they come from. Batch i of any trainer is rows i · batch_size … (i + 1) · batch_size, which is what `python -m train` steps
on with the same --batch-size and --data-seed in a global order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import click
import numpy as np
import torch

from pipeline.store.reader import Store
from train.feed.loader import Loader
from train.feed.order import Order
from train.step.member import normalise_batch


def write_rows(store: Store, out: Path, steps: int, batch_size: int, data_seed: int) -> dict[str, object]:
    """Write the rows of `steps` batches; returns what OUT.json says."""
    multiple = store.statistics.massive_multiple
    kept = store.train.kept_rows(multiple)
    center, scale = store.mean_and_scale(multiple)
    order = Order(kept, data_seed, None)
    rows = np.lib.format.open_memmap(out, "w+", np.float32, (steps * batch_size, store.d_model))
    with Loader(store.train, order, batch_size) as loader:
        for step in range(steps):
            batch = normalise_batch(loader.next(), center, scale)
            rows[step * batch_size : (step + 1) * batch_size] = batch.x.numpy()
    rows.flush()
    names = ("model", "layer", "weights_sha256")
    return {
        "store": str(store.path),
        "store_id": store.id,
        **{name: store.config[name] for name in names},
        "d_model": store.d_model,
        "steps": steps,
        "batch_size": batch_size,
        "data_seed": data_seed,
        "epochs": steps * batch_size / order.n_kept,
        "scale": float(scale),
        "center": center.tolist(),
    }


@click.command(help=__doc__)
@click.argument("store", type=Path)
@click.argument("out", type=Path)
@click.option("--steps", default=2000, show_default=True)
@click.option("--batch-size", default=512, show_default=True)
@click.option("--data-seed", default=0, show_default=True)
def main(store: Path, out: Path, steps: int, batch_size: int, data_seed: int) -> None:
    torch.set_num_threads(1)
    about = write_rows(Store.open(str(store)), out, steps, batch_size, data_seed)
    out.with_suffix(".json").write_text(json.dumps(about) + "\n")
    print(json.dumps({name: value for name, value in about.items() if name != "center"}))


if __name__ == "__main__":
    main()
