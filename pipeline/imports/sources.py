"""Activations that others saved, as rows in order: .npy, .safetensors, SAELens's cache, saev's shards, torch files.

A source is a list of parts, one a file, each read in blocks from any row on; opening one checks every header against its
file's length and reads no body. Nothing is unpickled but torch files, and those as weights only.

    npy                  arrays [row, d_model] or [sequence, position, d_model]
    safetensors          the same, one tensor a file or `key`
    saelens              what CacheActivationsRunner saves: a data set with a column a hook, [position, d_model] each
    saev                 metadata.json, shards.json and acts*.bin: float32 [example, layer, token, d_model], C order
    dictionary-learning  what torch.save wrote of a buffer: a tensor, or {"states": a tensor, "input_ids": its tokens}
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.base.errors import DamagedError, UsageError
from pipeline.base.fields import Fields
from pipeline.base.files import hash_config, read_json, regular, sha256
from pipeline.base.record_files import regular_files, saved_files
from pipeline.base.records import require_batches

BLOCK = 8192
"""Rows read at a time."""
EDGE = 1 << 20
"""Bytes at either end of a file that its fingerprint looks at."""
FLOATS = {torch.bfloat16: "bf16", torch.float16: "float32", torch.float32: "float32", torch.float64: "float32"}
"""The dtype of a store that holds rows of each dtype; only float64 is rounded."""


@dataclass(frozen=True)
class Asked:
    """What may be said of a source beyond its path. key: tensor or column, where there are several; layer: of a saev folder;
    special_ids: tokens whose rows are special, where the source has tokens."""

    key: str | None = None
    layer: int | None = None
    special_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Part:
    """Consecutive rows in one file. read(a, b): rows a … b − 1, float [row, d_model], in a dtype of FLOATS."""

    path: Path
    n_rows: int
    read: Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Source:
    """Rows in order. context: rows of one sequence, None where rows stand alone; dtype: of a store that holds them.

    about: what the store records of where they come from (plain JSON); places: layer, hook and model, where the source says
    so; special: rows not to train on, bool [sequence, context], None for none.
    """

    parts: Sequence[Part]
    d_model: int
    context: int | None
    dtype: str
    about: Mapping[str, Any]
    places: Mapping[str, Any] = field(default_factory=dict)
    special: npt.NDArray[np.bool_] | None = None

    @property
    def n_rows(self) -> int:
        """Rows there are."""
        return sum(part.n_rows for part in self.parts)

    def blocks(self, first: int) -> Iterator[Float[Tensor, "row d_model"]]:
        """Rows from `first` on, at most BLOCK at a time. Raises DamagedError for one that is not finite, naming it."""
        for part in self.parts:
            for a in range(min(first, part.n_rows), part.n_rows, BLOCK):
                rows = part.read(a, min(a + BLOCK, part.n_rows))
                require_finite(rows, f"{part.path}: row", a)
                yield rows
            first = max(0, first - part.n_rows)


def require_finite(rows: Float[Tensor, "row d_model"], where: str, first: int) -> None:
    """Raise DamagedError unless all numbers are finite and small enough for a float32 norm; `first` is the first row's."""
    norm = torch.linalg.vector_norm(rows.float(), dim=1)
    if not (finite := torch.isfinite(norm)).all():
        row = int(finite.int().argmin())
        found = rows[row][~torch.isfinite(rows[row])]
        what = f"holds {found[0]:g}" if len(found) else "is too large for float32"
        raise DamagedError(f"{where} {first + row} {what}; make these activations again")


def natural(path: Path) -> list[tuple[int, str]]:
    """Sorts acts_2 before acts_10."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in re.split(r"(\d+)", str(path))]


def files_of(place: Path, suffixes: Sequence[str]) -> list[Path]:
    """A file itself, or those of a folder, in natural order. Raises UsageError when there is none, or one of another kind."""
    if place.is_file():
        found = [place]
    elif place.is_dir():
        found = sorted(regular_files(p for p in place.iterdir() if not p.name.startswith(".")), key=natural)
        found = [path for path in found if path.suffix in suffixes]
    else:
        raise UsageError(f"{place}: no such file or folder")
    if not found or any(path.suffix not in suffixes for path in found):
        raise UsageError(f"{place}: holds no {' or '.join(suffixes)} file; check FORMAT and the path")
    return found


def fingerprint(files: Sequence[Path]) -> str:
    """A hash over the files' names, sizes and both ends (EDGE bytes): another source under the same path is noticed without
    reading all of it."""
    seen = []
    for path in files:
        with open(path, "rb", opener=regular) as file:
            size = path.stat().st_size
            head = file.read(EDGE)
            file.seek(max(size - EDGE, 0))
            seen.append([path.name, size, sha256(head), sha256(file.read(EDGE))])
    return hash_config({"files": seen})


def about(kind: str, place: Path, files: Sequence[Path], **more: Any) -> dict[str, Any]:
    """What a store records of its source."""
    return {"format": kind, "name": place.resolve().name, "files": len(files), "fingerprint": fingerprint(files)} | more


@dataclass(frozen=True)
class Shaped:
    """An array in a file: its shape, 2 or 3 dimensions, dtype, and a reader of entries a … b − 1 along the first."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]

    def part(self) -> Part:
        """As rows: those of one entry after those of the one before."""
        if len(self.shape) == 2:
            return Part(self.path, self.shape[0], self.read)
        return Part(self.path, self.shape[0] * self.shape[1], self._read_rows)

    def _read_rows(self, a: int, b: int) -> Tensor:
        each, d_model = self.shape[1:]
        first = a // each
        return self.read(first, -(-b // each)).reshape(-1, d_model)[a - first * each : b - first * each]


def arrays_source(arrays: Sequence[Shaped], described: Mapping[str, Any]) -> Source:
    """A source of arrays of one shape but for the first dimension. Raises UsageError naming the first that is another."""
    first = arrays[0]
    for array in arrays:
        if len(array.shape) not in (2, 3) or math.prod(array.shape) == 0:
            raise UsageError(
                f"{array.path}: expected [row, d_model] or [sequence, position, d_model], found {list(array.shape)}"
            )
        if array.dtype not in FLOATS:
            raise UsageError(f"{array.path}: expected rows of floats, found {str(array.dtype).removeprefix('torch.')}")
        if (array.shape[1:], array.dtype) != (first.shape[1:], first.dtype):
            raise UsageError(
                f"{array.path}: expected rows like {first.path.name}'s, {list(first.shape[1:])} {first.dtype}, "
                f"found {list(array.shape[1:])} {array.dtype}"
            )
    context = first.shape[1] if len(first.shape) == 3 else None
    return Source([a.part() for a in arrays], first.shape[-1], context, FLOATS[first.dtype], described)


def open_npy(place: Path, asked: Asked) -> Source:
    """A .npy file or a folder of them. Raises UsageError or DamagedError."""
    files = files_of(place, [".npy"])
    return arrays_source([npy_array(path) for path in files], about("npy", place, files))


def npy_array(path: Path) -> Shaped:
    """The array of a .npy file, mapped."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # its header is Python, of which numpy's reader raises whatever tokenize does
        raise DamagedError(f"{path}: not a whole .npy file of numbers ({short(error)}); make it again") from error
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        raise UsageError(f"{path}: expected float16, float32 or float64, found {array.dtype}; save bf16 as safetensors")
    dtype = {2: torch.float16, 4: torch.float32, 8: torch.float64}[array.dtype.itemsize]
    return Shaped(
        path, array.shape, dtype, lambda a, b: torch.from_numpy(array[a:b].astype(array.dtype.newbyteorder("=")))
    )


def open_safetensors(place: Path, asked: Asked) -> Source:
    """A .safetensors file or a folder of them. Raises UsageError or DamagedError."""
    files = files_of(place, [".safetensors"])
    arrays = [safetensors_array(path, asked.key) for path in files]
    return arrays_source(arrays, about("safetensors", place, files, key=asked.key))


def safetensors_array(path: Path, key: str | None) -> Shaped:
    """The one tensor of a file, or that of a key."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            name = chosen(path, sorted(file.keys()), key, "tensor")
            entry = file.get_slice(name)
            shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
    except SafetensorError as error:
        raise DamagedError(f"{path}: not a whole safetensors file ({short(error)}); make it again") from error
    known = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    if dtype not in known:
        raise UsageError(f"{path}: expected {name} as floats, found {dtype}")

    def read(a: int, b: int) -> Tensor:
        with safe_open(path, "pt") as file:
            rows: Tensor = file.get_slice(name)[a:b]
            return rows

    return Shaped(path, shape, known[dtype], read)


def chosen(path: Path, names: Sequence[str], key: str | None, what: str) -> str:
    """The name that was asked for, or the only one. Raises UsageError listing what there is."""
    if key is None and len(names) == 1:
        return names[0]
    if key is None or key not in names:
        shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
        wanted = "--key is needed" if key is None else f"no {what} {key!r}"
        raise UsageError(f"{path}: {wanted}; it holds {shown or 'none'}")
    return key


def open_saelens(place: Path, asked: Asked) -> Source:
    """A folder that SAELens's CacheActivationsRunner saved. Its token ids mark special rows (`special_ids`); they are not kept.

    Raises UsageError or DamagedError.
    """
    from datasets import Array2D, Dataset, load_from_disk

    if not (place / "state.json").is_file():
        raise UsageError(f"{place}: expected a folder that SAELens cached (with state.json), found none")
    files = files_of(place, [".arrow"])
    for path in saved_files(place, None):
        require_batches(path)
    try:
        data = load_from_disk(str(place))
    except Exception as error:
        raise DamagedError(f"{place}: not a whole data set ({short(error)}); cache it again") from error
    if not isinstance(data, Dataset):
        raise UsageError(f"{place}: holds several splits ({', '.join(data)}); give the folder of one")
    columns = {name: kind for name, kind in data.features.items() if isinstance(kind, Array2D)}
    name = chosen(place, sorted(columns), asked.key, "column")
    kind = columns[name]
    if kind.dtype not in ("float16", "float32", "float64"):
        raise UsageError(f"{place}: expected {name} as floats, found {str(kind.dtype)[:40]}")
    if [type(n) for n in kind.shape] != [int, int] or min(kind.shape) < 1:
        raise DamagedError(f"{place}: {name} has the shape {str(kind.shape)[:40]}, expected two sizes; cache it again")
    context, d_model = kind.shape
    if not len(data):
        raise UsageError(f"{place}: holds no sequence")
    rows = data.with_format("numpy", columns=[name], dtype=np.dtype(kind.dtype))

    def read(a: int, b: int) -> Tensor:
        with saved_errors(place, data, a, b):
            return torch.from_numpy(np.ascontiguousarray(rows[a:b][name])).view(b - a, context, d_model)

    array = Shaped(
        place, (len(data), context, d_model), {"float16": torch.float16}.get(kind.dtype, torch.float32), read
    )
    special = special_rows(place, data, context, asked.special_ids)
    described = about("saelens", place, files, key=name, special_ids=list(asked.special_ids))
    return Source([array.part()], d_model, context, FLOATS[array.dtype], described, hook_of(name), special)


@contextlib.contextmanager
def saved_errors(place: Path, data: Any, a: int, b: int) -> Iterator[None]:
    """What libraries say of sequences a … b − 1 as a DamagedError; first they are checked whole, since offsets that lead out of
    their memory would end the process."""
    try:
        data.data.slice(a, b - a).table.validate(full=True)
        yield
    except Exception as error:
        raise DamagedError(f"{place}: sequences {a} to {b} cannot be read ({short(error)}); cache it again") from error


def hook_of(name: str) -> dict[str, Any]:
    """Layer and hook of a hook's name, where it is one that is known."""
    from pipeline.base.errors import CheckpointError
    from pipeline.sae.foreign.hooks import hook_point

    try:
        return dict(hook_point(Path(name), name))
    except CheckpointError:
        return {}


def special_rows(place: Path, data: Any, context: int, ids: Sequence[int]) -> npt.NDArray[np.bool_] | None:
    """Which rows stand for one of these tokens. Raises UsageError when the data set has no tokens to look at."""
    if not ids:
        return None
    if "token_ids" not in data.column_names:
        raise UsageError(f"{place}: has no token_ids, so --special-ids says nothing; leave it out")
    columns = data.with_format("numpy", columns=["token_ids"])
    blocks = []
    for a in range(0, len(data), BLOCK):
        with saved_errors(place, data, a, min(a + BLOCK, len(data))):
            blocks.append(np.isin(np.asarray(columns[a : a + BLOCK]["token_ids"]), ids))
    special = np.concatenate(blocks) if len({block.shape[1:] for block in blocks}) == 1 else np.empty(0)
    if special.shape != (len(data), context):
        raise DamagedError(f"{place}: token_ids are {list(special.shape)}, expected {[len(data), context]}")
    return special


def short(error: Exception) -> str:
    """The first line of what a library says."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


SAEV_NAMES = {
    "tokens": ("content_tokens_per_example", "patches_per_ex", "n_patches_per_img"),
    "d_model": ("d_model", "d_vit"),
    "examples": ("n_examples", "n_ex", "n_imgs"),
    "model": ("ckpt", "vit_ckpt"),
}
"""What saev's releases have called the same field, newest first."""


def named(fields: Fields, what: str) -> str:
    """The name that a field has in this file. Raises DamagedError when it has none."""
    for name in SAEV_NAMES[what]:
        if name in fields.data:
            return name
    raise fields.wrong(SAEV_NAMES[what][0], "there", None)


def open_saev(place: Path, asked: Asked) -> Source:
    """A folder of saev's shards: one of its layers. The row of a CLS token, first of its example, is special.

    Raises UsageError or DamagedError.
    """
    if not (place / "metadata.json").is_file():
        raise UsageError(f"{place}: expected saev's folder of shards (with metadata.json), found none")
    about_all = Fields(place / "metadata.json", read_json(place / "metadata.json"))
    protocol = about_all.text("protocol", "1")
    if protocol.partition(".")[0] not in ("1", "2") or about_all.text("dtype", "float32") != "float32":
        raise UsageError(
            f"{place}: expected saev's protocol 1 or 2 in float32, found {protocol[:40]!a} "
            f"{about_all.text('dtype', 'float32')[:40]!a}"
        )
    layers = about_all.items("layers")
    if not layers or any(type(layer) is not int for layer in layers):
        raise about_all.wrong("layers", "whole numbers", layers)
    if (asked.layer is None and len(layers) > 1) or (asked.layer is not None and asked.layer not in layers):
        raise UsageError(f"{place}: holds layers {', '.join(map(str, layers))}; say which by --layer")
    layer = layers[0] if asked.layer is None else asked.layer
    has_cls = about_all.flag("cls_token")
    d_model, n_tokens, n_examples = (
        about_all.whole(named(about_all, what), least=1) for what in ("d_model", "tokens", "examples")
    )
    n_tokens += has_cls
    shards = place / "shards.json"
    found = read_json(shards)
    if not isinstance(found, list):
        raise DamagedError(f"{shards}: expected a list of shards; restore it or make it again")
    arrays = [
        saev_shard(place, Fields(shards, one), (layers.index(layer), len(layers), n_tokens, d_model)) for one in found
    ]
    if (there := sum(array.shape[0] for array in arrays)) != n_examples:
        raise DamagedError(f"{shards}: names {there} examples, metadata.json {n_examples}; make the shards again")
    special = np.zeros((n_examples, n_tokens), np.bool_)
    special[:, 0] = has_cls
    described = about("saev", place, [array.path for array in arrays], layer=layer, protocol=protocol)
    places = {"layer": layer, "model": about_all.text(named(about_all, "model"))}
    parts = [array.part() for array in arrays]
    return Source(parts, d_model, n_tokens, "float32", described, places, special if has_cls else None)


def saev_shard(place: Path, fields: Fields, shape: tuple[int, int, int, int]) -> Shaped:
    """One layer of a shard; `shape` is the layer's place, layers, tokens, d_model. The last file may be longer than it says."""
    at, n_layers, n_tokens, d_model = shape
    name, n_examples = fields.text("name"), fields.whole(named(fields, "examples"), least=1)
    path = place / name
    if re.fullmatch(r"acts\d+\.bin", name) is None or not path.is_file():
        raise DamagedError(f"{fields.path}: names {name[:40]!r}, which is no shard here; make the shards again")
    each, size = 4 * n_layers * n_tokens * d_model, path.stat().st_size
    if size % each or size < n_examples * each:
        raise DamagedError(f"{path}: {size} bytes, expected {n_examples} examples of {each}; make the shards again")
    mapped = np.memmap(path, "<f4", "r", shape=(size // each, n_layers, n_tokens, d_model))
    return Shaped(
        path, (n_examples, n_tokens, d_model), torch.float32, lambda a, b: torch.from_numpy(np.array(mapped[a:b, at]))
    )


def open_torch(place: Path, asked: Asked) -> Source:
    """A file of torch.save, or a folder of them. Raises UsageError or DamagedError."""
    files = files_of(place, [".pt", ".pth"])
    return arrays_source(
        [torch_array(path, asked.key) for path in files], about("dictionary-learning", place, files, key=asked.key)
    )


def torch_array(path: Path, key: str | None) -> Shaped:
    """The tensor in a file: itself, or under `states` or the key that is asked for; weights only, mapped."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever an unpickler meets
        raise DamagedError(f"{path}: not a whole file of tensors alone ({short(error)}); save it again") from error
    if isinstance(loaded, dict):
        names = sorted(name for name, value in loaded.items() if isinstance(value, Tensor) and isinstance(name, str))
        loaded = loaded[chosen(path, names, key or ("states" if "states" in names else None), "tensor")]
    if not isinstance(loaded, Tensor) or loaded.layout != torch.strided:
        raise UsageError(f"{path}: expected a tensor or a dict of tensors, found {type(loaded).__name__}")
    tensor = loaded
    return Shaped(path, tuple(tensor.shape), tensor.dtype, lambda a, b: tensor[a:b].clone())


FORMATS: dict[str, Callable[[Path, Asked], Source]] = {
    "npy": open_npy,
    "safetensors": open_safetensors,
    "saelens": open_saelens,
    "saev": open_saev,
    "dictionary-learning": open_torch,
}
