"""The arrays of a store: their names, shapes, chunks, files, and their zarr.json. Layout: FORMAT.md, "Store".

Absent data has a fill value that no harvest writes: NaN, or −1 for tokens. So a plain Zarr reader, which fills in what
is missing without a word, shows NaN where a shard is gone and never zeros.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.base.errors import DamagedError, UsageError
from pipeline.base.files import hash_config, hash_parts
from pipeline.store.shards import CODECS, chunk_bound, codec_json, index_nbytes

VERSION, GROUPED = 4, 4
"""The version of the format that is written, and the first whose small arrays and commit records lie in groups of shards."""
SPLITS = ("train", "eval")
KINDS = ("model", "truth", "rows")
"""What rows are: a language model's residual stream over tokens, sums of known features, or what others made (no tokens)."""
CHUNK_ROWS, SHARD_CHUNKS = 1024, 64
"""Rows of an inner chunk, rounded down to whole sequences, and chunks of a shard: 4.7 MB and 302 MB at d_model 2304."""
MANY_SHARDS, MOST_SHARD_CHUNKS = 256, 1024
"""A new store of more shards than this has them twice as large, and again, up to so many chunks: a million rows."""
GROUP_SHARDS, GROUP_ROWS = 64, 1 << 22
"""Shards whose tokens, masks, norms, moments and commit records lie together; fewer where they had more rows than that."""
EVAL_SHARE = 20
"""Unless told, evaluation gets one row for so many training rows."""
COMMITTED = ("resid", "norm", "moments")
"""The arrays whose part of a shard a commit record vouches for, in its order."""
PACKED = ("norm", "moments", "commit")
"""The arrays that are written when a store is finished, from its shards' records (record.py)."""

BF16_NAN = 0x7FC0
PARTS = "parts"
"""Folder of the notes of parts, while many processes make a store's shards; gone when it is finished."""
OUR_KEY = re.compile(
    r"(zarr\.json|parts/\d+-\d+\.json|mean/(zarr\.json|c/0)|(eval/)?truth/(zarr\.json|[a-z]+/(zarr\.json|c/0(/0)?))"
    r"|(train|eval)/(zarr\.json|resid/(large|record)/\d+|(tokens|special|resid|norm|moments|commit)/(zarr\.json|c/\d+(/0)?)))(\.\d+\.partial)?"
)
"""Every file that a store may hold, leftovers of killed writers included."""


@dataclass(frozen=True)
class Array:
    """One Zarr array. `chunk` is the shape of one file; `inner` that of the chunks inside a sharded file."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    dimensions: tuple[str, ...]
    fill: int | str
    inner: tuple[int, ...] | None = None
    codec: str = "none"
    view_as: str = ""

    def key(self, k: int) -> str:
        """The file of the k-th chunk (or shard) along the first dimension; others are never split."""
        return f"{self.path}/c/{k}" + "/0" * (len(self.shape) - 1)

    @property
    def metadata_key(self) -> str:
        """The file of the array's metadata."""
        return f"{self.path}/zarr.json"

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Little-endian, as stored."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def padding(self) -> int | float:
        """The fill value as a number."""
        return math.nan if self.fill == "NaN" else int(self.fill)

    @property
    def n_files(self) -> int:
        """Chunks (or shards) along the first dimension."""
        return -(-self.shape[0] // self.chunk[0])

    @property
    def file_nbytes(self) -> int:
        """Bytes of one whole file of an array that is not sharded: the data and its crc32c."""
        return math.prod(self.chunk) * self.numpy_dtype.itemsize + 4

    def metadata(self) -> bytes:
        """The zarr.json of this array, the bytes zarr-python writes."""
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        single = [{"name": "bytes"}] if self.numpy_dtype.itemsize == 1 else [little]
        codecs: list[dict[str, Any]] = [*single, *codec_json(self.codec, self.numpy_dtype.itemsize), {"name": "crc32c"}]
        if self.inner is not None:
            configuration = {
                "chunk_shape": self.inner,
                "codecs": codecs,
                "index_codecs": [little, {"name": "crc32c"}],
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": configuration}]
        return zarr_json(
            {
                "shape": self.shape,
                "data_type": self.dtype,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.chunk}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": self.fill,
                "codecs": codecs,
                "attributes": {"view_as": self.view_as} if self.view_as else {},
                "dimension_names": self.dimensions,
                "zarr_format": 3,
                "node_type": "array",
                "storage_transformers": [],
            }
        )


def zarr_json(data: Mapping[str, Any]) -> bytes:
    """JSON as zarr-python writes it."""
    return json.dumps(data, indent=2, allow_nan=False).encode()


def group_metadata(attributes: Mapping[str, Any]) -> bytes:
    """The zarr.json of a group."""
    return zarr_json({"attributes": attributes, "zarr_format": 3, "node_type": "group"})


@dataclass(frozen=True)
class Layout:
    """The part of a store's config that fixes the shape of its files. Rows are counted in `*_rows`.

    Raises UsageError when a shard is not whole chunks, or a chunk not whole sequences.
    """

    d_model: int
    context: int
    dtype: str
    shard_rows: int
    chunk_rows: int
    codec: str
    kind: str = "model"
    group_shards: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ("bf16", "float32"):
            raise UsageError(f"a store holds bf16 or float32, not {self.dtype[:40]!r}")
        if self.kind not in KINDS:
            raise UsageError(
                f"a store is of kind {' or '.join(KINDS)}, not {self.kind[:40]!r}; another release made it"
            )
        if self.codec not in CODECS:
            raise UsageError(f"codec {self.codec[:40]!r} is not one of {', '.join(CODECS)}")
        if min(self.d_model, self.context, self.shard_rows, self.chunk_rows) < 1 or self.group_shards < 0:
            raise UsageError("d_model, context, shard_rows, chunk_rows and group_shards must be at least 1")
        if self.shard_rows % self.chunk_rows or self.chunk_rows % self.context:
            raise UsageError(
                f"shard_rows {self.shard_rows} must be a multiple of chunk_rows {self.chunk_rows}, "
                f"and that of the context {self.context}"
            )

    @staticmethod
    def from_config(config: Mapping[str, Any], version: int = VERSION) -> Layout:
        """The layout of a store of this config and version. Raises UsageError when a field is not there."""
        names = [*Layout.__dataclass_fields__]
        if missing := [name for name in names if name not in config and name not in ("kind", "group_shards")]:
            raise UsageError(f"the store's config lacks {', '.join(missing)}")
        layout = Layout(**{name: config[name] for name in names if name in config})
        if version < GROUPED or layout.group_shards:
            return layout
        return replace(layout, group_shards=max(1, min(GROUP_SHARDS, GROUP_ROWS // layout.shard_rows)))

    @property
    def has_tokens(self) -> bool:
        """Whether rows stand for tokens; those of a truth, or made by others, do not."""
        return self.kind == "model"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of rows as they are read."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    @property
    def chunks_per_shard(self) -> int:
        """Inner chunks of a whole shard: the slots of its index."""
        return self.shard_rows // self.chunk_rows

    @property
    def in_groups(self) -> bool:
        """Whether small arrays of several shards lie together, and commit records say what every chunk's checksum is."""
        return self.group_shards > 0

    @property
    def record_width(self) -> int:
        """Numbers of a commit record: a digest for each of COMMITTED and, in groups, one for each chunk of a shard."""
        return len(COMMITTED) + (self.chunks_per_shard if self.in_groups else 0)

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of one inner chunk of resid before compression."""
        return self.chunk_rows * self.d_model * (2 if self.dtype == "bf16" else 4)

    @property
    def mean(self) -> Array:
        """The mean of the training split's kept rows."""
        return Array("mean", (self.d_model,), "float64", (self.d_model,), ("d_model",), "NaN")


@dataclass(frozen=True)
class SplitLayout:
    """The arrays of one split and the rows of each of its shards."""

    name: str
    layout: Layout
    n_sequences: int

    @property
    def n_rows(self) -> int:
        """Token positions of the split, special ones included."""
        return self.n_sequences * self.layout.context

    @property
    def n_shards(self) -> int:
        """Shards, a ragged last one included."""
        return -(-self.n_rows // self.layout.shard_rows)

    @property
    def group(self) -> int:
        """Shards whose small arrays lie in one file; one each before version 4."""
        return max(1, min(self.layout.group_shards, self.n_shards))

    @property
    def n_groups(self) -> int:
        """Groups of shards, a ragged last one included."""
        return -(-self.n_shards // self.group)

    def shards_of(self, g: int) -> range:
        """The shards of group g."""
        return range(g * self.group, min((g + 1) * self.group, self.n_shards))

    def record_key(self, k: int) -> str:
        """The file whose appearance commits shard k while the store is unfinished."""
        return f"{self.name}/resid/record/{k}" if self.layout.in_groups else self.arrays["commit"].key(k)

    def shard_rows_range(self, k: int) -> tuple[int, int]:
        """First row of shard k, and one past its last."""
        start = k * self.layout.shard_rows
        return start, min(start + self.layout.shard_rows, self.n_rows)

    def n_chunks(self, k: int) -> int:
        """Inner chunks that shard k holds, a ragged last one included."""
        start, stop = self.shard_rows_range(k)
        return -(-(stop - start) // self.layout.chunk_rows)

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """Every array of the split by name."""
        of, n, rows = self.layout, self.n_sequences, self.n_rows
        bf16 = of.dtype == "bf16"
        path, group, shards, width = self.name, self.group, self.n_shards, of.record_width
        per_group = group * of.shard_rows // of.context
        sequences = ("sequence", "position")
        resid = Array(
            f"{path}/resid",
            (rows, of.d_model),
            "uint16" if bf16 else "float32",
            (of.shard_rows, of.d_model),
            ("row", "d_model"),
            BF16_NAN if bf16 else "NaN",
            (of.chunk_rows, of.d_model),
            of.codec,
            "bfloat16" if bf16 else "",
        )
        moments = (2 + of.d_model,)
        tokens = Array(f"{path}/tokens", (n, of.context), "int32", (per_group, of.context), sequences, -1)
        return ({"tokens": tokens} if of.has_tokens else {}) | {
            "special": Array(f"{path}/special", (n, of.context), "uint8", (per_group, of.context), sequences, 255),
            "resid": resid,
            "norm": Array(f"{path}/norm", (rows,), "float32", (group * of.shard_rows,), ("row",), "NaN"),
            "moments": Array(
                f"{path}/moments", (shards, *moments), "float64", (group, *moments), ("shard", "moment"), "NaN"
            ),
            "commit": Array(f"{path}/commit", (shards, width), "uint64", (group, width), ("shard", "file"), 0),
        }


@dataclass(frozen=True)
class Extra:
    """An array that a store carries beside its rows, whole in one chunk: `path` like truth/parent or eval/truth/start."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @staticmethod
    def of(path: str, data: npt.NDArray[Any]) -> Extra:
        """What describes these data."""
        return Extra(path, str(data.dtype), data.shape, hash_parts(in_blocks(data)))

    @property
    def array(self) -> Array:
        """Its Zarr array."""
        fill: int | str = "NaN" if self.dtype.startswith("float") else -1
        names = EXTRAS[self.path]
        return Array(self.path, self.shape, self.dtype, self.shape, names, fill)

    def to_dict(self) -> dict[str, Any]:
        """As the root's attributes say it, under its path."""
        return {"dtype": self.dtype, "shape": list(self.shape), "sha256": self.sha256}


EXTRAS: dict[str, tuple[str, ...]] = {
    "truth/directions": ("feature", "d_model"),
    "truth/parent": ("feature",),
    "truth/depth": ("feature",),
    "truth/probability": ("feature",),
    "truth/magnitude": ("feature",),
    "eval/truth/start": ("row_and_one",),
    "eval/truth/feature": ("firing",),
    "eval/truth/strength": ("firing",),
}
"""Every extra array that a store may carry: path → its dimensions."""


def extras_of(attributes: Mapping[str, Any]) -> dict[str, Extra]:
    """The extra arrays that a root's attributes name. Raises DamagedError for one that no store has."""
    found = attributes.get("extras", {})
    if unknown := sorted(set(found) - set(EXTRAS)):
        raise DamagedError(f"the store's root names an array {unknown[0]!r} that no store has; another release made it")
    return {path: Extra(path, str(e["dtype"]), tuple(e["shape"]), str(e["sha256"])) for path, e in found.items()}


BLOCK = 1 << 20
"""Bytes of an extra array that are written, read and checked at a time."""


def in_blocks(data: npt.NDArray[Any]) -> Iterator[bytes]:
    """The numbers of an array as they are stored, block by block."""
    flat, step = data.reshape(-1), BLOCK // data.dtype.itemsize
    for first in range(0, len(flat), step):
        yield flat[first : first + step].astype(data.dtype.newbyteorder("<")).tobytes()


def metadata_files(
    config: Mapping[str, Any],
    n_sequences: Mapping[str, int],
    segments: Sequence[int],
    extras: Mapping[str, Extra] | None = None,
    version: int = VERSION,
) -> dict[str, bytes]:
    """Every zarr.json below the root: key → bytes.

    The groups name the config they belong to by its hash, and that of the training split the root's `segments` again: so
    a repair knows both when the root itself is damaged.
    """
    layout = Layout.from_config(config, version)
    files = {layout.mean.metadata_key: layout.mean.metadata()}
    for name in SPLITS:
        again = {"segments": list(segments)} if name == "train" else {}
        files[f"{name}/zarr.json"] = group_metadata({"config_sha256": hash_config(config)} | again)
        for array in SplitLayout(name, layout, n_sequences[name]).arrays.values():
            files[array.metadata_key] = array.metadata()
    for path, extra in (extras or {}).items():
        files[f"{path.rpartition('/')[0]}/zarr.json"] = group_metadata({})
        files[extra.array.metadata_key] = extra.array.metadata()
    return files


def pad_rows(array: npt.NDArray[Any], n_rows: int, fill: int | float) -> npt.NDArray[Any]:
    """The array with rows of the fill value appended up to `n_rows`, as Zarr pads a ragged last chunk."""
    if len(array) == n_rows:
        return array
    return np.concatenate([array, np.full((n_rows - len(array), *array.shape[1:]), fill, dtype=array.dtype)])


def shard_rows_for(n_rows: int, chunk_rows: int) -> int:
    """Rows of a shard of a new store of `n_rows` training rows: they grow with it, so that its files stay few."""
    chunks = SHARD_CHUNKS
    while chunks < MOST_SHARD_CHUNKS and n_rows > MANY_SHARDS * chunks * chunk_rows:
        chunks *= 2
    return chunks * chunk_rows


ROOT_REST = 2048
"""Bytes of the root's zarr.json beside config, files and groups: hashes, versions, statistics."""
GROUP_HASHES = 3 * 80
"""Bytes of the root's zarr.json that a group takes: a hash each of its tokens, its masks and its commit records."""


def estimate_bytes(config: Mapping[str, Any], n_train: int, n_eval: int, n_extra: int = 0) -> int:
    """Bytes of a finished store of so many sequences: exact to a few kB for codec none, an upper bound when compressed.

    `n_extra`: bytes of the arrays that it carries beside its rows.
    """
    layout, metadata = Layout.from_config(config), metadata_files(config, {"train": n_train, "eval": n_eval}, [n_train])
    root = group_metadata({"config": config, "files": dict.fromkeys(metadata, "0" * 64)})
    total = n_extra + len(root) + ROOT_REST + sum(map(len, metadata.values())) + layout.mean.file_nbytes
    for name, n_sequences in (("train", n_train), ("eval", n_eval)):
        split = SplitLayout(name, layout, n_sequences)
        n_chunks = max(split.n_shards - 1, 0) * layout.chunks_per_shard
        n_chunks += split.n_chunks(split.n_shards - 1) if split.n_shards else 0
        total += n_chunks * (chunk_bound(layout.codec, layout.chunk_nbytes) + 4)
        total += split.n_shards * index_nbytes(layout.chunks_per_shard) + split.n_groups * GROUP_HASHES
        total += sum(a.n_files * a.file_nbytes for name, a in split.arrays.items() if name != "resid")
    return total
