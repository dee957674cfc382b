"""Ctrl-C at any moment, and what a machine refuses, end every command in one line: never in a traceback, never unheard."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENTRIES = ["pipeline", "harvest", "train", "evaluate", "evaluate.report"]


def run(*words: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A Python process from the checkout, with `path` before it where Python looks for modules."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(path), str(ROOT)))}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def program(body: str) -> subprocess.CompletedProcess[str]:
    """A command whose body is Python, run as `main` runs commands."""
    head = "import signal, time, click\nfrom pipeline.base.cli import main\n"
    return run("-c", f"{head}{body}\nmain(click.Command('x', callback=work), 'x')")


@pytest.mark.parametrize("entry", ENTRIES)
def test_interrupt_while_importing_is_one_line(tmp_path: Path, entry: str) -> None:
    """Ctrl-C that comes while a command imports what it needs ends it at once."""
    (tmp_path / "click.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    ended = run("-m", entry, "--help", path=tmp_path)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "\nstopped while starting; nothing was begun\n"


@pytest.mark.parametrize("entry", ENTRIES)
def test_memory_lacking_at_import(tmp_path: Path, entry: str) -> None:
    """A library that finds no memory while it is imported is one line, not a traceback."""
    (tmp_path / "click.py").write_text("raise ImportError('libtorch.so: failed to map segment from shared object')\n")
    ended = run("-m", entry, "--help", path=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: not enough memory (libtorch.so: failed to map segment")
    assert ended.stderr.count("\n") == 1


WORK = {
    "harvest": "--model {data}/tiny-gemma2 --corpus {data}/corpus/train.jsonl.zst --layer 3 --store {out}/s.zarr",
    "train": "--store {out}/s.zarr --out {out}/runs --alpha 0",
    "evaluate": "{out}/runs --store {out}/s.zarr --out {out}/results",
    "pipeline": "inspect {out}/runs --text x",
}


@pytest.mark.parametrize("entry", WORK)
@pytest.mark.parametrize("megabytes", [400, 500, 650])
def test_few_addresses_are_one_line(tmp_path: Path, entry: str, megabytes: int) -> None:
    """Under a limit of addresses in which C++ would end the process while torch is loaded (400 MB), a command says so itself."""
    words = WORK[entry].format(data=ROOT / "data", out=tmp_path).split()
    begin = f"ulimit -v {megabytes * 1000}; exec {sys.executable} -m {entry}"
    ended = subprocess.run(["bash", "-c", f'{begin} "$@"', "x", *words], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: not enough memory (ulimit -v allows ")
    assert ended.stderr.count("\n") == 1


LOST = """
def thrown_away():
    try:
        yield 1
    finally:
        signal.raise_signal(signal.SIGINT)
"""


def test_lost_interrupt_comes_again() -> None:
    """Ctrl-C in a generator that is thrown away, where Python can raise nothing, still ends the command."""
    ended = program(
        f"{LOST}\ndef work():\n    one = thrown_away()\n    next(one)\n    del one\n    time.sleep(60)\n    print('went on')"
    )
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr.strip() == "stopped; run the same command again to go on"


def test_interrupt_turned_error_stays_interrupt() -> None:
    """A library that turns Ctrl-C into an error of its own changes nothing."""
    body = (
        "def work():\n    try:\n        signal.raise_signal(signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n        raise ImportError('x')"
    )
    ended = program(body)
    assert ended.returncode == 130
    assert ended.stderr.strip() == "stopped; run the same command again to go on"


def test_bugs_keep_their_traceback() -> None:
    """What nobody caused but us is not made pretty."""
    ended = program("def work():\n    raise ValueError('a bug')")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr


INTERRUPTED_HARVEST = """
import signal
from concurrent.futures import ThreadPoolExecutor
from harvest.__main__ import command
from pipeline.base.cli import main
shutdown = ThreadPoolExecutor.shutdown
def interrupted(self, *words, **options):
    if self._thread_name_prefix == "tokenise":
        signal.raise_signal(signal.SIGINT)
    shutdown(self, *words, **options)
ThreadPoolExecutor.shutdown = interrupted
main(command, "harvest")
"""


def test_interrupt_as_tokenising_ends_is_heard(tmp_path: Path) -> None:
    """Ctrl-C while the thread that tokenises is waited for ends the harvest."""
    words = ["--model", "data/tiny-gemma2", "--layer", "3", "--corpus", "data/corpus/train.jsonl.zst", "--tokens", "8k"]
    ended = run("-c", INTERRUPTED_HARVEST, *words, "--store", str(tmp_path / "acts.zarr"))
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
    assert ended.stderr.endswith("stopped; run the same command again to go on\n")
