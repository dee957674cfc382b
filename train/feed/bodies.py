"""The bytes that mapped training reads, checked beside it."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from pipeline.store.reader import Split


class BodyCheck:
    """Compares every byte of the shards of one split or several with the commit records, in a background thread.

    Mapped rows are not checked when they are gathered, so no checkpoint is final before `require` returned.
    """

    def __init__(self, *splits: Split) -> None:
        self.splits = splits
        self.stop = False
        self.n_done = 0
        self.future: Future[None] | None = None
        self.pool = ThreadPoolExecutor(1, "check")

    def begin(self) -> None:
        """Start checking in the background, once."""
        if self.future is None:
            self.future = self.pool.submit(self._run)

    def _run(self) -> None:
        for split in self.splits:
            for k in range(split.n_shards):
                if self.stop:
                    return
                split.check_shard(k, bodies=True)
                self.n_done += 1

    def poll(self) -> None:
        """Raise DamagedError if the check met damage so far."""
        if self.future is not None and self.future.done():
            self.future.result()

    def require(self) -> None:
        """Wait until all is checked. Raises DamagedError."""
        self.begin()
        assert self.future is not None
        self.future.result()

    def close(self) -> None:
        """Stop after the shard in hand."""
        self.stop = True
        self.pool.shutdown(wait=True)

    def __enter__(self) -> BodyCheck:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
