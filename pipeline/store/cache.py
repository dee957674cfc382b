"""Ranges of remote files, kept on a local disk: the least recently used go, and several processes may share a folder.

    DIR/ab/<hash of store, key and range>     the bytes, then their crc32c

A range is one file that appears whole (temporary name, rename), so whoever reads has all of it or none; when it was last used
is its modification time. Whoever has written its share of new bytes looks at the folder, under a lock, and deletes the oldest
until it holds nine tenths of what it may. A file that is deleted while another process reads it stays readable to that one, and
one that no longer fits its crc32c is fetched again. What is read from here is checked against the store's records like
any other bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.base.errors import DiskError
from pipeline.base.files import PARTIAL, anew, crc32c, human_bytes, regular, require_replaceable, sha256
from pipeline.base.progress import say
from pipeline.store.backend import Files

LEAST = 4096
"""Bytes of a range from which on it is kept: smaller ones (indexes, checksums) are read once anyway."""
SHARE = 32
"""A process looks at the folder whenever it wrote so many parts of what the folder may hold."""
LOCK = "cache.lock"


class Cache:
    """A folder for at most `most` bytes. Use `CachedFiles` to read through it."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        self.n_hits = self.n_misses = 0
        self.unseen = 0  # bytes written since this process last looked at the folder
        self.lock = threading.Lock()
        self.full = False

    def path(self, name: str) -> Path:
        """Where a range is kept."""
        digest = sha256(name)
        return self.folder / digest[:2] / digest

    def get(self, name: str, buffers: Sequence[memoryview]) -> bool:
        """Fill the buffers with what is kept under a name; False where it is not, or is damaged."""
        path = self.path(name)
        try:
            descriptor = regular(str(path), os.O_RDONLY)
        except OSError:
            return self.count(hit=False)
        stored = memoryview(bytearray(4))
        try:
            n = sum(map(len, buffers))
            whole = os.fstat(descriptor).st_size == n + 4 and os.preadv(descriptor, [*buffers, stored], 0) == n + 4
            os.utime(descriptor)
        except OSError:
            whole = False
        finally:
            os.close(descriptor)
        if whole and checksum(buffers) == bytes(stored):
            return self.count(hit=True)
        with contextlib.suppress(OSError):
            path.unlink()
        return self.count(hit=False)

    def count(self, *, hit: bool) -> bool:
        """Count a hit or a miss."""
        with self.lock:
            self.n_hits += hit
            self.n_misses += not hit
        return hit

    def put(self, name: str, buffers: Sequence[memoryview]) -> None:
        """Keep what was fetched; where the disk does not take it, it is said once and nothing is kept any more."""
        if self.full:
            return
        path = self.path(name)
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}{PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            require_replaceable(path)
            with open(partial, "wb", opener=anew) as file:
                file.writelines([*buffers, checksum(buffers)])
            os.replace(partial, path)
            n = sum(map(len, buffers)) + 4
            with self.lock:
                self.unseen += n
                if due := self.unseen * SHARE >= self.most:
                    self.unseen = 0
            if due:
                self.make_room()
        except FileNotFoundError:
            return  # another process made room meanwhile, or a person emptied the folder: this range is not kept
        except OSError as error:
            self.full = True
            with contextlib.suppress(OSError):
                partial.unlink()
            say(f"{self.folder}: nothing more is kept here ({error.strerror}); training goes on from the network")

    def make_room(self) -> None:
        """Delete what was not used for longest until nine tenths of `most` are left, and what killed writers left. One process
        at a time; where the file system has no locks, or another is at it, that one does it."""
        with open(self.folder / LOCK, "a", opener=regular) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            except OSError:
                pass  # deleting twice does no harm
            kept, total = [], 0
            for path, found in self.entries():
                kept.append((found.st_mtime_ns, found.st_size, path))
                total += found.st_size
            if total <= self.most:
                return
            for _, size, path in sorted(kept, key=lambda entry: entry[0]):
                if total * 10 <= self.most * 9:
                    break
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                total -= size

    def entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Every file of the cache; those of writers at work too, which are the last to go."""
        for folder in self.folder.iterdir():
            if len(folder.name) == 2 and folder.is_dir():
                for path in folder.iterdir():
                    with contextlib.suppress(FileNotFoundError):
                        yield path, path.stat()

    def text(self) -> str:
        """How much of what was read lay here."""
        total = self.n_hits + self.n_misses
        return f"{100 * self.n_hits / max(total, 1):.0f} % of {total:,} chunks from {self.folder}"


def checksum(buffers: Sequence[memoryview]) -> bytes:
    """The crc32c of buffers one after the other."""
    crc = 0
    for buffer in buffers:
        crc = crc32c(np.frombuffer(buffer, np.uint8), crc)
    return crc.to_bytes(4, "little")


def open_cache(folder: Path, most: int) -> Cache:
    """A cache in a folder, which is made, and is brought to its size. Raises DiskError where it cannot be written, or holds
    something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if other := [path.name for path in folder.iterdir() if len(path.name) != 2 and path.name != LOCK]:
            raise DiskError(
                f"{folder}: holds something else ({', '.join(sorted(other)[:3])}); choose a folder of its own"
            )
        cache = Cache(folder, most)
        cache.make_room()
    except DiskError:
        raise
    except OSError as error:
        raise DiskError(f"{folder}: no folder to keep a cache in ({error.strerror}); choose another one") from error
    free = os.statvfs(folder)
    if free.f_bavail * free.f_frsize + sum(found.st_size for _, found in cache.entries()) < most:
        say(
            f"note     {folder}: has less room than --cache-size {human_bytes(most)}; what it does not take is not kept"
        )
    return cache


class CachedFiles:
    """Files behind a cache: ranges of LEAST bytes and more are read from there, all else, and all that is written, goes through.

    `origin`: of which store they are, so that another at the same URL is another."""

    def __init__(self, files: Files, cache: Cache, origin: str) -> None:
        self.files, self.cache, self.origin = files, cache, origin

    def where(self, key: str) -> str:
        """As of the files behind."""
        return self.files.where(key)

    def read(self, key: str, most: int) -> bytes:
        """As of the files behind."""
        return self.files.read(key, most)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """From the cache, or fetched and kept."""
        wanted = [buffer.cast("B") for buffer in buffers]
        n = sum(map(len, wanted))
        if n < LEAST:
            self.files.read_into(key, offset, wanted)
            return
        name = f"{self.origin}/{key}/{offset}/{n}"
        if not self.cache.get(name, wanted):
            self.files.read_into(key, offset, wanted)
            self.cache.put(name, wanted)

    def size(self, key: str) -> int | None:
        """As of the files behind."""
        return self.files.size(key)

    def sizes(self, keys: Sequence[str]) -> dict[str, int | None]:
        """As of the files behind."""
        return self.files.sizes(keys)

    def write(self, key: str, data: bytes) -> None:
        """As of the files behind."""
        self.files.write(key, data)

    def create(self, key: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """As of the files behind."""
        return self.files.create(key)

    def delete(self, key: str) -> None:
        """As of the files behind."""
        self.files.delete(key)

    def delete_all(self, keys: Sequence[str]) -> None:
        """As of the files behind."""
        self.files.delete_all(keys)

    def keys(self) -> list[str]:
        """As of the files behind."""
        return self.files.keys()
