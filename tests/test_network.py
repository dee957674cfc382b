"""What the network refuses is one line with the next step, everywhere alike; what may pass is tried again."""

from __future__ import annotations

import socket
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2 as httpx
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub

from evaluate.probing.datasets import hub_rows
from harvest.corpus import Source, StreamedCorpus
from pipeline.base import network
from pipeline.base.errors import CheckpointError, CorpusError, ModelError
from pipeline.model import files
from pipeline.model.files import hub_errors
from pipeline.sae import hub as sae_hub

ANSWERS = network.answers  # before tests are given another
PAGE = "https://huggingface.co/a/b"


def hub_error(kind: type[hub.HfHubHTTPError], status: int) -> hub.HfHubHTTPError:
    """An error of the Hub's library with its answer."""
    answer = httpx.Response(status, request=httpx.Request("GET", PAGE))
    return kind(f"{status} Error\nmore lines", response=answer)


def caused(error: Exception, by: Exception) -> Exception:
    """An error with a cause."""
    error.__cause__ = by
    return error


REFUSALS = [
    (hub_error(hub.GatedRepoError, 403), "a/b: gated; accept its terms at https://huggingface.co/a/b while signed in"),
    (hub_error(hub.RepositoryNotFoundError, 404), "a/b: neither a path here nor something you may see on the Hub"),
    (hub_error(hub.RevisionNotFoundError, 404), "a/b: no such revision on the Hub"),
    (hub.OfflineModeIsEnabled("offline"), "a/b: not here, and HF_HUB_OFFLINE is set"),
    (hub.LocalEntryNotFoundError("not in the cache"), "the Hub cannot be reached"),
    (httpx.ConnectError("[Errno 111] Connection refused"), "the Hub cannot be reached"),
    (ConnectionRefusedError(111, "Connection refused"), "the Hub cannot be reached"),
    (caused(RuntimeError("could not"), httpx.ReadTimeout("slow")), "the Hub cannot be reached"),
    (hub_error(hub.HfHubHTTPError, 500), "a/b: the Hub says: 500 Error"),
]


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test knows what another has found, nor that CI is told to be offline."""
    monkeypatch.setattr(network.Reach, "lost", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits are noted, not waited."""
    waited: list[float] = []
    monkeypatch.setattr(network.time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize(("error", "says"), REFUSALS, ids=lambda value: type(value).__name__)
def test_refusal_is_one_line(error: Exception, says: str) -> None:
    """Every refusal is one line of the kind asked for, with the next step."""
    with pytest.raises(ModelError) as caught, network.hub_errors("a/b", ModelError, PAGE):
        raise error
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", [b"<html>log in first</html>", b'{"id": 3, "siblings": 7}'])
def test_answer_of_another_is_said(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    """A network's login page, which answers for the Hub, is no traceback within the Hub's client."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_args: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        api = HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token=False)
        said = pytest.raises(ModelError, match="a/b: what answers for the Hub is not the Hub")
        with said, network.hub_errors("a/b", ModelError, PAGE):
            api.list_repo_files("a/b")
        server.shutdown()


def test_other_errors_pass() -> None:
    """What is not of the network passes untouched."""
    with pytest.raises(ZeroDivisionError), network.hub_errors("a/b", ModelError, PAGE):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (httpx.ConnectError("refused"), 3),
        (hub_error(hub.HfHubHTTPError, 503), 3),
        (hub_error(hub.HfHubHTTPError, 429), 3),
        (hub_error(hub.RepositoryNotFoundError, 404), 1),
        (hub_error(hub.GatedRepoError, 403), 1),
        (hub.OfflineModeIsEnabled("offline"), 1),
        (ValueError("a bug"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_only_passing_troubles_are_retried(error: Exception, tries: int, no_waiting: list[float]) -> None:
    """A lost connection and a busy server are tried three times, a refusal once."""
    n_tries = 0

    def work() -> None:
        nonlocal n_tries
        n_tries += 1
        raise error

    with pytest.raises(type(error)):
        network.retried(work, "a/b")
    assert n_tries == tries
    assert no_waiting == list(network.WAITS[: tries - 1])


def test_retry_gives_the_result(no_waiting: list[float]) -> None:
    """What works at the second try is the result."""
    answers: list[Any] = [httpx.ConnectError("refused"), 7]

    def work() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    assert network.retried(work, "a/b") == 7
    assert no_waiting == [1.0]


def refuse(*_args: Any, **_options: Any) -> None:
    """A refused connection."""
    raise httpx.ConnectError("[Errno 111] Connection refused")


def test_models_corpora_and_saes_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is one line for a model, a corpus, a downloaded SAE."""
    monkeypatch.setattr(files, "snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("harvest.corpus.dataset_commit", refuse)
    with pytest.raises(ModelError, match=r"^a/b: .*cannot be reached"):
        files.model_folder("a/b", None)
    with pytest.raises(CorpusError, match=r"^a/b: .*cannot be reached"):
        StreamedCorpus(Source("a/b"))
    with pytest.raises(CheckpointError, match=r"^a/b: .*cannot be reached"):
        sae_hub.download("a/b")


def test_unreachable_hub_is_asked_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where nothing answers for the Hub, its client is not left to try for minutes: each caller has one line at once."""
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(network, "answers", lambda *address: bool(asked.append(address)))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(sae_hub, "find_checkpoint", lambda source: Path("sae.safetensors"))
    monkeypatch.setattr(sae_hub, "repository_files", lambda *_args: {})
    cases: list[tuple[type[Exception], Callable[[], object]]] = [
        (ModelError, lambda: files.model_folder("a/b", None)),
        (CorpusError, lambda: StreamedCorpus(Source("a/b"))),
        (CorpusError, lambda: list(StreamedCorpus(Source("a/b", revision="c")).documents())),
        (CorpusError, lambda: hub_rows("a/b", "train")),
        (CheckpointError, lambda: sae_hub.download("a/b")),
        (CheckpointError, lambda: sae_hub.push("sae.safetensors", "a/b")),
    ]
    for kind, call in cases:
        with pytest.raises(kind, match=r"^a/b: .*the Hub cannot be reached; check the network, or give a path$"):
            call()
    assert asked == [("huggingface.co", 443)] * len(asked)
    assert len(asked) == len(network.WAITS) + 1
    assert not constants.is_offline_mode()


def test_cache_serves_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing answers the client is told to take what it has, once; that is the result."""
    monkeypatch.setattr(network, "answers", lambda *_address: False)
    asked = []

    def cached() -> str:
        asked.append(constants.is_offline_mode())
        return "from the cache"

    assert network.retried(cached, "a/b") == "from the cache"
    assert asked == [True]


def test_failed_reach_is_remembered_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that did not answer is not asked again for a minute; then it is, and serves."""
    now, there = [100.0], [False]
    monkeypatch.setattr(network.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(network, "answers", lambda *_address: there[0])
    assert not network.reachable()
    there[0] = True
    now[0] += network.REMEMBERED - 1
    assert not network.reachable()
    now[0] += 2
    assert network.reachable()


def test_slow_names_end_the_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one look at a name takes as long as all tries may, there is no second one."""
    now, tries = [0.0], []

    def slow(*_address: object) -> bool:
        tries.append(now[0])
        now[0] += network.PATIENCE
        return False

    monkeypatch.setattr(network.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(network, "answers", slow)
    assert not network.reachable()
    assert tries == [0.0]


def test_offline_mode_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who said offline is told of that, and no connection is tried."""
    monkeypatch.setattr(network, "answers", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        files.model_folder("a/b-c", None)


@pytest.mark.parametrize(
    ("proxy", "found"),
    [
        ({}, ("huggingface.co", 443)),
        ({"https": "http://proxy.lab:3128"}, ("proxy.lab", 3128)),
        ({"all": "socks5://proxy.lab"}, ("proxy.lab", 1080)),
        ({"https": "proxy.lab:81", "no": "huggingface.co"}, ("huggingface.co", 443)),
    ],
)
def test_proxy_is_what_is_reached(
    monkeypatch: pytest.MonkeyPatch, proxy: dict[str, str], found: tuple[str, int]
) -> None:
    """Behind a proxy it is the proxy that has to answer."""
    monkeypatch.setattr(network.urllib.request, "getproxies", lambda: proxy)
    monkeypatch.setattr(network.urllib.request, "proxy_bypass", lambda host: host == proxy.get("no"))
    assert network.address("https://huggingface.co") == found


def test_connection_says_who_answers() -> None:
    """A listening port answers, a closed one does not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert ANSWERS("127.0.0.1", port)
    assert not ANSWERS("127.0.0.1", port)


def test_too_little_memory_stays_that() -> None:
    """What ends the loading of a model because its libraries find no memory is no fault of the model's files."""
    with pytest.raises(ImportError), hub_errors("a/b"):
        raise ImportError("libgfortran.so: failed to map segment from shared object")
    with pytest.raises(ModelError, match="a/b: cannot be loaded"), hub_errors("a/b"):
        raise ImportError("no module of that name")
