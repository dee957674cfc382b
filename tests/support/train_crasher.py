"""Trains in child processes that are killed, again and again, until one gets to its end. A program, for test_train_crash.

    python tests/support/train_crasher.py STORE OUT SEED KILLS HOW

HOW is `random` (SIGKILL after a random part of the time that a run takes) or `writes` (the child kills itself at its n-th
write, rename, unlink or fsync, n growing by one each round). After every kill the rolling states are copied to
OUT.states/<round>-<member>. This process forks before torch runs anything, so that a round costs no import.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from train.config import RECIPES, TrainConfig
from train.plan import RunConfig
from train.run import run


def small(recipe: str = "paper", **changes: Any) -> TrainConfig:
    """A training of a second or less on the tiny store; its lines and checkpoints fall on different steps."""
    own: dict[str, Any] = {"width": 96, "steps": 23, "batch_size": 64, "lr_warmup_steps": 4, "dtype": "float32"}
    own |= {"log_every": 4, "checkpoint_every": 5, "dead_after_rows": 500}
    own |= (
        {"sparsity_warmup_steps": 6} if recipe in ("paper", "jumprelu") else {"k": 8, "aux_k": 16, "lr_decay_steps": 5}
    )
    return RECIPES[recipe](**(own | changes))


def crash_config(store: Path, out: Path) -> RunConfig:
    """Two members with different counters, a rule of retention that deletes."""
    members = (small(alpha=0.25, target_l0=12), small("batchtopk", seed=1))
    return RunConfig(store, out, members, device="cpu", keep="last:2,every:10", threads=1)


def die_at_write(n: int) -> None:
    """Kill this process at the n-th call that changes the disk."""
    left = [n]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("replace", "fsync", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]


def child(config: RunConfig, die_at: int) -> None:
    """Train to the end, or until killed. Never returns."""
    torch.set_num_threads(1)
    if die_at:
        die_at_write(die_at)
    try:
        run(config)
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def whole_run_seconds(store: Path, out: Path) -> float:
    """How long the training takes here when it is left alone, so that kills fall within it on any machine."""
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(crash_config(store, out), 0)
    os.waitpid(pid, 0)
    return time.monotonic() - start


def main() -> None:
    """Rounds of killing, then one that is left alone."""
    store, out, seed, kills, how = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    config, rng, n_killed = crash_config(Path(store), out), random.Random(seed), 0
    length = whole_run_seconds(Path(store), Path(f"{out}.timed")) if how == "random" else 0.0
    for n in range(kills + 1):
        left_alone = n == kills
        pid = os.fork()
        if pid == 0:
            child(config, 0 if left_alone or how == "random" else seed + n)
        if how == "random" and not left_alone:
            time.sleep(rng.uniform(0.05, 0.7) * length)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            sys.exit(f"round {n}: the child failed")
        n_killed += os.WIFSIGNALED(status)
        for state in out.glob("*/state.safetensors"):
            (Path(f"{out}.states") / f"{n}-{state.parent.name}").parent.mkdir(exist_ok=True)
            shutil.copy(state, Path(f"{out}.states") / f"{n}-{state.parent.name}")
    print(n_killed)


if __name__ == "__main__":
    main()
