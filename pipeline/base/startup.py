"""What every command imports first, before anything that takes time: with `pipeline/__init__`, whose first lines take Ctrl-C,
it never ends in a traceback.

    while it imports     nothing is begun, nothing is held: the process leaves at once
    in `heard`           KeyboardInterrupt, as Python does it, but one that gets lost is raised again, and one that comes while
                         a module is imported waits until it is
    after it             the command has said how it ended: the process leaves at once

Garbage is looked for seldom: torch and transformers make a million objects that live on, and Python would walk through them
many times while they are imported, and once more at the end (a fifth of the time that a command takes to start and to leave).

One gets lost where Python cannot raise: in a generator that is thrown away, a destructor, a callback of a library. Python
then says "Exception ignored in" and goes on. `heard` notes it and interrupts once more, until the command hears it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any

from pipeline import INTERRUPTED, leave, say_stopped
from pipeline.base.errors import explain

AGAIN_S = 0.02
"""Seconds after which a lost interrupt is raised again: by then its frame is left."""


NEW_OBJECTS = 20_000
"""Objects more than were freed after which Python looks for garbage among the youngest (its own number: 700 to 2,000)."""


def leave_at_end(number: int, frame: FrameType | None) -> None:
    """End the process now; its command has ended, and said how."""
    say_stopped("stopped")
    os._exit(INTERRUPTED)


def say_what_failed(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Of what nobody caught: one line where the machine is the cause, and of Ctrl-C, which may come after `main` caught one
    or before it catches any; else Python's traceback."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__context__  # what a library's clean-up made of it
    if cause is not None:
        say_stopped("stopped")
        sys.exit(INTERRUPTED)
    said = explain(error)
    if said is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"error: {said}", file=sys.stderr)


def begin() -> None:
    """Let a program that is starting leave at once on Ctrl-C, say what fails in one line, and seldom look for garbage."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
    sys.excepthook = say_what_failed
    sys.meta_path.insert(0, EnoughAddresses())
    gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])
    atexit.register(gc.freeze)  # what stands at the end goes with the process


TORCH_NEEDS = 700 << 20
"""Bytes of addresses below which loading torch may end the process in C++ (std::bad_alloc), where nobody can say why; measured:
400 MB do, 600 MB fail in Python, 700 MB suffice."""


class EnoughAddresses(MetaPathFinder):
    """Finds no module, but looks at the limit of addresses (ulimit -v) before torch is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None, so that others find it. Raises MemoryError where torch cannot be loaded."""
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if fullname == "torch" and 0 <= limit < TORCH_NEEDS:
            raise MemoryError(f"ulimit -v allows {limit >> 20} MiB of addresses, torch alone needs {TORCH_NEEDS >> 20}")
        return None


def importing(frame: FrameType | None) -> bool:
    """Whether a frame is that of a module which is being imported, or of what it calls."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


class Interrupts:
    """What Ctrl-C does in the thread that makes this: whether it came, and what is yet to be raised."""

    def __init__(self) -> None:
        self.came = self.waits = self.over = False
        self.thread = threading.get_ident()

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """What SIGINT does. While a module is imported it waits, for C++ that is called there (torch's) would end the process
        with a message of its own; a second one ends it at once."""
        self.came = True
        if not importing(frame):
            raise KeyboardInterrupt
        if self.waits:
            leave_at_end(number, frame)
        self.waits = True
        self.later()

    def later(self) -> None:
        """Interrupt the thread again, soon, outside of imports."""
        threading.Thread(target=self.again, name="interrupt again", daemon=True).start()

    def again(self) -> None:
        """Wait until the thread imports nothing, then interrupt it; not where what can be interrupted is over."""
        time.sleep(AGAIN_S)
        while not self.over and importing(sys._current_frames().get(self.thread)):
            time.sleep(AGAIN_S)
        self.waits = False
        if not self.over:
            signal.pthread_kill(self.thread, signal.SIGINT)


@contextlib.contextmanager
def heard() -> Iterator[Interrupts]:
    """Ctrl-C raises KeyboardInterrupt inside, again where it was lost. Where SIGINT is ignored it stays ignored."""
    interrupts = Interrupts()
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous not in (signal.default_int_handler, leave):
        yield interrupts
        return
    hook = sys.unraisablehook

    def note(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            interrupts.later()
        else:
            hook(lost)

    sys.unraisablehook = note
    signal.signal(signal.SIGINT, interrupts.interrupt)
    try:
        yield interrupts
    finally:
        interrupts.over = True
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, leave_at_end if previous is leave else previous)
        if interrupts.waits:
            raise KeyboardInterrupt
