"""What is found by reading large files whole, computed once and kept: a cluster's hundred processes do not all read the model and
the corpus for their hashes and for where records lie.

One file each, under the user's cache folder, named after what says that a file is as it was: path, inode, size, and the
times of its last changes, to the nanosecond. What a file that changed a moment ago holds is not kept, since it might change once
more within the clock's tick.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.base.errors import DiskError
from pipeline.base.files import hash_file, read_bytes, sha256, write_bytes

LARGE = 64 << 20
"""Bytes of a file from which something is kept of it; a smaller one is read in the time that it takes to look."""
SETTLED_S = 5.0
"""Seconds for which a file must not have changed."""


def kept_folder() -> Path:
    """Where hashes are kept: $XDG_CACHE_HOME/nested-sae/hashes, by default ~/.cache/…"""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "nested-sae" / "hashes"


def kept_hash(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, from before where the file is as it was."""
    return kept(path, "", lambda: hash_file(path).encode()).decode()


def kept(path: Path, kind: str, find: Callable[[], bytes]) -> bytes:
    """What `find` finds in a file, from before where the file is as it was and so is what was kept, behind its own digest.
    `kind`: of what is found, where it is not the hash."""
    before = os.stat(path)
    if before.st_size < LARGE:
        return find()
    about = (path.resolve(), before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
    place = kept_folder() / (sha256(repr(about)) + kind)
    with contextlib.suppress(OSError):
        digest, _, data = read_bytes(place).partition(b"\n")
        if digest == sha256(data).encode():
            return data
    data = find()
    after = os.stat(path)
    same = (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == about[3:]
    if same and time.time() - max(after.st_mtime, after.st_ctime) > SETTLED_S:
        with contextlib.suppress(OSError, DiskError):  # a full or read-only home costs time, not correctness
            write_bytes(place, sha256(data).encode() + b"\n" + data)
    return data
