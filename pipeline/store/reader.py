"""Reading an activation store: what is in it, rows in order, and whether every byte is what was written.

    store = Store.open("acts.zarr")          # checks everything but the bodies of the shards
    x = store.train.read(0, 4096)            # rows in order, bf16 [row, d_model], crc checked
    mean, scale = store.mean, store.scale    # (x − mean) · scale has a mean square norm of 1 over kept rows

Nothing that is missing or changed is ever read as data: it raises DamagedError. Layout: FORMAT.md, "Store".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.base.errors import DamagedError, PipelineError, StoreError
from pipeline.base.files import PARTIAL, hash_parts, sha256
from pipeline.base.progress import Progress
from pipeline.store.backend import Files
from pipeline.store.layout import SPLITS, Layout, SplitLayout, extras_of
from pipeline.store.moments import Statistics, mean_and_scale, median_of, merge, norms_and_moments
from pipeline.store.objects import open_files
from pipeline.store.root import MOST_BYTES, read_root
from pipeline.store.split import Split as Split
from pipeline.store.split import read_array, read_part, to_numpy

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
        self.layout = Layout.from_config(self.config)
        self.d_model, self.context, self.dtype = self.layout.d_model, self.layout.context, self.layout.torch_dtype
        self._extras = extras_of(attributes)
        self._statistics = Statistics(**attributes["statistics"]) if self.complete else None
        self.train, self.eval = (
            Split(
                files,
                SplitLayout(name, self.layout, attributes["n_sequences"][name]),
                self._statistics,
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
        """Open a store after checking all but the bodies of shards: metadata, tokens, sizes, indexes, commit records.

        `check=False` is for describing or verifying a store that may be damaged: then only the root is checked.
        Raises StoreError when there is none, it is unfinished (unless `complete` is False) or of another version, and
        DamagedError for the first thing that is not as it was written.
        """
        store = Store.load(path)
        if complete and not store.complete:
            raise StoreError(f"{path}: {store.progress()}; run the same harvest command again to finish it")
        if check:
            store.check()
        return store

    @property
    def statistics(self) -> Statistics:
        """What harvest measured. Raises StoreError when the store is unfinished."""
        if self._statistics is None:
            raise StoreError(f"{self.where}: {self.progress()}, so it has no statistics; finish the harvest")
        return self._statistics

    @property
    def made_by(self) -> list[dict[str, str]]:
        """Who made its rows (makers.py), in the order in which they began; empty where nobody knows."""
        return list(self.attributes.get("made_by", ()))

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
        mean, scale, _ = mean_and_scale(moments_without(self.train, massive), self.where)
        return torch.from_numpy(mean.astype(np.float32)), scale

    def progress(self) -> str:
        """How far an unfinished harvest has come, in words."""
        if self.attributes["state"] == "preparing":
            return "its harvest was stopped before the first shard"
        done = sum(split.commit(k) is not None for split in self.splits for k in range(split.n_shards))
        return f"unfinished, {done} of {sum(split.n_shards for split in self.splits)} shards are committed"

    def checks(self, *, bodies: bool) -> Iterator[Check]:
        """What there is to check, in order: a name, and a function that raises DamagedError when it is not so."""
        yield from self._metadata_checks()
        for split in self.splits:
            for k in range(split.n_shards):
                if self.complete or self.files.size(split.arrays["commit"].key(k)) is not None:
                    yield f"{split.name} shard {k}", partial(split.check_shard, k, bodies)
        if self.complete:
            yield "mean", self._check_mean
        if self.complete and bodies:
            yield "statistics", self._check_statistics

    def check(self) -> None:
        """Raise DamagedError for the first thing that is not as it was written; the bodies of shards are not read."""
        for _, run in self.checks(bodies=False):
            run()

    def _metadata_checks(self) -> Iterator[Check]:
        for key, digest in sorted(self.attributes["files"].items()):
            yield key, partial(check_hash, self.files, key, digest)
        for split in self.splits:
            yield f"{split.name} tokens", partial(self._check_tokens, split)
        for path in self.extras:
            yield path, partial(self._check_extra, path)

    def check_metadata(self) -> None:
        """Raise DamagedError unless every zarr.json, the tokens and the special masks are as they were prepared."""
        for _, run in self._metadata_checks():
            run()

    def _check_tokens(self, split: Split) -> None:
        for name in ("tokens", "special"):
            if name not in split.arrays:
                continue
            array = split.arrays[name]
            expected = self.attributes[f"{name}_sha256"][split.name]
            parts = (read_part(self.files, array, k).tobytes() for k in range(array.n_files))
            found = hash_parts(parts)
            if found != expected:
                raise DamagedError(f"{self.files.where(array.path)}: SHA-256 {found[:10]}…, expected {expected[:10]}…")
        if self.layout.has_tokens and "vocab" in self.config:
            for k in range(split.n_shards):
                tokens = split.shard_tokens(k)
                if tokens.min() < 0 or tokens.max() >= self.config["vocab"]:
                    where = self.files.where(split.arrays["tokens"].key(k))
                    raise DamagedError(f"{where}: token ids beyond the model's {self.config['vocab']}; harvest again")

    def _check_extra(self, path: str) -> None:
        self.extra(path)

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
        """Every problem there is, one line each; empty when the store is whole. `bodies` reads every byte."""
        problems = [] if self.complete else [f"{self.where}: {self.progress()}"]
        checks = list(self.checks(bodies=bodies))
        with Progress(len(checks), "verify", "check", quiet=quiet) as bar:
            for name, check in checks:
                if name == "statistics" and problems:
                    continue  # of what is damaged nothing can be measured
                try:
                    check()
                except PipelineError as error:
                    problems.append(str(error))
                bar.advance(1, name)
        return problems


def check_hash(files: Files, key: str, digest: str) -> None:
    """Raise DamagedError unless a file has this SHA-256."""
    if sha256(files.read(key, most=MOST_BYTES)) != digest:
        raise DamagedError(f"{files.where(key)}: bytes changed since it was written (SHA-256); run harvest --repair")


def moments_without(split: Split, massive: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Moments [2 + d_model] of a split's non-special rows less those of its `massive` rows, which are in order.

    Reads the chunks that hold a row to take out.
    """
    total = merge(split.moments)
    for chunk in np.unique(massive // split.chunk_rows):
        start, stop = split.chunk_rows_range(int(chunk))
        rows = to_numpy(split.read(start, stop))[massive[(massive >= start) & (massive < stop)] - start]
        total -= norms_and_moments(rows, np.zeros(len(rows), np.bool_))[1]
    return total


def measure(store: Store, multiple: float) -> tuple[npt.NDArray[np.float64], Statistics]:
    """Mean (float64 [d_model]) and statistics of a store's training split, for massive rows beyond `multiple`.

    Reads one shard's norms and special mask at a time, so that memory does not grow with the store.
    """
    split = store.train
    shards = range(split.n_shards)
    n_usable = sum(np.count_nonzero(split.shard_usable(k)) for k in shards)
    if not n_usable:
        raise StoreError(
            f"{store.where}: every training row is special, so nothing can be trained; check --context and --bos"
        )
    median = median_of(lambda: (split.shard_norm(k)[split.shard_usable(k)] for k in shards))
    massive = split.massive(multiple, median)
    mean, scale, share = mean_and_scale(moments_without(split, massive), store.where)
    statistics = Statistics(
        n_rows=split.n_rows,
        n_special=split.n_rows - int(n_usable),
        n_massive=len(massive),
        n_kept=int(n_usable) - len(massive),
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
