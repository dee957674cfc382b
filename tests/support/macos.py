"""Put on PYTHONPATH as sitecustomize.py, it takes from a Python on Linux what macOS does not have: calls of `os`, /proc and /sys;
and what must not be used there: fork without exec."""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import Any

LINUX_ALONE = (
    "posix_fallocate posix_fadvise sched_getaffinity sched_setaffinity memfd_create copy_file_range fdatasync getxattr "
    "setxattr O_DIRECT O_TMPFILE O_PATH"
)
HIDDEN = ("/proc", "/sys/")


def is_hidden(path: Any) -> bool:
    """Whether a path is of a file system that Linux alone has."""
    return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(HIDDEN)


def refuse(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: no file there is opened, and nothing forks."""
    if event == "open" and is_hidden(args[0]):
        raise FileNotFoundError(2, "No such file or directory", args[0])
    if event in ("os.fork", "os.forkpty"):
        raise RuntimeError("a fork without exec")


def stat(path: Any, *args: Any, **options: Any) -> os.stat_result:
    """os.stat, which finds nothing there."""
    if is_hidden(path):
        raise FileNotFoundError(2, "No such file or directory", path)
    return whole_stat(path, *args, **options)


for name in LINUX_ALONE.split():
    if hasattr(os, name):
        delattr(os, name)
whole_stat, os.stat = os.stat, stat
sys.addaudithook(refuse)
multiprocessing.set_start_method("spawn", force=True)
