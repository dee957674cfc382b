"""Hashes of large files, computed once and kept: a cluster's hundred processes do not all read the model and the corpus.

One small file a hash, under the user's cache folder, named after what says that a file is as it was: path, inode, size, and the
times of its last changes, to the nanosecond. A file that changed a moment ago is hashed and not kept, since it might change once
more within the clock's tick.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

from pipeline.base.errors import DiskError
from pipeline.base.files import hash_file, read_text, sha256, write_bytes

LARGE = 64 << 20
"""Bytes from which a hash is kept; a smaller file is hashed in the time that it takes to look."""
SETTLED_S = 5.0
"""Seconds for which a file must not have changed."""


def kept_folder() -> Path:
    """Where hashes are kept: $XDG_CACHE_HOME/nested-sae/hashes, by default ~/.cache/…"""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "nested-sae" / "hashes"


def kept_hash(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, from before where the file is as it was."""
    before = os.stat(path)
    if before.st_size < LARGE:
        return hash_file(path)
    about = (path.resolve(), before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
    place = kept_folder() / sha256(repr(about))
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{64}", found := read_text(place)):
            return found
    found = hash_file(path)
    after = os.stat(path)
    same = (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == about[3:]
    if same and time.time() - max(after.st_mtime, after.st_ctime) > SETTLED_S:
        with contextlib.suppress(OSError, DiskError):  # a full or read-only home costs time, not correctness
            write_bytes(place, found.encode())
    return found
