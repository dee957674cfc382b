"""L0 at inference, over the steps of a training, of every recipe: does a checkpoint have the sparsity that was asked for?

    python tests/bench/inference_l0.py --store acts.zarr --width 768 --steps 600 --figure data/inference_l0.png

Each recipe is trained by `python -m train` on the store, flat and with two levels, every checkpoint is kept and encodes rows of
the evaluation split by its own inference rule. Prints a table, latents a row by step; the last line is JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import click
import matplotlib
import torch

from bench.options import placed
from pipeline.sae.checkpoint import load_checkpoint
from pipeline.store.reader import Store

K, TARGET = ("--k",), ("--target-l0",)
RECIPES = {
    "batchtopk": ("batchtopk", *K),
    "topk": ("topk", *K),
    "jumprelu": ("jumprelu", *TARGET),
    "paper": ("paper", *TARGET),
    "paper, no LayerNorm": ("paper", "--layernorm=none", *TARGET),
}
TICKS = (20, 32, 50, 100, 200, 400)
SHAPES = {"flat": "0", "two levels": "0.2"}


def l0_by_step(store: Path, out: Path, words: list[str], x: torch.Tensor) -> dict[int, float]:
    """Latents a row of every checkpoint of one training, at inference."""
    command = [
        sys.executable,
        "-m",
        "train",
        "--store",
        str(store),
        "--out",
        str(out),
        "--keep",
        "all",
        "--json",
        *words,
    ]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    folder = Path(json.loads(found.stdout)["members"][0]["folder"])
    l0: dict[int, float] = {}
    for path in sorted((folder / "checkpoints").glob("step_*.safetensors")):
        sae = load_checkpoint(path)[0].to(x.device)
        with torch.inference_mode():
            l0[int(path.stem.removeprefix("step_"))] = float((sae.encode(x) != 0).sum(1).float().mean())
    return l0


def draw(path: Path, lines: dict[str, dict[int, float]], wanted: int) -> None:
    """L0 over steps, on a logarithmic axis; 5 % around what was wanted is grey."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SHAPES), figsize=(9, 3.4), sharey=True)
    for shape, ax in zip(SHAPES, axes):
        for name in RECIPES:
            line = lines[f"{name}, {shape}"]
            ax.plot(list(line), list(line.values()), label=name, marker="o", ms=2.5)
        ax.axhspan(wanted * 0.95, wanted * 1.05, color="0.9")
        ax.set(yscale="log", xlabel="step", title=f"{shape}: {wanted} latents a row wanted (grey: within 5 %)")
        ax.title.set_fontsize(9)
        ax.set_yticks(TICKS, [str(tick) for tick in TICKS])
        ax.minorticks_off()
    axes[0].set_ylabel("latents a row at inference")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


@click.command(help=__doc__)
@click.option("--store", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--width", default=768, show_default=True)
@click.option("--steps", default=600, show_default=True)
@click.option("--batch-size", default=512, show_default=True)
@click.option("--every", default=25, show_default=True, help="steps between checkpoints")
@click.option("--wanted", default=32, show_default=True, help="latents a row")
@click.option("--paper-lr", default=1e-2, show_default=True, help="the paper's 3e-4 moves little in a short run")
@placed("products of training; rows are encoded in float32")
@click.option("--figure", type=click.Path(path_type=Path), help="picture to write")
def main(
    store: Path,
    width: int,
    steps: int,
    batch_size: int,
    every: int,
    wanted: int,
    paper_lr: float,
    dtype: str,
    device: torch.device,
    figure: Path | None,
) -> None:
    split = Store.open(store).eval
    n = min(split.n_rows, 8192)
    x = split.read(0, n).float()[torch.from_numpy(split.kept()[:n])].to(device)
    shared = [f"--width={width}", f"--steps={steps}", f"--batch-size={batch_size}", f"--checkpoint-every={every}"]
    shared.append(f"--device={device}")
    lines: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for shape, alpha in SHAPES.items():
            for name, (recipe, *own, sparsity) in RECIPES.items():
                lr = [f"--lr={paper_lr}"] if recipe == "paper" else []
                words = [*shared, f"--recipe={recipe}", f"--alpha={alpha}", f"{sparsity}={wanted}", f"--dtype={dtype}"]
                lines[f"{name}, {shape}"] = l0_by_step(store, Path(folder, f"{name}-{alpha}"), [*words, *own, *lr], x)
    shown = sorted({step for step in lines["batchtopk, flat"] if step % (4 * every) == 0} | {every, 2 * every, steps})
    print(f"| recipe | {' | '.join(f'step {step}' for step in shown)} |\n|---|{'---|' * len(shown)}")
    for name, line in lines.items():
        print(f"| {name} | {' | '.join(f'{line[step]:.1f}' for step in shown)} |")
    if figure is not None:
        draw(figure, lines, wanted)
    print(json.dumps({"wanted": wanted, "l0": lines}))


if __name__ == "__main__":
    main()
