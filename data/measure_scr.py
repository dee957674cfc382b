"""Measure how well linear probes read the two attributes of scr/ from tiny-gemma2, and how the spurious one misleads.

    python data/measure_scr.py

Figures are accuracies (fractions) on the test part with n rows in each of the four cells. The `spurious` probe is
trained on the two correlated cells alone (austen+female against other+male).
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import torch
from documents import read_documents
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, AutoTokenizer

HERE = Path(__file__).parent
POSITIVE = {"author": "austen", "gender": "female"}

Rows = list[dict[str, str]]


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), default=HERE / "tiny-gemma2", show_default=True)
@click.option("--scr", type=click.Path(path_type=Path, exists=True), default=HERE / "scr", show_default=True)
@click.option("--layer", default=3, show_default=True, help="Probe the residual stream after this layer, not the last.")
def main(model: Path, scr: Path, layer: int) -> None:
    """Print the accuracies as JSON."""
    train, test = (read_documents(scr / f"{part}.jsonl.zst") for part in ("train", "test"))
    x_train, x_test = (mean_residuals(model, [row["text"] for row in rows], layer) for rows in (train, test))
    balanced_train, balanced_test = balanced(train), balanced(test)
    spurious = [i for i, row in enumerate(train) if is_positive(row, "author") == is_positive(row, "gender")]

    biased = fit(x_train[spurious], labels(train, "author")[spurious])
    figures: dict[str, float] = {}
    for name in POSITIVE:
        probe = fit(x_train[balanced_train], labels(train, name)[balanced_train])
        x, y = x_test[balanced_test], labels(test, name)[balanced_test]
        figures[f"{name}_probe_on_{name}"] = float(probe.score(x, y))
        figures[f"spurious_probe_on_{name}"] = float(biased.score(x, y))
    click.echo(json.dumps(figures | {"n_train": len(balanced_train) / 4, "n_test": len(balanced_test) / 4}, indent=2))


@torch.no_grad()
def mean_residuals(model_folder: Path, texts: list[str], layer: int) -> NDArray[np.float32]:
    """Return the residual after `layer` averaged over each text's tokens but BOS, [text, d_model]."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModel.from_pretrained(model_folder, dtype=torch.float32)
    means = []
    for start in range(0, len(texts), 32):
        batch = tokenizer(texts[start : start + 32], padding=True, padding_side="right", return_tensors="pt")
        residual = model(**batch, output_hidden_states=True).hidden_states[layer + 1][:, 1:]  # [text, pos - 1, d_model]
        real = batch["attention_mask"][:, 1:, None]  # position 0 is BOS
        means.append((residual * real).sum(dim=1) / real.sum(dim=1))
    return torch.cat(means).numpy()


def is_positive(row: dict[str, str], attribute: str) -> bool:
    """Return whether the row has the attribute's positive value."""
    return row[attribute] == POSITIVE[attribute]


def labels(rows: Rows, attribute: str) -> NDArray[np.int64]:
    """Return 1 for the attribute's positive value and 0 for the other, [row]."""
    return np.array([int(is_positive(row, attribute)) for row in rows])


def balanced(rows: Rows) -> list[int]:
    """Return the indices of the first n rows of each cell, n being the size of the smallest."""
    cells: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(rows):
        cells.setdefault((row["author"], row["gender"]), []).append(i)
    n = min(map(len, cells.values()))
    return [i for cell in cells.values() for i in cell[:n]]


def fit(x: NDArray[np.float32], y: NDArray[np.int64]) -> Pipeline:
    """Return a logistic regression on standardised inputs."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)).fit(x, y)


if __name__ == "__main__":
    main()
