"""What the Hub and the network under it refuse, as one line each; and trying again what may pass by itself."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pipeline.base.errors import PipelineError
from pipeline.base.progress import say

T = TypeVar("T")

WAITS = (1.0, 4.0)
"""Seconds before the second and the third try."""


def problem(name: str, error: BaseException, page: str) -> str | None:
    """What an error of huggingface_hub, or of the network below, says of `name`, with the next step; None for others."""
    from huggingface_hub import errors as hub

    if (found := first_of(error, hub.GatedRepoError)) is not None:
        return (
            f"{name}: gated; accept its terms at {page} while signed in, make a read token at "
            "https://huggingface.co/settings/tokens, then run `hf auth login` (or set HF_TOKEN) and try again"
        )
    if first_of(error, hub.HFValidationError) is not None:
        return f"{name}: neither a path here nor a name that the Hub allows; check it"
    if first_of(error, hub.RevisionNotFoundError) is not None:
        return f"{name}: no such revision on the Hub; see {page}/commits"
    if first_of(error, hub.RepositoryNotFoundError) is not None:
        return (
            f"{name}: neither a path here nor something you may see on the Hub; check the name, or for a private or gated one "
            f"accept its terms at {page} and run `hf auth login` (or set HF_TOKEN)"
        )
    if first_of(error, hub.OfflineModeIsEnabled) is not None:
        return f"{name}: not here, and HF_HUB_OFFLINE is set; unset it, or give a local path"
    if first_of(error, hub.LocalEntryNotFoundError, *lost()) is not None:
        return f"{name}: not a path here nor in the Hub's cache, and the Hub cannot be reached; check the network, or give a path"
    if isinstance(found := first_of(error, hub.HfHubHTTPError), hub.HfHubHTTPError):
        return f"{name}: the Hub says: {first_line(found.server_message or str(found))}"
    return None


@contextlib.contextmanager
def hub_errors(name: str, raises: type[PipelineError], page: str) -> Iterator[None]:
    """Turn what the Hub and the network refuse into one line of the given kind; other errors pass."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        if (said := problem(name, error, page)) is None:
            raise
        raise raises(said) from error


def retried(work: Callable[[], T], name: str) -> T:
    """The result of work over the network; tried again where it failed on the way, or the Hub was busy."""
    for wait in WAITS:
        try:
            return work()
        except Exception as error:
            if not may_pass(error):
                raise
            say(f"{name}: {first_line(str(error)) or type(error).__name__}; trying again in {wait:g} s")
            time.sleep(wait)
    return work()


def may_pass(error: BaseException) -> bool:
    """Whether an error may be gone in a moment: a connection lost or timed out, a busy or broken server."""
    from huggingface_hub import errors as hub

    if first_of(error, hub.OfflineModeIsEnabled) is not None:
        return False
    if isinstance(found := first_of(error, hub.HfHubHTTPError), hub.HfHubHTTPError):
        answer = getattr(found, "response", None)
        return answer is not None and (answer.status_code == 429 or answer.status_code >= 500)
    return first_of(error, *lost()) is not None


def lost() -> tuple[type[BaseException], ...]:
    """Errors of a connection that is refused, lost or too slow: Python's own, and of the library the Hub's uses."""
    from huggingface_hub import errors as hub

    library = sys.modules[hub.HfHubHTTPError.__mro__[1].__module__.split(".")[0]]
    return ConnectionError, TimeoutError, getattr(library, "TransportError", ConnectionError)


def first_of(error: BaseException | None, *kinds: type[BaseException]) -> BaseException | None:
    """The first of these kinds among an error and what caused it."""
    while error is not None:
        if isinstance(error, kinds):
            return error
        error = error.__cause__ or error.__context__
    return None


def first_line(text: str) -> str:
    """The first line of a text."""
    return next(iter(text.strip().splitlines()), "")
