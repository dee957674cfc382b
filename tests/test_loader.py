"""Order and loader: every kept row once an epoch, any position restarts the same stream, bytes as in the store."""

from __future__ import annotations

import shutil
import threading
import tracemalloc
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.base.errors import DamagedError, StoreError, UsageError
from pipeline.store.kept import KeptRows
from pipeline.store.mapping import MappedShard
from pipeline.store.reader import Split, Store
from support.stores import make_store
from train.feed import loader
from train.feed.bodies import BodyCheck
from train.feed.loader import Feed, Loader, resolve_mode
from train.feed.order import Order, share_of
from train.feed.resident import DeviceRows, Place, idle_seconds, place_for


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Orders over small splits with a ragged end, few or many rows kept, exact (held or computed) or windowed."""
    n_rows, chunk_rows = draw(st.integers(1, 200)), draw(st.integers(1, 40))
    kept = np.array(draw(st.lists(st.booleans(), min_size=n_rows, max_size=n_rows)))
    kept[draw(st.integers(0, n_rows - 1))] = True
    window_rows = draw(st.none() | st.integers(1, 120))
    computed = window_rows is None and draw(st.booleans())
    return Order(KeptRows.of(iter([kept]), chunk_rows), draw(st.integers(0, 5)), window_rows, computed=computed)


def delivered(order: Order, position: int, batch_size: int, n_batches: int) -> list[list[int]]:
    """The rows of some batches, in order of delivery."""
    batches = order.batches(position, batch_size)
    return [
        [int(row) for p in next(batches) for row in order.window(p.epoch, p.window).rows[p.start : p.stop]]
        for _ in range(n_batches)
    ]


@given(orders(), st.integers(0, 3))
def test_epoch_yields_each_kept_row_once(order: Order, epoch: int) -> None:
    """Every kept row comes exactly once in an epoch."""
    (rows,) = delivered(order, epoch * order.n_kept, order.n_kept, 1)
    assert sorted(rows) == np.flatnonzero(order.kept.mask(np.arange(order.n_chunks))).tolist()


@given(st.data(), st.integers(1, 20), st.integers(1, 3), st.integers(1, 100))
def test_kept_rows_are_a_bit_each(data: st.DataObject, chunk_rows: int, shard_chunks: int, n_rows: int) -> None:
    """Packed shard by shard, the masks come back: by chunk, in any order, as numbers of rows, and one by one."""
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=n_rows, max_size=n_rows)))
    rows = chunk_rows * shard_chunks
    packed = KeptRows.of((kept[a : a + rows] for a in range(0, n_rows, rows)), chunk_rows)
    chunks = np.array(data.draw(st.permutations(range(-(-n_rows // chunk_rows)))))
    parts = [np.flatnonzero(kept[c * chunk_rows : (c + 1) * chunk_rows]) + c * chunk_rows for c in chunks.tolist()]
    assert packed.rows(chunks).tolist() == np.concatenate(parts).tolist()
    order = data.draw(st.permutations(range(int(kept.sum()))))
    assert packed.nth(np.array(order, np.int64)).tolist() == np.flatnonzero(kept)[order].tolist()
    assert packed.in_chunks()[chunks].tolist() == [len(part) for part in parts]
    assert packed.bits.nbytes == len(chunks) * -(-chunk_rows // 8)
    assert (packed & KeptRows.of(iter([~kept]), chunk_rows)).in_chunks().sum() == 0


@given(orders(), st.integers(1, 50), st.integers(0, 12))
def test_any_position_restarts_the_stream(order: Order, size: int, skip: int) -> None:
    """Batches have their size and any position restarts the same stream."""
    whole = delivered(order, 0, size, skip + 3)
    assert all(len(rows) == size for rows in whole)
    assert delivered(order, skip * size, size, 3) == whole[skip:]


@given(orders())
def test_window_spans_at_most_its_rows(order: Order) -> None:
    """A window spans no more rows than asked unless one chunk does."""
    sizes = [len(chunks) for chunks in order.chunks(1)]
    assert sum(sizes) == order.n_chunks
    assert max(sizes) - min(sizes) <= 1
    for index, chunks in enumerate(order.chunks(1)):
        assert set(order.window(1, index).rows[:] // order.kept.chunk_rows) <= set(chunks.tolist())


@given(orders(), st.integers(1, 6), st.integers(1, 20), st.integers(0, 50))
def test_shares_are_equal_parts_of_batch(order: Order, n_parts: int, size: int, position: int) -> None:
    """Shares of a batch are equal and together the batch."""
    batch = next(order.batches(position, n_parts * size))
    rows = [(p.epoch, p.window, i) for p in batch for i in range(p.start, p.stop)]
    shares = [
        [(p.epoch, p.window, i) for p in share_of(batch, part, n_parts) for i in range(p.start, p.stop)]
        for part in range(n_parts)
    ]
    assert all(len(share) == size for share in shares)
    assert [row for share in shares for row in share] == rows


def test_order_window_spans_at_most_rows() -> None:
    """A window of an order spans its rows at most."""
    order = Order(KeptRows.of(iter([np.ones(1000, bool)]), 10), 0, 250)
    assert [len(chunks) for chunks in order.chunks(1)] == [25, 25, 25, 25]
    assert [len(chunks) for chunks in order.chunks(0)] == [3, 22, 25, 25, 25]
    assert Order(KeptRows.of(iter([np.ones(1000, bool)]), 10), 0, 240).n_windows == 5


Kind = Literal["exact", "computed", "windowed"]
KINDS = get_args(Kind)


def order_of(kept: KeptRows, kind: Kind, seed: int = 0, window_rows: int = 512) -> Order:
    """An order of a kind."""
    return Order(kept, seed, window_rows if kind == "windowed" else None, computed=kind == "computed")


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_and_seeds_differ_in_order(kind: Kind) -> None:
    """Epochs and seeds have orders of their own."""
    kept = KeptRows.of(iter([np.ones(512, bool)]), 16)
    first = delivered(order_of(kept, kind, 0, 256), 0, 512, 2)
    other = delivered(order_of(kept, kind, 1, 256), 0, 512, 1)
    assert first[0] != first[1]
    assert first[0] != other[0]


def test_computed_orders_are_recorded() -> None:
    """What a training began in it goes on in: a computed order's rows are these, whatever version of this code computes them."""
    order = Order(KeptRows.of(iter([np.arange(5000) % 7 > 0]), 64), 3, None, computed=True)
    assert order.window(0, 0).rows[:8].tolist() == [2816, 1739, 1303, 821, 3118, 1902, 1740, 4950]
    assert order.window(2, 0).rows[4277:].tolist() == [2236, 1035, 3936, 2546, 3713, 4617, 3134, 3336]


def uniform(counts: npt.NDArray[np.int64]) -> float:
    """How far from equal numbers that are drawn alike are: χ² less its degrees of freedom, in standard deviations."""
    expected, free = counts.mean(), counts.size - 1
    return float((np.square(counts - expected).sum() / expected - free) / (2 * free) ** 0.5)


@pytest.mark.parametrize("n_rows", [30, 4096])
def test_computed_orders_are_shuffles(n_rows: int) -> None:
    """Over epochs, each row comes at each place, and behind each other row, as often as chance has it; and within a batch as
    many rows of one chunk come together, with the spread that they have in permutations that are drawn."""
    kept = KeptRows.of(iter([np.ones(n_rows, bool)]), 32)
    order, rng, n_epochs = Order(kept, 0, None, computed=True), np.random.default_rng(0), 600
    computed = np.stack([order.window(epoch, 0).rows[:n_rows] for epoch in range(n_epochs)])
    drawn = np.stack([rng.permutation(n_rows) for _ in range(n_epochs)])
    parts = computed * 15 // n_rows
    at = np.zeros((15, 15), np.int64)
    np.add.at(at, (np.broadcast_to(np.arange(n_rows) * 15 // n_rows, parts.shape), parts), 1)
    assert abs(uniform(at)) < 4
    steps = np.bincount((np.diff(computed, axis=1) % n_rows).ravel(), minlength=n_rows)[1:]
    assert abs(uniform(steps)) < 4

    def together(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        chunks = np.sort(rows[:, : n_rows // 16 * 16].reshape(len(rows), -1, 16) // 8, axis=2)
        found: npt.NDArray[np.int64] = (np.diff(chunks, axis=2) == 0).sum(axis=(1, 2))
        return found

    a, b = together(computed), together(drawn)
    assert abs(a.mean() - b.mean()) < 4 * np.hypot(a.std(), b.std()) / n_epochs**0.5
    assert abs(a.std() / b.std() - 1) < 4 / n_epochs**0.5


def test_split_without_kept_rows_is_refused() -> None:
    """A split without kept rows is refused."""
    with pytest.raises(StoreError, match="no training row is left"):
        Order(KeptRows.of(iter([np.zeros(32, bool)]), 16), 0, None)


@pytest.fixture(scope="module")
def compressed_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compressed") / "zstd.zarr"
    make_store(path, codec="zstd", n_sequences=100, dtype="float32", d_model=24)
    return path


def make_order(split: Split, kind: Kind, window_rows: int = 512) -> Order:
    return order_of(split.kept_rows(), kind, window_rows=window_rows)


def take(split: Split, order: Order, size: int, n: int, position: int = 0, threads: int = 2) -> list[Tensor]:
    """Copies of some batches."""
    with Loader(split, order, size, position=position, threads=threads) as loader:
        return [loader.next().clone() for _ in range(n)]


def bits(rows: Tensor) -> list[bytes]:
    """Rows as bytes, sorted, so that two sets of rows can be compared bit for bit."""
    return sorted(row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_mapped_shards_are_bounded(tiny_store: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one mapped shard of three, batches are the same and no more than two are ever mapped at once."""
    split = Store.open(tiny_store).train
    expected = take(split, make_order(split, kind), 50, 40)
    alive: list[weakref.ref[Tensor]] = []
    most = [0]
    mapped_shard = Split.mapped_shard

    def counted(self: Split, k: int) -> MappedShard:
        found = mapped_shard(self, k)
        alive.append(weakref.ref(found.view))
        most[0] = max(most[0], sum(one() is not None for one in alive))
        return found

    monkeypatch.setattr(Split, "mapped_shard", counted)
    monkeypatch.setattr(loader, "MOST_MAPPED", 1)
    found = take(split, make_order(split, kind), 50, 40, threads=1)
    assert all(map(torch.equal, found, expected))
    assert len(alive) > 3
    assert most[0] <= 2  # the one that is read, and the one that takes its place


@pytest.mark.parametrize("kind", KINDS)
def test_epoch_is_the_kept_rows(tiny_store: Path, kind: Kind) -> None:
    """An epoch of batches is the kept rows of the store bit for bit."""
    split = Store.open(tiny_store).train
    order = make_order(split, kind)
    n_batches = order.n_kept // 7
    rows = torch.cat(take(split, order, 7, n_batches + 1))[: order.n_kept]
    expected = split.read(0, split.n_rows)[torch.from_numpy(split.kept())]
    assert rows.dtype == torch.bfloat16
    in_epoch = bits(rows[: n_batches * 7])
    assert len(in_epoch) == n_batches * 7
    assert set(in_epoch) <= set(bits(expected))
    assert len(set(bits(expected)) - set(in_epoch)) == order.n_kept - n_batches * 7


@pytest.mark.parametrize("kind", KINDS)
def test_batch_holds_rows_of_its_order(tiny_store: Path, kind: Kind) -> None:
    """A batch holds the rows that its order names."""
    split = Store.open(tiny_store).train
    order = make_order(split, kind)
    size = order.n_kept // 3 + 5  # the third crosses into the second epoch
    batches = order.batches(0, size)
    source = split.read(0, split.n_rows)
    for found in take(split, order, size, 4):
        rows = [np.sort(order.window(p.epoch, p.window).rows[p.start : p.stop]) for p in next(batches)]
        assert torch.equal(found.view(torch.int16), source[np.concatenate(rows)].view(torch.int16))
        assert found.is_contiguous()


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 300), skip=st.integers(0, 12), kind=st.sampled_from(KINDS), threads=st.integers(1, 3))
def test_loader_restarts_at_any_position(tiny_store: Path, size: int, skip: int, kind: Kind, threads: int) -> None:
    """A loader started at any position delivers the same batches."""
    split = Store.open(tiny_store).train
    order = make_order(split, kind)
    whole = take(split, order, size, skip + 2)
    again = take(split, order, size, 2, position=skip * size, threads=threads)
    assert all(torch.equal(a, b) for a, b in zip(again, whole[skip:]))


def test_compressed_and_mapped_deliver_alike(tiny_store: Path, tmp_path: Path) -> None:
    """Compressed and mapped stores of the same rows deliver the same batches."""
    make_store(tmp_path / "lz4.zarr", codec="lz4")
    plain, compressed = Store.open(tiny_store).train, Store.open(tmp_path / "lz4.zarr").train
    for a, b in zip(
        take(plain, make_order(plain, "windowed"), 100, 30),
        take(compressed, make_order(compressed, "windowed"), 100, 30),
    ):
        assert torch.equal(a, b)


def test_compressed_float32_reads_through_windows(compressed_store: Path) -> None:
    """A compressed float32 store is read through windows."""
    split = Store.open(compressed_store).train
    order = make_order(split, "windowed")
    rows = torch.cat(take(split, order, order.n_kept, 1))
    assert bits(rows) == bits(split.read(0, split.n_rows)[torch.from_numpy(split.kept())])


def test_auto_maps_what_fits(tiny_store: Path, compressed_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Auto maps what fits and windows what is compressed or too large."""
    plain, compressed = Store.open(tiny_store).train, Store.open(compressed_store).train
    assert resolve_mode("auto", plain.shape) == "global"
    assert resolve_mode("auto", compressed.shape) == "window"
    with pytest.raises(UsageError, match="codec none"):
        resolve_mode("global", compressed.shape)
    monkeypatch.setattr("train.feed.loader.available_memory", lambda: 1000)
    assert resolve_mode("auto", plain.shape) == "window"
    assert resolve_mode("global", plain.shape) == "global"


@pytest.fixture
def damaged_store(tiny_store: Path, tmp_path: Path) -> Path:
    """One byte flipped in the body of the second training shard."""
    path = tmp_path / "damaged.zarr"
    shutil.copytree(tiny_store, path)
    shard = Store.open(path).train.shard_path(1)
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    return path


def test_window_load_finds_flipped_byte(damaged_store: Path) -> None:
    """A flipped byte is found when its window is loaded."""
    split = Store.open(damaged_store).train
    order = make_order(split, "windowed")
    with pytest.raises(DamagedError, match=r"train/resid/c/1/0.*harvest --repair"):
        take(split, order, 100, order.n_kept // 100)


def test_background_check_finds_flipped_byte(damaged_store: Path) -> None:
    """A flipped byte is found by the check beside mapped rows."""
    check = BodyCheck(Store.open(damaged_store).train)
    check.begin()
    with pytest.raises(DamagedError, match=r"train/resid/c/1/0.*harvest --repair"):
        check.require()
    with pytest.raises(DamagedError):
        check.poll()
    check.close()


def test_full_check_reads_every_shard(tiny_store: Path) -> None:
    """The check of a whole store passes and reads every shard."""
    split = Store.open(tiny_store).train
    check = BodyCheck(split)
    check.require()
    assert check.n_done == split.n_shards
    check.close()


def test_closed_loader_leaves_no_thread(tiny_store: Path) -> None:
    """A loader closed in the middle leaves no thread."""
    split = Store.open(tiny_store).train
    loader = Loader(split, make_order(split, "windowed"), 64)
    loader.next()
    loader.close()
    assert not loader.producer.is_alive()


def test_gathering_keeps_torch_threads(tiny_store: Path) -> None:
    """Gathering leaves the number of torch threads of this thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        split = Store.open(tiny_store).train
        take(split, make_order(split, "exact"), 64, 3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---- rows on the device: the class that CUDA uses, with a CPU for the device ----


def on_device(split: Split, order: Order, size: int, n: int, position: int = 0, free: int = 1 << 40) -> list[Tensor]:
    """Batches of `DeviceRows` that has so many bytes for rows."""
    place = place_for(split, order, free)
    assert place is not None
    with DeviceRows(split, order, size, place, position=position) as feed:
        return [feed.next().clone() for _ in range(n)]


def two_windows(split: Split, order: Order) -> int:
    """Bytes of two windows, which is less than the store's."""
    n_bytes = 2 * order.most_chunks * split.shape.layout.chunk_nbytes
    assert n_bytes < split.n_chunks * split.shape.layout.chunk_nbytes
    return n_bytes


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 300), position=st.integers(0, 9000), how=st.sampled_from([*KINDS, "all"]))
def test_device_rows_are_the_loaders(tiny_store: Path, size: int, position: int, how: Any) -> None:
    """Rows on the device come in the batches of the loader, bit for bit, over windows and epochs, from any position."""
    split = Store.open(tiny_store).train
    order = make_order(split, how if how != "all" else "windowed")
    n = 2 + 3000 // size
    free = two_windows(split, order) if how == "windowed" else 1 << 40
    expected = take(split, order, size, n, position)
    for found, batch in zip(on_device(split, order, size, n, position, free), expected, strict=True):
        assert torch.equal(found.view(torch.int16), batch.view(torch.int16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["host", "device"])
def test_processes_share_batches(tiny_store: Path, kind: Kind, where: str) -> None:
    """Processes that train together get their parts of a batch, from the host's memory and from the device's."""
    split = Store.open(tiny_store).train
    order = make_order(split, kind)
    place = place_for(split, order, two_windows(split, order) if kind == "windowed" else 1 << 40)
    assert place is not None
    parts = []
    for part in range(2):
        share = (part, 2)
        feed: Feed = (
            Loader(split, order, 100, share=share)
            if where == "host"
            else DeviceRows(split, order, 100, place, share=share)
        )
        with feed:
            parts.append([feed.next().clone() for _ in range(40)])
    whole = take(split, order, 100, 40)
    for first, second, batch in zip(*parts, whole, strict=True):
        assert bits(torch.cat([first, second])) == bits(batch)


@pytest.mark.parametrize("whole", [True, False])
def test_device_rows_are_checked_first(damaged_store: Path, whole: bool) -> None:
    """A flipped byte is found before a row of its chunk is delivered."""
    split = Store.open(damaged_store).train
    order = make_order(split, "exact" if whole else "windowed")
    with pytest.raises(DamagedError, match="crc32c"):
        on_device(split, order, 64, 60, free=1 << 40 if whole else two_windows(split, order))


def test_place_follows_free_memory(tiny_store: Path) -> None:
    """The store where it fits, else two windows, else nothing; an exact order needs the store."""
    split = Store.open(tiny_store).train
    order, chunk = make_order(split, "windowed"), split.shape.layout.chunk_nbytes
    assert place_for(split, order, split.n_chunks * chunk) == Place(split.n_chunks, True)
    assert place_for(split, order, split.n_chunks * chunk - 1) == Place(2 * order.most_chunks, False)
    assert place_for(split, order, 2 * order.most_chunks * chunk - 1) is None
    assert place_for(split, make_order(split, "exact"), split.n_chunks * chunk - 1) is None
    assert place_for(split, order, 2 * split.n_chunks * chunk, split) == Place(
        split.n_chunks, True
    )  # beside another store
    assert place_for(split, order, 2 * split.n_chunks * chunk - 1, split) == Place(2 * order.most_chunks, False)


def test_buffers_hold_windows_of_later_epochs(compressed_store: Path) -> None:
    """The first epoch's first window comes in two, later ones do not: buffers are as large as those."""
    split = Store.open(compressed_store).train
    order = make_order(split, "windowed", window_rows=1 << 20)
    assert order.n_windows == 1
    epochs = take(split, order, order.n_kept, 2)
    assert sorted(bits(epochs[0])) == sorted(bits(epochs[1]))


def test_closed_device_rows_leave_no_thread(tiny_store: Path) -> None:
    """No thread is left behind, whatever was being loaded."""
    before = threading.active_count()
    on_device(Store.open(tiny_store).train, make_order(Store.open(tiny_store).train, "windowed"), 64, 2)
    assert threading.active_count() == before


class BusyDevice:
    """Stands in for an event on a GPU that is busy until the rows have come (at the third look), or until they are sent for."""

    def __init__(self, coming: Future[Any], outlasts: bool) -> None:
        self.coming, self.outlasts, self.looks = coming, outlasts, 0

    def record(self, stream: object) -> None:
        """Nothing."""

    def query(self) -> bool:
        self.looks += 1
        if self.looks == 3 and self.outlasts:
            self.coming.set_result("rows")
        elif self.looks == 3:
            threading.Timer(0.01, self.coming.set_result, ["rows"]).start()
        return self.looks >= 3 and not self.outlasts


@pytest.mark.parametrize("outlasts", [True, False])
def test_wait_is_what_the_device_idles(outlasts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time in which a GPU still works is no waiting for data; what comes after that is."""
    coming: Future[Any] = Future()
    monkeypatch.setattr(torch.cuda, "Event", lambda: BusyDevice(coming, outlasts))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    seconds = idle_seconds(coming, torch.device("cuda"))
    assert coming.done()
    assert (seconds == 0) == outlasts


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", ["loader", "windows", "all"])
def test_cuda_batches_are_the_cpus(tiny_store: Path, how: str) -> None:
    """Batches on a CUDA device are those of the CPU, while a kernel that takes long is still at work on the one before."""
    split = Store.open(tiny_store).train
    order = make_order(split, "windowed")
    expected = take(split, order, 100, 60)
    if how == "loader":
        feed: Feed = Loader(split, order, 100, device="cuda")
    else:
        place = place_for(split, order, two_windows(split, order) if how == "windows" else 1 << 40)
        assert place is not None
        feed = DeviceRows(split, order, 100, place, device="cuda")
    with feed:
        found = []
        for _ in expected:
            batch = feed.next()
            torch.cuda._sleep(2_000_000)  # the device reads the batch after the host has asked for the next one
            found.append(batch.clone())
    for kept, batch in zip(found, expected, strict=True):
        assert torch.equal(kept.cpu().view(torch.int16), batch.view(torch.int16))


BLOCKS = 3_000_000
"""Bytes of the blocks in which numbers of rows are made of bits, whatever the size of a store."""


@pytest.mark.parametrize("kind", KINDS)
def test_order_memory_is_as_stated(kind: Kind) -> None:
    """One window is held while the next is made: no more than `Order.n_bytes`, and a bit a row beside windows and what is
    computed."""
    n_rows = 1 << 20
    kept = KeptRows(np.full((n_rows // 1024, 128), 0xFF, np.uint8), 1024)
    tracemalloc.start()
    order = order_of(kept, kind, window_rows=65_536)
    held = order.window(1, 0), order.window(2, 0)
    held[0].rows[-4096:]
    peak = kept.bits.nbytes + tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    window_rows = 65_536 if kind == "windowed" else None
    assert len(held[0].rows) == len(held[1].rows) == (window_rows or n_rows)
    assert peak < 1.02 * Order.n_bytes(n_rows, 1024, window_rows, kind == "computed") + BLOCKS
