"""Time of a training step against its floor, and against peers.

    python tests/bench/bench_train.py                                   # both shapes
    python tests/bench/bench_train.py --shape 640x4096 --rounds 5 --peer-python /path/to/env/bin/python
    python tests/bench/bench_train.py --count-bytes --shape 2304x16384  # no clock: what a step on a GPU launches and moves

The floor is the five large products of a step alone: torch.mm in bf16 on contiguous [row, d], [d, latent], [latent, d]
(DECISIONS 18), or in float32 where that is what steps run in. Everything is timed in turn, round after round in one run; figures
are medians. Peers (their own environment, optional) step on a batch of the same shape, on the same device in the same dtype, in a
process that only works when asked.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import click
import torch

from bench.options import placed
from train.config import TrainConfig, batchtopk, jumprelu, paper, topk
from train.step.fused.choice import fuses, member_kind
from train.step.member import Batch, Member, normalise_batch
from train.step.scratch import Scratch
from train.step.sparse import refusal

LIMIT = 120
"""Seconds that a peer's step may take."""

FIVE = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
OURS: dict[str, Callable[..., TrainConfig]] = {
    "paper, α 0": lambda **c: paper(alpha=0.0, layernorm="none", **c),
    "paper, α 0.2": lambda **c: paper(alpha=0.2, layernorm="none", **c),
    "paper, 5 levels": lambda **c: paper(levels=FIVE, layernorm="none", **c),
    "paper, α 0, LayerNorm": lambda **c: paper(alpha=0.0, **c),
    "paper, α 0.2, LayerNorm": lambda **c: paper(alpha=0.2, **c),
    "batchtopk, 2 levels": lambda **c: batchtopk(alpha=0.2, **c),
    "batchtopk, 5 levels": lambda **c: batchtopk(levels=FIVE, **c),
    "batchtopk, 2 levels, auxiliary loss": lambda **c: batchtopk(alpha=0.2, **c),
    "topk, 2 levels": lambda **c: topk(alpha=0.2, **c),
    "jumprelu, 2 levels": lambda **c: jumprelu(alpha=0.2, **c),
}


def floor_step(d_model: int, width: int, rows: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Encode, decode, both weight gradients and the latents' gradient, nothing else, into buffers that exist."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    x, z, w_enc, w_dec = random(rows, d_model), random(rows, width), random(d_model, width), random(width, d_model)
    latents, rows_out = torch.empty_like(z), torch.empty_like(x)
    w_enc_out, w_dec_out = torch.empty_like(w_enc), torch.empty_like(w_dec)

    def step() -> None:
        torch.mm(x, w_enc, out=latents)
        torch.mm(z, w_dec, out=rows_out)
        torch.mm(x, w_dec.T, out=latents)
        torch.mm(z.T, x, out=w_dec_out)
        torch.mm(x.T, z, out=w_enc_out)

    return step


def random_batch(d_model: int, rows: int, device: torch.device) -> Batch:
    """Sparse mixtures of directions, so that the trainers have something to find."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_model, d_model, generator=generator)
    x = ((torch.rand(rows, 4 * d_model, generator=generator) < 0.01).float() @ directions).to(device)
    center = x.mean(0)
    return normalise_batch(x, center, float((x - center).square().sum(1).mean() ** -0.5))


def one_step(name: str, member: Member, batch: Batch) -> None:
    """A step; where the auxiliary loss is to act, on a dictionary with as many dead latents as it looks at."""
    if name.endswith("auxiliary loss"):
        member.n_rows = member.config.dead_after_rows
        member.rows_since_fired[: 2 * member.config.aux_k] = member.n_rows
    member.step(batch)


def member_of(kind: Callable[..., Member], config: TrainConfig, d_model: int, scratch: Scratch) -> Member:
    device = scratch.device
    return kind(config, d_model, torch.zeros(d_model, device=device), 1.0, device, scratch)


class Peers:
    """The process of bench_peers.py: `names`, and one timed step of each when asked. A peer whose step takes longer than
    LIMIT, or ends the process, is left out; the others go on in a new one."""

    def __init__(self, python: str, shape: tuple[int, int, int], dtype: str, device: torch.device) -> None:
        script = str(Path(__file__).parents[1] / "peers" / "bench_peers.py")
        self.arguments = [python, script, *map(str, shape), dtype, str(device)]
        self.names = self._begin()

    def _begin(self) -> list[str]:
        self.process = subprocess.Popen(self.arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if not (line := self._line()):
            raise click.ClickException(f"the peers' process did not begin within {LIMIT} s; see its message above")
        return list(json.loads(line))

    def _line(self) -> str:
        assert self.process.stdout is not None
        limit = threading.Timer(LIMIT, self.process.kill)
        limit.start()
        line = self.process.stdout.readline()
        limit.cancel()
        return line

    def step(self, name: str) -> float | None:
        """Seconds of a peer's step; None when it had to be given up."""
        assert self.process.stdin is not None
        print(name, file=self.process.stdin, flush=True)
        if line := self._line():
            return float(line)
        self.process.communicate()
        print(f"{name}: left out, its step took more than {LIMIT} s or ended its process", file=sys.stderr)
        self._begin()
        return None

    def close(self) -> None:
        self.process.communicate()


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Of one step: by events on a GPU, which counts no launch that runs ahead."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure_shape(
    shape: tuple[int, int, int], rounds: int, dtype: str, device: torch.device, peer_python: str | None
) -> dict[str, float]:
    """Median seconds of a step by name; the first round warms up and is dropped. Where steps are fused, the plain one too."""
    d_model, width, rows = shape
    scratch, batch = Scratch(device), random_batch(d_model, rows, device)
    configs = {name: make(width=width, dtype=dtype, batch_size=rows) for name, make in OURS.items()}
    steps: dict[str, Callable[[], object]] = {
        "floor": floor_step(*shape, torch.bfloat16 if dtype == "bf16" else torch.float32, device)
    }
    for name, config in configs.items():
        kinds = {"": member_kind(config, device)} | ({", plain": Member} if fuses(config, device) else {})
        for way, kind in kinds.items():
            member = member_of(kind, config, d_model, scratch)
            steps[name + way] = lambda name=name, member=member: one_step(name, member, batch)
    peers = Peers(peer_python, shape, dtype, device) if peer_python else None
    times: dict[str, list[float]] = {name: [] for name in (*steps, *(peers.names if peers else ()))}
    for _ in range(rounds + 1):
        for name, taken in list(times.items()):
            found = seconds(steps[name], device) if name in steps or peers is None else peers.step(name)
            if found is None:
                del times[name]
            else:
                taken.append(found)
    if peers is not None:
        peers.close()
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def measure_members(
    shape: tuple[int, int, int], counts: list[int], dtype: str, device: torch.device, steps: int
) -> dict[int, float]:
    """Rows a second summed over so many members on one batch."""
    d_model, width, rows = shape
    batch, rates = random_batch(d_model, rows, device), {}
    for n in counts:
        scratch = Scratch(device)
        configs = [paper(width=width, dtype=dtype, batch_size=rows, layernorm="none", seed=seed) for seed in range(n)]
        members = [member_of(member_kind(config, device), config, d_model, scratch) for config in configs]
        for member in members:
            member.step(batch)
        taken = statistics.median(seconds(lambda ms=members: [m.step(batch) for m in ms], device) for _ in range(steps))
        rates[n] = n * rows / taken
    return rates


def summary(medians: dict[str, float], dtype: str) -> dict[str, Any]:
    """Ratios of medians. peer_over_ours: each peer to our step with its kind of sparsifier, 2 levels where it has 2."""
    flat = medians["paper, α 0"]
    known = {"floor", *OURS, *(f"{name}, plain" for name in OURS)}
    peers = {name: value for name, value in medians.items() if name not in known}
    ours = {name: "batchtopk, 2 levels" if "BatchTopK" in name else "paper, α 0" for name in peers}
    return {
        "dtype": dtype,
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
        "step_over_floor": {name: value / medians["floor"] for name, value in medians.items() if name in known},
        "nested_over_flat": {"2": medians["paper, α 0.2"] / flat, "5": medians["paper, 5 levels"] / flat},
        "peer_over_ours": {f"{name} / {ours[name]}": value / medians[ours[name]] for name, value in peers.items()},
    }


def count_bytes(shapes: Sequence[str], rows: int) -> dict[str, Any]:
    """Operations and bytes of a step on a GPU in bf16, by part, counted without one; prints tables: plain, fused, and fused with
    products over active latents alone."""
    from support.moved import count_step  # needs Triton

    found: dict[str, Any] = {}
    for shape in shapes:
        d_model, width = (int(number) for number in shape.split("x"))
        for name, make in OURS.items():
            config = make(width=width, dtype="bf16")
            for way in ("plain", "fused", *([] if refusal(config, False) else ["sparse"])):
                parts = count_step(config, d_model, rows, way != "plain", way == "sparse")
                total = {
                    "launches": sum(part.launches for part in parts.values()),
                    "bytes": sum(part.n_bytes for part in parts.values()),
                }
                found[f"{shape}, {name}, {way}"] = total
                print(
                    f"\n{shape}, {rows} rows, {name}, {way}: {total['launches']} operations, {total['bytes'] / 1e9:.2f} GB"
                )
                for part, moved in parts.items():
                    print(f"    {part:24s}{moved.launches:6d}{moved.n_bytes / 1e6:12.1f} MB")
    return found


def print_table(title: str, medians: dict[str, float]) -> None:
    print(f"\n{title}: median of a step\n{'':62s}{'ms':>10s}{'x floor':>10s}")
    for name, value in medians.items():
        print(f"{name:62s}{1e3 * value:10.1f}{value / medians['floor']:10.2f}")


@click.command(help=__doc__)
@click.option("--shape", "shapes", multiple=True, default=("640x4096", "2304x16384"), show_default=True)
@click.option("--rows", default=2048, show_default=True, help="rows a step")
@click.option("--rounds", default=9, show_default=True, help="timed rounds after one of warm-up")
@click.option("--peer-python", default=None, help="interpreter of an environment with sae-lens and dictionary-learning")
@click.option("--members", default="1,5,25", show_default=True, help="numbers of members on one batch; empty: none")
@click.option("--member-shape", default="256x1024", show_default=True)
@placed("our products, the floor's and the peers'")
@click.option(
    "--count-bytes", "counts_bytes", is_flag=True, help="count operations and bytes of a step on a GPU; no clock"
)
def main(
    shapes: tuple[str, ...],
    rows: int,
    rounds: int,
    peer_python: str | None,
    members: str,
    member_shape: str,
    device: torch.device,
    dtype: str,
    counts_bytes: bool,
) -> None:
    if counts_bytes:
        print(json.dumps(count_bytes(shapes, rows), ensure_ascii=False))
        return
    results: dict[str, Any] = {}
    for shape in shapes:
        d_model, width = (int(number) for number in shape.split("x"))
        medians = measure_shape((d_model, width, rows), rounds, dtype, device, peer_python)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        print_table(f"d_model x width {shape}, {rows} rows, {dtype}, {where}", medians)
        results[shape] = summary(medians, dtype)
    counts = [int(n) for n in members.split(",") if n]
    d_model, width = (int(number) for number in member_shape.split("x"))
    rates = measure_members((d_model, width, rows), counts, dtype, device, steps=max(3, rounds // 3))
    for n, rate in rates.items():
        print(f"{n} members of {member_shape}: {rate:,.0f} rows/s in all")
    last = results[shapes[-1]]
    headline = {
        "shape": shapes[-1],
        "step_over_floor": last["step_over_floor"]["paper, α 0.2"],
        "nested_over_flat": last["nested_over_flat"],
        "peer_over_ours": last["peer_over_ours"],
        "rows_per_s": {str(n): rate for n, rate in rates.items()},
        "all": results,
    }
    print(json.dumps(headline, ensure_ascii=False))


if __name__ == "__main__":
    main()
