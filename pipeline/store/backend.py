"""Where a store's files lie: a local folder here, object storage in `remote.py`. Everything else works with keys.

A key is a path inside the store, with slashes: `train/resid/c/0/0`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from pipeline.base.errors import DamagedError, DiskError
from pipeline.base.files import atomic, disk_errors, folder_there, regular, sync_folder


@runtime_checkable
class Readable(Protocol):
    """What reading a part of a file takes."""

    def where(self, key: str) -> str:
        """The full path or URL of a key, for messages."""

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, from `offset` on. Raises DamagedError when bytes are missing."""

    def size(self, key: str) -> int | None:
        """Bytes of a file; None when it is not there."""


@runtime_checkable
class Files(Readable, Protocol):
    """The few operations a store needs. Writes appear whole or not at all; all raise DiskError when they cannot."""

    def read(self, key: str, most: int) -> bytes:
        """All bytes of a file. Raises DamagedError when it is not there, or larger than `most` (then it is not read)."""

    def sizes(self, keys: Sequence[str]) -> dict[str, int | None]:
        """Key → bytes of many files, None where one is not there."""

    def write(self, key: str, data: bytes) -> None:
        """Write a whole file."""

    def create(self, key: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A file to write piece by piece; it appears when the block is left without an exception."""

    def delete(self, key: str) -> None:
        """Remove a file; nothing happens when it is not there."""

    def delete_all(self, keys: Sequence[str]) -> None:
        """Remove many."""

    def keys(self) -> list[str]:
        """Every file there is, sorted, leftovers of killed writers included."""


class LocalFiles:
    """A store in a local folder, which need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def where(self, key: str) -> str:
        """The file's path: text, since a store is opened by thousands of them."""
        return os.path.join(self.root, key) if key else str(self.root)

    def read(self, key: str, most: int) -> bytes:
        """All bytes of a file."""
        path = self.where(key)
        with disk_errors(path), missing_is_damage(path), open(path, "rb", opener=regular) as file:
            require_small(path, size := os.fstat(file.fileno()).st_size, most)
            return file.read(size)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """One preadv; goes on where the kernel returns early."""
        path = self.where(key)
        with disk_errors(path), missing_is_damage(path):
            descriptor = regular(path, os.O_RDONLY)
        try:
            left = [buffer.cast("B") for buffer in buffers]
            while left:
                n = os.preadv(descriptor, left, offset)
                if n == 0:
                    raise DamagedError(f"{path}: ends before byte {offset + 1}; it was cut short")
                offset += n
                while left and n >= len(left[0]):
                    n -= len(left.pop(0))
                if left:
                    left[0] = left[0][n:]
        finally:
            os.close(descriptor)

    def size(self, key: str) -> int | None:
        """Bytes of a file; None when it is not there."""
        path = self.where(key)
        with disk_errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if stat.S_ISDIR((found := os.stat(path)).st_mode):
                raise folder_there(path)
            return found.st_size
        return None

    def sizes(self, keys: Sequence[str]) -> dict[str, int | None]:
        """A stat each."""
        return {key: self.size(key) for key in keys}

    def write(self, key: str, data: bytes) -> None:
        """Temporary name, fsync, rename."""
        with self.create(key) as file:
            file.write(data)

    @contextlib.contextmanager
    def create(self, key: str) -> Iterator[BinaryIO]:
        """Temporary name, fsync, rename; new folders are fsynced into their parents too."""
        path = self.root / key
        with disk_errors(path):
            make_folder(path.parent)
        with atomic(path) as file:
            yield file

    def delete(self, key: str) -> None:
        """Unlink and fsync the folder, so that the file stays gone."""
        path = self.root / key
        with disk_errors(path), contextlib.suppress(FileNotFoundError):
            path.unlink()
            sync_folder(path.parent)

    def delete_all(self, keys: Sequence[str]) -> None:
        """Unlink all, then fsync each folder once."""
        for key in keys:
            with disk_errors(path := self.root / key), contextlib.suppress(FileNotFoundError):
                path.unlink()
        for folder in dict.fromkeys((self.root / key).parent for key in keys):
            with disk_errors(folder), contextlib.suppress(FileNotFoundError):
                sync_folder(folder)

    def keys(self) -> list[str]:
        """Every file below the folder. Raises DiskError when the path is a file."""
        with disk_errors(self.root):
            if self.root.exists() and not self.root.is_dir():
                raise DiskError(f"{self.root}: is a file, expected a folder; choose another path")
            return sorted(str(p.relative_to(self.root)) for p in self.root.rglob("*") if not p.is_dir())


class HeldFile:
    """One file of a known size, read whole by a single request."""

    def __init__(self, files: Files, key: str, size: int) -> None:
        """Raises DamagedError unless it has this size."""
        self.files = files
        try:
            self.data = files.read(key, most=size)
        except DamagedError:
            require_size(files.where(key), files.size(key), size)  # the words of every other check
            raise
        require_size(files.where(key), len(self.data), size)

    def where(self, key: str) -> str:
        """As of the files behind."""
        return self.files.where(key)

    def read_into(self, key: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """From memory; a file is checked to hold what its index says before this is asked."""
        for buffer in buffers:
            part = buffer.cast("B")
            part[:] = self.data[offset : offset + len(part)]
            offset += len(part)

    def size(self, key: str) -> int:
        """Of the file."""
        return len(self.data)


@contextlib.contextmanager
def missing_is_damage(where: str) -> Iterator[None]:
    """A file of ours that is not there is a damaged store, not a caller's mistake."""
    try:
        yield
    except IsADirectoryError as error:
        raise folder_there(where) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{where}: the file is gone; run harvest --repair to make it again") from error


def require_size(where: str, size: int | None, expected: int) -> None:
    """Raise DamagedError unless a file is there and has its size."""
    if size is None:
        raise DamagedError(f"{where}: the file is gone; run harvest --repair to make it again")
    if size != expected:
        raise DamagedError(f"{where}: {size} bytes, expected {expected}; run harvest --repair")


def require_small(where: str, size: int, most: int) -> None:
    """Raise DamagedError for a file that is larger than it can be."""
    if size > most:
        raise DamagedError(f"{where}: {size:,} bytes, expected {most:,} at most; run harvest --repair")


def make_folder(folder: Path) -> None:
    """mkdir -p that survives a power cut: each new folder is fsynced into its parent."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)
