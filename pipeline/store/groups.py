"""Norms, moments and commit records of a finished store lie in groups of shards; of an unfinished one, in a file a shard.

`pack` writes the groups when a store is finished, `unpack` gives every shard its record back before it is extended or repaired.
Neither takes anything away: the root says which of the two counts (`committed`), and what does not is deleted after it said so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.base.files import sha256
from pipeline.store.backend import Files
from pipeline.store.layout import PACKED, Array, SplitLayout
from pipeline.store.record import commit_tags, part_digest, record_bytes, record_of
from pipeline.store.shards import index_nbytes, with_crc
from pipeline.store.split import Split

AT_ONCE = 4
"""Groups that are written or read side by side."""


def pack_bytes(shape: SplitLayout) -> int:
    """Most bytes that `pack` and `unpack` hold: the norms of AT_ONCE groups, and as much again as files have them."""
    return AT_ONCE * 2 * 4 * shape.group * shape.layout.shard_rows


def pack(split: Split) -> list[str]:
    """Write the arrays of PACKED from the records of all shards; returns the SHA-256 of each file of `commit`.

    Raises DamagedError for a record that changed since it was written.
    """
    with ThreadPoolExecutor(AT_ONCE, "pack") as pool:
        return list(pool.map(lambda g: pack_group(split, g), range(split.shape.n_groups)))


def pack_group(split: Split, g: int) -> str:
    """The same of one group."""
    for name in PACKED:
        array = split.arrays[name]
        data = np.full(array.chunk, array.padding, array.numpy_dtype)
        for slot, k in zip(data.reshape(split.shape.group, -1), split.shape.shards_of(g)):
            slot[:] = split.committed_part(name, k)
        split.files.write(array.key(g), packed := with_crc(data))
    return sha256(packed)  # the last of PACKED is commit


def unpack(files: Files, origin: str, shapes: Sequence[SplitLayout]) -> None:
    """Write the record of every shard whose part of the groups is whole and whose file of rows has its size.

    A shard of which something is damaged gets none, and its neighbours in the group do.
    """
    groups = [(shape, g) for shape in shapes for g in range(shape.n_groups)]
    with ThreadPoolExecutor(AT_ONCE, "unpack") as pool:
        for _ in pool.map(lambda group: unpack_group(files, origin, *group), groups):
            pass


def unpack_group(files: Files, origin: str, shape: SplitLayout, g: int) -> None:
    """The same of one group."""
    held = {name: salvaged(files, shape.arrays[name], g, shape.group) for name in PACKED}
    found = {name: slots for name, slots in held.items() if slots is not None}
    if len(found) < len(PACKED):
        return
    for slot, k in enumerate(shape.shards_of(g)):
        parts = {name: slots[slot] for name, slots in found.items()}
        if is_whole(files, origin, shape, k, parts):
            files.write(shape.record_key(k), record_bytes(parts, shape.layout))


def is_whole(files: Files, origin: str, shape: SplitLayout, k: int, parts: Mapping[str, npt.NDArray[Any]]) -> bool:
    """Whether shard k's part of its group is what was committed, and its file of rows of the size that was."""
    record = record_of(parts["commit"], commit_tags(origin, shape.name, k), shape.n_chunks(k))
    if record is None or any(part_digest(parts[name]) != record.digest(name) for name in ("norm", "moments")):
        return False
    size = int(record.nbytes.sum()) + index_nbytes(shape.layout.chunks_per_shard)
    return files.size(shape.arrays["resid"].key(k)) == size


def salvaged(files: Files, array: Array, g: int, group: int) -> npt.NDArray[Any] | None:
    """What a group's file holds, [shard, …], whether or not it fits its checksum; None where it is gone or of another size."""
    if files.size(array.key(g)) != array.file_nbytes:
        return None
    data = files.read(array.key(g), most=array.file_nbytes)[:-4]
    return np.frombuffer(data, array.numpy_dtype).reshape(group, -1)


def delete_groups(files: Files) -> None:
    """Take the groups' norms, moments and commit records away, which an unfinished store does not read."""
    parts = tuple(f"/{name}/c/" for name in PACKED)
    files.delete_all([key for key in files.keys() if any(part in key for part in parts)])  # noqa: SIM118 (not a dict)
