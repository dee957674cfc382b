"""What the network refuses is one line with the next step, everywhere alike; what may pass is tried again."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import pytest
from huggingface_hub import errors as hub

from harvest.corpus import Source, StreamedCorpus
from pipeline.base import network
from pipeline.base.errors import CheckpointError, CorpusError, ModelError
from pipeline.model import files
from pipeline.sae import hub as sae_hub

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
