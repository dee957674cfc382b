"""Checkpoints are written while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from train.feed.bodies import BodyCheck


class Writer:
    """Writes snapshots in one background thread, in order, and nothing before the store's bodies were found whole.

    So whatever is on disk was trained on rows that were checked. `submit` blocks while more than `limit` bytes wait.
    """

    def __init__(self, check: BodyCheck | None, limit: int) -> None:
        self.check = check
        self.limit = limit
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.pending: list[tuple[Future[None], int]] = []

    def submit(self, write: Callable[[], None], n_bytes: int) -> None:
        """Have `write` called. Raises what an earlier one raised."""
        self.poll()
        while self.pending and sum(n for _, n in self.pending) + n_bytes > self.limit:
            self.pending.pop(0)[0].result()
        self.pending.append((self.pool.submit(self._run, write), n_bytes))

    def _run(self, write: Callable[[], None]) -> None:
        if self.check is not None:
            self.check.require()
        write()

    def poll(self) -> None:
        """Raise what a finished write raised."""
        while self.pending and self.pending[0][0].done():
            self.pending.pop(0)[0].result()

    def finish(self) -> None:
        """Wait until all is written. Raises what a write raised."""
        while self.pending:
            self.pending.pop(0)[0].result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
