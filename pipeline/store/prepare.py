"""Preparing an activation store: everything but its shards. New, going on, extending, repairing. Used by harvest alone.

The root's zarr.json says "preparing" before the first other file is touched and "prepared" after the last, so a folder
is ours from the first byte on, and one whose preparation was killed cannot be taken for a store.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.base.errors import DamagedError, DiskError, MismatchError, StoreError, UsageError
from pipeline.base.files import (
    PARTIAL,
    disk_errors,
    hash_config,
    hash_parts,
    is_url,
    lock_folder,
    require_free,
    require_same,
    sha256,
)
from pipeline.store.backend import Files, make_folder
from pipeline.store.beside import is_beside, write_beside
from pipeline.store.groups import delete_groups, unpack
from pipeline.store.layout import (
    OUR_KEY,
    SPLITS,
    VERSION,
    Extra,
    Layout,
    SplitLayout,
    metadata_files,
    pad_rows,
)
from pipeline.store.objects import open_files
from pipeline.store.reader import Store
from pipeline.store.root import FORMAT, ROOT_KEY, read_root, read_segments, write_root
from pipeline.store.shards import with_crc, without_crc
from pipeline.store.split import Mask, Rows
from pipeline.store.writer import StoreWriter, give_up, sweep

GROUPS = ("train/zarr.json", "eval/zarr.json")
BLOCK = 4096
"""Sequences that are converted and hashed at a time."""


@dataclass(frozen=True)
class SplitTokens:
    """What a split's rows stand for: `tokens` int32 and `special` bool, both [n_sequences, context].

    `special` is true for BOS, EOS, PAD, any special token of the tokenizer, and for position 0 always. Rows of no text
    have no `tokens`, and none of them needs be special.
    Raises UsageError when shapes or dtypes are others, a split is empty, or position 0 is not marked.
    """

    tokens: Rows | None
    special: Mask

    def __post_init__(self) -> None:
        if self.tokens is None:
            if self.special.ndim != 2 or self.special.dtype != np.bool_ or len(self.special) == 0:
                raise UsageError(f"special {self.special.shape}: expected bool [n_sequences, context]")
            return
        if self.tokens.ndim != 2 or self.tokens.shape != self.special.shape or len(self.tokens) == 0:
            raise UsageError(
                f"tokens {self.tokens.shape}, special {self.special.shape}: expected [n_sequences, context]"
            )
        if self.tokens.dtype != np.int32 or self.special.dtype != np.bool_ or not self.special[:, 0].all():
            raise UsageError("tokens must be int32, special bool and true at position 0")

    @property
    def n_sequences(self) -> int:
        """Sequences of the split."""
        return len(self.special)

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What is there, by the name of its array."""
        return ({} if self.tokens is None else {"tokens": self.tokens}) | {"special": self.special}

    def hashes(self, n_sequences: int | None = None) -> dict[str, str]:
        """SHA-256 of the first sequences' tokens (little-endian int32), where there are any, and special mask (uint8)."""
        return {name: hashed(array[:n_sequences], name) for name, array in self.arrays.items()}

    def group_hashes(self, per_group: int) -> dict[str, list[str]]:
        """The same of `per_group` sequences after the other."""
        starts = range(0, self.n_sequences, per_group)
        return {name: [hashed(array[a : a + per_group], name) for a in starts] for name, array in self.arrays.items()}


def hashed(array: npt.NDArray[Any], name: str) -> str:
    """SHA-256 of some sequences' tokens or special positions, as they are stored."""
    dtype = {"tokens": "<i4", "special": "u1"}[name]
    return hash_parts(array[a : a + BLOCK].astype(dtype).tobytes() for a in range(0, len(array), BLOCK))


def segments(path: Path | str, *, repair: bool = False) -> tuple[int, ...]:
    """Cumulative training sequences after each harvest of the store at `path`; () when there is none.

    To extend a store, make the tokens of these segments again and append new ones. Raises StoreError, and DamagedError
    unless `repair`: then a root that is gone or damaged is passed over for what the training group says.
    """
    files = open_files(path)
    try:
        return tuple(read_root(files)["segments"])
    except StoreError:
        if not repair:
            return ()
    except DamagedError:
        if not repair:
            raise
    try:
        return read_segments(files)
    except DamagedError:
        return ()


def extended(earlier: Sequence[int], n_train: int) -> tuple[int, ...]:
    """The segments of a store when it has `n_train` training sequences: one more, unless it has that many already."""
    return tuple(earlier) if n_train in earlier[-1:] else (*earlier, n_train)


def resume(path: Path | str, config: Mapping[str, Any], n_train: int, n_eval: int) -> StoreWriter | None:
    """The writer of a store that is prepared or complete for this config and these numbers of sequences.

    None: call `prepare` (there is no store yet, its preparation was stopped, or more training sequences are asked for).
    Raises MismatchError naming the fields that differ, StoreError, DamagedError.
    """
    files = open_files(path)
    if files.size(ROOT_KEY) is None:
        return None
    store = Store.load(path)
    if store.attributes["state"] == "preparing":
        return None
    require_same(store.path, store.config, config, "the store")
    require_sizes(store.where, store.attributes, n_train, n_eval)
    if n_train != store.train.n_sequences:
        return None
    if not store.complete:
        require_written(store.where, store.attributes)
    return StoreWriter.open(path)


def holds_tokens(path: Path | str, n_train: int, n_eval: int) -> bool:
    """Whether a store is there with the tokens of so many sequences, whatever its config."""
    try:
        store = Store.load(path)
    except (StoreError, DamagedError):
        return False
    there = (store.train.n_sequences, store.eval.n_sequences)
    return store.attributes["state"] != "preparing" and there == (n_train, n_eval)


def prepare(
    path: Path | str,
    config: Mapping[str, Any],
    train: SplitTokens,
    evaluation: SplitTokens,
    versions: Mapping[str, str],
    *,
    extras: Mapping[str, npt.NDArray[Any]] | None = None,
    repair: bool = False,
) -> StoreWriter:
    """Make a store ready for its shards: tokens, special masks, all metadata, then the root. One process at a time.

    `extras`: arrays that it carries beside its rows, by path (layout.EXTRAS).

    Run again it changes nothing. With more training sequences, the first of them those already there, it extends the
    store: whole shards stay, a ragged last one is given up, to be written at its new size. With `repair` it also writes
    again whatever of this is damaged and gives up every damaged shard (reads all bodies); `pending` then lists them.

    Raises MismatchError (another config or other tokens; says which), DiskError (the folder holds something else, the
    disk is full), DamagedError (without `repair`).
    """
    files, splits = open_files(path), {"train": train, "eval": evaluation}
    described = {name: Extra.of(name, data) for name, data in sorted((extras or {}).items())}
    layout = Layout.from_config(config)
    require_context(layout, splits)
    require_ours(files)
    cumulative = extended(segments(path, repair=repair), train.n_sequences)
    previous = read_previous(files, config, splits, described, cumulative, repair)
    attributes = new_attributes(config, splits, described, versions, cumulative, previous)
    if previous is not None and is_prepared(previous, attributes) and not repair:
        return StoreWriter.open(path)
    if previous is None or "committed" in previous:
        unpack_previous(files, config, attributes, previous, segments(path, repair=repair))
    write_root(files, attributes | {"state": "preparing"})
    sweep(files)
    delete_groups(files)
    if previous is not None and (previous["state"] == "preparing" or previous["segments"] != attributes["segments"]):
        give_up_ragged(files, layout, attributes["segments"])
    for key, data in prepared_files(config, layout, splits, cumulative, described):
        if not holds(files, key, data):
            files.write(key, data)
    for name, extra in described.items():
        write_beside(files, extra, (extras or {})[name])
    write_root(files, attributes)
    writer = StoreWriter.open(path)
    if repair:
        writer.give_up_damaged()
    return writer


def read_previous(
    files: Files,
    config: Mapping[str, Any],
    splits: Mapping[str, SplitTokens],
    described: Mapping[str, Extra],
    cumulative: Sequence[int],
    repair: bool,
) -> dict[str, Any] | None:
    """Attributes of the store that is there and goes on; None when a new one begins. Raises when it cannot go on."""
    parts = ("/commit/c/", "/resid/record/")
    has_shards = any(part in key for key in files.keys() for part in parts)  # noqa: SIM118 (not a dict)
    try:
        previous = read_root(files)
    except (StoreError, DamagedError):
        if files.size(ROOT_KEY) is not None and not repair:
            raise
        require_known(files, config, splits, described, cumulative, repair)
        return None
    path = Path(files.where(""))
    if previous["state"] == "preparing" and not has_shards:
        require_written(str(path), previous)
        return None  # a first preparation that was killed: nothing of it is worth keeping
    require_same(path, previous["config"], config, "the store")
    require_written(str(path), previous)
    require_sizes(str(path), previous, splits["train"].n_sequences, splits["eval"].n_sequences)
    for name in SPLITS:
        found = splits[name].hashes(previous["n_sequences"][name])
        if any(previous[f"{array}_sha256"][name] != digest for array, digest in found.items()):
            raise MismatchError(
                f"{path}: its {name} tokens are others although the config is the same; use another path"
            )
    return previous


def holds(files: Files, key: str, data: bytes) -> bool:
    """Whether a file is there with just these bytes."""
    return files.size(key) == len(data) and files.read(key, most=len(data)) == data


def is_whole(files: Files, key: str) -> bool:
    """Whether a chunk file fits its crc32c."""
    try:
        without_crc(files.read(key, most=files.size(key) or 0), key)
    except DamagedError:
        return False
    return True


def require_known(
    files: Files,
    config: Mapping[str, Any],
    splits: Mapping[str, SplitTokens],
    described: Mapping[str, Extra],
    cumulative: Sequence[int],
    repair: bool,
) -> None:
    """Without a readable root: raise unless the folder holds nothing yet, or `repair` and just this config and these tokens.

    A group that names the config and a file of tokens must be as they would be written now, and no file of tokens may be
    whole and another.
    """
    keys = [key for key in files.keys() if not key.endswith(PARTIAL)]  # noqa: SIM118 (not a dict)
    if not keys:
        return
    if not repair:
        raise DamagedError(f"{files.where(ROOT_KEY)}: gone, though the rest of a store is there; run harvest --repair")
    there = {
        key: holds(files, key, data)
        for key, data in prepared_files(config, Layout.from_config(config), splits, cumulative, described)
        if key in keys and (key in GROUPS or "/tokens/c/" in key)
    }
    if (directions := described.get("truth/directions")) and (key := directions.array.key(0)) in keys:
        there[key] = is_beside(files, directions)
    groups = [there.pop(key) for key in GROUPS if key in there]
    others = [key for key, same in there.items() if not same and is_whole(files, key)]
    if others or not any(groups) or not any(there.values()):
        raise MismatchError(
            f"{files.where('')}: its root is damaged and no other file shows that it was made with this config and these "
            f"tokens (config {hash_config(config)[:10]}…); use the command that made it, or another path"
        )


def require_written(where: str, previous: Mapping[str, Any]) -> None:
    """Raise StoreError for a store of a version that is read and not written any more."""
    if previous["version"] != VERSION:
        raise StoreError(
            f"{where}: is of version {previous['version']}, which can be trained on and evaluated, but not extended, repaired "
            f"or gone on with (version {VERSION} is written); use it as it is, or harvest to another path"
        )


def require_sizes(where: str, previous: Mapping[str, Any], n_train: int, n_eval: int) -> None:
    """Raise MismatchError unless a store may go on with these numbers of sequences."""
    held = previous["n_sequences"]
    if n_eval != held["eval"]:
        raise MismatchError(f"{where}: holds {held['eval']:,} evaluation sequences, asked {n_eval:,}; use another path")
    if n_train < held["train"]:
        raise MismatchError(
            f"{where}: holds {held['train']:,} training sequences, asked fewer ({n_train:,}); use it as it is, or another path"
        )
    if n_train > held["train"] and previous["state"] == "preparing":
        raise MismatchError(
            f"{where}: its harvest of {held['train']:,} training sequences was stopped while it began; run that one first"
        )


def require_context(layout: Layout, splits: Mapping[str, SplitTokens]) -> None:
    """Raise UsageError unless the tokens' rows are one context long."""
    for name, split in splits.items():
        if split.special.shape[1] != layout.context:
            raise UsageError(
                f"{name}: sequences of {split.special.shape[1]} tokens, the config's context is {layout.context}"
            )
        if (split.tokens is not None) != layout.has_tokens:
            raise UsageError(f"{name}: a store of kind {layout.kind} has {'' if layout.has_tokens else 'no '}tokens")


def require_ours(files: Files) -> None:
    """Raise DiskError when the folder holds a file that no store has."""
    for key in files.keys():  # noqa: SIM118 (not a dict)
        if OUR_KEY.fullmatch(key) is None:
            raise DiskError(f"{files.where(key)}: the folder holds something else than a store; choose another path")


def new_attributes(
    config: Mapping[str, Any],
    splits: Mapping[str, SplitTokens],
    described: Mapping[str, Extra],
    versions: Mapping[str, str],
    cumulative: Sequence[int],
    previous: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Attributes of the prepared store, without its seal. Versions stay those of the harvest that began it."""
    n_sequences = {name: splits[name].n_sequences for name in SPLITS}
    hashes = {name: splits[name].hashes() for name in SPLITS}
    tokens, special = (
        {split: found[name] for split, found in hashes.items() if name in found} for name in ("tokens", "special")
    )
    beside = {"extras": {path: extra.to_dict() for path, extra in described.items()}} if described else {}
    of_rows = {"tokens_sha256": tokens} if tokens else {"special_sha256": special, **beside}
    first = {"train": splits["train"].hashes(cumulative[0]), "eval": hashes["eval"]}
    shapes = (SplitLayout(name, Layout.from_config(config), n_sequences[name]) for name in SPLITS)
    per_group = {shape.name: shape.arrays["special"].chunk[0] for shape in shapes}
    return {
        "format": FORMAT,
        "version": VERSION,
        "state": "prepared",
        "id": hash_config({"config": config, **of_rows}),
        "origin": hash_config({"config": config, "first": first, **beside}),
        "config": dict(config),
        "segments": list(cumulative),
        "n_sequences": n_sequences,
        "tokens_sha256": tokens,
        "special_sha256": special,
        "groups": {name: splits[name].group_hashes(per_group[name]) for name in SPLITS},
        **beside,
        "files": {
            key: sha256(data) for key, data in metadata_files(config, n_sequences, cumulative, described).items()
        },
        "versions": dict(previous["versions"] if previous else versions),
        **({"made_by": previous["made_by"]} if previous and "made_by" in previous else {}),
    }


def is_prepared(previous: Mapping[str, Any], attributes: Mapping[str, Any]) -> bool:
    """Whether the store on disk already is what these attributes ask for, finished or not."""
    return previous["state"] != "preparing" and all(
        previous[name] == value for name, value in attributes.items() if name != "state"
    )


def unpack_previous(
    files: Files,
    config: Mapping[str, Any],
    attributes: Mapping[str, Any],
    previous: Mapping[str, Any] | None,
    cumulative: Sequence[int],
) -> None:
    """Give the shards of a finished store, or of one whose root is lost, their records back (groups.py)."""
    held = previous["n_sequences"] if previous else attributes["n_sequences"]
    n_train = held["train"] if previous or not cumulative else cumulative[-1]
    layout = Layout.from_config(config)
    shapes = [SplitLayout("train", layout, n_train), SplitLayout("eval", layout, held["eval"])]
    unpack(files, attributes["origin"], shapes)


def give_up_ragged(files: Files, layout: Layout, cumulative: list[int]) -> None:
    """Before an extension: give up the shard that was the last and not full; it will be larger."""
    if len(cumulative) < 2:
        return
    before = SplitLayout("train", layout, cumulative[-2])
    if before.n_rows % layout.shard_rows:
        give_up(files, before, before.n_shards - 1)


def prepared_files(
    config: Mapping[str, Any],
    layout: Layout,
    splits: Mapping[str, SplitTokens],
    cumulative: Sequence[int],
    described: Mapping[str, Extra],
) -> Iterator[tuple[str, bytes]]:
    """Every file of a prepared store but the root and the arrays beside its rows: key, bytes."""
    yield from metadata_files(
        config, {name: splits[name].n_sequences for name in SPLITS}, cumulative, described
    ).items()
    for name in SPLITS:
        arrays = SplitLayout(name, layout, splits[name].n_sequences).arrays
        for data, array in ((data, arrays[kind]) for kind, data in splits[name].arrays.items()):
            for k in range(array.n_files):
                part = data[k * array.chunk[0] : (k + 1) * array.chunk[0]].astype(array.numpy_dtype)
                yield array.key(k), with_crc(pad_rows(part, array.chunk[0], array.padding))


@contextlib.contextmanager
def locked(stores: Iterable[str], *, shared: bool = False) -> Iterator[None]:
    """Hold local stores against a second writer, `shared` with other makers of parts. Raises DiskError when another process has
    one.

    A store's folder is made for this, and taken away again where nothing came into it.
    """
    folders = [Path(path) for path in stores if not is_url(path)]
    with contextlib.ExitStack() as stack:
        for folder in folders:
            with disk_errors(folder):
                make_folder(folder)
                stack.callback(os.close, lock_folder(folder, "writing this store", shared=shared))
        try:
            yield
        finally:
            for folder in folders:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # refuses unless it is empty


def require_space(place: str, stores: Iterable[str], estimate: int) -> None:
    """Raise DiskError unless what is still to be written of the stores, `estimate` bytes in all, fits on the disk."""
    if is_url(place):
        return
    there = sum(p.stat().st_size for path in stores for p in Path(path).rglob("*") if p.is_file())
    require_free(Path(place), max(0, estimate - there), "the store")
