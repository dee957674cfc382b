"""Starts the stages as their own processes: they meet on disk, never in memory."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline import LOG_VARIABLE
from pipeline.base.digests import unvouch, vouch
from pipeline.base.errors import PipelineError, UsageError
from pipeline.base.files import regular
from pipeline.base.processes import ROOT, become_child, hold_interrupts, python_path


def options(settings: Mapping[str, Any], *, negatable: bool = False) -> list[str]:
    """Command-line options of a table of settings: a list repeats the option, true is a bare flag.

    False is left out, or `--no-x` for a stage whose flags are `negatable` (train, where some are on by default).
    """
    words: list[str] = []
    for name, value in settings.items():
        for one in value if isinstance(value, list) else [value]:
            if one is True:
                words.append(f"--{name}")
            elif one is not False:
                words += [f"--{name}", str(one)]
            elif negatable:
                words.append(f"--no-{name}")
    return words


COMMANDS = {
    "harvest": "harvest.__main__:command",
    "train": "train.__main__:command",
    "evaluate": "evaluate.__main__:evaluate",
    "evaluate.report": "evaluate.report.__main__:cli",
}
"""Where each stage's click command is."""
PARSE = """
from pipeline.base import startup
startup.begin()
import importlib, json, sys
import click
from pipeline.base.cli import ONLY_READ, require_sources
here, commands = json.load(sys.stdin)
for stage, place, words in commands:
    module, name = place.split(":")
    command = getattr(importlib.import_module(module), name)
    try:
        with command.make_context(stage, words, obj=ONLY_READ) as context:
            command.invoke(context)
            require_sources(context)
            if here and context.params.get("device", "auto") not in ("auto", "cpu"):
                from pipeline.base.runtime import resolve_device

                resolve_device(context.params["device"])
    except click.ClickException as error:
        sys.exit(f"{stage}: {error.format_message()}; python -m {stage} --help lists its options")
    except Exception as error:
        from pipeline.base.errors import explain

        if (said := explain(error)) is None:
            raise
        sys.exit(f"{stage}: {said}; python -m {stage} --help lists its options")
"""
"""A program that has stages read their words, and runs nothing."""


def check(commands: Sequence[tuple[str, Sequence[str]]], *, here: bool = True) -> None:
    """Have each stage itself read its words and what they mean together, all in one process. Raises UsageError with what it says,
    naming the stage. `here`: they will run on this machine, which has the devices that are asked for."""
    parsed = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps([here, [(stage, COMMANDS[stage], list(words)) for stage, words in commands]]),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if parsed.returncode:
        said = parsed.stderr.strip().splitlines() or ["a stage's parser ended without a word"]
        raise UsageError(said[-1])


def show(stage: str, words: Sequence[str]) -> str:
    """A stage's command as a person would type it."""
    return shlex.join(["python", "-m", stage, *words])


def run_stage(stage: str, words: Sequence[str], log: Path) -> str:
    """Run a stage to its end, its progress on this terminal and its lines appended to `log`; what it prints to stdout.

    Raises PipelineError naming the stage and its exit code when it fails; the stage has already said why. When this
    process dies, however, the stage dies with it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    unvouch(log)
    with open(log, "a", opener=regular) as file:
        file.write(f"$ {show(stage, words)}\n")
    with subprocess.Popen(
        [sys.executable, "-m", stage, *words],
        cwd=ROOT,
        env=stage_environment(log),
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=become_child,
    ) as process:
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            process.wait()
            raise
    vouch(log)
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode != 0:
        raise PipelineError(f"{show(stage, words)}: exit code {process.returncode}; see above or {log}, then run again")
    return output


def ask_stage(stage: str, words: Sequence[str], log: Path) -> Any:
    """Run a stage with --json and return what it printed. Raises PipelineError as `run_stage`."""
    return json.loads(run_stage(stage, [*words, "--json"], log))


def pass_on(stage: str, words: Sequence[str]) -> NoReturn:
    """Become a stage, for a command that only forwards its words: this process goes on as it, with this terminal.

    Paths in `words` are taken from here, so it runs here and not in ROOT.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    environment = os.environ | {"PYTHONPATH": python_path()}
    hold_interrupts()
    os.execve(sys.executable, [sys.executable, "-m", stage, *words], environment)


def stage_environment(log: Path) -> dict[str, str]:
    """Our environment with the log's path, and with the checkout first where Python looks.

    Idle OpenMP threads sleep rather than spin: on a machine that does anything else besides, spinning made a training
    step several times slower (NOTES.md)."""
    waiting = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    return os.environ | waiting | {"PYTHONPATH": python_path(), LOG_VARIABLE: str(log.resolve())}
