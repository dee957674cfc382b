"""Reading an activation store: what is in it, rows in order, and whether every byte is what was written.

    store = Store.open("acts.zarr")          # checks all but bodies and tokens, which are when they are read
    x = store.train.read(0, 4096)            # rows in order, bf16 [row, d_model], crc checked
    mean, scale = store.mean, store.scale    # (x − mean) · scale has a mean square norm of 1 over kept rows

Nothing that is missing or changed is ever read as data: it raises DamagedError. Layout: FORMAT.md, "Store".
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.base.errors import DamagedError, PipelineError, StoreError
from pipeline.base.files import PARTIAL, sha256
from pipeline.base.progress import Progress
from pipeline.store.backend import Files, LocalFiles
from pipeline.store.beside import BesideRows
from pipeline.store.large import ADVICE, large_key, read_large
from pipeline.store.layout import SPLITS, Layout, SplitLayout, extras_of
from pipeline.store.moments import Statistics, mean_and_scale, median_of, norms_and_moments
from pipeline.store.objects import REQUESTS, open_files
from pipeline.store.root import MOST_BYTES, read_root
from pipeline.store.split import MassiveRows, Prepared, read_array, read_part, to_numpy, usable
from pipeline.store.split import Split as Split

Check = tuple[str, Callable[[], None]]
SAME = 1e-9
"""Relative difference within which float64 sums over the same rows agree, in whatever order a machine adds."""


class Store:
    """An opened store. Use `Store.open`, which checks it; `Store.load` reads the root alone and checks only that."""

    def __init__(self, files: Files, path: Path | str, attributes: dict[str, Any]) -> None:
        self.files, self.where, self.path, self.attributes = files, str(path), Path(path), attributes
        self.id: str = attributes["id"]
        self.config: dict[str, Any] = attributes["config"]
        self.complete: bool = attributes["state"] == "complete"
        self.layout = Layout.from_config(self.config, attributes["version"])
        self.d_model, self.context, self.dtype = self.layout.d_model, self.layout.context, self.layout.torch_dtype
        self._extras = extras_of(attributes)
        self._statistics = Statistics(**attributes["statistics"]) if self.complete else None
        self.train, self.eval = (
            Split(
                files,
                SplitLayout(name, self.layout, attributes["n_sequences"][name]),
                self._statistics,
                prepared_of(attributes, name),
                attributes.get("origin"),
            )
            for name in SPLITS
        )

    @staticmethod
    def load(path: Path | str) -> Store:
        """Read the root's zarr.json alone. Raises StoreError (no store, another version) or DamagedError."""
        files = open_files(path)
        return Store(files, path, read_root(files))

    @staticmethod
    def open(path: Path | str, *, complete: bool = True, check: bool = True) -> Store:
        """Open a store after checking metadata, sizes and commit records, which say where every chunk stands; bodies, tokens and
        the index in a shard's own file are checked when they are first read.

        `check=False` is for describing or verifying a store that may be damaged: then only the root is checked.
        Raises StoreError when there is none, it is unfinished (unless `complete` is False) or of another version, and
        DamagedError for the first thing that is not as it was written.
        """
        store = Store.load(path)
        with store.steady():
            if complete and not store.complete:
                raise StoreError(f"{path}: {store.progress()}; run the same harvest command again to finish it")
            if check:
                store.check()
        return store

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """What is read in the block is of the store as it was opened. Damage is said to be another process's work where one has
        begun to extend, repair or finish the store since: raises StoreError for it, DamagedError for other damage."""
        try:
            yield
        except DamagedError as error:
            if (why := self.changed()) is None:
                raise
            raise StoreError(f"{self.where}: {why}") from error

    def changed(self) -> str | None:
        """What another process has done to the store since it was opened, and what to do; None where its root is as it was."""
        try:
            now = read_root(self.files)
        except (DamagedError, StoreError):
            return None
        if now == self.attributes:
            return None
        if now["state"] == "complete":
            return "another process extended, repaired or finished it while it was read; run the same command again"
        return "another process extends or repairs it; run the same command again when that is done"

    @property
    def statistics(self) -> Statistics:
        """What harvest measured. Raises StoreError when the store is unfinished."""
        if self._statistics is None:
            raise StoreError(f"{self.where}: {self.progress()}, so it has no statistics; finish the harvest")
        return self._statistics

    @property
    def made_by(self) -> list[dict[str, str]]:
        """Who made its rows (makers.py), in the order in which they began; empty where nobody knows."""
        return list(self.attributes.get("made_by") or ())

    @property
    def splits(self) -> tuple[Split, Split]:
        """Training, evaluation."""
        return self.train, self.eval

    @cached_property
    def mean(self) -> Tensor:
        """Mean of the training split's kept rows, float32 [d_model]."""
        return torch.from_numpy(self.mean64.astype(np.float32))

    @cached_property
    def mean64(self) -> npt.NDArray[np.float64]:
        """The mean as it is stored, float64 [d_model]."""
        return read_array(self.files, self.layout.mean)

    @property
    def extras(self) -> tuple[str, ...]:
        """Paths of the arrays that the store carries beside its rows (FORMAT.md), in order."""
        return tuple(sorted(self._extras))

    def extra(self, path: str) -> npt.NDArray[Any]:
        """One of them, whole. Raises StoreError when the store has none of this name, DamagedError when bytes changed."""
        if path not in self._extras:
            raise StoreError(f"{self.where}: has no array {path}")
        extra = self._extras[path]
        found = read_part(self.files, extra.array, 0)
        if (digest := sha256(found.tobytes())) != extra.sha256:
            raise DamagedError(f"{self.files.where(path)}: SHA-256 {digest[:10]}…, expected {extra.sha256[:10]}…")
        return found

    @property
    def scale(self) -> float:
        """(E‖x − mean‖²)^−½ over the training split's kept rows."""
        return self.statistics.scale

    def mean_and_scale(self, max_norm: float | None) -> tuple[Tensor, float]:
        """Mean (float32 [d_model]) and scale for another multiple of the median norm; None: no row is massive.

        Reads the massive rows, whose chunks are checked, and takes them out of the stored float64 moments.
        """
        if max_norm == self.statistics.massive_multiple:
            return self.mean, self.scale
        massive = self.train.massive(max_norm, self.statistics.median_norm)
        mean, scale, _ = mean_and_scale(moments_without(self.train, massive)[0], self.where)
        return torch.from_numpy(mean.astype(np.float32)), scale

    def progress(self) -> str:
        """How far an unfinished harvest has come, in words."""
        if self.attributes["state"] == "preparing":
            return "not prepared to its end: a harvest is at it, or was stopped there"
        done = sum(split.commit(k) is not None for split in self.splits for k in range(split.n_shards))
        return f"unfinished, {done} of {sum(split.n_shards for split in self.splits)} shards are committed"

    def checks(self, *, bodies: bool) -> Iterator[Check]:
        """What there is to check, in order: a name, and a function that raises DamagedError when it is not so.

        Any may run beside any other, but `statistics`, the last, after all. `bodies`: of shards, tokens and special positions.
        """
        yield from self._metadata_checks(bodies=bodies)
        sizes = {} if bodies else self._sizes()
        for split in self.splits:
            for g in range(split.shape.n_groups) if split.packed else ():
                check = partial(split.check_norms, g) if bodies else partial(split.check_group, g, sizes)
                yield f"{split.name} group {g}", check
            for k in range(split.n_shards) if bodies or not split.packed else ():
                if self.complete or split.has_record(k):
                    yield f"{split.name} shard {k}", partial(split.check_shard, k, bodies)
        if self.complete:
            yield "mean", self._check_mean
        if self.complete and bodies:
            yield "statistics", self._check_statistics

    def _sizes(self) -> dict[str, int | None]:
        """Key → bytes of the groups' files and of the shards' files of rows, of a finished store from version 4 on."""
        packed = [split for split in self.splits if split.packed]
        small = [key for split in packed for g in range(split.shape.n_groups) for key in split.group_files(g)]
        resid = [split.arrays["resid"].key(k) for split in packed for k in range(split.n_shards)]
        return self.files.sizes(small + resid) if packed else {}

    def check(self) -> None:
        """Raise DamagedError for the first thing that is not as it was written; bodies, tokens and special positions are not
        read before they are used."""
        with checkers(self.files) as pool:
            for _ in pool.map(lambda check: check[1](), self.checks(bodies=False)):
                pass

    def _metadata_checks(self, *, bodies: bool) -> Iterator[Check]:
        for key, digest in sorted(self.attributes["files"].items()):
            yield key, partial(check_hash, self.files, key, digest)
        for split in self.splits if bodies else ():
            for name in split.prepared.sha256:
                yield f"{split.name} {name}", partial(split.check_whole, name)
        for path in self.extras:
            yield path, partial(self._check_extra, path)

    def check_metadata(self) -> None:
        """Raise DamagedError unless every zarr.json is as it was prepared."""
        for _, run in self._metadata_checks(bodies=False):
            run()

    def check_tokens(self) -> None:
        """Raise DamagedError unless all tokens and special positions are as prepared; each part is so checked when it is read."""
        for split in self.splits:
            for name in split.prepared.sha256:
                split.require_whole(name)

    def extra_in_parts(self, path: str) -> BesideRows:
        """One of dimension one, to be read in parts. Raises as `extra`."""
        if path not in self._extras:
            raise StoreError(f"{self.where}: has no array {path}")
        return BesideRows(self.files, self._extras[path])

    def _check_extra(self, path: str) -> None:
        BesideRows(self.files, self._extras[path])

    def _check_mean(self) -> None:
        if sha256(self.mean64.tobytes()) != self.statistics.mean_sha256:
            raise DamagedError(
                f"{self.files.where('mean')}: not the mean that its statistics name; run harvest --repair"
            )

    def _check_statistics(self) -> None:
        """Measured again from norms, masks and moments: counts and median exactly, sums but for the order of their terms."""
        mean, found = measure(self, self.statistics.massive_multiple)
        held, here = self.statistics.to_dict(), found.to_dict()
        for name in sorted(held.keys() - {"mean_sha256"}):
            if not math.isclose(held[name], here[name], rel_tol=SAME, abs_tol=0.0):
                raise DamagedError(
                    f"{self.where}: its statistics say {name} {held[name]:.10g}, its rows {here[name]:.10g}; whoever sealed them "
                    "anew changed them; run harvest --repair, or do not use it"
                )
        if np.abs(mean - self.mean64).max() > SAME * np.abs(mean).max():
            raise DamagedError(f"{self.files.where('mean')}: not the mean of its rows; run harvest --repair")

    def verify(self, *, bodies: bool = True, quiet: bool = False) -> list[str]:
        """Every problem there is, one line each; empty when the store is whole. `bodies` reads every byte, by all cores. Of one
        that is being prepared it is that: its other files need not be there yet."""
        if self.attributes["state"] == "preparing":
            return [f"{self.where}: {self.progress()}"]
        problems = [] if self.complete else [f"{self.where}: {self.progress()}"]
        checks = list(self.checks(bodies=bodies))
        last = [checks.pop()] if checks[-1][0] == "statistics" else []
        with Progress(len(checks) + len(last), "verify", "check", quiet=quiet) as bar, checkers(self.files) as pool:
            for (name, _), problem in zip(checks, pool.map(problem_of, checks)):
                problems += problem
                bar.advance(1, name)
            for name, _ in last if not problems else ():  # of what is damaged nothing can be measured
                problems += problem_of(last[0])
                bar.advance(1, name)
        if problems and (why := self.changed()) is not None:
            return [f"{self.where}: {why}"]
        return list(dict.fromkeys(problems))  # what is wrong with a group is so for each of its shards


def problem_of(check: Check) -> list[str]:
    """What a check says, none or one."""
    try:
        check[1]()
    except PipelineError as error:
        return [str(error)]
    return []


def checkers(files: Files) -> ThreadPoolExecutor:
    """Threads that check a store's files: as many as cores of a local one, REQUESTS of one at a URL."""
    return ThreadPoolExecutor(os.cpu_count() if isinstance(files, LocalFiles) else REQUESTS, "check")


def prepared_of(attributes: Mapping[str, Any], split: str) -> Prepared:
    """What the root says of a split's tokens and special positions."""
    names = ("tokens", "special")
    hashes = {name: attributes[f"{name}_sha256"][split] for name in names if split in attributes[f"{name}_sha256"]}
    groups = {**attributes.get("groups", {}).get(split, {}), **attributes.get("committed", {}).get(split, {})}
    return Prepared(hashes, attributes["config"].get("vocab") if "tokens" in hashes else None, groups)


def check_hash(files: Files, key: str, digest: str) -> None:
    """Raise DamagedError unless a file has this SHA-256."""
    if sha256(files.read(key, most=MOST_BYTES)) != digest:
        raise DamagedError(f"{files.where(key)}: bytes changed since it was written (SHA-256); run harvest --repair")


def moments_without(split: Split, massive: Iterator[MassiveRows]) -> tuple[npt.NDArray[np.float64], int]:
    """Moments [2 + d_model] of a split's non-special rows less those of its massive rows, which come shard by shard; and the
    number of these.

    Those that lie beside their shards (large.py) are taken from there; of others the chunks are read.
    """
    total, n_massive, left = np.zeros(2 + split.shape.layout.d_model), 0, []
    for (moments,) in split.in_order("moments"):
        total += moments[0]
    for k, rows in massive:
        n_massive += len(rows)
        if (large := read_large(split.files, split.shape, k) if len(rows) else None) is None:
            total = without_rows(split, total, rows)
            continue
        at = large.find(rows - k * split.shard_rows)
        norm, moments = norms_and_moments(large.data[at[at >= 0]], np.zeros(np.count_nonzero(at >= 0), np.bool_))
        require_rows(split, k, rows[at >= 0], norm)
        total -= moments
        left.append(rows[at < 0])
    return without_rows(split, total, np.concatenate([np.empty(0, np.int64), *left])), n_massive


def without_rows(
    split: Split, moments: npt.NDArray[np.float64], rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Moments less those of some rows, which are in order: their chunks are read one by one."""
    for chunk, own in parts_of(rows, split.chunk_rows):
        start, stop = split.chunk_rows_range(chunk)
        held = to_numpy(split.read(start, stop))[own - start]
        moments = moments - norms_and_moments(held, np.zeros(len(own), np.bool_))[1]
    return moments


def parts_of(rows: npt.NDArray[np.int64], size: int) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Ascending rows by the part of `size` rows that they lie in: its number, and those of it."""
    parts, starts = np.unique(rows // size, return_index=True)
    yield from zip(parts.tolist(), np.split(rows, starts[1:]))


def require_rows(split: Split, k: int, rows: npt.NDArray[np.int64], norm: npt.NDArray[np.float32]) -> None:
    """Raise DamagedError unless the norms of rows that lie beside shard k are those that were committed for them."""
    committed = split.shard_norm(k)[rows - k * split.shard_rows]
    if not np.allclose(norm, committed, rtol=1e-5, atol=0.0):
        raise DamagedError(f"{split.files.where(large_key(split.name, k))}: not the rows of shard {k}; {ADVICE}")


def measure(store: Store, multiple: float) -> tuple[npt.NDArray[np.float64], Statistics]:
    """Mean (float64 [d_model]) and statistics of a store's training split, for massive rows beyond `multiple`.

    Reads one shard's norms and special mask at a time, so that memory does not grow with the store.
    """
    split = store.train
    n_usable = sum(np.count_nonzero(usable(special)) for (special,) in split.in_order("special"))
    if not n_usable:
        raise StoreError(
            f"{store.where}: every training row is special, so nothing can be trained; check --context and --bos"
        )
    median = median_of(lambda: (norm[usable(special)] for special, norm in split.in_order("special", "norm")))
    moments, n_massive = moments_without(split, split.massive(multiple, median))
    mean, scale, share = mean_and_scale(moments, store.where)
    statistics = Statistics(
        n_rows=split.n_rows,
        n_special=split.n_rows - int(n_usable),
        n_massive=n_massive,
        n_kept=int(n_usable) - n_massive,
        massive_multiple=multiple,
        median_norm=median,
        mean_sha256=sha256(mean.tobytes()),
        scale=scale,
        mean_share=share,
    )
    return mean, statistics


def describe_store(store: Store) -> dict[str, Any]:
    """Everything a store says about itself, as plain JSON data: all that is needed to make it again, rows, bytes, scale."""
    held = {key: store.files.size(key) or 0 for key in store.files.keys() if not key.endswith(PARTIAL)}  # noqa: SIM118
    splits = {
        split.name: {
            "sequences": split.n_sequences,
            "rows": split.n_rows,
            "shards": split.n_shards,
            "committed": sum(split.commit(k) is not None for k in range(split.n_shards)),
            "bytes": sum(size for key, size in held.items() if key.startswith(f"{split.name}/")),
        }
        for split in store.splits
    }
    names = (
        "format",
        "version",
        "state",
        "id",
        *(["origin"] if "origin" in store.attributes else []),
        "config",
        "segments",
        "tokens_sha256",
        "versions",
        *(["made_by"] if store.made_by else []),
    )
    described = {name: store.attributes[name] for name in names} | {"splits": splits, "bytes": sum(held.values())}
    if store.extras:
        described["extras"] = store.attributes["extras"]
    if store.complete:
        described |= {"statistics": store.statistics.to_dict(), "mean": store.mean64.tolist()}
    return described


def finished(store: Store) -> str:
    """One line about a finished store."""
    s = store.statistics
    return (
        f"{store.path}: complete, {s.n_rows:,} training rows ({s.n_special:,} special, {s.n_massive:,} massive), "
        f"{store.eval.n_rows:,} evaluation rows, median norm {s.median_norm:.4g}, id {store.id[:10]}"
        + (f"; its rows are of {len(store.made_by)} makers (--mixed)" if len(store.made_by) > 1 else "")
    )
