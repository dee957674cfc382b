"""Stores at a URL, used from here: read through a cache, or copied to a local disk, where rows are read in any order.

Stopped anywhere, the same call goes on; every shard is checked against its commit record as it arrives.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.base.errors import DamagedError, DiskError, MismatchError
from pipeline.base.files import require_free
from pipeline.base.progress import Progress
from pipeline.store.backend import Files, HeldFile, LocalFiles
from pipeline.store.cache import Cache, CachedFiles
from pipeline.store.layout import COMMITTED, PACKED, estimate_bytes, extras_of
from pipeline.store.objects import REQUESTS, RemoteFiles
from pipeline.store.prepare import locked, require_ours
from pipeline.store.reader import Store
from pipeline.store.root import ROOT_KEY, read_root, write_root
from pipeline.store.split import Split
from pipeline.store.writer import sweep

PIECE = 8 << 20
"""Bytes of one download request; REQUESTS of them are in memory at a time."""


def open_cached(path: Path | str, cache: Cache | None) -> Store:
    """A store as `Store.open` has it; of one at a URL, chunks are kept in the cache."""
    store = Store.open(path)
    if cache is not None and isinstance(store.files, RemoteFiles):
        for split in store.splits:
            split.files = CachedFiles(store.files, cache, store.id)
    return store


def copy_file(source: Files, target: Files, key: str, size: int | None = None) -> None:
    """Copy one file piece by piece; one of a known size that is no larger than a piece, by a single request."""
    if size is not None and size <= PIECE:
        target.write(key, HeldFile(source, key, size).data)
        return
    size = source.size(key)
    if size is None:
        raise DamagedError(f"{source.where(key)}: the file is gone; run harvest --repair")
    buffer = memoryview(bytearray(min(size, PIECE)))
    with target.create(key) as file:
        for offset in range(0, size, PIECE):
            piece = buffer[: min(PIECE, size - offset)]
            source.read_into(key, offset, [piece])
            file.write(piece)


def stage(url: str, path: Path, *, quiet: bool = False) -> Store:
    """Copy a finished store to a local folder and check every byte against its commit records; returns it, opened.

    Stopped anywhere, the same call goes on: shards that are there and whole are not copied again. Raises StoreError
    (no finished store at the URL), MismatchError (another store in the folder), DiskError, DamagedError.
    """
    source = Store.open(url)
    with locked([str(path)]), source.steady():
        copy_store(source, LocalFiles(path), path, quiet=quiet)
    return Store.open(path)


def copy_store(source: Store, target: LocalFiles, path: Path, *, quiet: bool) -> None:
    """The same, while nobody else writes there."""
    require_ours(target)
    sweep(target)
    begin(source, target)
    store = Store(target, path, source.attributes)
    shards = [(split, k) for split in store.splits for k in range(split.n_shards)]
    with ThreadPoolExecutor(REQUESTS) as pool:
        for _ in pool.map(lambda file: copy_file(source.files, target, *file), small_files(store).items()):
            pass
    with Progress(len(shards), "stage", "shard", quiet=quiet) as bar, ThreadPoolExecutor(REQUESTS) as pool:
        for _ in pool.map(lambda shard: copy_shard(source.files, *shard), shards):
            bar.advance(1)
    for split in store.splits:
        for g in range(split.shape.n_groups) if split.packed else ():
            split.check_norms(g)
    store.check_metadata()
    store.check_tokens()
    write_root(target, source.attributes)


def begin(source: Store, target: LocalFiles) -> None:
    """Mark the folder as being written, unless a copy of this store is there. Raises MismatchError, DiskError."""
    n_train, n_eval = source.train.n_sequences, source.eval.n_sequences
    if target.size(ROOT_KEY) is None:
        if target.keys():
            raise DiskError(f"{target.root}: holds part of a store without its root; choose another folder")
        n_extra = sum(extra.array.file_nbytes for extra in extras_of(source.attributes).values())
        require_free(target.root, estimate_bytes(source.config, n_train, n_eval, n_extra), "the copy of the store")
    elif (found := read_root(target)["id"]) != source.id:
        raise MismatchError(f"{target.root}: store {found[:10]}… is there, asked {source.id[:10]}…; use another folder")
    write_root(target, source.attributes | {"state": "preparing"})


def small_files(store: Store) -> dict[str, int | None]:
    """Key → bytes, where the layout says them, of everything but the root and the shards' own files."""
    names = ("tokens", "special", *(PACKED if store.layout.in_groups else ()))
    arrays = [split.arrays[name] for split in store.splits for name in names if name in split.arrays]
    arrays += [store.layout.mean, *(extra.array for extra in extras_of(store.attributes).values())]
    return dict.fromkeys(store.attributes["files"]) | {
        array.key(k): array.file_nbytes for array in arrays for k in range(array.n_files)
    }


def keys_of(store: Store) -> set[str]:
    """Key of every file that a finished store consists of."""
    shards = {
        split.arrays[name].key(k) for split in store.splits for k in range(split.n_shards) for name in own_names(split)
    }
    return {ROOT_KEY} | small_files(store).keys() | shards


def own_names(split: Split) -> tuple[str, ...]:
    """Names of the arrays of which a shard has a file of its own, its commit record last."""
    return ("resid",) if split.packed else (*COMMITTED, "commit")


def copy_shard(source: Files, split: Split, k: int) -> None:
    """Copy one shard, a commit record of its own last, unless it is there and whole. Raises DamagedError when it arrives
    broken."""
    with contextlib.suppress(DamagedError):
        split.check_shard(k)
        return
    if not split.packed:
        split.files.delete(split.arrays["commit"].key(k))
    for name in own_names(split):
        array = split.arrays[name]
        copy_file(source, split.files, array.key(k), split.shard_nbytes(k) if name == "resid" else array.file_nbytes)
    split.check_shard(k)
