"""Progress of long work: a bar with rate and ETA on a terminal, a plain line now and then when piped."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from types import TracebackType

from tqdm import tqdm

from pipeline import LOG_VARIABLE
from pipeline.base.files import regular
from pipeline.base.token_text import visible

PLAIN_EVERY_S = 15.0
"""Seconds between plain lines when the output is not a terminal."""

_silent = False
_lost: set[str] = set()  # logs that take no line


@contextlib.contextmanager
def silenced(quiet: bool = True) -> Iterator[None]:
    """Let `say` and `Progress` say nothing inside the block, in every thread, where `quiet`."""
    global _silent
    before, _silent = _silent, _silent or quiet
    try:
        yield
    finally:
        _silent = before


class Progress:
    """Counts units of work. `with Progress(total, "harvest", unit="row") as bar: bar.advance(128, "1.2 GB")`.

    Writes to stderr. On a terminal it is a tqdm bar; otherwise a line at most every PLAIN_EVERY_S seconds and one at
    the end, so that logs stay short.
    """

    def __init__(self, total: int, label: str, unit: str, *, done: int = 0, quiet: bool = False) -> None:
        self.total, self.label, self.unit, self.n, self.start_n = total, label, unit, done, done
        self._note = ""
        self._t0 = self._last = time.monotonic()
        self._quiet = quiet or _silent
        self._bar = None
        if sys.stderr.isatty() and not self._quiet:
            self._bar = tqdm(total=total, initial=done, desc=label, unit=f" {unit}", unit_scale=True, leave=True)

    def advance(self, n: int, note: str = "") -> None:
        """Add `n` finished units; `note` is short free text shown behind the rate. Where more is done than was planned, the
        total is what is done."""
        self.n += n
        self.total = max(self.total, self.n)
        self._note = visible(note) or self._note
        if self._bar is not None:
            self._bar.total = self.total
            if note:
                self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(n)
        if not self._quiet and time.monotonic() - self._last >= PLAIN_EVERY_S:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        seconds = max(self._last - self._t0, 1e-9)
        rate = (self.n - self.start_n) / seconds
        left = f", {format_seconds((self.total - self.n) / rate)} left" if rate and self.n < self.total else ""
        note = f", {self._note}" if self._note else ""
        share = f"{100 * self.n / self.total:.0f} %" if self.total else "done"
        count = f"{self.n:,} of {self.total:,} {self.unit}s, {rate:,.4g} {self.unit}s/s"
        line = f"{self.label}: {share}, {count}{left}{note}"
        log_line(line)
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._quiet and kind is None:
            self._line()
        if self._bar is not None:
            self._bar.close()


def say(line: str) -> None:
    """A line for a person, or several, on stderr, without tearing a progress bar; what names of others would do to a terminal is
    spelled out. Nothing where `silenced`."""
    if _silent:
        return
    line = "\n".join(map(visible, line.split("\n")))
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()
    log_line(line)


def log_line(line: str) -> None:
    """Append a line to the log that LOG_VARIABLE names, if any; where it takes none, that is said once, and work goes on."""
    path = os.environ.get(LOG_VARIABLE)
    if not path or path in _lost:
        return
    try:
        with open(path, "a", encoding="utf-8", errors="backslashreplace", opener=regular) as file:
            file.write(line + "\n")
    except OSError as error:
        _lost.add(path)
        tqdm.write(f"note     {path}: nothing more is logged here ({error.strerror or error})", file=sys.stderr)


def format_seconds(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


class Took:
    """Seconds of each part of a long work, by its name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what runs inside as `name`'s, beside what was counted before."""
        began = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    @property
    def said(self) -> str:
        """took 1 min 28 s: harvest 12 s, train 31 s, evaluate 38 s, report 7 s."""
        parts = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in self.seconds.items())
        return f"took {format_seconds(sum(self.seconds.values()))}: {parts}"
