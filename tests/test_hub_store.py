"""Stores on the Hub: pushed whole with a card, gone on with when stopped, read and pulled from there with every byte checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote

import pytest
import torch

from pipeline.base.errors import DamagedError, MismatchError, PipelineError, StoreError
from pipeline.store import requests
from pipeline.store.hub import pull_store, push_store, store_card
from pipeline.store.reader import Store
from support.stores import make_store
from test_hub import COMMIT, StandIn
from test_remote import SIZES
from test_store import tree


class StoreStandIn(StandIn):
    """The Hub's interface as data sets use it: files by range, a tree of them, commits that may fail."""

    fail_commits: ClassVar[list[int]]

    def do_POST(self) -> None:
        if "/commit/" in self.path and self.fail_commits and self.fail_commits.pop(0):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer({"error": "broken"}, 400)
        elif "/paths-info/" in self.path:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            self.answer([entry(p, self.files[p]) for p in paths if p in self.files])
        else:
            super().do_POST()

    def do_GET(self, body: bool = True) -> None:
        path = unquote(self.path.split("?")[0])
        if "/resolve/" in path and (name := path.split("/resolve/")[1].partition("/")[2]) in self.files:
            data, code = self.files[name], 200
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                data, code = data[int(first) : int(last) + 1 if last else None], 206
            self.answer(data, code, body=body)
        elif "/tree/" in path:
            under = path.split("/tree/")[1].partition("/")[2]
            prefix = f"{under}/" if under else ""
            inside = {p: d for p, d in self.files.items() if p.startswith(prefix)}
            recursive = "recursive=true" in self.path.lower()
            found = [entry(p, d) for p, d in inside.items() if recursive or "/" not in p[len(prefix) :]]
            folders = {prefix + p[len(prefix) :].split("/")[0] for p in inside if "/" in p[len(prefix) :]}
            self.answer([*found, *({"type": "directory", "path": f, "oid": "1" * 40} for f in sorted(folders))])
        elif "/revision/" in path or path.startswith("/api/datasets/"):
            siblings = [{"rfilename": file} for file in self.files]
            self.answer({"id": "owner/name", "sha": COMMIT, "siblings": siblings, "tags": []})
        else:
            super().do_GET(body)


def entry(path: str, data: bytes) -> dict[str, Any]:
    """A file of a repository's tree."""
    return {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}


@pytest.fixture
def the_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StoreStandIn]]:
    """A Hub on loopback, empty."""
    fsspec = pytest.importorskip("fsspec")
    import huggingface_hub.constants as constants
    from huggingface_hub import HfApi, HfFileSystem

    class Handler(StoreStandIn):
        files: ClassVar[dict[str, bytes]] = {}
        seen: ClassVar[list[str]] = []
        fail_commits: ClassVar[list[int]] = []

    import threading

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": endpoint})
    monkeypatch.setattr(requests, "WAITS", (0.0, 0.0))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=endpoint, token="hf_secret_of_the_test"))
    HfFileSystem.clear_instance_cache()
    yield Handler
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A store on a disk."""
    return make_store(tmp_path / "local.zarr", **SIZES).path


def test_pushed_store_comes_back_equal(the_hub: type[StoreStandIn], local: Path, tmp_path: Path) -> None:
    """What is pulled has the bytes of what was pushed, and beside them there was a card."""
    push_store(local, "owner/name", quiet=True)
    assert set(the_hub.files) == {*tree(local), "README.md"}
    pull_store("owner/name", tmp_path / "pulled.zarr", quiet=True)
    assert tree(tmp_path / "pulled.zarr") == tree(local)


def test_pushed_rows_are_read_there(the_hub: type[StoreStandIn], local: Path) -> None:
    """The repository is a URL like any other: rows are read from it without a copy."""
    push_store(local, "owner/name", quiet=True)
    assert torch.equal(Store.open("hf://datasets/owner/name").train.read(3, 70), Store.open(local).train.read(3, 70))


def test_stopped_push_is_no_store(the_hub: type[StoreStandIn], local: Path, tmp_path: Path) -> None:
    """A push that fails before its last commit leaves no store; the same call ends it."""
    the_hub.fail_commits += [0, 1]
    with pytest.raises(StoreError, match="owner/name"):
        push_store(local, "owner/name", quiet=True)
    assert "zarr.json" not in the_hub.files
    with pytest.raises(PipelineError, match="no activation store here"):
        pull_store("owner/name", tmp_path / "pulled.zarr", quiet=True)
    push_store(local, "owner/name", quiet=True)
    pull_store("owner/name", tmp_path / "pulled.zarr", quiet=True)
    assert tree(tmp_path / "pulled.zarr") == tree(local)


def test_damaged_store_is_not_pushed(the_hub: type[StoreStandIn], local: Path) -> None:
    """A store with a changed byte is refused before anything is uploaded."""
    body = local / "train/resid/c/1/0"
    body.write_bytes(bytes([body.read_bytes()[0] ^ 1]) + body.read_bytes()[1:])
    with pytest.raises(DamagedError, match="train/resid/c/1/0"):
        push_store(local, "owner/name", quiet=True)
    assert the_hub.files == {}


def test_another_store_is_not_overwritten(the_hub: type[StoreStandIn], local: Path, tmp_path: Path) -> None:
    """A repository that holds another store is refused, and stays as it is."""
    push_store(local, "owner/name", quiet=True)
    before = dict(the_hub.files)
    other = make_store(tmp_path / "other.zarr", **SIZES | {"seed": 1}).path
    with pytest.raises(MismatchError, match="use another repository"):
        push_store(other, "owner/name", quiet=True)
    assert the_hub.files == before


def test_changed_repository_is_found(the_hub: type[StoreStandIn], local: Path, tmp_path: Path) -> None:
    """A byte that changed on the Hub is named when the store is pulled; pulled again, once it is mended, it is whole."""
    push_store(local, "owner/name", quiet=True)
    whole = the_hub.files["train/resid/c/1/0"]
    the_hub.files["train/resid/c/1/0"] = whole[:9] + bytes([whole[9] ^ 1]) + whole[10:]
    with pytest.raises(DamagedError, match="train/resid/c/1/0"):
        pull_store("owner/name", tmp_path / "pulled.zarr", quiet=True)
    the_hub.files["train/resid/c/1/0"] = whole
    pull_store("owner/name", tmp_path / "pulled.zarr", quiet=True)
    assert tree(tmp_path / "pulled.zarr") == tree(local)


def test_card_says_the_essentials(local: Path, tmp_path: Path) -> None:
    """A card names model, layer, rows, corpus, size and id, and how to read it; text of the root breaks no table."""
    card = store_card(Store.open(local), "owner/name")
    for text in (
        "no/model",
        "layer 3",
        "76 for training",
        Store.open(local).id,
        "hf://datasets/owner/name",
        "pull-store",
    ):
        assert text in card, text
    shutil.copytree(local, tmp_path / "evil.zarr")
    evil = Store.open(local)
    evil.config["model"] = "a|b\n<script>"
    assert "<script>" not in store_card(evil, "owner/name")
    assert "a b" in store_card(evil, "owner/name")
