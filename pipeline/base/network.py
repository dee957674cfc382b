"""What the Hub and the network under it refuse, as one line each; and trying again what may pass by itself."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from typing import TypeVar
from urllib.parse import urlsplit

from pipeline.base.errors import PipelineError, first_line, one_line
from pipeline.base.progress import say

T = TypeVar("T")

WAITS = (1.0, 4.0)
"""Seconds before the second and the third try."""
PATIENCE = 8.0
"""Seconds after which a Hub that nothing answers for is given up; one try takes as long where names are looked up slowly."""
REMEMBERED = 60.0
"""Seconds for which a Hub that could not be reached is not asked again."""


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
        return f"{name}: the Hub says: {one_line(found.server_message or str(found))[:300]}"
    if isinstance(error, ValueError | KeyError | TypeError | AttributeError) and is_of_client(error):
        return f"{name}: what answers for the Hub is not the Hub, as a network's login page; open {page} in a browser"
    return None


def is_of_client(error: BaseException) -> bool:
    """Whether an error came up within the Hub's client, which trips over an answer that is not what it expects."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(str(frame.f_globals.get("__name__")).partition(".")[0] == "huggingface_hub" for frame in frames)


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
    """The result of work over the network; tried again where it failed on the way, or the Hub was busy.

    Where the Hub cannot be reached its client, which alone would try for minutes, is told so: what it has in its cache
    serves, all else is a ConnectionError.
    """
    if not reachable():
        with offline():
            return unasked(work)
    for wait in WAITS:
        try:
            return work()
        except Exception as error:
            if not may_pass(error):
                raise
            say(f"{name}: {first_line(error)}; trying again in {wait:g} s")
            time.sleep(wait)
    return work()


def unasked(work: Callable[[], T]) -> T:
    """The result of work while the client is offline. Raises ConnectionError where it would have had to ask the Hub."""
    from huggingface_hub import errors as hub

    try:
        return work()
    except Exception as error:
        if first_of(error, hub.OfflineModeIsEnabled) is None:
            raise
    raise ConnectionError("the Hub cannot be reached")  # not behind the error that speaks of an offline mode


class Reach:
    """When the Hub could last not be reached, in seconds of `time.monotonic`."""

    lost: float | None = None


def reachable() -> bool:
    """Whether something answers where the Hub, or the proxy before it, should be; True where the user said offline, since then
    nothing is asked. Takes some 50 ms, or PATIENCE and one try; a failure is remembered for a minute."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return True
    if Reach.lost is not None and time.monotonic() - Reach.lost < REMEMBERED:
        return False
    began, waits = time.monotonic(), iter(WAITS)
    while not answers(*address(constants.ENDPOINT)):
        wait = next(waits, None)
        if wait is None or time.monotonic() - began + wait > PATIENCE:
            Reach.lost = time.monotonic()
            return False
        time.sleep(wait)
    Reach.lost = None
    return True


def address(endpoint: str) -> tuple[str, int]:
    """Host and port to which a connection to an address is made: its own, or those of the proxy that is set for it."""
    url = urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and url.hostname and not urllib.request.proxy_bypass(url.hostname):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return url.hostname or "", url.port or {"http": 80, "socks5": 1080, "socks5h": 1080}.get(url.scheme, 443)


def answers(host: str, port: int) -> bool:
    """Whether a connection can be made."""
    try:
        with socket.create_connection((host, port), timeout=PATIENCE / 2):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """For a while the Hub's client takes what it has in its cache, and raises OfflineModeIsEnabled for all else."""
    from huggingface_hub import constants

    before = constants.is_offline_mode
    constants.is_offline_mode = lambda: True
    try:
        yield
    finally:
        constants.is_offline_mode = before


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
