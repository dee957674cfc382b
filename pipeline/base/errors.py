"""What a user or a disk can cause. A command prints one of these as one line and exits 1.

Each message says what is wrong, where (path), what was expected and found, and what to do next. Classes also inherit
the builtin that a caller would expect to catch. What nobody foresaw of a disk or a memory, `explain` says: the one place
where an operating system's words become ours.
"""

from __future__ import annotations

import errno
import os

from pipeline.base.token_text import visible


class PipelineError(Exception):
    """Base of every error that is not our own bug."""


class UsageError(PipelineError, ValueError):
    """The options contradict each other or the data; a command exits 2."""


class CorpusError(PipelineError, ValueError):
    """The corpus is missing, empty, lacks the text field, or is shorter than asked."""


class ModelError(PipelineError, ValueError):
    """The language model or its tokenizer is missing, gated, or cannot be split where asked."""


class StoreError(PipelineError, ValueError):
    """The activation store is missing, unfinished, or of an unknown version."""


class DamagedError(PipelineError, OSError):
    """Bytes on disk are not the bytes that were written: truncated, flipped, or gone."""


class CheckpointError(PipelineError, ValueError):
    """A checkpoint is missing, malformed, or does not fit the store or the model it is used with."""


class MismatchError(PipelineError, ValueError):
    """An artefact on disk was made by another config; the message names the fields that differ."""


class DiskError(PipelineError, OSError):
    """No room, no permission, or an output folder that holds something else."""


class DivergedError(PipelineError, ArithmeticError):
    """Training met a loss that is not finite."""


ADVICE = {
    errno.ENOENT: "check the path; a link there may lead to nothing, or what is mounted there takes no new files",
    errno.ENOTDIR: "a file stands where a folder should; choose another path",
    errno.EISDIR: "a folder stands where a file should; choose another path",
    errno.EEXIST: "something else is there; choose another path",
    errno.ENOTEMPTY: "something else is there; choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle; remove one of them",
    errno.EACCES: "choose another path, or have its permissions changed",
    errno.EPERM: "choose another path, or have its permissions changed",
    errno.EROFS: "choose a path on another disk",
    errno.ENOSPC: "make room, then run again",
    errno.EDQUOT: "make room, then run again",
    errno.EFBIG: "raise the limit (ulimit -f), or choose another disk",
    errno.EMFILE: "raise the limit (ulimit -n), then run again",
    errno.ENFILE: "the machine has too many files open; close some programs, then run again",
    errno.EIO: "the disk failed; look at it, or choose another one",
    errno.ESTALE: "the network's disk lost it; mount it again, then run again",
    errno.ENOLCK: "the disk has no locks; choose a local one",
    errno.EADDRINUSE: "another job uses this port; choose another --master-port",
}
"""What to do when an operating system says this."""
OUT_OF_MEMORY = (
    "not enough memory",
    "cannot allocate memory",
    "out of memory",
    "failed to map segment",
    "start new thread",
)
"""What libraries say, in any case, when memory or what it is needed for is not to be had."""


def explain(error: BaseException) -> str | None:
    """One line for a person about what a user, a disk or a machine caused; None for what is a bug of ours."""
    if isinstance(error, PipelineError):
        return shown(str(error))
    if panicked(error):
        return f"a library gave up ({first_line(error)}); a file that it read is damaged, or its version has a bug"
    said = str(error).lower()
    if isinstance(error, MemoryError) or (
        isinstance(error, OSError | RuntimeError | ImportError | SystemError)
        and any(part in said for part in OUT_OF_MEMORY)
    ):
        return (
            f"not enough memory ({one_line(str(error))[:200] or type(error).__name__}); raise the limit (ulimit -v, the job's), "
            "close other programs, or ask for less at a time (--help lists sizes)"
        )
    if not isinstance(error, OSError):
        return None
    places = " and ".join(os.fsdecode(one) for one in (error.filename, error.filename2) if isinstance(one, str | bytes))
    reason = error.strerror or one_line(str(error))[:300] or type(error).__name__
    advice = ADVICE.get(error.errno or 0, "look at it, then run again")
    return shown(f"{places or 'a file or a connection'}: {reason}; {advice}")


def lacks_memory(error: BaseException) -> bool:
    """Whether memory, or what it is needed for, was not to be had: an error that says nothing of the file that was read."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        not isinstance(error, PipelineError) and any(part in said for part in OUT_OF_MEMORY)
    )


def panicked(error: BaseException) -> bool:
    """Whether it is what a library written in Rust ends with where it met what its authors never did: no Exception."""
    return type(error).__name__ == "PanicException"


def is_failure(error: BaseException) -> bool:
    """Whether it says that something failed, a library's panic too; not that an end was asked for (Ctrl-C, exit)."""
    return isinstance(error, Exception) or panicked(error)


HEAD, TAIL = 900, 300
"""Characters of a message that are shown of its begin, and of its end, which says what to do."""


def shown(text: str) -> str:
    """A message for a terminal or a log, whatever names and values of others it holds: one line, of a length that is read, and
    nothing in it that moves a cursor."""
    line = one_line(text)
    return visible(line if len(line) <= HEAD + TAIL else f"{line[:HEAD]} … {line[-TAIL:]}")


def one_line(text: str) -> str:
    """Text of several lines as one."""
    return " ".join(text.split())


def first_line(error: BaseException) -> str:
    """What an error of others says, in a line that is not long; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "")[:300] or type(error).__name__


def kind_and_line(error: BaseException) -> str:
    """An error's kind and what it says, where that alone may say little."""
    kind, said = type(error).__name__, first_line(error)
    return kind if said == kind else f"{kind}: {said}"
