"""The side-by-side: trains every cell of a grid on identical rows, scores all of them alike, prints the table.

    python tests/peers/grid.py --out runs/peers --store acts.zarr --model data/tiny-gemma2 --width 1536 \
        --trainer ours=0.005 --trainer dictionary-learning=0.005 --trainer sae-lens=0.005 \
        --levels 1 --levels 0.2,1 --k 32 --seed 0 --seed 1 --seed 2 --peer-python peers/bin/python

Resumable: a cell is a folder named by what it is, and what stands there is not trained or scored again; a larger grid
adds to the same OUT. Cells run one thread each, --jobs at a time, at nice 19. OUT/scores.jsonl has one line an SAE.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import click
from table import print_table

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
Cell = dict[str, Any]


def cell_name(cell: Cell) -> str:
    """A folder's name: everything that makes a cell another one within a grid's rows."""
    levels = "-".join(f"{share:g}" for share in cell["levels"])
    name = f"{cell['trainer']}_levels{levels}_k{cell['k']}_width{cell['width']}_lr{cell['lr']:g}_seed{cell['seed']}"
    return f"{name}_steps{cell['steps']}" + (f"_{cell['tag']}" if cell.get("tag") else "")


def ours_command(cell: Cell, store: Path, folder: Path) -> list[str]:
    """`python -m train` with its defaults but for what the cell fixes for every trainer."""
    levels = [str(share) for share in cell["levels"]]
    shape = ["--alpha", levels[0] if len(levels) == 2 else "0"] if len(levels) < 3 else ["--levels", ",".join(levels)]
    options = {name: cell[name] for name in ("width", "k", "lr", "seed", "steps", "batch_size")}
    given = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]
    where = ["--store", str(store), "--out", str(folder / "out"), "--mode", "global", "--recipe", "batchtopk"]
    extra = ["--dtype", "float32", "--checkpoint-every", str(cell["steps"]), "--keep", "last:1"]
    return [sys.executable, "-m", "train", *where, *shape, *given, *extra, *cell.get("options", [])]


def train(cell: Cell, folder: Path, rows: Path, store: Path, peer_python: str) -> None:
    """Train one cell, unless it stands; run.json is written last. Raises CalledProcessError with its stderr in LOG."""
    if (folder / "run.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    peer = [peer_python, str(HERE / "train_peer.py"), str(rows), str(folder), json.dumps(cell)]
    command = ours_command(cell, store, folder) if cell["trainer"] == "ours" else peer
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            ["nice", "-n", "19", *command], stdout=log, stderr=log, env=os.environ | ONE_THREAD, cwd=ROOT
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{folder.name} ended with {process.returncode}; see {folder / 'log.txt'}")
    if cell["trainer"] == "ours":
        seconds = (usage.ru_utime + usage.ru_stime) / (cell["steps"] * cell["batch_size"]) * 1e6
        (folder / "run.json").write_text(json.dumps({"cell": cell, "cpu_s_per_1m": seconds}) + "\n")
    print(f"trained {folder.name}", flush=True)


def make_cells(
    trainers: Sequence[str], levels: Sequence[str], ks: Sequence[int], seeds: Sequence[int], shared: Cell
) -> list[Cell]:
    """Every combination; seeds slowest, so that an interrupted grid has whole comparisons."""
    cells = []
    for seed, k, shape, trainer in itertools.product(seeds, ks, levels, trainers):
        name, lr = trainer.split("=")
        own = {"trainer": name, "lr": float(lr), "levels": [float(share) for share in shape.split(",")]}
        cells.append({**shared, **own, "k": k, "seed": seed})
    return cells


@click.command(help=__doc__)
@click.option("--out", type=Path, required=True)
@click.option("--store", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--model", required=True, help="folder of the model that made the store")
@click.option("--trainer", "trainers", multiple=True, required=True, help="ours, dictionary-learning or sae-lens, =LR")
@click.option("--levels", multiple=True, default=("1",), help="cumulative shares of the width, like 0.2,1")
@click.option("--k", "ks", type=int, multiple=True, default=(32,))
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,))
@click.option("--width", type=int, required=True)
@click.option("--steps", default=2000, show_default=True)
@click.option("--batch-size", default=512, show_default=True)
@click.option("--eval-rows", type=int, default=None, help="evaluation rows  [default: all]")
@click.option("--peer-python", default="", help="interpreter of the peers' environment")
@click.option("--jobs", default=2, show_default=True)
@click.option("--tag", default="", help="added to names, with --option another cell")
@click.option("--option", "options", multiple=True, help="a further word for python -m train, like --beta2=0.99")
def main(
    out: Path,
    store: Path,
    model: str,
    trainers: tuple[str, ...],
    levels: tuple[str, ...],
    ks: tuple[int, ...],
    seeds: tuple[int, ...],
    width: int,
    steps: int,
    batch_size: int,
    eval_rows: int | None,
    peer_python: str,
    jobs: int,
    tag: str,
    options: tuple[str, ...],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = out / f"rows_{steps}x{batch_size}.npy"
    env = os.environ | ONE_THREAD
    if not rows.with_suffix(".json").exists():
        arguments = [str(store), str(rows), "--steps", str(steps), "--batch-size", str(batch_size)]
        subprocess.run([sys.executable, str(HERE / "rows.py"), *arguments], check=True, env=env)
    shared = {"width": width, "steps": steps, "batch_size": batch_size}
    shared |= ({"tag": tag} if tag else {}) | ({"options": list(options)} if options else {})
    cells = make_cells(trainers, levels, ks, seeds, shared)
    folders = [out / cell_name(cell) for cell in cells]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda pair: train(*pair, rows, store, peer_python), zip(cells, folders)))
    score = ["nice", "-n", "19", sys.executable, str(HERE / "score.py"), str(rows), str(store), model, str(out)]
    counted = ["--eval-rows", str(eval_rows)] if eval_rows else []
    subprocess.run([*score, *counted, *map(str, folders)], check=True, env=env)
    print_table(out / "scores.jsonl")


if __name__ == "__main__":
    main()
