"""Files that appear whole or not at all: temporary name, fsync, rename. JSON that is the same bytes for the same data."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import crc32c as crc32c_package
import numpy.typing as npt

from pipeline.base.errors import ADVICE, DamagedError, DiskError, MismatchError
from pipeline.base.fields import require_plain

PARTIAL = ".partial"
"""Suffix of a file that is being written. One that is found was left by a killed process and may be deleted."""


def canonical_json(data: Any) -> str:
    """Sorted keys, no spaces, no NaN: equal data gives equal text. Raises ValueError on NaN or infinity."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def sha256(data: bytes | str) -> str:
    """Hex digest; a string is hashed as UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def hash_parts(parts: Iterable[bytes]) -> str:
    """Hex SHA-256 of bytes that come in parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def crc32c(data: bytes | npt.NDArray[Any], crc: int = 0) -> int:
    """crc32c of bytes or of a contiguous array, going on from `crc`; about 10 GB/s a core.

    The package releases the interpreter's lock from 32 kB on, so that a thread that checks chunks does not stall those
    that gather rows.
    """
    return int(crc32c_package.crc32c(data if isinstance(data, bytes) else data.data, crc))


def hash_config(config: Mapping[str, Any]) -> str:
    """Hex SHA-256 of the canonical JSON of a config: the identity of what it makes."""
    return sha256(canonical_json(config))


def is_url(path: Path | str) -> bool:
    """Whether a path names object storage (s3://…, memory://…) rather than a local folder."""
    return isinstance(path, str) and "://" in path


def beside(store: str) -> Path:
    """A local folder beside a store, for temporary files and for asking how much is free."""
    return Path.cwd() if is_url(store) else Path(store).absolute().parent


KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
"""What a name may lead to that has no bytes of its own, or no end."""


def regular(path: str, flags: int) -> int:
    """The `opener` of every file of which only the name is known: a descriptor. Raises OSError as os.open does, and DamagedError
    for what is no regular file, links followed; a pipe is not waited for. A folder is left to `open`, which refuses it."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
        if (mode := stat.S_IFMT(os.fstat(descriptor).st_mode)) in (stat.S_IFREG, stat.S_IFDIR):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EOPNOTSUPP):  # a socket; a pipe to be written, which nobody reads
            raise
        mode = stat.S_IFMT(os.stat(path).st_mode)
    raise not_regular(path, mode)


def anew(path: str, flags: int) -> int:
    """The `opener` of a temporary file under a name of this process's own: a descriptor. What lies there was left by a killed
    process of the same number, or planted, and goes; a link is never followed. Raises OSError as os.open does."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return os.open(path, flags | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def require_replaceable(path: Path) -> None:
    """Raise DamagedError for a device, a pipe or a socket, links followed, and for any name in /dev, where a link may lead to
    what this process writes to: a rename would take its place. Raises OSError where it cannot be looked at."""
    with contextlib.suppress(FileNotFoundError):
        require_ordinary(path)
        if os.path.lexists(path) and os.path.realpath(path.parent) == "/dev":
            raise not_regular(path, stat.S_IFCHR)


def require_ordinary(path: Path) -> None:
    """Raise DamagedError for a device, a pipe or a socket, links followed, and OSError where it cannot be looked at."""
    if (mode := stat.S_IFMT(os.stat(path).st_mode)) not in (stat.S_IFREG, stat.S_IFDIR):
        raise not_regular(path, mode)


def not_regular(path: Path | str, mode: int) -> DamagedError:
    """What is said of a file of this mode, which is no regular file."""
    what = f"{KINDS.get(mode, 'no file')}, expected a regular file"
    error = DamagedError(f"{path}: {what}; remove it or give another")
    error.strerror = what  # for who words an OSError anew
    return error


def folder_there(path: Path | str) -> DamagedError:
    """What is said of a folder that has the name of a file of ours."""
    return DamagedError(f"{path}: a folder stands where a file should; remove it, then make the file again")


def read_bytes(path: Path) -> bytes:
    """A whole file. Raises as `regular` does."""
    with open(path, "rb", opener=regular) as file:
        return file.read()


def read_text(path: Path, errors: str = "strict") -> str:
    """A whole file as UTF-8, its line ends as \\n. Raises as `regular` does, and UnicodeDecodeError."""
    with open(path, encoding="utf-8", errors=errors, opener=regular) as file:
        return file.read()


def read_lines(path: Path, errors: str = "strict") -> list[str]:
    """The lines of a file as UTF-8, which end at \\n alone: what else ends a line to Python may stand inside a JSON string, and a
    hash of lines must see it. Raises as `read_text`."""
    lines = read_bytes(path).decode("utf-8", errors).split("\n")
    return lines if lines[-1] else lines[:-1]


def hash_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces. Raises as `regular` does."""
    with open(path, "rb", opener=regular) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing so that it appears whole or not at all, and survives a power cut.

    Bytes go to a sibling `NAME.<pid>.partial`; on success it is fsynced and renamed and its folder fsynced, on any
    exception it is removed. Raises DiskError when the disk is full or the folder read-only, and as `require_replaceable`
    does.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    with disk_errors(path):
        require_replaceable(path)
        if path.is_dir():
            raise folder_there(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb", opener=anew) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that a rename in it is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path, what: str, *, shared: bool = False) -> int:
    """A descriptor that holds the one lock of a folder until it is closed or the process is gone, however it ends; `shared` with
    others who ask for it so.

    Raises DiskError, saying `what` the other process is doing, when the lock is held for longer than a process that was
    killed takes to let go of it (a child that it was starting may hold it too), or when the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + LET_GO_S
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return descriptor
        except OSError as error:
            if isinstance(error, BlockingIOError) and time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise DiskError(f"{folder}: another process is {what}; wait for it or stop it") from error
            raise DiskError(
                f"{folder}: cannot be locked ({error.strerror}); choose a folder on a local disk"
            ) from error


def is_locked(folder: Path) -> bool | None:
    """Whether a process holds a folder's lock now; None where that cannot be asked. It leaves nothing behind; while it asks it
    is itself in the way of `lock_folder`, which waits that out."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


LET_GO_S = 2.0
"""Seconds to wait for a lock."""


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file atomically."""
    with atomic(path) as file:
        file.write(data)


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON with sorted keys atomically, for people to read."""
    write_bytes(path, json_bytes(data))


def json_bytes(data: Any) -> bytes:
    """Indented JSON with sorted keys, for people to read."""
    return (json.dumps(data, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def write_alone(path: Path, data: bytes) -> None:
    """Write a file atomically that no other process writes meanwhile: what killed ones left of it is deleted."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*{PARTIAL}"):
        left.unlink(missing_ok=True)
    write_bytes(path, data)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> None:
    """Rows as CSV with a head, atomically: the columns of `names`, or of the first row; a missing value is an empty field."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names or list(rows[0] if rows else ()), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def read_json(path: Path) -> Any:
    """Read a JSON file as every format of ours is: plain data (`require_plain`). Raises DamagedError when it is not, and
    FileNotFoundError when it is not there."""
    data = read_any_json(path)
    require_plain(path, data)
    return data


def read_any_json(path: Path) -> Any:
    """Read a JSON file of others, which may hold numbers that are none (Infinity) and text that is not Unicode. Raises as
    `read_json`."""
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: not readable as JSON ({error}); restore it or make it again") from error


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn what a disk says (full, read-only, no permission) into one DiskError that names the path."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = free_bytes(Path(path))
            raise DiskError(
                f"{path}: the disk is full ({human_bytes(free)} free); make room, then run again"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise DiskError(f"{path}: cannot write here ({error.strerror}); choose another folder") from error
        if error.filename is None and error.errno in ADVICE:  # of a descriptor, which knows no path
            raise DiskError(f"{path}: {error.strerror}; {ADVICE[error.errno]}") from error
        raise


def free_bytes(path: Path) -> int:
    """Bytes free for us on the disk that holds `path`, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_free(path: Path, needed: int, what: str) -> None:
    """Raise DiskError unless `needed` bytes are free where `path` is or will be."""
    free = free_bytes(path)
    if free < needed:
        raise DiskError(
            f"{path}: {what} needs {human_bytes(needed)}, {human_bytes(free)} are free; make room or choose another disk"
        )


LONGEST_NAME = 100
"""Bytes of a name that `safe_name` makes; what is put before and behind it must fit a file system's 255."""


def safe_name(text: str) -> str:
    """A file's name out of text that was read from a file or the network: never a path, hidden, or over LONGEST_NAME bytes.

    Letters, digits and . _ = + , @ - of ASCII stay, all else becomes _. A text that had to change ends in 10 digits of its
    hash, so that different texts have different names.
    """
    name = re.sub(r"[^A-Za-z0-9._=+,@-]|^[.-]|^$", "_", text)
    if name == text and len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 11]}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"


def require_writable(folder: Path) -> None:
    """Make an output folder where there is none. Raises DiskError unless files can be made in it: found before work begins."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=PARTIAL):
            pass
    except OSError as error:
        raise DiskError(f"{folder}: no folder to write to ({error.strerror}); choose another one") from error


def sweep_partials(folder: Path) -> list[Path]:
    """Delete what killed writers left under `folder`; return what was deleted. Call it only where nobody else writes."""
    left = sorted(folder.rglob(f"*{PARTIAL}")) if folder.is_dir() else []
    for path in left:
        path.unlink(missing_ok=True)
    return left


MOST_NAMED = 10
"""Fields that a message names, of however many that differ."""


def require_same(path: Path, found: Mapping[str, Any], asked: Mapping[str, Any], what: str) -> None:
    """Raise MismatchError naming the fields in which the config on disk differs from the one asked for."""
    found, asked = flattened(found), flattened(asked)
    names = sorted(name for name in found.keys() | asked.keys() if found.get(name) != asked.get(name))
    if names:
        shown = [
            f"{n[:80]}: there {repr(found.get(n))[:80]}, asked {repr(asked.get(n))[:80]}" for n in names[:MOST_NAMED]
        ]
        detail = "; ".join(shown) + (f"; and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
        raise MismatchError(f"{path}: {what} was made with another config ({detail}); use its config or another path")


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config with mappings in it as one mapping, names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def human_bytes(n: float) -> str:
    """46.1 GB and the like: powers of 1000, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")
