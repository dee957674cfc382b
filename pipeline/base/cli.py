"""What the four commands share: exit codes, number formats, one line for an error, a clean Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
import time
import tomllib
import traceback
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

import click

from pipeline import INTERRUPTED, say_stopped
from pipeline.base.errors import ADVICE, DiskError, PipelineError, UsageError, explain, is_failure, one_line
from pipeline.base.fields import LARGEST
from pipeline.base.files import is_url, read_text, require_ordinary, require_replaceable
from pipeline.base.processes import is_launched
from pipeline.base.progress import log_line, say
from pipeline.base.startup import heard

SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


MOST_DIGITS = 40
"""Of a number on a command line; more is read no further."""


class Count(click.ParamType[int]):
    """A whole number of things: 10000000, 10_000_000, 10M, 1.5k."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([kKmMgGbBtT]?)", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a count; write 10000000, 10_000_000 or 10M", param, ctx)
        digits = match[1].replace("_", "").replace(",", "")
        number = Fraction(digits[:MOST_DIGITS]) * SUFFIXES[match[2].lower()]  # exact: a seed is one of these
        if len(digits) > MOST_DIGITS or number >= LARGEST:
            self.fail(f"{str(value)[:MOST_DIGITS]!r} is more than can be counted", param, ctx)
        if number.denominator != 1:
            self.fail(f"{value!r} is not a whole number", param, ctx)
        return int(number)


class Whole(click.ParamType[int]):
    """A whole number as the files that name it may hold it, below zero too."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number: int = click.INT.convert(value, param, ctx)
        if abs(number) >= LARGEST:
            self.fail(f"{str(value)[:MOST_DIGITS]!r} is more than can be counted", param, ctx)
        return number


class Size(Count):
    """A number of bytes: 2000000000, 2GB, 500M."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return super().convert(re.sub(r"(?i)i?b$", "", value) if isinstance(value, str) else value, param, ctx)


class CountOrAuto(click.ParamType[int | str]):
    """A whole number of things, or the word auto."""

    name = "count or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        number = "auto" if value == "auto" else COUNT.convert(value, param, ctx)
        if number == 0:
            self.fail("0: give 1 or more, or auto", param, ctx)
        return number


COUNT, COUNT_OR_AUTO, SIZE, WHOLE = Count(), CountOrAuto(), Size(), Whole()


class Source(click.ParamType[Any]):
    """A path to read, looked at before anything else is done; with `names`, text that may also be a Hub id or a name of ours;
    with `several`, some of these with commas between; with `urls`, a URL, as text. Raises UsageError for a URL that is not taken,
    and DiskError for what the operating system refuses to look at, and where a link leads nowhere."""

    name = "path"

    def __init__(self, *, names: bool = False, several: bool = False, urls: bool = False) -> None:
        self.names, self.several, self.urls = names, several, urls

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A Path; text as it is where names are taken, and of URLs."""
        if self.urls and is_url(str(value)):
            return str(value)
        for one in str(value).split(",") if self.several else [str(value)]:
            if is_url(one):
                ids = " or a Hugging Face id (owner/name)" if self.names else ""
                raise UsageError(
                    f"{one}: a URL, where {spelled(param)} takes a local path{ids}; copy it to a disk first (python -m pipeline "
                    "stage for a store, pull for an SAE of the Hub)"
                )
            require_readable(Path(one))
        return str(value) if self.names else Path(value)


SOURCE, NAMED_SOURCE, NAMED_SOURCES = Source(), Source(names=True), Source(names=True, several=True)
STORE, PLACE = Source(urls=True), Source(names=True, urls=True)
"""A store to read: a Path, or a URL as text; anything of ours, both as text."""


class Repository(click.ParamType[str]):
    """A repository of the Hugging Face Hub: owner/name, as text. Raises UsageError for a URL, as a browser shows."""

    name = "repository"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if is_url(str(value)):
            raise UsageError(
                f"{value}: a URL, where {spelled(param)} takes owner/name; leave out what stands before it"
            )
        return str(value)


REPOSITORY = Repository()


def spelled(param: click.Parameter | None) -> str:
    """An option or an argument as help writes it."""
    return "this" if param is None else param.opts[0] if isinstance(param, click.Option) else param.human_readable_name


def require_readable(path: Path) -> None:
    """Raise DiskError for a path that is there and cannot be read, as a device, a pipe and a socket, or that can never be there;
    what is not there passes."""
    place = require_text(path).expanduser()
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(place)
            require_ordinary(place)
            if not os.access(place, os.R_OK | (os.X_OK if place.is_dir() else 0)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except OSError as error:
        raise DiskError(explain(error) or str(error)) from error
    if place.is_symlink() and not place.exists():
        raise DiskError(f"{path}: a link that leads to nothing; {ADVICE[errno.ENOENT]}")


def require_sources(context: click.Context) -> None:
    """Raise UsageError for a path that a command's options name to be read, but a store, which others may make first, and that
    is not there. What may be a Hub id or a name of ours passes."""
    for option in context.command.params:
        if not isinstance(option, click.Option) or not isinstance(option.type, Source) or option.type.urls:
            continue
        given = context.params.get(str(option.name)) or ()
        for value in given if isinstance(given, tuple) else (given,):
            for one in str(value).split(",") if option.type.several else [str(value)]:
                place = Path(one).expanduser()
                if (not option.type.names or place.is_absolute() or one.startswith(".")) and not place.exists():
                    raise UsageError(f"{spelled(option)} {one}: no such file or folder; check the path")


def require_text(path: Path) -> Path:
    """The path. Raises DiskError for one that is not UTF-8: no artefact could record it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise DiskError(f"{str(path)!a}: a name that is not UTF-8; rename it") from error
    return path


class Output(click.ParamType[Any]):
    """A path to write to, a file or a folder, looked at before anything else is done; with `urls`, a URL, as it is.

    Nothing is made. Raises DiskError where it can never be written, and UsageError for a URL that is not taken.
    """

    name = "path"

    def __init__(self, *, folder: bool, urls: bool = False) -> None:
        self.folder, self.urls = folder, urls

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A Path; text as it is where URLs are taken."""
        if is_url(str(value)):
            if self.urls:
                return value
            raise UsageError(
                f"{value}: a URL, where {spelled(param)} takes a local path; write to a disk, then copy it there"
            )
        try:
            require_place(Path(value), folder=self.folder)
        except DiskError:
            raise
        except OSError as error:
            raise DiskError(explain(error) or str(error)) from error
        return str(value) if self.urls else Path(value)


OUT_FOLDER, OUT_FILE, OUT_STORE = Output(folder=True), Output(folder=False), Output(folder=True, urls=True)


def require_place(path: Path, *, folder: bool) -> None:
    """Raise DiskError unless a file or folder can be made at `path`, or is there and can be written. Raises OSError for what
    the operating system says of the path itself: links in a circle, names that are too long; and for a device, a pipe or a
    socket, which no output replaces."""
    kind = "folder" if folder else "file"
    place = require_text(path).absolute()
    there = next(one for one in (place, *place.parents) if os.path.lexists(one))
    if not there.exists():
        os.stat(there)
    inside = place.parts[len(there.parts) :]
    longest = os.pathconf(there if there.is_dir() else there.parent, "PC_NAME_MAX")
    if too_long := [part for part in inside if len(os.fsencode(part)) > longest - LEFT_FOR_SUFFIXES]:
        raise DiskError(
            f"{path}: a name of {len(os.fsencode(too_long[0]))} bytes is too long here; choose a shorter one"
        )
    if inside and not there.is_dir():
        raise DiskError(f"{path}: {there} is a file, so nothing can lie under it; choose another {kind}")
    if not inside and there.is_dir() != folder:
        raise DiskError(f"{path}: is a {'file' if folder else 'folder'}, expected a {kind}; choose another one")
    require_replaceable(place)
    if not os.access(there if inside or folder else there.parent, os.W_OK | os.X_OK):
        raise DiskError(f"{path}: {there} cannot be written; choose another {kind}, or have its permissions changed")


LEFT_FOR_SUFFIXES = 28
"""Bytes of a name that what we put behind it takes: `.sha256.12345678.partial`, `_files`."""


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises UsageError naming the line when it is not TOML, or when it is not there."""
    try:
        return tomllib.loads(read_text(path))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not readable as TOML ({one_line(str(error))[:200]})") from error


def print_json(data: Any) -> None:
    """Print JSON to stdout, for `--json`."""
    print(json.dumps(data, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False))


RANK_0_FIRST = 5.0
"""Seconds that further ranks keep an error to themselves."""


def let_rank_0_speak() -> None:
    """Under torchrun, wait in all ranks but the first: an error of all is said by that one, at whose exit torchrun ends the
    others; one that rank 0 does not have is said after that."""
    if is_launched() and os.environ.get("RANK", "0") != "0":
        time.sleep(RANK_0_FIRST)


WORDS = f"{__name__}.words"
"""Key of a click context's meta: the words that a command was given."""


class Remembering(click.Command):
    """A command that remembers its words, so that others can be started with the same."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does it; `args` go to the context's meta under WORDS."""
        ctx.meta[WORDS] = list(args)
        return super().parse_args(ctx, args)


ONLY_READ = "only read"


def only_reads() -> bool:
    """Whether this command is to read its options, check what they mean together, and stop before any work: as an experiment has
    every stage do before the first one begins (`experiment/stages.py`)."""
    return bool(click.get_current_context().find_root().obj == ONLY_READ)


def main(command: click.Command, program: str, resume: str = "run the same command again to go on") -> NoReturn:
    """Run a click command as a program: exit 0 when done, 1 with one line for what a user or a disk caused, 2 for usage.

    Ctrl-C prints `resume` and exits 130, whatever it was turned into on its way here. A bug keeps its traceback.
    """
    with heard() as interrupts:
        try:
            command.main(prog_name=f"python -m {program}", standalone_mode=False)
        except click.exceptions.Exit as stop:
            sys.exit(stop.exit_code)
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt) and not is_failure(error):
                raise
            sys.exit(failed(error, resume, interrupted=interrupts.came))
    sys.exit(0)


def failed(error: BaseException, resume: str, *, interrupted: bool) -> int:
    """Say what ended a command, and its exit code. Raises the error itself where it is a bug."""
    if interrupted or isinstance(error, click.Abort | KeyboardInterrupt):
        say_stopped(f"stopped; {resume}")
        log_line(f"stopped; {resume}")
        return INTERRUPTED
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if not isinstance(error, PipelineError):
        log_line("".join(traceback.format_exception(error)))
    if (said := explain(error)) is None:
        raise error
    let_rank_0_speak()
    say(f"error: {said}")
    return 2 if isinstance(error, UsageError) else 1
