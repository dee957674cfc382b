"""Realistic results files without any training: for tests of the report, and to look at it. Layout: FORMAT.md, "Results"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluate.latents.files import begin, latents_folder, write_index, write_page
from pipeline.base.files import canonical_json, read_json, sha256, write_json
from pipeline.base.runtime import numpy_rng
from pipeline.definitions import METRICS

N_VALUES = (2, 5, 10, 20, 50, 100)


def write_results(
    folder: Path,
    *,
    alphas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.5),
    seeds: Sequence[int] = (0, 1, 2),
    steps: Sequence[int] = (100, 200, 400),
    effect: float = 0.05,
    noise: float = 0.01,
    layer: int = 3,
    d_model: int = 192,
    l0: float = 40.0,
    drop: Sequence[str] = (),
    **train: Any,
) -> list[Path]:
    """Write one file a checkpoint of every α and seed; only the last step carries a curve. Return the paths.

    `effect`: how much nesting moves scores at α = 1; `noise`: standard deviation between seeds; `l0`: of the last step, within a
    hundredth, scores rising with its logarithm; `drop`: top-level fields
    or metric ids that are left out; further keywords go into the training config (width, lr, recipe, levels ...).
    """
    paths = []
    for alpha in alphas:
        for seed in seeds:
            for step in steps:
                config = training(alpha, seed, train, max(steps))
                data = result(config, step, max(steps), effect, noise, layer, d_model, l0)
                for name in drop:
                    drop_metric(data, name)
                path = folder / f"{data['checkpoint']['provenance']['member']}-step_{step:06d}-{data['key'][:10]}.json"
                write_json(path, data)
                paths.append(path)
    return paths


def training(alpha: float, seed: int, changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """A training config with the fields a report uses."""
    base = {"recipe": "paper", "alpha": alpha, "levels": [], "seed": seed, "data_seed": 0, "width": 1024, "lr": 1e-3}
    more = {"steps": steps, "batch_size": 512, "objective": "nested", "lambda_shared": 0.04, "lambda_specialised": 0.04}
    return base | more | changes


def sizes(config: dict[str, Any]) -> list[int]:
    """Cumulative sizes of a config's levels."""
    width = config["width"]
    if config["levels"]:
        return [round(share * width) for share in config["levels"]]
    return [round(config["alpha"] * width), width] if config["alpha"] else [width]


def result(
    config: dict[str, Any],
    step: int,
    steps: int,
    effect: float,
    noise: float,
    layer: int,
    d_model: int,
    l0: float = 40.0,
) -> dict[str, Any]:
    """One results file's data."""
    rng = numpy_rng("results", config["seed"], canonical_json(config), step, layer)
    levels = sizes(config)
    nested = config["alpha"] or 0.3 if len(levels) > 1 else 0.0
    progress = 0.35 + 0.65 * step / steps
    quality = progress - effect * nested + noise * rng.normal() + 0.02 * math.log2(config["width"] / 1024)
    quality += 0.05 * math.log2(l0 / 40)
    member = f"alpha{config['alpha']}-seed{config['seed']}-{sha256(canonical_json([config, layer]))[:10]}"
    provenance = {
        "member": member,
        "train": config,
        "store": {"id": sha256(f"store {layer}"), "model": "data/tiny-gemma2", "layer": layer},
        "versions": {"torch": "2.13.0"},
        "git": "0123456789abcdef-dirty",
        "rows_seen": step * config["batch_size"],
        "fired_rows": 100_000,
        "dead": 0.01,
    }
    return {
        "format": "nested-sae-results",
        "version": 1,
        "key": sha256(canonical_json([config, step, layer])),
        "checkpoint": {
            "path": f"checkpoints/{member}/checkpoints/step_{step:06d}.safetensors",
            "sha256": sha256(member + str(step)),
            "step": step,
            "sae": {"d_model": d_model, "width": config["width"], "levels": levels, "activation": "relu"},
            "provenance": provenance,
        },
        "store": {
            "id": sha256(f"store {layer}"),
            "model": "data/tiny-gemma2",
            "layer": layer,
            "d_model": d_model,
            "context": 128,
        },
        "evaluation": {"scores": ["kl", "ev", "scr"], "rows": 20_000, "scr": "data/scr", "seeds": [0, 1, 2]},
        "sample": {"n_tokens": 19_840, "n_tokens_without_massive": 19_801, "n_sequences": 156},
        "baselines": {"kl_zero": 4.2, "kl_mean": 1.9, "ce_clean": 3.1, "ce_zero": 8.3, "ce_mean": 5.0, "entropy": 2.9},
        "levels": [level_scores(rng, i, m, config["width"], quality, l0) for i, m in enumerate(levels)],
        "series": {
            "sparse_coding_rate": series(rng, len(levels), lambda n: 1 - math.exp(-n / 18)),
            "scr": series(rng, len(levels), lambda n: 0.3 * (1 - math.exp(-n / 30)) + 0.05 * quality),
        },
        "features": {"density": densities(rng, levels), **use(rng, len(levels) > 1)},
        "curve": curve(rng, len(levels), nested, steps),
        "definitions": {
            m.id: {"unit": m.unit, "better": m.better, "definition": m.definition} for m in METRICS.values()
        },
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "git": "0123456789abcdef-dirty",
    }


def level_scores(rng: np.random.Generator, level: int, m: int, width: int, quality: float, l0: float) -> dict[str, Any]:
    """Scores of one level: a prefix of m latents is worse than the whole, and sparser."""
    share = (m / width) ** 0.25
    q = quality * share
    kl = max(0.02, 1.6 * (1.05 - q))
    scores = {
        "kl_nats": kl,
        "kl_score": 1 - kl / 4.2,
        "ce": 3.1 + kl,
        "ce_score": 1 - kl / 5.2,
        "ev": min(0.98, 0.85 * q),
        "mse": 30 * (1 - 0.85 * q),
        "cosine": 0.9 * q,
        "l0": l0 * (1 + 0.003 * rng.normal()) * share,
        "dead": 0.02 + 0.01 * abs(rng.normal()),
        "top1": 0.8 * q,
    }
    scores["sparsity"] = 1 - scores["l0"] / m
    without = {name: 0.97 * value for name, value in scores.items()}
    return {"level": level, "n_latents": m, "scores": scores, "scores_without_massive": without}


def series(rng: np.random.Generator, n_levels: int, mean: Any) -> list[dict[str, Any]]:
    """Points of a score by n, for every level."""
    points = []
    for level in range(n_levels):
        for n in N_VALUES:
            value = float(mean(n) + 0.01 * rng.normal())
            points.append({"n": n, "level": level, "value": value, "low": value - 0.03, "high": value + 0.03})
    return points


def densities(rng: np.random.Generator, levels: list[int]) -> dict[str, Any]:
    """Histograms of log10 density for each block."""
    edges = np.linspace(-5, 0, 26)
    blocks = {"specialised": rng.normal(-2.6, 0.7, levels[-1] - (levels[0] if len(levels) > 1 else 0))}
    if len(levels) > 1:
        blocks["shared"] = rng.normal(-1.7, 0.5, levels[0])
    return {"edges": edges.tolist()} | {name: np.histogram(x, edges)[0].tolist() for name, x in blocks.items()}


def use(rng: np.random.Generator, nested: bool) -> dict[str, Any]:
    """Utilisation, geometry and correlation of each block, and across blocks."""
    blocks = ("shared", "specialised") if nested else ("specialised",)
    pairs = [f"within {name}" for name in blocks] + (["shared to specialised", "across"] if nested else [])
    return {
        "utilisation": {
            name: {"entropy": 0.8 + 0.02 * rng.random(), "gini": 0.6, "freq_over_1_percent": 0.3} for name in blocks
        },
        "geometry": {
            "encoder_decoder": {name: {"p50": 0.7 + 0.02 * rng.random()} for name in blocks},
            "nearest": {name: {"p50": 0.3 + 0.02 * rng.random()} for name in pairs},
        },
        "correlation": {name: {"mean_abs_pearson": 0.02 + 0.01 * rng.random()} for name in pairs},
    }


def curve(rng: np.random.Generator, n_levels: int, nested: float, steps: int) -> dict[str, list[Any]]:
    """A loss curve of 60 points with its terms."""
    at = np.linspace(steps / 60, steps, 60)
    base = 0.25 + 0.75 * np.exp(-at / (0.2 * steps)) + 0.004 * rng.normal(size=60)
    recon = [base * (1 + 0.35 * (n_levels - 1 - level)) for level in range(n_levels)]
    shared, special = (0.06 if nested else 0) * (1 - base), 0.1 * (1 - base)
    return {
        "step": [int(s) for s in at],
        "loss": (sum(recon) + shared + special).tolist(),
        "recon": np.stack(recon, 1).tolist(),
        "l1_shared": shared.tolist(),
        "l1_specialised": special.tolist(),
        "l0": (40 + 200 * np.exp(-at / (0.1 * steps))).tolist(),
    }


def drop_metric(data: dict[str, Any], name: str) -> None:
    """Leave out a top-level field, or a metric wherever it stands."""
    data.pop(name, None)
    data.get("series", {}).pop(name, None)
    for level in data.get("levels", []):
        for scores in ("scores", "scores_without_massive"):
            level[scores].pop(name, None)


def add_nesting(path: Path, **scores: float) -> None:
    """Give a results file scores of its whole dictionary (by metric id), three known trees and labels."""
    data = read_json(path)
    data["levels"][-1]["scores"] |= scores
    data["levels"][-1]["scores_without_massive"] |= {id: x for id, x in scores.items() if id in ("ev", "l0")}
    n = len(data["levels"])
    trees = [[node(3 * tree, -1, 0, n), *(node(3 * tree + i, 3 * tree, 1, n) for i in (1, 2))] for tree in range(3)]
    data["truth"] = {"n_features": 9, "n_parent_and_child": 200, "n_parent_alone": 300, "trees": trees}
    every = {"n_labels": 5, "n": 1234}
    data["absorption"] = {"left_out": {"a": "too few"}, "levels": [{"level": i, "all": every} for i in range(n)]}
    if any(name.startswith("first_letter") for name in scores):
        data["first_letter"] = {"left_out": {}, "levels": [{"level": i, "letters": every} for i in range(n)]}
    data["structure"] = {
        "meta": [{"level": i, "value": 0.5 + 0.1 * i} for i in range(n)],
        "hierarchy": {
            "controls": [
                {"share": share, "density": density, "excess": density + share / 10}
                for share in ([0.2] if n > 1 else [0.2, 0.5])
                for density in (0.1, 0.4)
            ],
            **({"level": {"density": 0.2, "excess": 0.3}} if n > 1 else {}),
        },
    }
    write_json(path, data)


def node(feature: int, parent: int, depth: int, n_levels: int) -> dict[str, Any]:
    """A known feature whose latent has its own number, but for every second child, which has its parent's."""
    latent = parent if parent >= 0 and feature % 3 == 2 else feature
    levels = [{"latent": latent, "cosine": 0.9, "recall": 0.8} for _ in range(n_levels)]
    return {"feature": feature, "parent": parent, "depth": depth, "levels": levels}


def write_latent_pages(results: Path, tokens: list[str]) -> Path:
    """Latent pages of a few latents, each with one context of the given tokens."""
    folder = latents_folder(results)
    latents = [
        {"id": j, "related": [], "contexts": [[3, 1, len(tokens) - 1, list(range(len(tokens))), [0.5] * len(tokens)]]}
        | {"drawn": [], "bars": [3, 0, 1], "step": 0.25}
        for j in range(4)
    ]
    summary: dict[str, Any] = {
        "format": "nested-sae-latents",
        "version": 3,
        "store": "s",
        "split": "eval",
        "n_tokens": 1000,
    }
    summary |= {"n_latents": 4, "levels": [2, 4], "n_shared": 2, "page_size": 256, "radius": 10, "dead": 0}
    summary |= {"related_latents": 0, "criterion": {"count": 20, "chance": 0.01}, "logit_lens": False}
    begin(folder, 1)
    write_page(folder, 0, tokens, latents)
    columns = {
        "level": [0, 0, 1, 1],
        "density": [0.1] * 4,
        "max": [0.5] * 4,
        "label": tokens[:1] * 4,
        "related": [0] * 4,
        "precision": [0.5, None, 0.0, 1.0],
        "recall": [0.25, None, 0.0, 1.0],
    }
    write_index(folder, summary, columns)
    return folder
