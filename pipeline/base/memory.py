"""Memory that a process may use: the machine's, within the limit of every cgroup around it (a Slurm job's, a container's)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MemoryFiles:
    """What a cgroup's memory files are called: limits, what is used, and fields of memory.stat for its pages of files."""

    limits: tuple[str, ...]
    used: str
    cached: tuple[str, ...]


MEMORY_FILES = {
    "cgroup2": MemoryFiles(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
    "cgroup": MemoryFiles(
        ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
    ),
}
"""By type of file system: versions 2 and 1. Above memory.high a process is slowed down until it all but stands still."""
PROC = Path("/proc/self")
"""Where the kernel lists the cgroups that this process is in, and where their file systems are mounted."""


def available_memory() -> int:
    """Bytes of memory that can be used without swapping (MemAvailable, within the limit of every cgroup around this process)."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for folder, files in memory_cgroups():
        limits = [n for n in (read_number(folder / name) for name in files.limits) if n is not None]
        if limits:
            used = (read_number(folder / files.used) or 0) - cached(folder, files)
            available = min(available, min(limits) - max(used, 0))
    return max(available, 0)


def read_number(path: Path) -> int | None:
    """The whole number in a file of a cgroup; None for `max`, and where it is not there or not ours to read."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def memory_cgroups() -> Iterator[tuple[Path, MemoryFiles]]:
    """The cgroup that this process is in and all those around it, any of which may set a limit (a Slurm job's is a child).

    Both versions, wherever they are mounted. Of a cgroup that lies outside what is mounted (a container's, or another
    namespace's) only the mounted one can be seen.
    """
    own = {
        name: path
        for _, names, path in (line.split(":", 2) for line in proc_lines("cgroup"))
        for name in names.split(",")
    }
    for line in proc_lines("mountinfo"):
        where, _, what = line.partition(" - ")
        kind, _, options = what.split(" ", 2)
        controller = "" if kind == "cgroup2" else "memory"
        if kind not in MEMORY_FILES or (controller and controller not in options.split(",")):
            continue
        root, mount = (
            Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), word)) for word in where.split(" ")[3:5]
        )
        path = Path(own.get(controller, root))
        inside = path.relative_to(root).parts if path.is_relative_to(root) else ()
        if ".." in inside:
            inside = ()
        for depth in range(len(inside) + 1):
            yield mount.joinpath(*inside[:depth]), MEMORY_FILES[kind]


def proc_lines(name: str) -> list[str]:
    """Lines of what the kernel says of this process; none where it says nothing (not Linux)."""
    try:
        return (PROC / name).read_text().splitlines()
    except OSError:
        return []


def cached(folder: Path, files: MemoryFiles) -> int:
    """Bytes that a cgroup is charged for files in the page cache, which go as soon as memory is short."""
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    return sum(int(fields.get(name, 0)) for name in files.cached)
