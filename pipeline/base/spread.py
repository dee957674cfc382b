"""`--processes`: the members of a training, or the checkpoints of an evaluation, shared out over processes of this machine,
without torchrun.

On a CPU what is done to a small SAE gains little from a second core; two SAEs side by side, a core each, gain all of it. This
process is the first and takes every n-th; it starts the others with its own words and a rank in their environment, its cores
divided among all. They meet on disk, and each prints its outcomes to the first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Any

import click
import torch
from threadpoolctl import threadpool_limits

from pipeline import INTERRUPTED
from pipeline.base.cli import WORDS
from pipeline.base.errors import PipelineError, UsageError
from pipeline.base.processes import SPREAD_VARIABLE, die_with_parent, is_launched, python_path
from pipeline.base.progress import say
from pipeline.base.runtime import rank as own_rank
from pipeline.base.runtime import world_size

STOP_S = 60.0
"""Seconds that a process which is asked to stop may take to write the states of its members."""


def n_processes(asked: int | str, n_left: int, device: torch.device) -> int:
    """How many processes share out so many SAEs that are not done: what is asked, `auto` being one a core of a CPU or one a
    GPU, and never more than SAEs.

    Cores are those that torch would use, so OMP_NUM_THREADS bounds them. Raises UsageError for none, under another launcher,
    and for more than there are GPUs.
    """
    if asked == "auto" and (is_launched() or world_size() > 1):
        return 1
    there = torch.cuda.device_count() if device.type == "cuda" else torch.get_num_threads()
    n = there if asked == "auto" else int(asked)
    if n < 1:
        raise UsageError(f"--processes {n}: must be at least 1, or auto")
    if n > 1 and (is_launched() or world_size() > 1):
        raise UsageError(
            f"--processes {n}: a launcher set WORLD_SIZE={world_size()} and shares the work out; leave one out"
        )
    if n > 1 and device.type == "cuda" and n > there:
        raise UsageError(
            f"--processes {n}: {there} CUDA devices are visible, one a process; ask for as many, or for auto"
        )
    return max(1, min(n, n_left))


@contextmanager
def cores_divided(n: int) -> Iterator[int]:
    """Each of n processes has its share of the threads that torch uses; that many, and here too inside the block, where numpy's
    products have them: its library would wait on every core for work, on those of the other processes too."""
    before = torch.get_num_threads()
    share = max(1, before // n)
    torch.set_num_threads(share)
    try:
        with threadpool_limits(share, "blas"):
            yield share
    finally:
        torch.set_num_threads(before)


def is_shown() -> bool:
    """Whether what this process says reaches a person: that of a further process is kept, and shown where it fails."""
    return own_rank() == 0 or SPREAD_VARIABLE not in os.environ


def rank_environment(rank: int, n: int, threads: int) -> dict[str, str]:
    """What tells a process its rank among n on this machine, as torchrun would, and its threads."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, SPREAD_VARIABLE: n}
    return {
        name: str(value) for name, value in (ranks | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}).items()
    }


class Others:
    """The further processes of a stage that is shared out over n; none for one. Use as a context: they run inside it.

    `stage`: the module of this process's own command, a `cli.Remembering` one, whose words they get too; what they share out is
    `what`, in the plural. Leaving it while they run, whatever the reason, has them write what they have and stop.
    """

    def __init__(self, stage: str, n: int, what: str) -> None:
        self.stage, self.n, self.what = stage, n, what
        self.words: Sequence[str] = click.get_current_context().meta[WORDS]
        self.running: list[tuple[subprocess.Popen[str], IO[str]]] = []
        self.stack = ExitStack()

    def __enter__(self) -> Others:
        if self.n > 1:
            threads = self.stack.enter_context(cores_divided(self.n))
            say(f"{self.n} processes of {threads} threads share the {self.what} out; this one shows its own")
            self.running = [self.start(rank, threads) for rank in range(1, self.n)]
            self.stack.enter_context(environment(rank_environment(0, self.n, threads)))
        return self

    def start(self, rank: int, threads: int) -> tuple[subprocess.Popen[str], IO[str]]:
        """Start one with this process's own words; what it says to a person is kept, to be shown where it fails.

        It has a process group of its own: Ctrl-C in a terminal reaches the first alone, which then asks the others to stop.
        """
        said = self.stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115  (the stack closes it)
        process = subprocess.Popen(
            [sys.executable, "-m", self.stage, *self.words, "--json", "--processes", "1"],
            env=os.environ | {"PYTHONPATH": python_path()} | rank_environment(rank, self.n, threads),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            process_group=0,
            preexec_fn=die_with_parent,
        )
        return process, said

    def results(self) -> list[Mapping[str, Any]]:
        """Wait for them; what each printed as JSON. Raises PipelineError where one failed, after showing what it said."""
        found = []
        for rank, (process, said) in enumerate(self.running, 1):
            if process.poll() is None:
                say(f"waiting for process {rank} of {self.n}")
            output, _ = process.communicate()
            if process.returncode == INTERRUPTED:
                raise KeyboardInterrupt
            if not output:
                said.seek(0)
                print(said.read(), file=sys.stderr, end="", flush=True)
                raise PipelineError(
                    f"process {rank} of {self.n} ended with exit code {process.returncode} (what it said is above); run the "
                    "same command again to go on"
                )
            found.append(json.loads(output))
        return found

    def __exit__(self, *exception: object) -> None:
        running = [process for process, _ in self.running if process.poll() is None]
        for process in running:
            process.terminate()
        try:
            for process in running:
                process.wait(STOP_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            for process in running:
                process.kill()
            raise
        finally:
            self.stack.close()


@contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """os.environ with changes inside the block."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
