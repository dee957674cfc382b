"""The machine: device, dtype, seeds, ranks, versions. What a run records so that it can be made again."""

from __future__ import annotations

import atexit
import contextlib
import gc
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.base.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

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


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on a device: on CUDA by way of pinned memory, so that the host does not wait until what was asked of
    the device before is done."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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
    """Whether Triton is installed, as CUDA builds of torch bring it, from 3.3 on (torch 2.7): before it a kernel takes no bundles
    of arguments."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


BF16_GAIN = 1.2
"""How much faster than float32 a bf16 product must be where it is measured. By AVX512-BF16 it is twice as fast on a Zen 4, and
takes 1.7 times as long on an Intel (Sapphire Rapids without its AMX), so that load decides nothing."""


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 faster than float32, as torch may use it: by AMX always, by AVX512-BF16 where a product
    shows it now. ATEN_CPU_CAPABILITY below avx512 and ONEDNN_MAX_CPU_ISA hold torch back."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    held_back = most not in ("ALL", "DEFAULT")
    if "amx_bf16" in flags and ("AMX" in most or not held_back):
        return True
    if "avx512_bf16" not in flags or (held_back and not any(name in most for name in ("BF16", "FP16", "AMX", "AVX10"))):
        return False
    bf16, float32 = (product_rate(dtype, torch.device("cpu"), 256, 512, 512, rounds=20) for dtype in DTYPES.values())
    return bf16 > BF16_GAIN * float32


def resolve_dtype(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware multiplies it faster, else float32. Returns `bf16` or `float32`."""
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


def measured_seconds(work: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """Seconds that something takes on a device, the best of some rounds after one that warms up: for estimates of time."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    seconds = []
    for _ in range(1 + rounds):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def product_rate(dtype: torch.dtype, device: torch.device, rows: int, inner: int, width: int, rounds: int = 3) -> float:
    """FLOP/s of a [rows, inner] by [inner, width] product, measured now: for estimates of time."""
    x, w = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, width)))
    return 2 * rows * inner * width / measured_seconds(lambda: x @ w, device, rounds)


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
    if (store := restarted_store()) is not None:
        options |= {"store": store, "rank": rank(), "world_size": world_size()}
    torch.distributed.init_process_group(backend, **options)
    try:
        assert torch.distributed.group.WORLD is not None
        yield torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()


def restarted_store() -> Store | None:
    """Where the workers meet that torchrun has restarted on one machine, under keys of this attempt; None: as init_process_group
    does it.

    Unless `--rdzv-backend` names another, torchrun's store outlives its workers, and there the addresses of those that were
    killed would be taken for the new ones'. On several machines each counts restarts of its own: those need
    `--rdzv-backend c10d`, which meets in a new store each time.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1"
    if attempt == "0" or not held:
        return None
    store, _, _ = next(rendezvous("env://"))
    return PrefixStore(f"attempt {attempt}", store)


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


def memory_limit(asked: int | None, device: torch.device, available: int, share: int) -> int:
    """Bytes that this process may use: as asked, else four fifths of what is free, divided by the processes that share."""
    if asked is not None:
        return asked
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available // max(share, 1)
    return free * 4 // 5
