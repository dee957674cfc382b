"""Stores made by an enemy, who seals what is changed: one line that names the file, nothing outside the target, no traceback."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch

from evaluate.scores.truth import Truth
from harvest.truth.run import TruthConfig, run_truth
from pipeline.base.errors import DamagedError, DiskError
from pipeline.store.backend import LocalFiles
from pipeline.store.objects import RemoteFiles
from pipeline.store.prepare import resume, segments
from pipeline.store.reader import Store, describe_store
from pipeline.store.shards import read_index, with_crc
from pipeline.store.staging import stage
from support.fuzzing import as_bytes, hurt, mutated, one_line_or_none
from support.stores import make_store
from test_format import canonical
from test_store import SMALL, tree

SIZES: dict[str, Any] = {"n_sequences": 19, "eval_sequences": 5, **SMALL}


def forged(attributes: Any, *, named: bool = True) -> bytes:
    """A root of these attributes as an enemy writes it: sealed, and named by its contents."""
    if isinstance(attributes, dict):
        attributes = {name: value for name, value in attributes.items() if name != "seal"}
        with contextlib.suppress(KeyError, ValueError, TypeError):
            if named:
                rows = {"tokens_sha256": attributes["tokens_sha256"]}
                if not attributes["tokens_sha256"]:
                    rows = {name: attributes[name] for name in ("special_sha256", "extras")}
                attributes["id"] = sha256(canonical({"config": attributes["config"], **rows})).hexdigest()
        with contextlib.suppress(ValueError):
            attributes["seal"] = sha256(canonical(attributes)).hexdigest()
    return json.dumps({"attributes": attributes, "zarr_format": 3, "node_type": "group"}, indent=2).encode()


def change_root(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a store's attributes as an enemy would."""
    attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
    change(attributes)
    (path / "zarr.json").write_bytes(forged(attributes))


def readers(path: Path, target: Path) -> Iterator[Callable[[], object]]:
    """Everything that reads a store, each alone, since what one of them refuses the next might not."""
    config = {"model": "no/model"}
    yield lambda: describe_store(Store.load(path))
    yield lambda: read_rows(Store.open(path))
    yield lambda: verified(Store.open(path, complete=False, check=False))
    yield lambda: segments(path, repair=True)
    yield lambda: resume(path, config, 19, 5)
    yield lambda: stage(str(path), target, quiet=True)
    yield lambda: Truth.read(Store.load(path), "cpu")


def read_rows(store: Store) -> None:
    """Rows, masks, norms and moments of both splits."""
    for split in store.splits:
        split.read(0, split.n_rows), split.kept(), split.moments
        if store.layout.codec == "none":
            split.mapped_shard(0)
    assert store.mean.shape == (store.d_model,)


def verified(store: Store) -> None:
    """Refuse what `verify` finds, each problem a line."""
    for problem in store.verify(quiet=True):
        if "unfinished" not in problem:
            raise DamagedError(problem)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished stores of a model, uncompressed and compressed, and of known features."""
    folder = tmp_path_factory.mktemp("stores")
    made = {codec: make_store(folder / f"{codec}.zarr", **SIZES | {"codec": codec}).path for codec in ("none", "lz4")}
    truth = TruthConfig(
        "tree", store=str(folder / "truth.zarr"), tokens=640, eval_tokens=320, context=16, chunk_rows=64
    )
    return made | {"truth": Path(run_truth(truth))}


def fuzz_root(path: Path, folder: Path, n: int, seed: int) -> int:
    """Read n stores with mutated roots; how many of the readings were refused."""
    rng, refused, store = random.Random(seed), 0, folder / "a.zarr"
    shutil.copytree(path, store)
    root = store / "zarr.json"
    attributes = json.loads(root.read_bytes())["attributes"]
    for _ in range(n):
        changed = mutated(attributes, rng)
        root.write_bytes(as_bytes(changed, rng) if rng.random() < 0.2 else forged(changed, named=rng.random() < 0.8))
        refused += one_line_each(store, folder / "a_target", rng)
    return refused


def fuzz_files(path: Path, folder: Path, n: int, seed: int) -> int:
    """Read n stores with one file mutated and its checksum made right again; how many of the readings were refused."""
    rng, refused, store = random.Random(seed), 0, folder / "a.zarr"
    shutil.copytree(path, store)
    keys = [key for key in tree(store) if key != "zarr.json"]
    for _ in range(n):
        file = store / rng.choice(keys)
        whole = file.read_bytes()
        file.write_bytes(resealed(hurt(whole, rng)) if rng.random() < 0.8 else hurt(whole, rng))
        refused += one_line_each(store, folder / "a_target", rng)
        file.write_bytes(whole)
    return refused


def resealed(data: bytes) -> bytes:
    """With the crc32c at the end that its bytes have."""
    return data[:-4] + google_crc32c.value(data[:-4]).to_bytes(4, "little")


def one_line_each(store: Path, target: Path, rng: random.Random) -> int:
    """How many readings were refused; a store is staged now and then."""
    refused, found = 0, list(readers(store, target))
    for read in found if rng.random() < 0.1 else [*found[:5], found[6]]:
        refused += one_line_or_none(read, store)
    shutil.rmtree(target, ignore_errors=True)
    return refused


@pytest.mark.parametrize("kind", ["none", "truth"])
def test_hostile_roots_end_in_one_line(stores: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Whatever a root says, each reader refuses it in a line or reads it."""
    assert fuzz_root(stores[kind], tmp_path, 60, seed=1) > 200


@pytest.mark.parametrize("kind", ["none", "lz4", "truth"])
def test_hostile_files_end_in_one_line(stores: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Likewise of every other file of a store."""
    assert fuzz_files(stores[kind], tmp_path, 40, seed=1) > 80


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "n"), [("none", 6000), ("truth", 4000)])
def test_hostile_roots_end_in_line(stores: dict[str, Path], tmp_path: Path, kind: str, n: int) -> None:
    """Likewise, ten thousand."""
    assert fuzz_root(stores[kind], tmp_path, n, seed=2) > 3 * n


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "n"), [("none", 4000), ("lz4", 4000), ("truth", 2000)])
def test_hostile_files_end_in_line(stores: dict[str, Path], tmp_path: Path, kind: str, n: int) -> None:
    """Likewise, ten thousand."""
    assert fuzz_files(stores[kind], tmp_path, n, seed=2) > 2 * n


@pytest.mark.parametrize("where", ["folder", "memory"])
@pytest.mark.parametrize(
    "key", ["../../outside", "/dev/zero", "{outside}", "train/resid/c/0/0", "train/colour/zarr.json"]
)
def test_stage_copies_only_the_layout(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, key: str
) -> None:
    """A root that names a file of its own is refused before another byte is read, and nothing is written anywhere."""
    shutil.copytree(stores["none"], tmp_path / "s.zarr")
    outside = tmp_path / "a" / "outside"
    key = key.format(outside=outside)
    change_root(tmp_path / "s.zarr", lambda attributes: attributes["files"].update({key: "0" * 64}))
    url = str(tmp_path / "s.zarr")
    if where == "memory":
        fsspec = pytest.importorskip("fsspec")
        url = f"memory://{tmp_path.name}.zarr"
        fsspec.filesystem("memory").put(f"{tmp_path}/s.zarr", f"/{tmp_path.name}.zarr", recursive=True)
    read: list[str] = []
    whole_read = LocalFiles.read
    monkeypatch.setattr(LocalFiles, "read", lambda self, key, most: read.append(key) or whole_read(self, key, most))
    before = {str(path) for path in tmp_path.rglob("*")}
    with pytest.raises(DamagedError, match=rf"^{url}/zarr\.json: names a file .* that no store has"):
        stage(url, tmp_path / "a" / "b" / "target.zarr")
    assert {str(path) for path in tmp_path.rglob("*")} == before
    assert read == (["zarr.json"] if where == "folder" else [])


@pytest.mark.parametrize(
    "key", ["zarr.json", "train/zarr.json", "train/tokens/c/0/0", "train/norm/c/0", "train/resid/c/0/0"]
)
@pytest.mark.parametrize("what", ["endless", "pipe", "folder", "large"])
def test_entry_not_a_file_refused(stores: dict[str, Path], tmp_path: Path, key: str, what: str) -> None:
    """A device without an end, a pipe that nobody writes, a folder or a terabyte of holes is refused, and nothing waits."""
    shutil.copytree(stores["none"], tmp_path / "s.zarr")
    file = tmp_path / "s.zarr" / key
    file.unlink()
    if what == "endless":
        file.symlink_to("/dev/zero")
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    else:
        with open(file, "wb") as holes:
            holes.truncate(1 << 40)
    with pytest.raises((DamagedError, DiskError), match=key):
        Store.open(tmp_path / "s.zarr")


@pytest.mark.parametrize("key", ["zarr.json", "train/zarr.json", "train/norm/c/0", "train/resid/c/0/0"])
def test_pipes_behind_a_url_are_refused(stores: dict[str, Path], tmp_path: Path, key: str) -> None:
    """Staging from file:// refuses a pipe where a file of the store should be, and does not wait for who writes it."""
    pytest.importorskip("fsspec")
    shutil.copytree(stores["none"], tmp_path / "s.zarr")
    (tmp_path / "s.zarr" / key).unlink()
    os.mkfifo(tmp_path / "s.zarr" / key)
    unblocked = os.open(tmp_path / "s.zarr" / key, os.O_RDWR)  # who opens it without the guard fails instead of waiting
    try:
        with pytest.raises(DamagedError, match=key):
            stage(f"file://{tmp_path}/s.zarr", tmp_path / "target.zarr")
    finally:
        os.close(unblocked)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a["config"].update(d_model="64"), "'config.d_model' should be a whole number"),
        (lambda a: a["config"].update(chunk_rows=1 << 40, shard_rows=1 << 40), "'config.chunk_rows' should be rows of at most"),
        (lambda a: a["n_sequences"].update(eval=1 << 62), "'n_sequences.eval' should be sequences of at most"),
        (lambda a: a.update(segments=[19, 18]), "'segments' should be numbers that grow to 19"),
        (lambda a: a.update(colour=1), "has a field 'colour'"),
        (lambda a: a["files"].pop("train/zarr.json"), "'files.train/zarr.json' should be named"),
        (lambda a: a.pop("statistics"), "'statistics.n_rows' should be a whole number"),
        (lambda a: a["statistics"].update(scale=0), "'statistics.scale' should be a number above 0"),
        (lambda a: a["special_sha256"].update(eval="0"), "'special_sha256.eval' should be a SHA-256"),
        (lambda a: a.pop("origin"), "'origin' should be text, found nothing"),
        (lambda a: a.pop("versions"), "'versions' should be there, found nothing"),
        (lambda a: a.update(version=1), "'config.group_shards' should be in no version before 4"),
        (lambda a: a["groups"]["eval"]["special"].append("0" * 64), "'groups.eval.special' should be 1 SHA-256s"),
        (lambda a: a["groups"].pop("train"), "'groups.train.tokens' should be 2 SHA-256s"),
        (lambda a: a["committed"]["train"].update(commit=["0", "1"]), "'committed.train.commit' should be 2 SHA-256s"),
        (lambda a: a.pop("committed"), "'committed.train.commit' should be 2 SHA-256s"),
        (lambda a: a["config"].update(kind=None), "'config.kind' should be text"),
        (lambda a: a["config"].update(group_shards=0), "'config.group_shards' should be a whole number from 1"),
        (lambda a: a.update(extras={"truth/parent": {}}), "'extras' should be none, or of a truth"),
        (lambda a: a["config"].update(x=json.loads("[" * 40 + "]" * 40)), "is nested deeper than 32"),
        (lambda a: a["config"].update(x=1e200), "'config.x' is no number that can be"),
        (lambda a: a.update(made_by=[{"torch": 2}]), "'made_by.0.torch' should be text"),
        (lambda a: a.update(made_by={"torch": "2"}), "'made_by' should be a list"),
    ],
)  # fmt: skip
def test_fields_of_a_root_are_typed(
    stores: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    """A field of another type, out of bounds, unknown, gone, or against another is named."""
    shutil.copytree(stores["none"], tmp_path / "s.zarr")
    change_root(tmp_path / "s.zarr", change)
    with pytest.raises(DamagedError, match=says):
        Store.load(tmp_path / "s.zarr")


def test_null_makers_are_none(stores: dict[str, Path], tmp_path: Path) -> None:
    """A root whose made_by is null names no maker."""
    shutil.copytree(stores["none"], tmp_path / "s.zarr")
    change_root(tmp_path / "s.zarr", lambda attributes: attributes.update(made_by=None))
    store = Store.load(tmp_path / "s.zarr")
    assert store.made_by == []
    assert describe_store(store)["id"] == store.id


def test_foreign_name_is_refused(stores: dict[str, Path], tmp_path: Path) -> None:
    """The id is that of config and tokens, so a config cannot be changed under it."""
    shutil.copytree(stores["none"], tmp_path / "s.zarr")
    attributes = json.loads((tmp_path / "s.zarr/zarr.json").read_bytes())["attributes"]
    attributes["config"]["model"] = "another/model"
    (tmp_path / "s.zarr/zarr.json").write_bytes(forged(attributes, named=False))
    with pytest.raises(DamagedError, match="'id' should be the hash of its config and tokens"):
        Store.load(tmp_path / "s.zarr")


def test_tokens_out_of_vocabulary_refused(stores: dict[str, Path], tmp_path: Path) -> None:
    """Tokens that an enemy wrote and hashed anew would be looked up behind the embedding's end."""
    shutil.copytree(stores["none"], tmp_path / "s.zarr")
    change_root(tmp_path / "s.zarr", lambda attributes: attributes["config"].update(vocab=3))
    with pytest.raises(DamagedError, match="token ids beyond the model's 3"):
        Store.load(tmp_path / "s.zarr").check_tokens()
    with pytest.raises(DamagedError, match="token ids beyond the model's 3"):
        Store.open(tmp_path / "s.zarr").train.tokens_of(0, 1)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("truth/parent", "a parent or a depth that no feature has"),
        ("eval/truth/feature", "a firing of a feature that there is not"),
        ("eval/truth/start", "firings that are not row after row"),
    ],
)
def test_contradicting_truth_is_refused(stores: dict[str, Path], tmp_path: Path, path: str, says: str) -> None:
    """Indexes out of range in a truth whose hashes were made right are named."""
    shutil.copytree(stores["truth"], tmp_path / "s.zarr")
    array = np.array(Store.load(tmp_path / "s.zarr").extra(path))
    array.reshape(-1)[0] = 1 << 20
    key = f"{path}/c/0"
    (tmp_path / "s.zarr" / key).write_bytes(resealed(array.tobytes() + b"crc?"))
    change_root(
        tmp_path / "s.zarr",
        lambda attributes: attributes["extras"][path].update(sha256=sha256(array.tobytes()).hexdigest()),
    )
    with pytest.raises(DamagedError, match=says):
        Truth.read(Store.load(tmp_path / "s.zarr"), torch.device("cpu"))


@pytest.mark.parametrize("shape", [[7], [20, 1], [0]])
def test_extras_have_the_truths_shapes(stores: dict[str, Path], tmp_path: Path, shape: list[int]) -> None:
    """An array beside the rows that is of another length than the others say, of more dimensions, or empty is refused."""
    shutil.copytree(stores["truth"], tmp_path / "s.zarr")
    change_root(tmp_path / "s.zarr", lambda attributes: attributes["extras"]["truth/parent"].update(shape=shape))
    with pytest.raises(DamagedError, match=r"extras\.truth/p\w+\.shape' should be"):
        Store.load(tmp_path / "s.zarr")


def test_large_objects_are_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an object in a bucket that is larger than it can be, one byte more than that is asked for, and it is refused."""
    pytest.importorskip("fsspec")
    files = RemoteFiles("memory://large.zarr")
    files.write("mean/c/0", bytes(1000))
    asked: list[tuple[int, int | None]] = []
    fetch = type(files.fs).cat_file
    monkeypatch.setattr(
        type(files.fs),
        "cat_file",
        lambda fs, path, start, end: asked.append((start, end)) or fetch(fs, path, start, end),
    )
    assert files.read("mean/c/0", most=1000) == bytes(1000)
    with pytest.raises(DamagedError, match=r"mean/c/0: 11 bytes, expected 10 at most"):
        files.read("mean/c/0", most=10)
    assert asked == [(0, 1001), (0, 11)]


def test_claimed_sizes_take_no_memory(tmp_path: Path) -> None:
    """Of a file behind file:// no more is asked for than it holds, whatever size the store's root claims for it."""
    (tmp_path / "s.zarr/mean/c").mkdir(parents=True)
    (tmp_path / "s.zarr/mean/c/0").write_bytes(bytes(1000))
    files = RemoteFiles(f"file://{tmp_path}/s.zarr")
    assert files.read("mean/c/0", most=1 << 62) == bytes(1000)
    assert files.fetch("mean/c/0", 900, 1 << 62) == bytes(100)
    assert files.fetch("mean/c/0", 1 << 40, 1 << 62) == b""


@pytest.mark.parametrize("nbytes", [[(1 << 64) - 8, 48], [8, 32], [40, 0]])
def test_entries_of_an_index_are_bounded(tmp_path: Path, nbytes: list[int]) -> None:
    """Sizes of chunks that go round and add up to the file's, or that no chunk can have, are refused."""
    entries = [[0, nbytes[0]], [nbytes[0], nbytes[1]]]
    (tmp_path / "shard").write_bytes(bytes(40) + with_crc(np.array(entries, "<u8")))
    with pytest.raises(DamagedError, match="expected 2 chunks one after the other"):
        read_index(LocalFiles(tmp_path), "shard", 2, 2, (20, 20))
    whole = with_crc(np.array([[0, 20], [20, 20]], "<u8"))
    (tmp_path / "shard").write_bytes(bytes(40) + whole)
    assert read_index(LocalFiles(tmp_path), "shard", 2, 2, (20, 20)).tolist() == [[0, 20], [20, 20]]


@pytest.mark.parametrize("name", ["mean", "scale", "median_norm", "n_massive", "mean_share"])
def test_forged_statistics_are_measured_again(stores: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Statistics or a mean that were changed, and sealed anew, are not those of the rows: verify finds each."""
    shutil.copytree(stores["none"], tmp_path / "s.zarr")
    held = Store.load(tmp_path / "s.zarr")
    changed = {name: 2} if name == "n_massive" else {name: 0.37}
    if name == "mean":
        forged_mean = with_crc(held.mean64 * 1.001)
        (tmp_path / "s.zarr/mean/c/0").write_bytes(forged_mean)
        changed = {"mean_sha256": sha256(forged_mean[:-4]).hexdigest()}
    change_root(tmp_path / "s.zarr", lambda attributes: attributes["statistics"].update(changed))
    (problem,) = Store.open(tmp_path / "s.zarr").verify(quiet=True)
    assert ("not the mean of its rows" if name == "mean" else f"its statistics say {name} ") in problem
