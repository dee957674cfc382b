"""Every measurement that needs a GPU, each part in a process of its own with a time limit; called by `run.sh`.

machine    what it is, its bandwidth and rate of products
kernels    `pytest -m gpu` (toy: kernels in Triton's interpreter)
steps      a step of every recipe at three shapes over the products' floor, fused and plain, by CUDA events
sparse     products over active latents alone against dense steps, by k: whether `--sparse auto` may use them on this GPU
training   4882 steps of one member and of 25 from a store on this machine's disk: seconds, rows/s, wait
harvest    Gemma-2-2B's shapes with random weights against the bare forward pass, rows/s; three stores written at once
compiled   the same with compiled layers
evaluate   1, 10 and 50 checkpoints at those shapes against the naive way
profile    ten steps: a Chrome trace and the kernels that take longest

A part that fails is reported as such, and the others go on; then the exit status is 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT))
BENCH = ROOT / "tests" / "bench"
PARTS = ("machine", "kernels", "steps", "sparse", "training", "harvest", "compiled", "evaluate", "profile")
SELF = str(Path(__file__).resolve())


def commands(part: str, toy: bool, out: Path) -> list[str]:
    """The command of a part; its last line is JSON, but that of pytest."""
    python, device = sys.executable, "cpu" if toy else "cuda"
    if part == "kernels":
        chosen = ["-m", "triton", "-k", "test_recipe_equals_float64_step and batchtopk-1"] if toy else ["-m", "gpu"]
        files = ["tests/test_kernels.py"] if toy else gpu_tests()
        return [python, "-m", "pytest", "-p", "no:cacheprovider", *chosen, *files]
    if part == "steps":
        sizes = (
            "--shape 16x64 --rows 64 --rounds 1 --members 1,2 --member-shape 16x64"
            if toy
            else "--shape 640x4096 --shape 2304x16384 --shape 2304x65536 --rounds 20 --members 1,5,25 --member-shape 640x4096"
        )
        return [python, str(BENCH / "bench_train.py"), "--device", device, *sizes.split()]
    if part == "sparse":
        sizes = ("--shape 16x256 --rows 64 --rounds 1 --k 4" if toy else
                 "--shape 2304x16384 --shape 2304x65536 --rounds 20 --k 32 --k 64 --k 128")  # fmt: skip
        return [python, str(BENCH / "bench_sparse.py"), "--device", device, *sizes.split()]
    if part in ("harvest", "compiled"):
        n_layers = {"harvest": 2, "compiled": 1}[part] if toy else 20
        sizes = "--d-model 128 --tokens 2k --rounds 1" if toy else "--d-model 2304 --tokens 500k --rounds 3"
        writer = "--writer-rows 8k --writer-d-model 64" if toy else "--writer-rows 500k"
        words = [*sizes.split(), "--layers", str(n_layers), *(writer.split() if part == "harvest" else ["--compile"])]
        return [python, str(BENCH / "bench_harvest.py"), "--device", device, *words]
    if part == "evaluate":
        sizes = ("--d-model 32 --ff 64 --head-dim 16 --layers 3 --layer 1 --vocab 200 --width 64 --sequences 4 --batch 2 "
                 "--counts 1 --rounds 1" if toy else
                 "--d-model 2304 --ff 9216 --head-dim 256 --vocab 256000 --width 16384 --sequences 512 --counts 1,10,50 "
                 "--rounds 3")  # fmt: skip
        return [python, str(BENCH / "bench_evaluate.py"), "--device", device, *sizes.split()]
    return [python, SELF, "--out", str(out), "--do", part, *(["--toy"] if toy else [])]


def gpu_tests() -> list[str]:
    """Test files that have any for a GPU; others may want packages that a box without a network has not."""
    return [f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_*.py")) if ".gpu" in path.read_text()]


def run_part(part: str, toy: bool, out: Path, limit: float) -> dict[str, Any]:
    """Run a part; its figures, or what went wrong."""
    start = time.perf_counter()
    log = out / f"{part}.log"
    with log.open("w") as file:
        try:
            done = subprocess.run(
                commands(part, toy, out), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit, check=False
            )
            status = f"exit status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            status = f"took more than {limit:.0f} s"
    lines = log.read_text().strip().splitlines() or [""]
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1)}
    if status:
        return found | {"error": status, "last_lines": lines[-8:]}
    return found | ({"said": lines[-1]} if part == "kernels" else json.loads(lines[-1]))


# ---- parts that are here ----


def machine(toy: bool, out: Path) -> dict[str, Any]:
    """What this machine is, and its two floors."""
    import torch

    from pipeline.base.runtime import measured_seconds

    device = torch.device("cpu" if toy else "cuda")
    n = 1 << (20 if toy else 29)
    source, target = (torch.zeros(n, dtype=torch.float32, device=device) for _ in range(2))
    side = 256 if toy else 8192
    a, b, c = (torch.zeros(side, side, dtype=torch.float32 if toy else torch.bfloat16, device=device) for _ in range(3))
    found: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "cpus": os.cpu_count()}
    found["copy_bytes_per_s"] = 8 * n / measured_seconds(lambda: target.copy_(source), device)
    found["product_flop_per_s"] = 2 * side**3 / measured_seconds(lambda: torch.mm(a, b, out=c), device)
    if not toy:
        found |= {"gpu": torch.cuda.get_device_name(), "memory": torch.cuda.get_device_properties(0).total_memory}
        import triton

        found["triton"] = triton.__version__
    return found


def training(toy: bool, out: Path) -> dict[str, Any]:
    """Trainings from a store on this machine's disk."""
    d_model, width, n_rows, steps, many = (64, 256, 4096, 20, 2) if toy else (2304, 16384, 2_500_000, 4882, 25)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=out) as place:
        start = time.perf_counter()
        store = write_store(Path(place) / "acts.zarr", d_model, n_rows)
        found["store_rows_per_s"] = n_rows / (time.perf_counter() - start)
        for n_members in (1, many):
            runs = Path(place) / f"runs{n_members}"
            seeds = [word for seed in range(n_members) for word in ("--seed", str(seed))]
            command = [
                sys.executable,
                "-m",
                "train",
                "--store",
                store,
                "--out",
                runs,
                "--width",
                width,
                "--steps",
                steps,
            ]
            command += [
                "--batch-size",
                64 if toy else 2048,
                "--device",
                "cpu" if toy else "cuda",
                "--log-every",
                10 if toy else 100,
            ]
            command += ["--checkpoint-every", steps, *seeds]
            start = time.perf_counter()
            subprocess.run([*map(str, command)], cwd=ROOT, check=True)
            seconds = time.perf_counter() - start
            timings = [json.loads(line) for line in next(runs.glob("*/timings.jsonl")).read_text().splitlines()]
            steady = timings[len(timings) // 2 :]
            found[f"{n_members} members"] = {
                "seconds": seconds,
                "seconds_of_steps": timings[-1]["seconds"],
                "rows_per_s": sum(line["rows_per_s"] for line in steady) / len(steady),
                "wait": sum(line["wait"] for line in steady) / len(steady),
                "milliseconds_a_step_and_member": 1e3 * timings[-1]["seconds"] / steps / n_members,
            }
    return found


def write_store(path: Path, d_model: int, n_rows: int) -> Path:
    """A store of sparse mixtures of directions; blocks of rows come again, in other places."""
    import torch

    from support.stores import prepare_store, store_config

    context = 16 if n_rows < 10_000 else 128
    config = store_config(d_model=d_model, context=context, shard_rows=512 * context, chunk_rows=8 * context)
    writer = prepare_store(path, config, n_rows // context, 64)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_model, d_model, generator=generator)
    n_pool = min(n_rows, 65_536)
    pool = torch.cat([((torch.rand(m, 4 * d_model, generator=generator) < 0.01).float() @ directions).bfloat16()
                      for m in [4096] * (n_pool // 4096) + [n_pool % 4096]])  # fmt: skip
    for split in ("train", "eval"):
        for k in writer.pending(split):
            start, stop = writer.split(split).shard_rows_range(k)
            with writer.shard(split, k) as shard:
                shard.write(pool[torch.arange(start, stop) % len(pool)])
    writer.finish()
    return path


def profile(toy: bool, out: Path) -> dict[str, Any]:
    """Ten steps of batchtopk under torch's profiler: trace.json, and the kernels that take longest."""
    import torch
    from torch.profiler import ProfilerActivity

    from train.config import batchtopk
    from train.step.fused.choice import make_normalise, member_kind
    from train.step.scratch import Scratch

    device = torch.device("cpu" if toy else "cuda")
    d_model, width, rows = (16, 64, 64) if toy else (2304, 16384, 2048)
    config, scratch = batchtopk(width=width, batch_size=rows, dtype="float32" if toy else "bf16"), Scratch(device)
    member = member_kind(config, device)(config, d_model, torch.zeros(d_model, device=device), 1.0, device, scratch)
    normalise = make_normalise(config, device, scratch)
    raw = torch.randn(rows, d_model, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    batch = None
    for _ in range(3):
        batch = normalise(raw, member.center, d_model**-0.5, out=batch)
        member.step(batch)
    activities = [ProfilerActivity.CPU, *([] if toy else [ProfilerActivity.CUDA])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(10):
            batch = normalise(raw, member.center, d_model**-0.5, out=batch)
            member.step(batch)
        member.metrics()
    profiler.export_chrome_trace(str(out / "trace.json"))
    taken = [
        (event.self_cpu_time_total if toy else event.self_device_time_total, event) for event in profiler.key_averages()
    ]
    top = sorted(taken, key=lambda pair: -pair[0])[:30]
    return {
        "top": [
            {"name": event.key[:120], "microseconds_a_step": time_ / 10, "calls": event.count} for time_, event in top
        ]
    }


DO = {"machine": machine, "training": training, "profile": profile}


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--toy", is_flag=True, help="at toy size on a CPU")
@click.option("--only", "only", multiple=True, type=click.Choice(PARTS))
@click.option("--limit", default=540.0, help="seconds a part may take")
@click.option("--do", "do", type=click.Choice(list(DO)), hidden=True)
def main(out: Path, toy: bool, only: tuple[str, ...], limit: float, do: str | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    if do is not None:
        print(json.dumps(DO[do](toy, out)))
        return
    path = out / "gpu.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() and only else {}
    found["toy"] = toy
    parts = only or PARTS
    with ThreadPoolExecutor(
        os.cpu_count() if toy else 1
    ) as pool:  # toy sizes are run to see that they run, side by side
        for part, figures in zip(parts, pool.map(lambda part: run_part(part, toy, out, limit), parts)):
            found[part] = figures
            path.write_text(json.dumps(found, indent=1))
            print(f"{part}: {figures.get('error', 'done')} ({figures['seconds']} s)", flush=True)
    sys.exit(any("error" in found[part] for part in only or PARTS))


if __name__ == "__main__":
    main()
