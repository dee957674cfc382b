"""Trains in child processes that are killed, again and again, until one gets to its end. A program, for test_train_crash.

    python tests/support/train_crasher.py STORE OUT SEED KILLS HOW

HOW is `random` (SIGKILL after a random part of the time that a run takes; a child that ends before its kill was timed on
a busier machine: the folder is begun anew and the next kills fall earlier, until KILLS of them fell) or `writes` (the
child kills itself at its n-th write, rename, unlink or fsync, n growing by one each round). After every kill the rolling
states are copied to OUT.states/<round>-<member>. This process forks before torch runs anything, so that a round costs no
import.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
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


def whole_run_seconds(config: RunConfig) -> float:
    """How long the training takes here when it is left alone, so that kills fall within it on any machine."""
    start = time.monotonic()
    end_of(forked(replace(config, out=Path(f"{config.out}.timed"))))
    return time.monotonic() - start


def keep_states(out: Path, n: int) -> None:
    """Copy the rolling states that round `n` left."""
    for state in out.glob("*/state.safetensors"):
        (Path(f"{out}.states") / f"{n}-{state.parent.name}").parent.mkdir(exist_ok=True)
        shutil.copy(state, Path(f"{out}.states") / f"{n}-{state.parent.name}")


def end_of(pid: int) -> bool:
    """Wait for a child; whether it was killed. Ends this program when the child failed."""
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("a child failed")
    return os.WIFSIGNALED(status)


def forked(config: RunConfig, die_at: int = 0) -> int:
    """The process of a child that trains."""
    pid = os.fork()
    if pid == 0:
        child(config, die_at)
    return pid


def kill_at_random(config: RunConfig, seed: int, kills: int) -> int:
    """Kills at random moments of a run, until as many fell as were asked for; their number."""
    rng, length, n_killed, n = random.Random(seed), whole_run_seconds(config), 0, 0
    while n_killed < kills:
        pid = forked(config)
        time.sleep(rng.uniform(0.05, 0.7) * length)
        os.kill(pid, signal.SIGKILL)
        if end_of(pid):
            n_killed += 1
        else:
            length *= 0.7
            shutil.rmtree(config.out)
        keep_states(config.out, n)
        n += 1
    return n_killed


def kill_at_writes(config: RunConfig, first: int, kills: int) -> int:
    """Rounds in which the child kills itself at a later write each; the number of those that did not end before."""
    n_killed = 0
    for n in range(kills):
        n_killed += end_of(forked(config, first + n))
        keep_states(config.out, n)
    return n_killed


def main() -> None:
    """Rounds of killing, then one that is left alone."""
    store, out, seed, kills, how = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    config = crash_config(Path(store), out)
    n_killed = (kill_at_random if how == "random" else kill_at_writes)(config, seed, kills)
    assert not end_of(forked(config))
    print(n_killed)


if __name__ == "__main__":
    main()
