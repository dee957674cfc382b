"""A byte that changed, a file cut short or gone: found, never read as data, and repaired to the byte."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.base.errors import DamagedError, MismatchError, PipelineError, StoreError
from pipeline.base.runtime import numpy_rng
from pipeline.store.backend import LocalFiles
from pipeline.store.objects import open_files
from pipeline.store.prepare import SplitTokens, prepare, segments
from pipeline.store.reader import Store
from pipeline.store.root import read_root, write_root
from pipeline.store.shards import with_crc
from pipeline.store.writer import StoreWriter
from support.stores import make_store, make_tokens, prepare_store, store_config, write_shards
from test_store import SMALL, tree

SIZES: dict[str, Any] = {"n_sequences": 19, "eval_sequences": 5, **SMALL}
KEYS = [
    "zarr.json", "mean/zarr.json", "mean/c/0", "train/zarr.json", "eval/zarr.json",
    *(f"train/{name}/zarr.json" for name in ("tokens", "special", "resid", "norm", "moments", "commit")),
    "train/tokens/c/0/0", "train/special/c/1/0", "train/resid/c/0/0", "train/resid/c/2/0", "train/norm/c/1",
    "train/moments/c/1/0", "train/commit/c/1/0", "eval/tokens/c/0/0", "eval/resid/c/0/0", "eval/commit/c/0/0",
]  # fmt: skip


@pytest.fixture(scope="module", params=["none", "zstd"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small complete store; tests put back what they change."""
    return make_store(tmp_path_factory.mktemp("whole") / "s.zarr", codec=request.param, **SIZES).path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A small complete store to damage for good."""
    return make_store(tmp_path / "s.zarr", **SIZES).path


@contextmanager
def changed(path: Path, data: bytes | None) -> Iterator[None]:
    """A file with other bytes, or gone for None; as it was afterwards."""
    before = path.read_bytes()
    path.unlink() if data is None else path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def flipped(data: bytes, position: int, mask: int) -> bytes:
    """The data with some bits of one byte changed."""
    return data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


def problems(path: Path) -> list[str]:
    """What `verify` reports, a root that cannot be read included."""
    try:
        return Store.open(path, complete=False, check=False).verify(quiet=True)
    except PipelineError as error:
        return [str(error)]


def everything_read(path: Path) -> list[Any]:
    """All that a training or an evaluation could take from a store."""
    store = Store.open(path)
    found: list[Any] = [store.mean.tolist(), store.scale, store.mean_and_scale(None)[1], store.id]
    for split in store.splits:
        found += [split.tokens.tolist(), split.special.tolist(), split.norm.tolist(), split.kept().tolist()]
        found.append(split.read(0, split.n_rows).view(torch.uint8).tolist())
    return found


def test_flipped_bytes_are_found_everywhere(whole: Path) -> None:
    """A flipped byte anywhere is found and never used."""
    expected = everything_read(whole)
    assert problems(whole) == []
    rng = numpy_rng("flips")
    for key, data in tree(whole).items():
        places = {0, len(data) - 1, *rng.integers(0, len(data), 2).tolist()}
        for position in sorted(places):
            with changed(whole / key, flipped(data, position, int(rng.integers(1, 256)))):
                found = problems(whole)
                assert found, (key, position)
                assert str(whole) in found[0]
                try:
                    assert everything_read(whole) == expected, (key, position)
                except PipelineError:
                    continue


@pytest.mark.parametrize(
    ("before", "after"), [(b'"zarr_format": 3', b'"zarr_format": 2'), (b"\n  ", b"\n\t "), (b'"group"', b'"array"')]
)
def test_root_bytes_outside_attributes_count(whole: Path, before: bytes, after: bytes) -> None:
    """Bytes of the root outside its attributes count too."""
    data = (whole / "zarr.json").read_bytes()
    with (
        changed(whole / "zarr.json", data.replace(before, after, 1)),
        pytest.raises(DamagedError, match="bytes changed"),
    ):
        Store.open(whole)


def test_every_byte_of_records_counts(whole: Path) -> None:
    """Every byte of a group's commit records counts when a store is opened."""
    path = whole / "train/commit/c/0/0"
    data = path.read_bytes()
    for position in range(len(data)):
        with changed(path, flipped(data, position, 0x10)), pytest.raises(DamagedError, match="commit/c/0/0: SHA-256"):
            Store.open(whole)


def test_every_byte_of_an_index_counts(whole: Path) -> None:
    """Every byte of a shard's index counts when the first of its rows is read."""
    path = whole / "train/resid/c/0/0"
    data = path.read_bytes()
    for position in range(len(data) - 16 * 4 - 4, len(data)):
        with changed(path, flipped(data, position, 0x10)):
            with pytest.raises(DamagedError, match="resid/c/0/0"):
                Store.open(whole).train.read(0, 1)
            assert len(problems(whole)) == 1


@pytest.mark.parametrize(
    "key", ["zarr.json", "train/zarr.json", "train/resid/c/0/0", "eval/tokens/c/0/0", "train/commit/c/0/0"]
)
def test_folders_instead_are_named(store: Path, tmp_path: Path, key: str) -> None:
    """A folder where a file of a store should be is said to be one, by what reads, verifies and writes; from a URL too."""
    (store / key).unlink()
    (store / key).mkdir()
    says = f"{key}: a folder stands where a file should; remove it"
    assert any(says in problem for problem in problems(store))
    with pytest.raises(DamagedError, match=says):
        LocalFiles(store).size(key)
    with pytest.raises(DamagedError, match=says):
        LocalFiles(store).read(key, most=100)
    with pytest.raises(DamagedError, match=says):
        LocalFiles(store).write(key, b"")
    with pytest.raises(DamagedError, match=says):
        open_files(f"file://{store}").read(key, most=100)
    assert not list(store.rglob("*.partial"))


@pytest.mark.parametrize("key", KEYS)
def test_missing_or_resized_file_is_found(whole: Path, key: str) -> None:
    """A file that is gone, cut short or longer is found when opening."""
    data = (whole / key).read_bytes()
    for other in (None, b"", data[:1], data[: len(data) // 2], data[:-1], data + b"\0"):
        with changed(whole / key, other):
            with pytest.raises(PipelineError):
                Store.open(whole)
            assert problems(whole)


def test_message_names_file_and_advice(whole: Path) -> None:
    """The message names the file and what to do."""
    with changed(whole / "train/resid/c/1/0", None), pytest.raises(DamagedError, match=r"resid/c/1/0: .*--repair"):
        Store.open(whole)


def test_flipped_row_spares_other_rows(whole: Path) -> None:
    """Reading a flipped row raises and other rows still read."""
    path = whole / "train/resid/c/0/0"
    expected = Store.open(whole).train.read(8, 19 * 4)
    with changed(path, flipped(path.read_bytes(), 11, 0x40)):
        store = Store.open(whole)  # bodies are not read when opening
        with pytest.raises(DamagedError, match="resid/c/0/0"):
            store.train.read(3, 4)
        assert torch.equal(store.train.read(8, 19 * 4), expected)
        with pytest.raises(DamagedError, match=r"bytes 0 to .* changed"):
            store.train.check_shard(0)


def test_swapped_shards_are_found(store: Path) -> None:
    """Swapped shards are found."""
    first, second = store / "train/resid/c/0/0", store / "train/resid/c/1/0"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert len(problems(store)) == 2


def swap(first: Path, second: Path) -> None:
    """Each has the other's bytes."""
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


@pytest.mark.parametrize("name", ["tokens/c/{}/0", "special/c/{}/0", "norm/c/{}", "moments/c/{}/0", "commit/c/{}/0"])
def test_swapped_groups_are_found(store: Path, name: str) -> None:
    """Files of two groups in each other's place are refused: commit records when opening, others when they are read."""
    swap(*(store / "train" / name.format(g) for g in (0, 1)))
    found = problems(store)
    assert found
    assert all(f"train/{name.split('/')[0]}" in line for line in found)
    if name.startswith("commit"):
        with pytest.raises(DamagedError, match="commit/c/0/0: SHA-256"):
            Store.open(store)
        return
    split = Store.open(store).train
    with pytest.raises(DamagedError, match=f"train/{name.split('/')[0]}"):
        getattr(split, name.split("/")[0])


def test_sealed_swap_of_records_refused(store: Path) -> None:
    """Groups swapped with all their files, by someone who seals the root anew, are not read: records say whose they are."""
    for name in ("tokens/c/{}/0", "special/c/{}/0", "norm/c/{}", "moments/c/{}/0", "commit/c/{}/0"):
        swap(*(store / "train" / name.format(g) for g in (0, 1)))
    files = open_files(store)
    attributes = read_root(files)
    for hashes in (attributes["groups"]["train"], attributes["committed"]["train"]):
        for name in hashes:
            hashes[name].reverse()
    write_root(files, attributes)
    for k in (0, 2):
        with pytest.raises(DamagedError, match=f"commit/c/{k // 2}/0: not the commit record of shard {k} of train"):
            Store.open(store, check=False).train.read(32 * k, 32 * k + 1)
    assert problems(store)


RECORDED = ("resid/c/{}/0", "resid/record/{}")
"""The files of a shard of an unfinished store."""


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A store whose shards are all there."""
    write_shards(prepare_store(tmp_path / "s.zarr", store_config(**SMALL), 19, 5))
    return tmp_path / "s.zarr"


@pytest.mark.parametrize("change", [{"seed": 1}, {"layer": 4}])
def test_shard_of_another_store_is_refused(unfinished: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """A shard that was copied with its record from a store of another seed or layer does not count."""
    config = store_config(**SMALL) | change
    tokens = make_tokens(0, "train", 19, 4), make_tokens(0, "eval", 5, 4)
    write_shards(prepare(tmp_path / "other.zarr", config, *tokens, {}))
    for name in RECORDED:
        theirs = tmp_path / "other.zarr/train" / name.format(1)
        (unfinished / "train" / name.format(1)).write_bytes(theirs.read_bytes())
    with pytest.raises(DamagedError, match="another shard, split, store or layer wrote it"):
        Store.open(unfinished, complete=False)
    assert StoreWriter.open(unfinished).pending("train") == [1]


@pytest.mark.parametrize(("split", "k"), [("train", 1), ("eval", 0)])
def test_shard_in_anothers_place_is_refused(unfinished: Path, split: str, k: int) -> None:
    """A shard of an unfinished store in the place of another, of either split, does not count."""
    for name in RECORDED:
        (unfinished / split / name.format(k)).write_bytes((unfinished / "train" / name.format(0)).read_bytes())
    with pytest.raises(DamagedError, match=f"resid/record/{k}: not the commit record of shard {k} of {split}"):
        Store.open(unfinished, complete=False)
    assert StoreWriter.open(unfinished).pending(split) == [k]


def test_every_byte_of_a_record_counts(unfinished: Path) -> None:
    """A flipped byte, or a lost one, of the record of an unfinished store's shard is found before the store is finished."""
    path = unfinished / "train/resid/record/0"
    data = path.read_bytes()
    others = [flipped(data, position, 0x10) for position in range(len(data))]
    for other in [*others, data[:-1], data + b"\0", b"", None]:
        with changed(path, other), pytest.raises(PipelineError):
            StoreWriter.open(unfinished).finish()
    assert StoreWriter.open(unfinished).finish().verify(quiet=True) == []


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("name", ["resid/c/0/0", "norm/c/0", "moments/c/0/0"])
def test_old_reading_compares_with_records(golden: Path, tmp_path: Path, version: int, name: str) -> None:
    """A whole file of another shard that opening cannot see is refused by whoever reads it, and spares other shards."""
    store = tmp_path / "s.zarr"
    shutil.copytree(golden / f"v{version}_none.zarr", store)
    (store / "train" / name).write_bytes((store / "train" / name.replace("c/0", "c/1")).read_bytes())
    opened = Store.open(store)
    assert torch.equal(opened.eval.read(0, 20), Store.open(store).eval.read(0, 20))
    with pytest.raises(DamagedError, match="whole, but not the file that was committed"):
        opened.train.read(0, 4), opened.train.norm, opened.train.moments


@pytest.mark.parametrize("name", ["norm", "moments"])
def test_reading_compares_with_the_record(store: Path, name: str) -> None:
    """Norms or moments of another shard of the group are refused by whoever reads them, and spare the others."""
    path = next((store / "train" / name / "c").rglob("0*"))
    path = path / "0" if path.is_dir() else path
    parts = np.frombuffer(path.read_bytes()[:-4], np.uint8).reshape(2, -1).copy()
    parts[1] = parts[0]
    path.write_bytes(with_crc(parts))
    opened = Store.open(store)
    read = {"norm": opened.train.shard_norm, "moments": opened.train.shard_moments}[name]
    for k in (0, 2):
        assert np.array_equal(read(k), getattr(Store.open(store, check=False).train, f"shard_{name}")(k))
    with pytest.raises(DamagedError, match=rf"{name}/c/0.* \(shard 1\): whole, but not the file that was committed"):
        read(1)


def test_extension_keeps_the_origin(tmp_path: Path) -> None:
    """Whole shards stay as they were when a store is extended, and their records still name them."""
    first = make_store(tmp_path / "s.zarr", n_sequences=16, eval_sequences=5, **SMALL)
    before = tree(tmp_path / "s.zarr")
    records = [first.train.record(k) for k in range(first.train.n_shards)]
    store = make_store(tmp_path / "s.zarr", **SIZES)
    assert store.attributes["origin"] == first.attributes["origin"]
    assert store.id != first.id
    kept = [f"train/resid/c/{k}/0" for k in range(first.train.n_shards)]
    assert {key: tree(store.path)[key] for key in kept} == {key: before[key] for key in kept}
    for k, record in enumerate(records):
        assert store.train.record(k).digests == record.digests
        assert np.array_equal(store.train.record(k).chunks, record.chunks)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_old_versions_are_only_read(golden: Path, tmp_path: Path, version: int) -> None:
    """A store of an earlier version is found finished; extending or repairing it is refused in one line."""
    store = tmp_path / "s.zarr"
    shutil.copytree(golden / f"v{version}_none.zarr", store)
    config, before = Store.open(store).config, tree(store)
    sizes = {name: value for name, value in SIZES.items() if name != "group_shards"}
    assert make_store(store, **sizes).complete
    longer = make_tokens(0, "train", 30, 4), make_tokens(0, "eval", 5, 4)
    for repair in (False, True):
        with pytest.raises(StoreError, match=rf"version {version}, which can be trained on .* not extended"):
            prepare(store, config, *longer, {}, repair=repair)
    assert tree(store) == before


@pytest.mark.parametrize("key", ["train/tokens/c/1/0", "eval/tokens/c/0/0", "mean/c/0"])
def test_file_of_another_store_is_found(store: Path, tmp_path: Path, key: str) -> None:
    """A whole file of another store is found before it is used: tokens when they are first read."""
    other = make_store(tmp_path / "other.zarr", **(SIZES | {"seed": 1})).path
    (store / key).write_bytes((other / key).read_bytes())
    with pytest.raises(DamagedError, match=r"SHA-256|not the mean"):
        getattr(Store.open(store), key.split("/")[0]).tokens_of(0, 5 if key.startswith("eval") else 19)
    assert len(problems(store)) == 1


def test_other_special_mask_is_found(store: Path) -> None:
    """Special positions that are others are found when they are first read, whichever shard's."""
    data = bytearray((store / "eval/special/c/0/0").read_bytes()[:-4])
    data[5] = 1 - data[5]
    (store / "eval/special/c/0/0").write_bytes(with_crc(np.frombuffer(data, np.uint8)))
    for read in ("special_of", "kept_of"):
        with pytest.raises(DamagedError, match="special/c/0/0: SHA-256"):
            getattr(Store.open(store).eval, read)(4, 5)
    assert len(problems(store)) == 1


@pytest.mark.parametrize("entries", [[1, 0, 2, 3], [0, 1, 2], [0, 0, 2, 3]])
def test_reordered_index_is_refused(store: Path, entries: list[int]) -> None:
    """An index that is whole but in another order is refused.
    Mapped reading counts on chunks one after the other, so that is checked and not only the index's crc32c."""
    path = store / "train/resid/c/0/0"
    data = path.read_bytes()
    index = np.frombuffer(data[-68:-4], "<u8").reshape(4, 2)
    other = np.full_like(index, 2**64 - 1)
    other[: len(entries)] = index[entries]
    path.write_bytes(data[:-68] + with_crc(other))
    for read in (lambda split: split.read(0, 1), lambda split: split.mapped_shard(0)):
        with pytest.raises(DamagedError, match="another index"):
            read(Store.open(store).train)
    assert len(problems(store)) == 1


def test_verify_reports_every_problem(store: Path) -> None:
    """Verify reports every problem and not only the first."""
    (store / "train/resid/c/1/0").unlink()
    (store / "eval/norm/c/0").unlink()
    (store / "train/tokens/c/0/0").write_bytes(b"")
    assert len(problems(store)) == 3


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_repair_redoes_only_the_damaged(store: Path, key: str, how: str) -> None:
    """Repair gives back every byte and redoes only what is damaged."""
    before = tree(store)
    shards = {p: p.stat().st_ino for p in store.rglob("resid/c/*/0")}
    data = (store / key).read_bytes()
    if how == "gone":
        (store / key).unlink()
    else:
        (store / key).write_bytes(flipped(data, len(data) // 2, 0x04))
    make_store(store, repair=True, **SIZES)
    assert tree(store) == before
    redone = {p for p, inode in shards.items() if p.stat().st_ino != inode}
    lost = key.replace("norm/c/1", "resid/c/2/0")
    for name in ("moments", "commit"):
        lost = lost.replace(f"train/{name}/c/1/0", "train/resid/c/2/0").replace(f"eval/{name}", "eval/resid")
    assert redone <= {store / lost}


@pytest.mark.parametrize("key", ["train/norm/c/0", "train/moments/c/0/0", "train/commit/c/0/0"])
def test_repair_spares_the_group(store: Path, key: str) -> None:
    """Of a group's damaged file only the shard whose part is damaged is made again; of one that is gone, all."""
    before, data = tree(store), (store / key).read_bytes()
    config = Store.open(store).config
    tokens = make_tokens(0, "train", 19, 4), make_tokens(0, "eval", 5, 4)
    for changed_to, pending in ((flipped(data, len(data) - 9, 0x04), [1]), (flipped(data, 9, 4), [0]), (None, [0, 1])):
        (store / key).unlink() if changed_to is None else (store / key).write_bytes(changed_to)
        assert problems(store)
        assert prepare(store, config, *tokens, {}, repair=True).pending("train") == pending
        make_store(store, **SIZES)
        assert tree(store) == before


def test_repair_lists_what_it_gives_up(store: Path) -> None:
    """Repair reads the bodies and lists what it gives up."""
    path = store / "train/resid/c/0/0"
    path.write_bytes(flipped(path.read_bytes(), 5, 1))
    config = Store.open(store).config
    writer = prepare(store, config, make_tokens(0, "train", 19, 4), make_tokens(0, "eval", 5, 4), {}, repair=True)
    assert (writer.pending("train"), writer.pending("eval")) == ([0], [])


@pytest.mark.parametrize("change", [{"layer": 1}, {"seed": 1}])
def test_rootless_store_is_not_claimed(store: Path, change: dict[str, Any]) -> None:
    """A store without its root is not claimed for another config."""
    config = Store.open(store).config | change
    (store / "zarr.json").unlink()
    before = tree(store)
    tokens = make_tokens(config["seed"], "train", 19, 4), make_tokens(config["seed"], "eval", 5, 4)
    with pytest.raises(DamagedError, match="run harvest --repair"):
        prepare(store, config, *tokens, {})
    with pytest.raises(MismatchError, match="use the command that made it"):
        prepare(store, config, *tokens, {}, repair=True)
    assert tree(store) == before


@pytest.mark.parametrize("also", ["", "train/zarr.json"])
def test_extended_store_regains_its_root(tmp_path: Path, also: str) -> None:
    """An extended store gets its root back."""
    path = tmp_path / "s.zarr"
    make_store(path, n_sequences=12, eval_sequences=5, **SMALL)
    config, before = make_store(path, **SIZES).config, tree(path)
    (path / "zarr.json").unlink()
    if (
        also
    ):  # without its copy, what was shuffled together is not known: these tokens would be others in a real harvest
        (path / also).unlink()
        assert segments(path, repair=True) == ()
        return
    assert segments(path, repair=True) == (12, 19)
    tokens = make_tokens(0, "train", 19, 4), make_tokens(0, "eval", 5, 4)
    writer = prepare(path, config, *tokens, {}, repair=True)
    assert (writer.pending("train"), writer.pending("eval")) == ([], [])
    writer.finish()
    assert tree(path).keys() == before.keys()
    assert {key for key in before if tree(path)[key] != before[key]} <= {"zarr.json"}  # only its versions
    assert Store.open(path).attributes["segments"] == [12, 19]


def test_reordered_tokens_are_not_taken(store: Path) -> None:
    """Whole tokens of another order are not taken over.
    An extended store that lost its root and its list of segments: the tokens asked for are shuffled otherwise."""
    config = Store.open(store).config
    (store / "zarr.json").unlink()
    before = tree(store)
    evaluation = make_tokens(0, "eval", 5, 4)
    train = make_tokens(0, "train", 19, 4)
    other = SplitTokens(train.tokens[::-1].copy(), train.special[::-1].copy())
    with pytest.raises(MismatchError, match="its root is damaged"):
        prepare(store, config, other, evaluation, {}, repair=True)
    assert tree(store) == before


def test_damaged_metadata_needs_repair(store: Path) -> None:
    """Harvesting again without repair refuses damaged metadata and tokens."""
    for key in ("train/resid/zarr.json", "train/tokens/c/0/0", "zarr.json"):
        data = (store / key).read_bytes()
        with changed(store / key, flipped(data, len(data) // 2, 1)), pytest.raises(DamagedError, match="--repair"):
            make_store(store, **SIZES)


def test_lost_shard_blocks_finishing(tmp_path: Path) -> None:
    """A shard that is lost before the store is finished is not finished over."""
    writer = prepare_store(tmp_path / "s.zarr", store_config(**SMALL), 19, 5)
    write_shards(writer)
    (tmp_path / "s.zarr/eval/resid/c/0/0").unlink()
    with pytest.raises(DamagedError, match=r"eval/resid/c/0/0.*--repair"):
        writer.finish()
    assert Store.open(tmp_path / "s.zarr", complete=False, check=False).complete is False
