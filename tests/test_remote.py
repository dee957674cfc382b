"""Stores on object storage: the same bytes as on a disk, read and verified there, staged to a disk for training."""

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zarr

from pipeline.base.errors import DamagedError, DiskError, MismatchError, StoreError, UsageError
from pipeline.experiment.verify import verify
from pipeline.store import objects, staging
from pipeline.store.backend import LocalFiles
from pipeline.store.objects import RemoteFiles, open_files
from pipeline.store.reader import Store, describe_store
from support.stores import make_rows, make_store, prepare_store, store_config
from test_store import SMALL, tree

SIZES: dict[str, Any] = {"n_sequences": 19, "eval_sequences": 5, **SMALL}


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """The same store on a disk."""
    return make_store(tmp_path / "local.zarr", **SIZES).path


def remote_tree(url: str) -> dict[str, bytes]:
    """Every object of a store and its bytes."""
    files = open_files(url)
    return {key: files.read(key, most=1 << 30) for key in files.keys()}  # noqa: SIM118 (not a dict)


def test_url_store_has_the_disks_bytes(url: str, local: Path) -> None:
    """A store at a URL has the bytes of one on a disk."""
    store = make_store(url, **SIZES)
    assert remote_tree(url) == tree(local)
    assert store.verify() == []
    assert describe_store(store) == describe_store(Store.open(local))


def test_url_rows_read_in_order(url: str) -> None:
    """Rows are read in order from a URL."""
    store = make_store(url, **SIZES)
    assert torch.equal(store.train.read(3, 70), make_rows(store.config, "train", 3, 70))


def test_zarr_opens_the_same_url(url: str) -> None:
    """zarr-python opens the same URL."""
    if url.startswith("memory"):
        pytest.skip("zarr-python has its own memory:// which is not fsspec's")
    store = make_store(url, **SIZES)
    group = zarr.open_group(url, mode="r")
    assert torch.equal(torch.from_numpy(group["train/norm"][:]), torch.from_numpy(store.train.norm.copy()))


def test_url_damage_is_found(url: str) -> None:
    """A flipped byte and a missing shard are found at a URL."""
    files = make_store(url, **SIZES).files
    body = files.read("train/resid/c/0/0", most=1 << 30)
    files.write("train/resid/c/0/0", bytes([body[0] ^ 1]) + body[1:])
    files.delete("eval/resid/c/0/0")
    problems = Store.open(url, check=False).verify()
    assert len(problems) == 2
    assert all(problem.startswith(url) for problem in problems)
    with pytest.raises(DamagedError, match="gone"):
        Store.open(url)


def test_stopped_url_harvest_goes_on(url: str, local: Path) -> None:
    """A harvest to a URL that was stopped goes on."""
    writer = prepare_store(url, store_config(**SMALL), 19, 5)
    with writer.shard("train", 2) as shard:
        shard.write(make_rows(writer.store.config, "train", 64, 76))
    with pytest.raises(RuntimeError), writer.shard("train", 0) as shard:
        shard.write(make_rows(writer.store.config, "train", 0, 20))
        raise RuntimeError("stopped")
    with pytest.raises(StoreError, match="1 of 4 shards"):
        Store.open(url)
    make_store(url, **SIZES)
    assert remote_tree(url) == tree(local)


def test_url_store_cannot_be_mapped(url: str) -> None:
    """A store at a URL cannot be mapped."""
    with pytest.raises(UsageError, match="pipeline stage"):
        make_store(url, **SIZES).train.mapped_shard(0)


def test_staged_store_is_equal_and_mappable(url: str, local: Path, tmp_path: Path) -> None:
    """A staged store has the same bytes and can be mapped."""
    make_store(url, **SIZES)
    store = staging.stage(url, tmp_path / "staged.zarr", quiet=True)
    assert tree(tmp_path / "staged.zarr") == tree(local)
    assert store.train.mapped_shard(0).view.shape[1] == 6


def test_restaging_copies_only_damage(url: str, local: Path, tmp_path: Path) -> None:
    """Staging again copies only what is damaged."""
    make_store(url, **SIZES)
    path = tmp_path / "staged.zarr"
    staging.stage(url, path, quiet=True)
    inodes = {p: p.stat().st_ino for p in path.rglob("resid/c/*/0")}
    body = path / "train/resid/c/1/0"
    body.write_bytes(bytes([body.read_bytes()[0] ^ 1]) + body.read_bytes()[1:])
    staging.stage(url, path, quiet=True)
    assert tree(path) == tree(local)
    assert {p for p, inode in inodes.items() if p.stat().st_ino != inode} == {body}


def test_small_files_take_one_request(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifying and staging ask for a small shard once, whatever its number of chunks."""
    make_store(url, **SIZES)
    asked, ask = Counter[str](), RemoteFiles.ask

    def counted(files: RemoteFiles, key: str, work: Callable[[], Any]) -> Any:
        asked[key] += 1
        return ask(files, key, work)

    monkeypatch.setattr(RemoteFiles, "ask", counted)
    store = Store.open(url, check=False)
    massive = store.train.massive(store.statistics.massive_multiple, store.statistics.median_norm)
    again = [k for k, rows in massive if len(rows)]
    shards = {split.arrays["resid"].key(k) for split in store.splits for k in range(split.n_shards)}
    asked.clear()
    assert store.verify(quiet=True) == []
    twice = {store.train.arrays["resid"].key(k) for k in again}  # its statistics need massive rows
    assert {key: asked[key] for key in shards - twice} == dict.fromkeys(shards - twice, 1)
    asked.clear()
    staging.stage(url, tmp_path / "staged.zarr", quiet=True)
    assert {key: asked[key] for key in shards} == dict.fromkeys(shards, 1)


def test_stopped_staging_is_no_store(url: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A staging that was stopped is no store and goes on."""
    make_store(url, **SIZES)
    copy_file, left = staging.copy_file, [25]

    def stopping(*args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        copy_file(*args)

    monkeypatch.setattr(staging, "copy_file", stopping)
    with pytest.raises(KeyboardInterrupt):
        staging.stage(url, tmp_path / "staged.zarr", quiet=True)
    with pytest.raises(StoreError, match="not prepared to its end"):
        Store.open(tmp_path / "staged.zarr")
    left[0] = 1000
    staging.stage(url, tmp_path / "staged.zarr", quiet=True)
    assert tree(tmp_path / "staged.zarr") == tree(local)


@pytest.mark.parametrize(
    "key", ["train/resid/c/0/0", "train/tokens/c/1/0", "eval/special/c/0/0", "train/norm/c/1", "train/moments/c/0/0"]
)
def test_staging_notices_a_broken_source(url: str, tmp_path: Path, key: str) -> None:
    """Staging notices a shard, tokens, special positions, norms and moments that are broken at the source."""
    files = make_store(url, **SIZES).files
    body = files.read(key, most=1 << 30)
    files.write(key, body[:9] + bytes([body[9] ^ 1]) + body[10:])
    with pytest.raises(DamagedError, match=key):
        staging.stage(url, tmp_path / "staged.zarr", quiet=True)
    with pytest.raises(StoreError):
        Store.open(tmp_path / "staged.zarr")


def test_staging_spares_other_files(url: str, local: Path, tmp_path: Path) -> None:
    """Staging leaves another store and other files alone."""
    make_store(url, **(SIZES | {"seed": 1}))
    before = tree(local)
    with pytest.raises(MismatchError, match="use another folder"):
        staging.stage(url, local, quiet=True)
    assert tree(local) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(DiskError, match="something else"):
        staging.stage(url, tmp_path / "notes", quiet=True)


def test_staging_needs_room_on_the_disk(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging needs room on the disk."""
    make_store(url, **SIZES)
    monkeypatch.setattr("pipeline.base.files.free_bytes", lambda path: 1000)
    with pytest.raises(DiskError, match="the copy of the store needs"):
        staging.stage(url, tmp_path / "staged.zarr", quiet=True)
    assert not os.path.exists(tmp_path / "staged.zarr")


def test_missing_url_store_is_said(url: str) -> None:
    """No store at a URL is said so."""
    with pytest.raises(StoreError, match="no activation store here"):
        Store.open(url)


def test_unknown_url_kind_is_refused() -> None:
    """A URL of an unknown kind is refused."""
    pytest.importorskip("fsspec", reason="needs fsspec (pip install '.[remote]')")
    with pytest.raises(UsageError, match="not a URL that fsspec knows"):
        Store.open("carrier-pigeon://loft/acts.zarr")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("zip://a::file:///etc/passwd", "a chain of URLs; unpack or copy"),
        ("simplecache::memory://acts.zarr", "a chain of URLs; unpack or copy"),
        ("reference://x", r"cannot be opened \(\w+: .*; check the URL"),
        ("zip://acts.zarr", r"cannot be opened \(\w+: .*; check the URL"),
    ],
)
def test_unopened_urls_are_refused(url: str, said: str) -> None:
    """File systems within files, and those whose driver cannot start, are one line, whatever the driver raises."""
    pytest.importorskip("fsspec", reason="needs fsspec (pip install '.[remote]')")
    with pytest.raises(UsageError, match=f"{url}: {said}"):
        Store.open(url)


def test_what_drivers_lack_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a driver cannot do is one line, and not tried again."""
    pytest.importorskip("fsspec", reason="needs fsspec (pip install '.[remote]')")
    files, calls = RemoteFiles("memory://broken.zarr"), []

    def fail(path: str, **_: int) -> bytes:
        calls.append(path)
        raise NotImplementedError

    monkeypatch.setattr(files.fs, "cat_file", fail)
    with pytest.raises(DiskError, match=r"memory://broken\.zarr/zarr\.json: NotImplementedError; check the URL"):
        files.read("zarr.json", most=10)
    assert len(calls) == 1


def test_unsaid_length_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not say how long a file is, as one that answers without end."""
    monkeypatch.setattr(type(RemoteFiles(url).fs), "info", lambda *_args, **_more: {"size": None})
    with pytest.raises(DiskError, match=r"zarr\.json: the server does not say how long it is"):
        Store.open(url)


def test_unreachable_web_server_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which fsspec says that there is no such file; a file that the server does not have is gone."""
    pytest.importorskip("fsspec", reason="needs fsspec (pip install '.[remote]')")
    files, status = RemoteFiles("memory://broken.zarr"), 403

    class Refused(Exception):
        """As aiohttp has it."""

        __module__ = "aiohttp.client_exceptions"

    def info(path: str) -> dict[str, Any]:
        cause = Refused("refused here")
        cause.status = status  # type: ignore[attr-defined]
        raise FileNotFoundError(path) from cause

    monkeypatch.setattr(files.fs, "info", info)
    with pytest.raises(DiskError, match=r"zarr\.json: Refused: refused here; check the URL and the connection"):
        files.size("zarr.json")
    with pytest.raises(DiskError, match="refused here"):
        verify("memory://broken.zarr")
    status = 404
    assert files.size("zarr.json") is None


def test_endless_redirects_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, since they end no sooner when asked again; the library itself says "0, message=''"."""
    pytest.importorskip("fsspec", reason="needs fsspec (pip install '.[remote]')")
    files = RemoteFiles("memory://broken.zarr")
    redirects = type("TooManyRedirects", (Exception,), {"__module__": "aiohttp.client_exceptions"})

    def info(path: str) -> dict[str, Any]:
        raise FileNotFoundError(path) from redirects("0, message=''")

    monkeypatch.setattr(files.fs, "info", info)
    with pytest.raises(DiskError, match=r"zarr\.json: the server redirects without end; check the URL"):
        files.size("zarr.json")
    assert files.traffic.n_requests == 1


def test_plain_path_is_local(tmp_path: Path) -> None:
    """A path without a scheme is a local folder."""
    assert isinstance(open_files(str(tmp_path)), LocalFiles)


@pytest.mark.parametrize("finds", [False, True])
def test_walking_drivers_are_listed_flat(monkeypatch: pytest.MonkeyPatch, finds: bool) -> None:
    """Where a driver would list every folder alone, obstore lists all below a URL in pages of a thousand; one that finds all by
    itself is asked itself."""
    from fsspec.asyn import AsyncFileSystem

    class Walks(AsyncFileSystem):  # type: ignore[misc]
        pass

    class Finds(AsyncFileSystem):  # type: ignore[misc]
        async def _find(self, path: str, **_options: Any) -> dict[str, Any]:
            return {f"{path}/c": {"size": 3}}

    asked: list[Any] = []

    def pages(store: str, prefix: str, chunk_size: int) -> list[list[dict[str, Any]]]:
        asked.append((store, prefix, chunk_size))
        return [
            [{"path": f"{prefix}/{name}", "size": size} for name, size in page] for page in ([("a", 1)], [("b/c", 2)])
        ]

    obstore = SimpleNamespace(list=pages, store=SimpleNamespace(from_url=lambda url: url), __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "obstore", obstore)
    driver = Finds() if finds else Walks()
    monkeypatch.setattr(objects, "open_url", lambda url: (driver, url.partition("://")[2]))
    found = RemoteFiles("s3://bucket/stores/s.zarr").listing()
    assert found == ({"c": 3} if finds else {"a": 1, "b/c": 2})
    assert asked == ([] if finds else [("s3://bucket", "stores/s.zarr", 1000)])


def test_no_driver_keeps_listings() -> None:
    """A driver that takes no option for it, and lists from what it kept, is made to forget: what is written meanwhile is seen."""
    fsspec = pytest.importorskip("fsspec", reason="needs fsspec (pip install '.[remote]')")
    there = ["a"]

    class Strict(fsspec.AbstractFileSystem):  # type: ignore[misc]
        protocol = "strict"

        def __init__(self) -> None:
            super().__init__()

        def ls(self, path: str, detail: bool = True, **_options: Any) -> list[dict[str, Any]]:
            if path not in self.dircache:
                found = [{"name": f"{path}/{name}", "size": 1, "type": "file"} for name in there]
                self.dircache[path] = found
                return found
            return list(self.dircache[path])

    fsspec.register_implementation("strict", Strict, clobber=True)
    files = RemoteFiles("strict://s.zarr")
    assert files.keys() == ["a"]
    there.append("b")
    assert files.keys() == ["a", "b"]
