"""Evaluates, latent pages included, in child processes that kill themselves at their n-th write, n growing by one each round.

    python tests/support/evaluate_crasher.py STORE RUNS OUT FIRST STEP

Rounds FIRST, FIRST + STEP, … until a child gets to its end; prints how many were killed. A program, for test_evaluate_crash: it
forks before torch runs anything, so that a round costs no import.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from evaluate.run import EvaluateConfig, run
from support.train_crasher import die_at_write


def child(store: Path, runs: Path, out: Path, die_at: int) -> None:
    """Evaluate to the end, or until killed. Never returns."""
    torch.set_num_threads(1)
    die_at_write(die_at)
    try:
        failed = run(EvaluateConfig(store=store, out=out, scores=("ev",), latents="all", device="cpu"), [runs]).failed
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(1 if failed else 0)


def main() -> None:
    """Rounds of killing, until one is left alone."""
    store, runs, out, n, step = (
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        Path(sys.argv[3]),
        int(sys.argv[4]),
        int(sys.argv[5]),
    )
    n_killed = 0
    while True:
        if (pid := os.fork()) == 0:
            child(store, runs, out, n)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            break
        n, n_killed = n + step, n_killed + 1
    if os.WEXITSTATUS(status):
        sys.exit("the child failed")
    print(n_killed)


if __name__ == "__main__":
    main()
