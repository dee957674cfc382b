"""The root's zarr.json: the one file that says what a store is and what state it is in. Read typed, checked before use.

Whoever made the file, what `read_root` returns has every field that FORMAT.md lists, of its type and within bounds that a
store of this size on disk can have; its files are exactly those that its layout implies. Nothing else is read before.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.base.errors import DamagedError, StoreError, UsageError
from pipeline.base.fields import Fields, require_plain
from pipeline.base.files import canonical_json, hash_config, sha256
from pipeline.store.backend import Files
from pipeline.store.layout import (
    EXTRAS,
    GROUPED,
    SPLITS,
    VERSION,
    Layout,
    SplitLayout,
    extras_of,
    group_metadata,
    metadata_files,
)
from pipeline.store.moments import Statistics

FORMAT = "nested-sae-activations"
READ_VERSIONS = (1, 2, 3, VERSION)
"""Those before are read and not written: up to 2 no commit record says whose it is, up to 3 nothing lies in groups."""
NAMED = 3
"""The first version with an `origin`."""
ROOT_KEY = "zarr.json"
STATES = ("preparing", "prepared", "complete")
MOST_BYTES = 1 << 26
"""Bytes that a root, whose special ids and segments are lists, stays under."""
MOST_CHUNK, MOST_SHARDS = 1 << 31, 1 << 20
"""Bytes of a chunk, which is read whole, and shards of a split, which are looked at one by one."""
REQUIRED = ("state", "id", "config", "segments", "n_sequences", "tokens_sha256", "special_sha256", "files", "versions")
KNOWN = (
    *(
        "format",
        "version",
        "state",
        "id",
        "origin",
        "config",
        "segments",
        "n_sequences",
        "tokens_sha256",
        "special_sha256",
        "groups",
    ),
    *("extras", "files", "versions", "made_by", "seal", "statistics", "committed"),
)
"""All attributes, in the order in which they are written."""
ABOUT = {"truth": "truth", "rows": "source"}
"""Kind → the object of the config that says what rows of no text are; who makes them reads it further."""
EXTRA_TYPES = ("int32", "int64", "float32", "float64")
HASH = re.compile(r"[0-9a-f]{64}")


def read_root(files: Files) -> dict[str, Any]:
    """The attributes of the root group, typed and checked against their seal. Raises StoreError or DamagedError."""
    where = files.where(ROOT_KEY)
    if files.size(ROOT_KEY) is None:
        raise StoreError(
            f"{where}: no such file, so there is no activation store here; make one with python -m harvest"
        )
    data = files.read(ROOT_KEY, most=MOST_BYTES)
    try:
        attributes = json.loads(data)["attributes"]
        found = attributes.get("format"), attributes.get("version")
        whole = attributes.get("seal") == seal(attributes) and group_metadata(attributes) == data
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = str(error)[:200] if not isinstance(error, RecursionError) else "nested too deeply"
        raise DamagedError(f"{where}: not readable as a Zarr group ({said}); run harvest --repair") from error
    if found[0] != FORMAT or type(found[1]) is not int or found[1] not in READ_VERSIONS:
        known, shown = ", ".join(map(str, READ_VERSIONS)), [ascii(str(value)[:40])[1:-1] for value in found]
        raise StoreError(
            f"{where}: expected format {FORMAT} version {known}, found {shown[0]} version {shown[1]}; harvest again, or use the "
            f"release that made it"
        )
    if not whole:
        raise DamagedError(f"{where}: bytes changed since it was written (seal); run harvest --repair")
    with named(where) as path:
        require_attributes(path, attributes)
    return dict(attributes)


def write_root(files: Files, attributes: Mapping[str, Any]) -> None:
    """Write the root's zarr.json, sealed: the one file that says what state the store is in."""
    sealed = {**attributes, "seal": seal(attributes)}
    files.write(ROOT_KEY, group_metadata({name: sealed[name] for name in sorted(sealed, key=KNOWN.index)}))


def seal(attributes: Mapping[str, Any]) -> str:
    """The hash of all attributes but the seal."""
    return sha256(canonical_json({name: value for name, value in attributes.items() if name != "seal"}))


def read_segments(files: Files) -> tuple[int, ...]:
    """What the training group says of the root's segments, for a repair. Raises DamagedError."""
    key = f"{SPLITS[0]}/{ROOT_KEY}"
    try:
        data = json.loads(files.read(key, most=MOST_BYTES))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{files.where(key)}: not readable as a Zarr group; run harvest --repair") from error
    with named(files.where(key)) as path:
        require_plain(path, data)
        return tuple(Fields(path, data).inner("attributes").list_of_wholes("segments"))


@contextlib.contextmanager
def named(where: str) -> Iterator[Path]:
    """A path for typed reading, whose messages name the URL where it was one (a Path makes s3:/ of s3://)."""
    path = Path(where)
    try:
        yield path
    except DamagedError as error:
        raise DamagedError(str(error).replace(str(path), where, 1)) from error


def require_attributes(path: Path, attributes: Mapping[str, Any]) -> None:
    """Raise DamagedError, naming the field, unless these are a store's attributes and agree with each other."""
    require_plain(path, attributes)
    root = Fields(path, attributes)
    root.only(*KNOWN)
    if missing := [name for name in REQUIRED if name not in attributes]:
        raise root.wrong(missing[0], "there", None)
    root.one_of("state", STATES)
    layout = layout_of(root)
    n_sequences = require_sizes(root, layout)
    require_hashes(root, layout)
    if attributes["version"] >= NAMED:
        require_hash(root, "origin")
    elif "origin" in attributes:
        raise root.wrong("origin", f"in no version before {NAMED}", attributes["origin"])
    require_groups(root, layout, n_sequences)
    require_extras(root, layout, n_sequences)
    require_id(root, layout)
    root.texts("versions")
    for maker in root.objects("made_by"):
        for name in maker.data:
            maker.text(name)
    require_files(root, n_sequences)
    if "statistics" in attributes or attributes["state"] == "complete":
        require_statistics(root.inner("statistics"))


def layout_of(root: Fields) -> Layout:
    """The layout that the config names, its other fields typed too."""
    config = root.inner("config")
    for name in ("d_model", "context", "shard_rows", "chunk_rows"):
        config.whole(name, least=1)
    for name in ("dtype", "codec", "model", "weights_sha256"):
        config.text(name)
    config.whole("seed")
    if "group_shards" in config.data:
        config.whole("group_shards", least=1)
        if root.data["version"] < GROUPED:
            raise config.wrong("group_shards", f"in no version before {GROUPED}", config.data["group_shards"])
    if "kind" in config.data:
        config.text("kind")
    try:
        layout = Layout.from_config(config.data, root.data["version"])
    except UsageError as error:
        raise DamagedError(f"{root.path}: {error}; run harvest --repair") from error
    if layout.chunk_nbytes >= MOST_CHUNK:
        raise config.wrong("chunk_rows", f"rows of at most {MOST_CHUNK:,} bytes together", layout.chunk_rows)
    if layout.has_tokens:
        require_model(config)
    else:
        config.some_whole("layer")
        config.some_text("hook")
        Fields(config.path, config.data.get(about := ABOUT[layout.kind]), f"config.{about}")
    return layout


def require_model(config: Fields) -> None:
    """Raise DamagedError unless what a model's config says, beside the layout, is of its types."""
    config.some_text("revision")
    config.whole("layer")
    for name in ("tokenizer_sha256", "attention", "device_type", "compute_dtype", "hook"):
        if name in config.data:
            config.text(name)
    for name in ("n_layers", "vocab", "separator", "batch_size"):
        if name in config.data:
            config.whole(name)
    for name in ("compile", "parse_special"):
        if name in config.data:
            config.flag(name)
    if isinstance(config.data.get("bos"), list):
        config.list_of_wholes("bos")  # several tokens begin every row
    else:
        config.some_whole("bos")
    config.list_of_wholes("special_ids")
    config.list_of_texts("roles")
    for name in ("corpus", "eval_corpus"):
        if config.data.get(name) is not None:
            corpus = config.inner(name)
            corpus.text("id")
            for part in ("sha256", "revision", "subset", "split", "text_field"):
                corpus.some_text(part)


def require_sizes(root: Fields, layout: Layout) -> dict[str, int]:
    """Sequences of each split. Raises DamagedError unless the segments lead up to those of training."""
    sizes = root.inner("n_sequences")
    sizes.only(*SPLITS)
    n_sequences = {name: sizes.whole(name, least=1) for name in SPLITS}
    for name, n in n_sequences.items():
        if SplitLayout(name, layout, n).n_shards > MOST_SHARDS:
            raise sizes.wrong(name, f"sequences of at most {MOST_SHARDS:,} shards", n)
    segments = root.list_of_wholes("segments")
    if not segments or segments != sorted(set(segments)) or segments[0] < 1 or segments[-1] != n_sequences["train"]:
        raise root.wrong("segments", f"numbers that grow to {n_sequences['train']}", segments)
    return n_sequences


def require_hashes(root: Fields, layout: Layout) -> None:
    """Raise DamagedError unless there are hashes of tokens, where a store has them, and of special masks."""
    for name, there in (("tokens_sha256", layout.has_tokens), ("special_sha256", True)):
        hashes = root.inner(name)
        hashes.only(*(SPLITS if there else ()))
        for split in SPLITS if there else ():
            require_hash(hashes, split)


def require_groups(root: Fields, layout: Layout, n_sequences: Mapping[str, int]) -> None:
    """Raise DamagedError unless there is a hash of every group's tokens and masks, and of a finished store's commit records."""
    prepared = ("tokens", "special") if layout.has_tokens else ("special",)
    complete = root.data["state"] == "complete"
    for name, there in (("groups", layout.in_groups), ("committed", layout.in_groups and complete)):
        if not there and name not in root.data:
            continue
        if not layout.in_groups:
            raise root.wrong(name, f"in no version before {GROUPED}", root.data[name])
        groups = root.inner(name)
        groups.only(*SPLITS)
        for split in SPLITS:
            shape, hashes = SplitLayout(split, layout, n_sequences[split]), groups.inner(split)
            hashes.only(*(held := prepared if name == "groups" else ("commit",)))
            for array in held:
                found = hashes.list_of_texts(array)
                if len(found) != shape.n_groups or any(HASH.fullmatch(one) is None for one in found):
                    raise hashes.wrong(array, f"{shape.n_groups} SHA-256s", found)


def require_extras(root: Fields, layout: Layout, n_sequences: Mapping[str, int]) -> None:
    """Raise DamagedError unless the arrays beside the rows are those of a truth: all or none, their shapes agreeing."""
    extras = root.inner("extras")
    extras.only(*EXTRAS)
    if extras.data and (layout.has_tokens or set(extras.data) != set(EXTRAS)):
        raise root.wrong("extras", f"none, or of a truth {', '.join(EXTRAS)}", ", ".join(extras.data))
    sizes = {"d_model": layout.d_model, "row_and_one": n_sequences["eval"] * layout.context + 1}
    for path in sorted(extras.data):
        extra = extras.inner(path)
        extra.only("dtype", "shape", "sha256")
        extra.one_of("dtype", EXTRA_TYPES)
        require_hash(extra, "sha256")
        shape, names = extra.list_of_wholes("shape"), EXTRAS[path]
        agreed = [sizes.setdefault(name, n) for name, n in zip(names, shape)]
        if shape != agreed or len(shape) != len(names) or 0 in shape:
            raise extra.wrong("shape", f"[{', '.join(names)}], here {agreed}", shape)


def require_id(root: Fields, layout: Layout) -> None:
    """Raise DamagedError unless the store is named by what is in it."""
    data = root.data
    beside = {"extras": data["extras"]} if "extras" in data else {}
    of_rows = {"tokens_sha256": data["tokens_sha256"]} if layout.has_tokens else {}
    of_rows = of_rows or {"special_sha256": data["special_sha256"], **beside}
    if root.text("id") != (expected := hash_config({"config": data["config"], **of_rows})):
        raise root.wrong("id", f"the hash of its config and tokens, {expected[:10]}…", data["id"])


def require_files(root: Fields, n_sequences: Mapping[str, int]) -> None:
    """Raise DamagedError unless the files that are named are those that the layout implies, no other and none less."""
    files = root.inner("files")
    data = root.data
    implied = metadata_files(data["config"], n_sequences, data["segments"], extras_of(data), data["version"])
    if unknown := sorted(files.data.keys() - implied.keys()):
        raise DamagedError(
            f"{root.path}: names a file {unknown[0][:80]!a} that no store has; do not use it, whoever made it meant harm"
        )
    if missing := sorted(implied.keys() - files.data.keys()):
        raise files.wrong(missing[0], "named, with its hash", None)
    for key in implied:
        require_hash(files, key)


def require_statistics(statistics: Fields) -> None:
    """Raise DamagedError unless these are what a harvest measures."""
    statistics.only(*Statistics.__dataclass_fields__)
    for name in ("n_rows", "n_special", "n_massive", "n_kept"):
        statistics.whole(name)
    for name in ("massive_multiple", "median_norm", "scale", "mean_share"):
        statistics.number(name, least=0.0)
    if statistics.data["scale"] <= 0:
        raise statistics.wrong("scale", "a number above 0", statistics.data["scale"])
    require_hash(statistics, "mean_sha256")


def require_hash(fields: Fields, name: str) -> None:
    """Raise DamagedError unless a field is a SHA-256 in hex."""
    if HASH.fullmatch(fields.text(name)) is None:
        raise fields.wrong(name, "a SHA-256", fields.data[name])
