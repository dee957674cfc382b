"""Ctrl-C at any moment, and what a machine refuses, end every command in one line: never in a traceback, never unheard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.base.processes import hold_interrupts

ROOT = Path(__file__).parents[1]
ENTRIES = [
    "pipeline",
    "harvest",
    "train",
    "evaluate",
    "evaluate.report",
    "evaluate.explain",
    "evaluate.latents.neuronpedia",
]
STARTING = "\nstopped while starting; nothing was begun\n"


def run(*words: str, path: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python process from the checkout, with `path` before it where Python looks for modules, and more variables."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(path), str(ROOT)))} | variables
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
    assert ended.stderr == STARTING


INTERRUPT_AT_LINE = """
import _signal, os, sys
seen = 0
def trace(frame, event, argument):
    global seen
    ours = os.path.dirname(frame.f_code.co_filename).startswith(os.environ["ROOT"])
    if event == "line" and (seen or ours):
        seen += 1
        if seen == int(os.environ["AT"]):
            sys.settrace(None)
            _signal.raise_signal(_signal.SIGINT)
            return None
    return trace
sys.settrace(trace)
"""
TAKEN = 25
"""Lines of Python, from our first one on, within which Ctrl-C is taken: those of the first lines of two files."""


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("at", [TAKEN, 50, 100, 200, 400, 800])
def test_interrupt_at_first_lines(tmp_path: Path, entry: str, at: int) -> None:
    """Ctrl-C while our own first modules are imported, at any line of Python's machinery too, is one line."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT_AT_LINE)
    ended = run("-m", entry, "--help", path=tmp_path, AT=str(at), ROOT=str(ROOT))
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", STARTING)


@pytest.mark.parametrize("words", [["-m", "theirs"], ["-m", "theirs", "train"], ["-c", "import pipeline, train"]])
def test_programs_of_others_keep_interrupts(tmp_path: Path, words: list[str]) -> None:
    """A program that imports our packages, as early as `python -m` lets it, keeps Python's own KeyboardInterrupt."""
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("import pipeline, harvest, train, evaluate\n")
    (package / "__main__.py").write_text("")
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, signal\n"
        "atexit.register(lambda: print(signal.getsignal(signal.SIGINT) is signal.default_int_handler))\n"
    )
    assert run(*words, path=tmp_path).stdout == "True\n"


@pytest.mark.parametrize("entry", ENTRIES)
def test_held_interrupt_is_heard(entry: str) -> None:
    """Ctrl-C while Python itself starts a stage, whose parent holds it back, is heard by the stage's first lines."""
    process = subprocess.Popen(
        [sys.executable, "-m", entry, "--help"], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=hold_interrupts
    )
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == STARTING
    assert process.returncode == 130


def test_stage_leaves_last_word_to_experiment(tmp_path: Path) -> None:
    """Of Ctrl-C in a stage of an experiment the experiment speaks, so that it is said once."""
    (tmp_path / "click.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    ended = run("-m", "harvest", "--help", path=tmp_path, PIPELINE_LOG=str(tmp_path / "log"))
    assert (ended.returncode, ended.stderr) == (130, "")


def test_glued_module_name_is_ours(tmp_path: Path) -> None:
    """`python -mtrain` is a command of ours too."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT_AT_LINE)
    ended = run("-mtrain", "--help", path=tmp_path, AT=str(TAKEN), ROOT=str(ROOT))
    assert (ended.returncode, ended.stderr) == (130, STARTING)


INTERRUPT_MAIN = """
import os, signal, sys
from pipeline.base import startup
startup.begin()
import click
from pipeline.base import cli
from pipeline.base.errors import UsageError

def work():
    if mode == "error":
        raise UsageError("wrong")
    if mode == "interrupt":
        signal.raise_signal(signal.SIGINT)

def trace(frame, event, argument):
    global seen
    if event == "line" and frame.f_code.co_filename in (cli.__file__, startup.__file__):
        seen += 1
        if seen == at:
            sys.settrace(None)
            os.write(tell, b"interrupted")
            signal.raise_signal(signal.SIGINT)
            return None
    return trace

mode, at, seen = sys.argv.pop(), 0, 0
while True:  # a child for each line, which is interrupted there; the last one ends before
    at += 1
    heard, tell = os.pipe()
    if not (child := os.fork()):
        break
    os.close(tell)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    if not os.read(heard, 20):
        os._exit(0)
sys.settrace(trace)
cli.main(click.Command("x", callback=work), "x")
"""


@pytest.mark.parametrize(("mode", "code"), [("done", "0"), ("error", "2"), ("interrupt", "130")])
def test_interrupt_at_each_line_of_main(mode: str, code: str) -> None:
    """Ctrl-C at any line of what surrounds a command, once it is done, failed or interrupted too, is no traceback."""
    ended = run("-c", INTERRUPT_MAIN, mode)
    *interrupted, whole = ended.stdout.split()
    assert len(interrupted) > 15
    assert set(interrupted) == {"130"}
    assert whole == code
    assert "Traceback" not in ended.stderr


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


SLOW_MODULE = """
import signal, sys, time
try:
    for _ in range(int(sys.argv[-1])):
        signal.raise_signal(signal.SIGINT)
    time.sleep(0.1)
except BaseException:
    print("C++ would end here")
print("imported")
"""


SLOW_COMMAND = """
import sys, time
from pipeline.base import startup
startup.begin()
import click
from pipeline.base.cli import main

@click.command()
@click.argument("times", expose_value=False)
def work():
    import slow_module
    time.sleep(60)

main(work, "x")
"""


@pytest.mark.parametrize(("times", "printed", "said"), [
    ("1", "imported\n", "stopped; run the same command again to go on"), ("2", "", "stopped"),
])  # fmt: skip
def test_interrupt_waits_for_an_import(tmp_path: Path, times: str, printed: str, said: str) -> None:
    """Ctrl-C while a command imports a module waits until it is imported, for C++ there ends the process; a second does not."""
    (tmp_path / "slow_module.py").write_text(SLOW_MODULE)
    ended = run("-c", SLOW_COMMAND, times, path=tmp_path)
    assert (ended.returncode, ended.stdout) == (130, printed)
    assert ended.stderr.strip() == said


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
