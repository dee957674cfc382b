"""The machine: device, dtype, seeds, ranks, memory, versions. What a run records so that it can be made again."""

from __future__ import annotations

import atexit
import contextlib
import gc
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.base.errors import UsageError

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA when there is one, else the CPU; on CUDA with its number, and made the current device. Raises UsageError
    for a device that is not there."""
    if name == "auto":
        return current(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"--device {name}: not supported (sums are in float64, which {device.type} may lack); use --device cpu"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: no CUDA device is visible here; use --device cpu or auto")
    return current(device)


def current(device: torch.device) -> torch.device:
    """The device, by its number on CUDA (without one: this process's on its node), and made the current one there: streams,
    graphs and kernels go to the current one."""
    if device.type != "cuda":
        return device
    numbered = torch.device("cuda", local_rank() if device.index is None else device.index)
    torch.cuda.set_device(numbered)
    return numbered


@contextlib.contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """On CUDA, float32 products within the block may round what they multiply to TF32's 10 bits (torch's own default is that
    they may not); on a CPU nothing changes."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def has_triton() -> bool:
    """Whether Triton is installed; CUDA builds of torch bring it, others do not."""
    return importlib.util.find_spec("triton") is not None


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (AMX or AVX512-BF16), so that bf16 is faster than float32, and torch may use it:
    with ATEN_CPU_CAPABILITY below avx512 the machine is treated as one that does not."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    native = "amx_bf16" in flags or "avx512_bf16" in flags
    return native and torch.backends.cpu.get_cpu_capability() == "AVX512"


def resolve_dtype(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware multiplies it natively, else float32. Returns `bf16` or `float32`."""
    if name != "auto":
        return name
    fast = torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else cpu_has_bf16()
    return "bf16" if fast else "float32"


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that is a pure function of its key, the same on every machine and Python."""
    text = "/".join(str(part) for part in key).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def numpy_rng(*key: int | str) -> np.random.Generator:
    """A numpy generator seeded by `derive_seed(*key)`."""
    return np.random.Generator(np.random.PCG64(derive_seed(*key)))


def torch_rng(*key: int | str) -> torch.Generator:
    """A CPU torch generator seeded by `derive_seed(*key)`. Draw on the CPU and move: results do not depend on device."""
    return torch.Generator().manual_seed(derive_seed(*key))


def measured_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that something takes on a device, the best of three after one that warms up: for estimates of time."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    seconds = []
    for _ in range(4):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def product_rate(dtype: torch.dtype, device: torch.device, rows: int, inner: int, width: int) -> float:
    """FLOP/s of a [rows, inner] by [inner, width] product, measured now: for estimates of time."""
    x, w = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, width)))
    return 2 * rows * inner * width / measured_seconds(lambda: x @ w, device)


def environment_number(name: str, default: int) -> int:
    """A whole number of the environment. Raises UsageError naming the variable when it is none."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UsageError(
            f"the environment has {name}={value!r}, which is not a whole number; unset it, or use torchrun"
        )
    return int(value)


def rank() -> int:
    """This process's rank under torchrun, else 0."""
    return environment_number("RANK", 0)


def local_rank() -> int:
    """This process's rank on its own node under torchrun, else 0."""
    return environment_number("LOCAL_RANK", 0)


def world_size() -> int:
    """The number of processes under torchrun, else 1."""
    return environment_number("WORLD_SIZE", 1)


def require_world(meeting: str = "") -> None:
    """Raise UsageError for a rank outside the world, and where processes are to meet, of which `meeting` says what for, with no
    place named where: variables of the environment that something other than torchrun left there."""
    if rank() >= world_size():
        raise UsageError(
            f"the environment has RANK={rank()} and WORLD_SIZE={world_size()}, so no such process; unset both, or use torchrun"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "RANK") if name not in os.environ]
    if meeting and world_size() > 1 and missing:
        raise UsageError(
            f"{meeting}: the environment has WORLD_SIZE={world_size()} but no {missing[0]}; start with torchrun, or unset it"
        )


@contextlib.contextmanager
def process_group(backend: str, **options: Any) -> Iterator[torch.distributed.ProcessGroup]:
    """torch's process group of all ranks inside the block; options as of `torch.distributed.init_process_group`.

    Gloo's threads end with the last reference to the group, and members refer to it in cycles. A thread that is still there
    when the interpreter ends, with a tensor to let go of, aborts the process (pytorch issue 190489: once in twenty runs under
    load), so what is left of the group is collected just before.
    """
    atexit.unregister(gc.collect)
    atexit.register(gc.collect)
    torch.distributed.init_process_group(backend, **options)
    try:
        assert torch.distributed.group.WORLD is not None
        yield torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()


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


PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "zarr", "numcodecs", "numpy", "safetensors")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed versions of the libraries that shape results, without importing them."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def maker(device: torch.device, packages: tuple[str, ...]) -> dict[str, str]:
    """What the last bits of a computation depend on: versions of the packages that compute, and the GPU's name, or cpu."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return versions(packages) | {"device": name}


@cache
def git_state() -> str:
    """Commit of this checkout, `-dirty` when it has uncommitted changes, `unknown` outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        run = subprocess.run(("git", *words), cwd=here, capture_output=True, text=True, timeout=10, check=True)
        return run.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
