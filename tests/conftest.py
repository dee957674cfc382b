"""Fixtures that several test files share. Shapes and types of our own functions are checked while tests run."""

from __future__ import annotations

import os
import signal
import sys
import tarfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

import support.interpreter  # before anything imports Triton, as torch._dynamo does
import support.typechecks  # noqa: F401 (the hook looks it up as an attribute)

jaxtyping.install_import_hook(["pipeline", "harvest", "train", "evaluate"], "support.typechecks.check")

from pipeline.base import network  # noqa: E402 (the hook must be there first)
from support.stores import make_store  # noqa: E402

hypothesis.settings.register_profile("ours", deadline=None)  # the machine may be busy
hypothesis.settings.load_profile("ours")


@pytest.fixture(scope="session", autouse=True)
def hears_interrupts() -> None:
    """A shell starts what it puts into the background deaf to SIGINT, and so would be every process that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """No test cuts the power, and a hundred small stores would wait minutes for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def hub_answers() -> Iterator[None]:
    """Tests that stand in for the Hub find one there, whether this machine has a network or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "answers", lambda host, port: True)
        yield


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores that earlier releases wrote: 19 sequences to train on, 5 to evaluate; v3_half has one shard of four."""
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(Path(__file__).parent / "golden" / "stores.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store without a language model: d_model 64, context 16, 2432 training rows, 512 evaluation rows.

    Read-only by agreement: copy it (shutil.copytree) to damage it.
    """
    path = tmp_path_factory.mktemp("store") / "tiny.zarr"
    make_store(path)
    return path


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`lm_folder("gemma2")`: the folder of a tiny random model of that architecture with its tokenizer. Read-only."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        from support import tiny_models  # here, so that tests without a language model do not load transformers

        if kind not in made:
            made[kind] = tiny_models.make_model(tmp_path_factory.mktemp("lm") / kind, kind)
        return made[kind]

    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch: on tiny matrices others only wait, and on a busy machine for long."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URL of an empty bucket on a local S3 server."""
    pytest.importorskip("s3fs", reason="needs s3fs (pip install '.[remote]')")
    boto3 = pytest.importorskip("boto3", reason="needs boto3")
    server_module = pytest.importorskip("moto.server", reason="needs moto[server]")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="stores")
        yield "s3://stores"
    server.stop()


@pytest.fixture(params=["memory", *(pytest.param(name, marks=pytest.mark.slow) for name in ("s3", "obstore"))])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL at which no store is; "obstore" is S3 where s3fs is not installed."""
    pytest.importorskip("fsspec", reason="needs fsspec (pip install '.[remote]')")
    base = request.getfixturevalue("s3") if request.param != "memory" else "memory://stores"
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    if request.param == "obstore":
        pytest.importorskip("obstore", reason="needs obstore (pip install obstore)")
        monkeypatch.setitem(sys.modules, "s3fs", None)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    return f"{base}/{uuid.uuid4().hex}.zarr"
