"""What goes into a store comes out, bit for bit; anybody's Zarr reads it; statistics are those of the rows."""

import json
import math
import shutil
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from harvest.tokens import scratch_array
from pipeline.base.errors import DamagedError, DiskError, MismatchError, ModelError, StoreError, UsageError
from pipeline.model.specials import mark_special
from pipeline.store.backend import LocalFiles
from pipeline.store.layout import Layout, SplitLayout, estimate_bytes, shard_rows_for
from pipeline.store.moments import measure_rows, median_of, norms_and_moments
from pipeline.store.prepare import SplitTokens, prepare, resume, segments
from pipeline.store.reader import Store, describe_store
from pipeline.store.root import write_root
from pipeline.store.split import Split, to_numpy
from support import reference
from support.stores import VOCAB, make_rows, make_store, make_tokens, prepare_store, store_config, write_shards

SMALL: dict[str, Any] = {"d_model": 6, "context": 4, "shard_rows": 32, "chunk_rows": 8, "group_shards": 2}
KINDS = [("bf16", "none"), ("bf16", "lz4"), ("bf16", "zstd"), ("float32", "none"), ("float32", "zstd")]


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a store and its bytes."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def all_rows(store: Store, split: Split) -> torch.Tensor:
    """What the test wrote into a split."""
    return make_rows(store.config, split.name, 0, split.n_rows)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(kind))
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """19 training sequences of 4 rows of width 6: two shards of 32 rows and a ragged one whose last chunk is ragged."""
    dtype, codec = request.param
    path = tmp_path_factory.mktemp("store") / "small.zarr"
    return make_store(path, n_sequences=19, eval_sequences=5, dtype=dtype, codec=codec, **SMALL)


def test_rows_roundtrip(small: Store) -> None:
    """Every row comes out as it went in."""
    for split in small.splits:
        assert torch.equal(split.read(0, split.n_rows), all_rows(small, split))


@given(data=st.data())
def test_any_row_range_reads(tiny_store: Path, data: st.DataObject) -> None:
    """Any range of rows can be read."""
    split = Store.open(tiny_store).eval
    start = data.draw(st.integers(0, split.n_rows))
    stop = data.draw(st.integers(start, split.n_rows))
    assert torch.equal(split.read(start, stop), make_rows(store_config(), "eval", 0, split.n_rows)[start:stop])


def test_rows_outside_the_split_are_refused(tiny_store: Path) -> None:
    """Rows outside the split are refused."""
    split = Store.open(tiny_store).train
    for start, stop in ((-1, 3), (5, 3), (0, split.n_rows + 1)):
        with pytest.raises(UsageError, match="not within 0 and 2432"):
            split.read(start, stop)


def test_tokens_and_specials_roundtrip(small: Store) -> None:
    """Tokens and special positions come out as they went in."""
    for split in small.splits:
        expected = make_tokens(0, split.name, split.n_sequences, 4)
        assert np.array_equal(split.tokens, expected.tokens)
        assert np.array_equal(split.special, expected.special)


def test_zarr_python_reads_the_same(small: Store) -> None:
    """zarr-python reads the same without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(small.path, mode="r")
        for split in small.splits:
            there = group[split.name]
            assert isinstance(there, zarr.Group)
            arrays = dict(there.arrays())
            assert sorted(arrays) == ["commit", "moments", "norm", "resid", "special", "tokens"]
            assert np.array_equal(arrays["resid"][:], to_numpy(all_rows(small, split)))
            assert np.array_equal(arrays["tokens"][:], split.tokens)
            assert np.array_equal(arrays["norm"][:], split.norm)
            assert all(None not in array.metadata.dimension_names for array in arrays.values())
        assert np.array_equal(group["mean"][:], small.mean64)


def test_bytes_are_those_of_zarr_python(small: Store, tmp_path: Path) -> None:
    """Files are the bytes that zarr-python writes.
    Every array written again by zarr-python from what it reads, with the codecs FORMAT.md names."""
    ours, theirs = zarr.open_group(small.path, mode="r"), zarr.create_group(tmp_path / "theirs.zarr")
    itemsize = 2 if small.config["dtype"] == "bf16" else 4
    compressors: dict[str, list[Any]] = {
        "none": [],
        "lz4": [BloscCodec(typesize=itemsize, cname="lz4", clevel=1, shuffle="bitshuffle", blocksize=0)],
        "zstd": [ZstdCodec(level=1, checksum=False)],
    }
    names = ["mean", *(f"{split}/{name}" for split in ("train", "eval") for name in small.train.arrays)]
    with zarr.config.set({"array.write_empty_chunks": True}):
        for name in names:
            array = ours[name]
            sharded = name.endswith("resid")
            copy = theirs.create_array(
                name,
                shape=array.shape,
                dtype=array.dtype,
                chunks=array.chunks,
                shards=array.shards,
                filters=None,
                compressors=[*(compressors[small.config["codec"]] if sharded else []), Crc32cCodec()],
                fill_value=array.fill_value,
                attributes=dict(array.attrs),
                dimension_names=array.metadata.dimension_names,
            )
            copy[...] = array[...]
    written = tree(tmp_path / "theirs.zarr")
    for key, data in tree(small.path).items():
        if key.count("/") < 2 and key.endswith("zarr.json") and not key.startswith("mean"):
            continue  # groups: they have attributes of ours
        if key.endswith("zarr.json"):
            assert json.loads(written[key]) == json.loads(data), key
        else:
            assert written[key] == data, key


def test_chunk_shape_must_fit(small: Store) -> None:
    """A chunk does not fit into memory of another shape."""
    with pytest.raises(ValueError, match="out is"):
        small.train.read_chunk(0, torch.zeros(3, small.d_model, dtype=small.dtype))


@pytest.mark.parametrize("d_model", [6, 5, 1])
@pytest.mark.parametrize("dtype", ["bf16", "float32"])
def test_mapped_shard_indexes_its_rows(tmp_path: Path, d_model: int, dtype: str) -> None:
    """A mapped shard has every row at the index it says."""
    sizes = SMALL | {"d_model": d_model}
    store = make_store(tmp_path / "s.zarr", n_sequences=19, eval_sequences=5, dtype=dtype, **sizes)
    for k in range(store.train.n_shards):
        start, stop = store.train.shard_rows_range(k)
        order = torch.randperm(stop - start)
        mapped = store.train.mapped_shard(k)
        assert torch.equal(mapped.view[mapped.at(order)], store.train.read(start, stop)[order])


def test_compressed_store_cannot_be_mapped(tmp_path: Path) -> None:
    """A compressed store cannot be mapped."""
    store = make_store(tmp_path / "s.zarr", n_sequences=19, eval_sequences=5, codec="zstd", **SMALL)
    with pytest.raises(UsageError, match="window mode"):
        store.train.mapped_shard(0)


@given(block=st.integers(1, 40))
@settings(max_examples=15)
def test_block_sizes_change_no_bytes(tmp_path_factory: pytest.TempPathFactory, block: int) -> None:
    """The bytes do not depend on the blocks that rows come in."""
    path = tmp_path_factory.mktemp("blocks") / "s.zarr"
    writer = prepare_store(path, store_config(**SMALL), 19, 5)
    for split in ("train", "eval"):
        for k in writer.pending(split):
            start, stop = writer.split(split).shard_rows_range(k)
            with writer.shard(split, k) as shard:
                for a in range(start, stop, block):
                    shard.write(make_rows(writer.store.config, split, a, min(a + block, stop)))
    writer.finish()
    make_store(path.with_name("plain.zarr"), n_sequences=19, eval_sequences=5, **SMALL)
    assert tree(path) == tree(path.with_name("plain.zarr"))


def test_norms_are_of_stored_rows(small: Store) -> None:
    """Norms are those of the stored rows."""
    for split in small.splits:
        expected = all_rows(small, split).double().norm(dim=1).float()
        torch.testing.assert_close(torch.from_numpy(split.norm.copy()), expected, rtol=1e-6, atol=0)


def test_moments_leave_out_special_rows() -> None:
    """Moments leave out special rows."""
    rows = np.array([[1, 2], [100, 100], [3, -1]], np.float32)
    norm, moments = norms_and_moments(rows, np.array([False, True, False]))
    assert norm == pytest.approx([5**0.5, 20000**0.5, 10**0.5])
    assert moments.tolist() == [2, 15, 4, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_device_measures_rows_exactly(dtype: torch.dtype) -> None:
    """An accelerator's float64 sums: norms are the exact ones rounded to float32, as the writer's are, moments within 1e-14."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5000, 33, generator=generator) * torch.logspace(-3, 4, 5000)[:, None]
    rows, special = rows.to(dtype), torch.rand(5000, generator=generator) < 0.1
    rows[7], special[7] = torch.inf, True
    measured = measure_rows(rows, special)
    norm, moments = norms_and_moments(to_numpy(rows), special.numpy())
    assert torch.equal(measured.norm, torch.from_numpy(norm))
    assert measured.moments.numpy() == pytest.approx(moments, rel=1e-12)
    kept = rows[~special].double()
    exact = [math.fsum(column) for column in kept.T.tolist()]
    scale = kept.abs().sum(0)
    assert ((measured.moments[2:] - torch.tensor(exact, dtype=torch.float64)).abs() <= 1e-14 * scale).all()
    for row in range(0, 5000, 501):
        exact_norm = math.sqrt(math.fsum(value * value for value in rows[row].double().tolist()))
        assert float(measured.norm[row]) == float(np.float32(exact_norm))


def test_partly_measured_shard_is_refused(tmp_path: Path) -> None:
    """A shard whose rows are measured in part only is refused."""
    writer = prepare_store(tmp_path / "s.zarr", store_config(**SMALL), 19, 5)
    rows = torch.zeros(4, 6)
    with pytest.raises(UsageError, match="with some rows"), writer.shard("train", 0) as shard:
        shard.write(rows.to(writer.layout.torch_dtype))
        shard.write(rows.to(writer.layout.torch_dtype), measure_rows(rows, torch.zeros(4, dtype=torch.bool)))


@pytest.mark.parametrize("multiple", [None, 3.0, 1.1])
def test_mean_and_scale_follow_kept_rows(tiny_store: Path, multiple: float | None) -> None:
    """Mean and scale are those of the kept rows."""
    store = Store.open(tiny_store)
    rows, special = all_rows(store, store.train), torch.from_numpy(store.train.special.reshape(-1))
    kept, mean, scale = reference.kept_mean_and_scale(rows, special, multiple)
    found_mean, found_scale = store.mean_and_scale(multiple)
    assert np.array_equal(store.train.kept(multiple), kept.numpy())
    torch.testing.assert_close(found_mean.double(), mean, rtol=1e-6, atol=1e-6)
    assert found_scale == pytest.approx(scale, rel=1e-9)


def test_statistics_count_special_and_massive_rows(tiny_store: Path) -> None:
    """Statistics count special and massive rows."""
    store = Store.open(tiny_store)
    statistics = store.statistics
    index = torch.arange(store.train.n_rows)
    massive = int(((index % 97 == 50) & (index % 16 != 0)).sum())
    assert (statistics.n_rows, statistics.n_special, statistics.n_massive) == (2432, 152, massive)
    assert statistics.n_kept == 2432 - 152 - massive == store.train.kept().sum()
    assert massive > 0


def test_scaled_rows_have_unit_mean_square(tiny_store: Path) -> None:
    """Centred and scaled kept rows have a mean square norm of one."""
    store = Store.open(tiny_store)
    x = (all_rows(store, store.train).double()[torch.from_numpy(store.train.kept())] - store.mean) * store.scale
    assert x.square().sum(1).mean().item() == pytest.approx(1, abs=1e-6)


def test_evaluation_uses_the_training_median(tiny_store: Path) -> None:
    """Evaluation rows are measured against the training median."""
    store = Store.open(tiny_store)
    limit = 3 * store.statistics.median_norm
    assert np.array_equal(store.eval.kept(), ~store.eval.special.reshape(-1) & (store.eval.norm <= limit))


def test_ranges_are_read_by_shard(tiny_store: Path) -> None:
    """Tokens, special positions and kept rows of some sequences, within a shard and across two, are those of the whole."""
    split = Store.open(tiny_store).train
    for first, stop in ((0, 152), (3, 5), (60, 70), (64, 128), (150, 152), (7, 7)):
        assert np.array_equal(split.tokens_of(first, stop), split.tokens[first:stop])
        assert np.array_equal(split.special_of(first, stop), split.special[first:stop])
        for multiple in ("store", 1.5, None):
            kept = split.kept(multiple)  # type: ignore[arg-type]
            assert np.array_equal(split.kept_of(first, stop, multiple), kept[16 * first : 16 * stop])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bf16", "float32"])
def test_estimate_is_exact_to_one_percent(tmp_path: Path, dtype: str) -> None:
    """The estimate is exact to one per cent."""
    config = store_config(dtype=dtype)
    make_store(tmp_path / "s.zarr", dtype=dtype)
    size = sum(len(data) for data in tree(tmp_path / "s.zarr").values())
    assert estimate_bytes(config, 152, 32) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_estimate_is_an_upper_bound(tmp_path: Path, codec: str) -> None:
    """The estimate is an upper bound when compressed."""
    make_store(tmp_path / "s.zarr", codec=codec)
    size = sum(len(data) for data in tree(tmp_path / "s.zarr").values())
    assert size <= estimate_bytes(store_config(codec=codec), 152, 32) < 2 * size


def test_store_describes_itself_as_json(tiny_store: Path) -> None:
    """A store describes itself in plain JSON."""
    described = json.loads(json.dumps(describe_store(Store.open(tiny_store))))
    assert described["config"] == json.loads(json.dumps(store_config()))
    assert described["splits"]["train"] | {"bytes": 0} == {
        "sequences": 152, "rows": 2432, "shards": 3, "committed": 3, "bytes": 0,
    }  # fmt: skip
    assert described["bytes"] == sum(len(data) for data in tree(tiny_store).values())
    assert len(described["mean"]) == 64
    assert described["statistics"]["scale"] > 0


def test_begun_store_misses_no_file(tmp_path: Path) -> None:
    """Of a store that is being prepared `verify` says that alone, not that its other files are gone."""
    writer = prepare_store(tmp_path / "acts.zarr", store_config(), 8, 8)
    write_root(LocalFiles(tmp_path / "acts.zarr"), writer.store.attributes | {"state": "preparing"})
    shutil.rmtree(tmp_path / "acts.zarr" / "train")
    (problem,) = Store.load(tmp_path / "acts.zarr").verify(quiet=True)
    assert problem.endswith("acts.zarr: not prepared to its end: a harvest is at it, or was stopped there")


def test_unfinished_store_says_its_progress(tmp_path: Path) -> None:
    """An unfinished store is refused and says how far it came."""
    writer = prepare_store(tmp_path / "s.zarr", store_config(**SMALL), 19, 5)
    with writer.shard("train", 1) as shard:
        shard.write(make_rows(writer.store.config, "train", 32, 64))
    with pytest.raises(StoreError, match="1 of 4 shards are committed"):
        Store.open(tmp_path / "s.zarr")
    assert writer.pending("train") == [0, 2]
    assert Store.open(tmp_path / "s.zarr", complete=False).train.read(32, 64).shape == (32, 6)
    assert "1 of 4" in Store.open(tmp_path / "s.zarr", complete=False).verify()[0]


def test_store_finishes_with_its_last_shard(tmp_path: Path) -> None:
    """A store is not finished before its last shard."""
    writer = prepare_store(tmp_path / "s.zarr", store_config(**SMALL), 19, 5)
    with pytest.raises(StoreError, match="not committed"):
        writer.finish()


def test_no_store_is_said_so(tmp_path: Path) -> None:
    """No store is said so."""
    with pytest.raises(StoreError, match="no activation store here"):
        Store.open(tmp_path)


def test_other_version_is_refused(tmp_path: Path) -> None:
    """A store of another version is refused."""
    make_store(tmp_path / "s.zarr", n_sequences=19, eval_sequences=5, **SMALL)
    root = tmp_path / "s.zarr" / "zarr.json"
    root.write_bytes(root.read_bytes().replace(b'"version": 4,', b'"version": 5,'))
    with pytest.raises(
        StoreError, match=r"expected format nested-sae-activations version 1, 2, 3, 4, found .* version 5"
    ):
        Store.open(tmp_path / "s.zarr")


def test_other_config_names_its_fields(tiny_store: Path) -> None:
    """Another config on the same path is refused, naming the fields."""
    other = store_config() | {"layer": 5, "dtype": "float32"}
    with pytest.raises(MismatchError, match=r"dtype: there 'bf16', asked 'float32'; layer: there 3, asked 5"):
        resume(tiny_store, other, 152, 32)
    with pytest.raises(MismatchError, match="layer: there 3, asked 5"):
        prepare(tiny_store, other, make_tokens(0, "train", 152, 16), make_tokens(0, "eval", 32, 16), {})


def test_other_tokens_are_refused(tiny_store: Path) -> None:
    """Other tokens under the same config are refused."""
    with pytest.raises(MismatchError, match="train tokens are others"):
        prepare(tiny_store, store_config(), make_tokens(1, "train", 152, 16), make_tokens(0, "eval", 32, 16), {})


def test_fewer_tokens_or_other_split_refused(tiny_store: Path) -> None:
    """Fewer tokens or another evaluation split are refused."""
    with pytest.raises(MismatchError, match="holds 152 training sequences, asked fewer"):
        resume(tiny_store, store_config(), 151, 32)
    with pytest.raises(MismatchError, match="holds 32 evaluation sequences, asked 33"):
        resume(tiny_store, store_config(), 152, 33)


def test_occupied_folder_is_refused(tmp_path: Path) -> None:
    """A folder with something else in it is refused."""
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "thesis.tex").write_text("ten years of work")
    with pytest.raises(DiskError, match=r"thesis\.tex: the folder holds something else"):
        make_store(tmp_path / "s.zarr")
    assert (tmp_path / "s.zarr" / "thesis.tex").read_text() == "ten years of work"


def test_file_as_path_is_refused(tmp_path: Path) -> None:
    """A path that is a file is refused."""
    (tmp_path / "s.zarr").write_text("a file")
    with pytest.raises(DiskError, match="is a file"):
        make_store(tmp_path / "s.zarr")


def test_finished_store_is_left_alone(tmp_path: Path) -> None:
    """A finished store is left alone by the same command."""
    path = tmp_path / "s.zarr"
    make_store(path, n_sequences=19, eval_sequences=5, **SMALL)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    make_store(path, n_sequences=19, eval_sequences=5, **SMALL)
    prepare(
        path, store_config(**SMALL), make_tokens(0, "train", 19, 4), make_tokens(0, "eval", 5, 4), {"numpy": "other"}
    )
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before


@pytest.mark.parametrize("n_rows", [0, 31, 33])
def test_wrong_row_count_leaves_nothing(tmp_path: Path, n_rows: int) -> None:
    """A shard with too few or too many rows leaves nothing behind."""
    writer = prepare_store(tmp_path / "s.zarr", store_config(**SMALL), 19, 5)
    before = tree(tmp_path / "s.zarr")
    with pytest.raises(UsageError, match="a shard of 32 rows"), writer.shard("train", 0) as shard:
        shard.write(make_rows(writer.store.config, "train", 0, n_rows)) if n_rows else None
    assert tree(tmp_path / "s.zarr") == before


def test_wrong_dtype_or_width_is_refused(tmp_path: Path) -> None:
    """Rows of another dtype or width are refused."""
    writer = prepare_store(tmp_path / "s.zarr", store_config(**SMALL), 19, 5)
    for rows in (torch.zeros(4, 6), torch.zeros(4, 5, dtype=torch.bfloat16)):
        with pytest.raises(UsageError, match=r"expected torch.bfloat16 \[row, 6\]"), writer.shard("train", 0) as shard:
            shard.write(rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_infinite_residual_is_named(tmp_path: Path, value: float) -> None:
    """A residual that is not finite is refused and named."""
    writer = prepare_store(tmp_path / "s.zarr", store_config(**SMALL), 19, 5)
    rows = make_rows(writer.store.config, "train", 32, 64)
    rows[13, 2] = value
    with pytest.raises(ModelError, match="row 45 is not finite"), writer.shard("train", 1) as shard:
        shard.write(rows)


def test_committed_shard_is_kept(tmp_path: Path) -> None:
    """A committed shard is not written again."""
    writer = prepare_store(tmp_path / "s.zarr", store_config(**SMALL), 19, 5)
    write_shards(writer)
    with pytest.raises(StoreError, match="shard 0 of train is committed"), writer.shard("train", 0):
        pass


def test_all_special_rows_cannot_finish(tmp_path: Path) -> None:
    """A store whose rows are all special cannot be finished."""
    tokens = make_tokens(0, "train", 19, 4)
    everything = SplitTokens(tokens.tokens, np.ones_like(tokens.special))
    writer = prepare(tmp_path / "s.zarr", store_config(**SMALL), everything, make_tokens(0, "eval", 5, 4), {})
    write_shards(writer)
    with pytest.raises(StoreError, match="every training row is special"):
        writer.finish()


def test_all_equal_rows_cannot_finish(tmp_path: Path) -> None:
    """A store whose rows are all the same cannot be finished."""
    writer = prepare_store(tmp_path / "s.zarr", store_config(**SMALL), 8, 5)
    with writer.shard("train", 0) as shard:
        shard.write(torch.ones(32, 6, dtype=torch.bfloat16))
    write_shards(writer)
    with pytest.raises(StoreError, match="are the same vector"):
        writer.finish()


def test_special_positions_must_include_the_first() -> None:
    """Special positions must include the first."""
    tokens = make_tokens(0, "train", 2, 4)
    with pytest.raises(UsageError, match="true at position 0"):
        SplitTokens(tokens.tokens, np.zeros_like(tokens.special))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_rows": 36}, "shard_rows 36 must be a multiple of chunk_rows 8"),
        ({"chunk_rows": 6, "shard_rows": 36}, "and that of the context 4"),
        ({"dtype": "float16"}, "holds bf16 or float32"),
        ({"codec": "gzip"}, "codec 'gzip' is not one of"),
        ({"d_model": 0}, "at least 1"),
    ],
)
def test_impossible_layout_is_refused(change: dict[str, Any], message: str) -> None:
    """A layout that cannot be is refused."""
    with pytest.raises(UsageError, match=message):
        Layout.from_config(store_config(**SMALL) | change)


def test_config_without_layout_is_refused() -> None:
    """A config without its layout is refused."""
    with pytest.raises(UsageError, match="lacks context, codec"):
        Layout.from_config({k: v for k, v in store_config().items() if k not in ("context", "codec")})


@pytest.mark.parametrize(("before", "after"), [(19, 30), (16, 20), (3, 19), (17, 18), (8, 16)])
def test_extension_keeps_whole_shards(tmp_path: Path, before: int, after: int) -> None:
    """An extended store keeps its whole shards and has all rows."""
    path = tmp_path / "s.zarr"
    make_store(path, n_sequences=before, eval_sequences=5, **SMALL)
    whole = [path / f"train/resid/c/{k}/0" for k in range(before * 4 // 32)]
    held = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in [*whole, path / "eval/resid/c/0/0"]}
    store = make_store(path, n_sequences=after, eval_sequences=5, **SMALL)
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in held} == held
    assert store.attributes["segments"] == [before, after]
    assert segments(path) == (before, after)
    assert torch.equal(store.train.read(0, store.train.n_rows), all_rows(store, store.train))
    assert store.verify() == []
    make_store(tmp_path / "direct.zarr", n_sequences=after, eval_sequences=5, **SMALL)
    extended, direct = tree(path), tree(tmp_path / "direct.zarr")
    different = {key for key in extended.keys() | direct.keys() if extended.get(key) != direct.get(key)}
    assert {key for key in different if "/commit/c/" not in key} == {"zarr.json", "train/zarr.json"}


def test_extension_must_begin_alike(tiny_store: Path) -> None:
    """An extension must begin with the tokens that are there."""
    with pytest.raises(MismatchError, match="train tokens are others"):
        prepare(tiny_store, store_config(), make_tokens(5, "train", 200, 16), make_tokens(0, "eval", 32, 16), {})


def test_memory_does_not_grow(tmp_path: Path) -> None:
    """Memory does not grow with the store.
    Tokens, masks and norms of the whole store would be 11 MB; making, checking and finishing it takes some groups of them."""
    config = store_config(d_model=2, context=16, chunk_rows=1 << 13, shard_rows=1 << 16, group_shards=1)
    whole = {"train": 75_000, "eval": 5_000}
    splits = []
    for n in whole.values():
        tokens, special = (scratch_array(tmp_path, (n, 16), dtype) for dtype in (np.int32, np.bool_))
        tokens[:] = np.arange(16)
        mark_special(tokens, [0], VOCAB, special)
        splits.append(SplitTokens(tokens, special))
    tracemalloc.start()
    try:
        writer = prepare(tmp_path / "s.zarr", config, *splits, {})
        for name in whole:
            for k in writer.pending(name):
                start, stop = writer.split(name).shard_rows_range(k)
                with writer.shard(name, k) as shard:
                    shard.write(torch.randn(stop - start, 2).bfloat16())
        store = writer.finish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert store.statistics.n_rows == 1_200_000
    assert peak < 5e6, peak


@given(
    st.lists(st.lists(st.floats(0, 2.0**100, width=32, allow_subnormal=False), max_size=9), min_size=1, max_size=5),
    st.floats(0, 9, width=32, allow_subnormal=False),
)
def test_merged_median_is_the_median(parts: list[list[float]], common: float) -> None:
    """The median of parts is that of all."""
    arrays = [np.array([*part, *[common] * (len(part) % 3)], np.float32) for part in parts]
    everything = np.concatenate(arrays).astype(np.float64)
    if len(everything):
        assert median_of(lambda: arrays) == np.median(everything)


@pytest.mark.parametrize("multiple", [1.5, 5.0])
def test_massive_rows_are_not_kept(tiny_store: Path, multiple: float) -> None:
    """Massive rows are those that are not kept."""
    split = Store.open(tiny_store).train
    massive = np.flatnonzero(~split.special.reshape(-1) & ~split.kept(multiple))
    assert len(massive) > 0
    found = dict(split.massive(multiple, Store.open(tiny_store).statistics.median_norm))
    assert list(found) == list(range(split.n_shards))
    assert np.concatenate(list(found.values())).tolist() == massive.tolist()


def test_missing_shard_errs_here_nan_elsewhere(tmp_path: Path) -> None:
    """A missing shard is an error here and NaN in any zarr reader."""
    store = make_store(tmp_path / "s.zarr", n_sequences=19, eval_sequences=5, dtype="float32", **SMALL)
    store.train.shard_path(1).unlink()
    with pytest.raises(DamagedError, match="gone"):
        Store.open(store.path)
    with pytest.raises(DamagedError, match="gone"):
        store.train.read(30, 34)
    assert np.isnan(zarr.open_group(store.path, mode="r")["train/resid"][32:64]).all()


def test_missing_bf16_shard_is_nan_elsewhere(tmp_path: Path) -> None:
    """A missing bf16 shard is NaN in any zarr reader."""
    store = make_store(tmp_path / "s.zarr", n_sequences=19, eval_sequences=5, **SMALL)
    shutil.rmtree(store.path / "train/resid/c/1")
    bits = zarr.open_group(store.path, mode="r")["train/resid"][32:64]
    assert torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).isnan().all()


def test_shards_grow_with_the_store() -> None:
    """At 1024 rows a chunk, 10M rows keep shards of 64 chunks, 1B have a million rows a shard and 10B no more; files stay few."""
    rows = {n: shard_rows_for(n, 1024) for n in (1, 10**7, 1 << 24, (1 << 24) + 1, 10**9, 10**10)}
    assert list(rows.values()) == [1 << 16, 1 << 16, 1 << 16, 1 << 17, 1 << 20, 1 << 20]
    config = store_config(context=128, chunk_rows=1024, shard_rows=rows[10**9])
    splits = [
        SplitLayout(name, Layout.from_config(config), n // 128) for name, n in (("train", 10**9), ("eval", 10**9 // 20))
    ]
    assert sum(array.n_files for split in splits for array in split.arrays.values()) < 20_000
