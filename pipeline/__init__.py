"""What two stages need, or what defines bytes on disk. Stages meet only here and on disk; this package imports no stage.

Importing it loads nothing, so that a report needs no torch. What a notebook calls is fetched when it is first asked for:
`pipeline.load`, `pipeline.attach`, the edits `pipeline.steer`, `pipeline.ablate`, `pipeline.clamp`, and `pipeline.write_store`.
"""

import _signal
import os
import sys

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
LOG_VARIABLE = "PIPELINE_LOG"
"""Environment variable of a stage that an experiment runs: a file to which every line that a person sees is appended too."""


def say_stopped(line: str) -> None:
    """Say in one line on stderr that Ctrl-C came; not in a stage of an experiment, which says it itself."""
    if LOG_VARIABLE not in os.environ:
        os.write(2, f"\n{line}\n".encode())


def leave(number: int, frame: object) -> None:
    """End the process now; what it has done so far is to import."""
    say_stopped("stopped while starting; nothing was begun")
    os._exit(INTERRUPTED)


def starts_command() -> bool:
    """Whether Python was started as `python -m` with a command of ours, and is still looking for it."""
    if sys.argv[:1] != ["-m"]:
        return False
    word = sys.orig_argv[-len(sys.argv)]
    module = word.partition("m")[2] if word.startswith("-") else word  # -mtrain
    return module.split(".")[0] in ("pipeline", "harvest", "train", "evaluate")


# Only what is built in or already loaded is imported above: until here Ctrl-C would be a traceback.
if starts_command() and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, leave)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {_signal.SIGINT})  # who started us may have held it back until here

from typing import Any  # noqa: E402

NOTEBOOK = {
    "load": "pipeline.sae.hub",
    "attach": "pipeline.live.attach",
    "steer": "pipeline.live.edits",
    "ablate": "pipeline.live.edits",
    "clamp": "pipeline.live.edits",
    "write_store": "pipeline.imports.write",
}


def __getattr__(name: str) -> Any:
    if name in NOTEBOOK:
        import importlib

        return getattr(importlib.import_module(NOTEBOOK[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
