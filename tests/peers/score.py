"""Scores SAEs of any trainer alike: threshold, dead share, then explained variance and KL by the project's own evaluation.

    python tests/peers/score.py ROWS.npy STORE MODEL OUT FOLDER...

A FOLDER holds a peer's SAE with run.json beside it (`train_peer.py`), or a member of `python -m train`. Each becomes a
checkpoint of ours: the peer's weights by evaluate's own readers, centre and scale those of the rows, the inference
threshold the one number that leaves k latents a row on the last 16 training batches, for every SAE alike, ours too. Dead:
the share of latents that never fire, with that threshold, on the last 102,400 training rows. Then one `evaluate` job for
all. OUT gets checkpoints/, results/ and scores.jsonl, one line an SAE; folders that stand there are skipped.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import click
import numpy as np
import torch
from torch import Tensor

from evaluate.checkpoints.find import member_checkpoints
from evaluate.config import EvaluateConfig
from evaluate.run import run
from pipeline.base.results import read_result
from pipeline.sae.checkpoint import load_checkpoint, save_checkpoint
from pipeline.sae.foreign.reader import load_foreign
from pipeline.sae.nested import NestedSAE

THRESHOLD_BATCHES = 16
DEAD_ROWS = 102_400
CHUNK = 2048
Cell = dict[str, Any]


def sizes(cell: Cell) -> tuple[int, ...]:
    """Cumulative sizes of the levels, as `train_peer.py` has them."""
    step = 8 if cell["width"] >= 1024 else 1
    return tuple(step * round(share * cell["width"] / step) for share in cell["levels"])


def as_batchtopk(sae: NestedSAE, levels: tuple[int, ...], k: int, center: Tensor, scale: float) -> NestedSAE:
    """The same weights as a BatchTopK SAE of these levels in the rows' space. Its threshold is still to be set."""
    made = NestedSAE(dataclasses.replace(sae.config, levels=levels, activation="batchtopk", k=k))
    state = {name: tensor for name, tensor in sae.state_dict().items() if name not in ("threshold", "center", "scale")}
    zeros = {"threshold": torch.zeros(levels[-1]), "center": center, "scale": torch.tensor(scale)}
    made.load_state_dict(state | zeros)
    return made.eval().requires_grad_(False)


def chunks(rows: np.ndarray) -> list[Tensor]:
    """Rows as tensors of at most CHUNK."""
    return [torch.from_numpy(np.array(rows[i : i + CHUNK])) for i in range(0, len(rows), CHUNK)]


def threshold_for(sae: NestedSAE, rows: np.ndarray, k: int) -> float:
    """The number that exactly k latents a row exceed on average over these rows (no latent fires below it)."""
    keep = k * len(rows) + 1
    largest = torch.zeros(0)
    for x in chunks(rows):
        z = sae.latents_before_selection(x).flatten()
        largest = torch.cat([largest, z[z > 0]])
        if len(largest) > keep:
            largest = largest.topk(keep, sorted=False).values
    return float(largest.min()) if len(largest) == keep else 0.0


def counts(sae: NestedSAE, rows: np.ndarray) -> Tensor:
    """How many of these rows each latent fires on."""
    total = torch.zeros(sae.config.width)
    for x in chunks(rows):
        total += (sae.encode_normalized(x) != 0).sum(0)
    return total


def load(folder: Path) -> tuple[NestedSAE, Cell, dict[str, Any]]:
    """The SAE of a folder, its cell, and what its run says."""
    run_json = json.loads((folder / "run.json").read_text())
    cell = run_json["cell"]
    if cell["trainer"] == "ours":
        (member,) = [path for path in (folder / "out").iterdir() if path.is_dir()]
        return load_checkpoint(member_checkpoints(member, all_steps=False)[0])[0], cell, run_json
    return load_foreign(folder)[0], cell, run_json


def first_level(sae: NestedSAE) -> NestedSAE:
    """The first level of an SAE as a flat one of that width."""
    width = sae.config.levels[0]
    made = NestedSAE(dataclasses.replace(sae.config, width=width, levels=(width,)))
    cut = {"W_enc": sae.W_enc[:, :width], "W_dec": sae.W_dec[:width], "b_enc": sae.b_enc[:width]}
    made.load_state_dict(sae.state_dict() | cut | {"threshold": sae.threshold[:width]})
    return made.eval().requires_grad_(False)


def prepare(
    folder: Path, rows: np.ndarray, about: dict[str, Any], out: Path, *, first: int | None
) -> tuple[Path, dict[str, Any]]:
    """Write the folder's SAE, or its first level at L0 `first`, as a checkpoint for evaluation; its path, and the part of
    its line known by then."""
    sae, cell, run_json = load(folder)
    trained = rows[: cell["steps"] * cell["batch_size"]]
    levels = sae.config.levels if cell["trainer"] == "ours" else sizes(cell)
    sae = as_batchtopk(sae, levels, cell["k"], torch.tensor(about["center"]), about["scale"])
    if first is not None:
        sae = first_level(sae)
    own = threshold_for(sae, trained[-THRESHOLD_BATCHES * cell["batch_size"] :], cell["k"] if first is None else first)
    sae.threshold.data.fill_(own)
    fired = counts(sae, trained[-DEAD_ROWS:])
    path = out / "checkpoints" / f"{folder.name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    store = {"id": about["store_id"], "layer": about["layer"], "weights_sha256": about["weights_sha256"]}
    save_checkpoint(path, sae, cell["steps"], {"member": folder.name, "config": {}, "store": store})
    line = {**cell, "cpu_s_per_1m": run_json["cpu_s_per_1m"], "threshold": own}
    line |= {"l0_train": float(fired.sum()) / min(DEAD_ROWS, len(trained)), "dead": float((fired == 0).float().mean())}
    return path, line


def scored(result: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    """The line with scores of the whole and of the first level, massive rows left out of the average."""
    part = {}
    for name, level in (("whole", result["levels"][-1]), ("first", result["levels"][0])):
        scores = level["scores_without_massive"]
        part[name] = {"ev": scores["ev"], "kl": scores["kl_nats"], "l0": scores["l0"], "ce_score": scores["ce_score"]}
        part[name] |= {"ev_all": level["scores"]["ev"], "kl_all": level["scores"]["kl_nats"]}
    return line | part | {"eval_rows": result["sample"]["n_tokens"]}


@click.command(help=__doc__)
@click.argument("rows", type=Path)
@click.argument("store", type=Path)
@click.argument("model")
@click.argument("out", type=Path)
@click.argument("folders", type=Path, nargs=-1)
@click.option("--eval-rows", type=int, default=None, help="evaluation rows  [default: all]")
@click.option("--first", type=int, default=None, help="score first levels alone, each at this L0, into OUT/first.jsonl")
def main(
    rows: Path, store: Path, model: str, out: Path, folders: Sequence[Path], eval_rows: int | None, first: int | None
) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    lines_path = out / ("scores.jsonl" if first is None else "first.jsonl")
    done = {json.loads(line)["name"] for line in lines_path.read_text().splitlines()} if lines_path.exists() else set()
    about = json.loads(rows.with_suffix(".json").read_text())
    data = np.load(rows, mmap_mode="r")
    todo = [folder for folder in folders if (folder / "run.json").exists() and folder.name not in done]
    if not todo:
        return
    prepared = [prepare(folder, data, about, out, first=first) for folder in todo]
    paths = [path for path, _ in prepared]
    config = EvaluateConfig(
        store=store, out=out / "results", model=model, scores=("kl", "ev", "l0"), rows=eval_rows, dtype="float32"
    )
    outcome = run(config, paths)
    if outcome.failed:
        raise click.ClickException(f"{outcome.failed[0][0]}: {outcome.failed[0][1]}")
    results = {Path(entry["checkpoint"]): read_result(Path(entry["path"])) for entry in outcome.results}
    with lines_path.open("a") as file:
        for path, line in prepared:
            file.write(json.dumps({"name": path.stem} | scored(results[path], line)) + "\n")
            path.unlink()


if __name__ == "__main__":
    main()
