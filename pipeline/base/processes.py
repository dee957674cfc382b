"""Processes that belong together: those that one starts for its own work, and those that a launcher started side by side."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout: `data/` lies here, and stages run here so that `evaluate` is ours whatever else is installed."""
SPREAD_VARIABLE = "PIPELINE_PROCESSES"
"""Environment variable in the processes of one command with `--processes N`, the first one included: N."""
LAUNCHERS = ("TORCHELASTIC_RUN_ID", SPREAD_VARIABLE)
"""Environment variables that say who set RANK and WORLD_SIZE: torchrun, or we."""


def is_launched() -> bool:
    """Whether torchrun or `--processes` gave this process its rank, and not another launcher or a variable left over."""
    return any(name in os.environ for name in LAUNCHERS)


def python_path() -> str:
    """PYTHONPATH with the checkout first."""
    return os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)


def die_with_parent() -> None:
    """In the child before exec: have the kernel kill it when its parent dies (Linux; elsewhere it lives on)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def hold_interrupts() -> None:
    """Have Ctrl-C wait in a process that becomes a command of ours, before exec: Python's own start knows no better than a
    traceback. The command's first lines let it in (pipeline/__init__)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def become_child() -> None:
    """In the child before exec: it dies with its parent, and Ctrl-C waits until it can be heard."""
    die_with_parent()
    hold_interrupts()
