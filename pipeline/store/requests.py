"""Requests to object storage: tried again where they may pass, and counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from pipeline.base.errors import DamagedError, DiskError, PipelineError, kind_and_line
from pipeline.base.files import human_bytes
from pipeline.base.progress import say

T = TypeVar("T")
WAITS = (0.5, 2.0, 8.0, 30.0)
"""Seconds before the second try of a request and those after it."""
FIRST = 2
"""Of these, before anything was ever answered: a wrong address is said soon."""
CLIENTS = (
    "aiohttp", "aiobotocore", "botocore", "obstore", "gcsfs", "adlfs", "azure", "requests", "urllib3", "fsspec", "httpx",
    "httpx2", "httpcore", "huggingface_hub",
)  # fmt: skip
"""Libraries whose errors are of the network or of a server, whatever they derive from."""

REFUSALS = (ValueError, NotImplementedError)
"""What drivers raise of a path that they cannot read, and of what they cannot do at all (writing over HTTP)."""


class Gone(DamagedError):
    """There is no such object."""


@dataclass
class Traffic:
    """What was asked of object storage so far; safe to add to from several threads."""

    n_requests: int = 0
    n_bytes: int = 0
    n_retries: int = 0
    n_answered: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, *, requests: int = 0, n_bytes: int = 0, retries: int = 0, answered: int = 0) -> None:
        """Count."""
        with self.lock:
            self.n_requests += requests
            self.n_bytes += n_bytes
            self.n_retries += retries
            self.n_answered += answered

    def copy(self) -> Traffic:
        """As it is now."""
        with self.lock:
            return Traffic(self.n_requests, self.n_bytes, self.n_retries, self.n_answered)

    def __add__(self, other: Traffic) -> Traffic:
        """Of two stores."""
        return Traffic(
            self.n_requests + other.n_requests,
            self.n_bytes + other.n_bytes,
            self.n_retries + other.n_retries,
            self.n_answered + other.n_answered,
        )

    def text(self) -> str:
        """1,234 requests, 5.6 GB, 3 tried again."""
        again = f", {self.n_retries:,} tried again" if self.n_retries else ""
        return f"{self.n_requests:,} requests, {human_bytes(self.n_bytes)}{again}"


def may_pass(error: Exception) -> bool:
    """Whether a request that failed so may do when it is tried again: not where the server refused it as it is."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return not refused and "Credentials" not in type(error).__name__


def is_of_network(error: Exception) -> bool:
    """Whether an error is of a network or a server, and not a bug of ours."""
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.partition(".")[0] in CLIENTS


def behind(error: Exception) -> Exception:
    """The error itself, or what kept fsspec's web driver from looking, of which it says that there is no such file."""
    cause = error.__cause__
    is_web = isinstance(error, FileNotFoundError) and type(cause).__module__.partition(".")[0] == "aiohttp"
    return cause if is_web and isinstance(cause, Exception) and getattr(cause, "status", 0) not in (404, 410) else error


def asked(work: Callable[[], T], where: str, traffic: Traffic) -> T:
    """The result of one request, tried again with growing waits. Raises Gone, or DiskError for the rest, one line each."""
    waits = WAITS if traffic.n_answered else WAITS[:FIRST]
    for wait in (*waits, None):
        traffic.add(requests=1)
        try:
            found = work()
        except Exception as raised:
            error = behind(raised)
            if isinstance(error, FileNotFoundError):
                traffic.add(answered=1)
                raise Gone(f"{where}: the file is gone; run harvest --repair to make it again") from error
            if isinstance(error, PermissionError):
                said = kind_and_line(error)
                raise DiskError(f"{where}: no permission ({said}); check the credentials and the bucket") from error
            if type(error).__name__ == "TooManyRedirects":
                raise DiskError(f"{where}: the server redirects without end; check the URL") from error
            is_network = is_of_network(error)
            if isinstance(error, PipelineError) or not (is_network or isinstance(error, REFUSALS)):
                raise
            if wait is None or not is_network or not may_pass(error):
                said = kind_and_line(error)
                raise DiskError(f"{where}: {said}; check the URL and the connection, then run again") from error
            say(f"{where}: {kind_and_line(error)}; trying again in {wait:g} s")
            traffic.add(retries=1)
            time.sleep(wait)
        else:
            traffic.add(answered=1)
            return found
    raise AssertionError("unreachable")
