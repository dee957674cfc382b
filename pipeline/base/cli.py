"""What the four commands share: exit codes, number formats, one line for an error, a clean Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import tomllib
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from pipeline.base.errors import PipelineError, UsageError
from pipeline.base.files import disk_errors
from pipeline.base.progress import log_line, say

SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}


class Count(click.ParamType[int]):
    """A whole number of things: 10000000, 10_000_000, 10M, 1.5k."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([kKmMgGbBtT]?)", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a count; write 10000000, 10_000_000 or 10M", param, ctx)
        number = float(match[1].replace("_", "").replace(",", "")) * SUFFIXES[match[2].lower()]
        if number != int(number):
            self.fail(f"{value!r} is not a whole number", param, ctx)
        return int(number)


class Size(Count):
    """A number of bytes: 2000000000, 2GB, 500M."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return super().convert(re.sub(r"(?i)i?b$", "", value) if isinstance(value, str) else value, param, ctx)


COUNT, SIZE = Count(), Size()


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises UsageError naming the line when it is not TOML, or when it is not there."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not readable as TOML ({error})") from error


def print_json(data: Any) -> None:
    """Print JSON to stdout, for `--json`."""
    print(json.dumps(data, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False))


RANK_0_FIRST = 5.0
"""Seconds that further ranks keep an error to themselves."""


def let_rank_0_speak() -> None:
    """Under torchrun, wait in all ranks but the first: an error of all is said by that one, at whose exit torchrun ends the
    others; one that rank 0 does not have is said after that."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
        time.sleep(RANK_0_FIRST)


def main(command: click.Command, program: str, resume: str = "run the same command again to go on") -> NoReturn:
    """Run a click command as a program: exit 0 when done, 1 with one line for what a user or a disk caused, 2 for usage.

    Ctrl-C prints `resume` and exits 130. A bug keeps its traceback.
    """
    try:
        with disk_errors(Path.cwd()):
            command.main(prog_name=f"python -m {program}", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        say(f"\nstopped; {resume}")
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except PipelineError as error:
        let_rank_0_speak()
        say(f"error: {error}")
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except Exception:
        log_line(traceback.format_exc())
        raise
    sys.exit(0)
