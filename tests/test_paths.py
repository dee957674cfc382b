"""Every path that any command takes, at every kind of place where it cannot be: one line, made from the commands' own options.

A new command or path option is tested without a word here; a new option of text is refused until it is said to be no path.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from evaluate.__main__ import evaluate
from evaluate.explain.__main__ import cli as explain
from evaluate.latents.neuronpedia import command as neuronpedia
from evaluate.report.__main__ import cli as report
from harvest.__main__ import command as harvest
from pipeline.__main__ import cli as pipeline
from pipeline.base.cli import Output, Repository, Source, failed, spelled
from train.__main__ import command as train

COMMANDS: dict[str, click.Command] = {
    "harvest": harvest,
    "train": train,
    "evaluate": evaluate,
    "report": report,
    "explain": explain,
    "neuronpedia": neuronpedia,
    **{f"pipeline {name}": command for name, command in pipeline.commands.items()},
}
NO_PATHS = {
    *("revision", "subset", "split", "part", "text_field", "device", "bos", "attention", "level_weighting", "keep", "scores"),
    "levels",
    *("dtype", "scr_text", "scr_attributes", "scr_pairs", "scr_n", "probe_k", "latents", "title", "primary", "model_id"),
    *("set_name", "creator", "creator_id", "sbatch", "gpu", "key", "hook", "special_ids", "level", "text"),
}  # fmt: skip
"""Options of text that name no path."""
MODEL = Path(__file__).parent.parent / "data" / "tiny-gemma2"
"""A model that is there, so that what comes after it is looked at."""


def paths_of(command: click.Command) -> list[click.Parameter]:
    """The parameters of a command that are paths, by their types."""
    return [one for one in command.params if isinstance(one.type, Source | Output)]


CASES = [(name, str(one.name)) for name, command in COMMANDS.items() for one in paths_of(command)]


def dangling(folder: Path) -> Path:
    """A link that leads to nothing."""
    (folder / "dangling.jsonl").symlink_to(folder / "nothing")
    return folder / "dangling.jsonl"


def circle(folder: Path) -> Path:
    """A link that leads to itself."""
    (folder / "circle.jsonl").symlink_to(folder / "circle.jsonl")
    return folder / "circle.jsonl"


def under_a_file(folder: Path) -> Path:
    """A path below a file."""
    (folder / "file").write_text("x")
    return folder / "file" / "below.jsonl"


def too_long(folder: Path) -> Path:
    """A name of 300 bytes."""
    return folder / ("x" * 300)


def not_text(folder: Path) -> Path:
    """A name that is not UTF-8."""
    return folder / os.fsdecode(b"caf\xe9.jsonl")


def a_file(folder: Path) -> Path:
    """A file that is nothing of ours, where a folder or something of ours should be."""
    (folder / "thesis.tex").write_text("\\section{x}")
    return folder / "thesis.tex"


def a_folder(folder: Path) -> Path:
    """An empty folder, where a file or something of ours should be."""
    (folder / "hollow").mkdir()
    return folder / "hollow"


def a_pipe(folder: Path) -> Path:
    """A pipe that nobody writes to."""
    os.mkfifo(folder / "pipe.jsonl")
    return folder / "pipe.jsonl"


def locked_file(folder: Path) -> Path:
    """A file that nobody may read or write."""
    (folder / "locked.jsonl").write_text("{}")
    (folder / "locked.jsonl").chmod(0)
    return folder / "locked.jsonl"


def in_a_locked_folder(folder: Path) -> Path:
    """A path in a folder that nobody may look into."""
    (folder / "vault").mkdir()
    (folder / "vault" / "in.jsonl").write_text("{}")
    (folder / "vault").chmod(0)
    return folder / "vault" / "in.jsonl"


def in_a_read_only_folder(folder: Path) -> Path:
    """A path in a folder that nobody may write to."""
    (folder / "museum").mkdir()
    (folder / "museum").chmod(0o555)
    return folder / "museum" / "new"


BAD: tuple[Callable[[Path], Path], ...] = (
    *(dangling, circle, under_a_file, too_long, not_text, a_file, a_folder, a_pipe, locked_file),
    *(in_a_locked_folder, in_a_read_only_folder),
)  # fmt: skip


LOCKED = (locked_file, in_a_locked_folder, in_a_read_only_folder)
"""What only those without power are kept from; they may not read the modules that a command imports later either."""
MAY_BE_OTHERS = (a_file, a_folder)
"""Of what can be read, something else may be found wrong first."""


def is_fine(param: click.Parameter, kind: Callable[[Path], Path]) -> bool:
    """Whether a place of this kind is a good one for the parameter, or none at all there: then there is nothing to refuse."""
    if isinstance(param.type, Output):
        return kind in (
            (a_folder,) if param.type.folder else (a_file, locked_file)
        )  # a file is replaced, not written into
    return kind is in_a_read_only_folder  # what is not there to be read is a name


@contextlib.contextmanager
def powerless() -> Iterator[None]:
    """Without the right of root to read and write everything."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)  # the real one too, which os.access asks
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that anybody may reach and write to, as pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="paths-"))
    folder.chmod(0o777)
    yield folder
    for path in (folder / "vault", folder / "museum"):
        if path.exists():
            path.chmod(0o700)
    shutil.rmtree(folder)


def words_for(command: click.Command, asked: str, bad: str, folder: Path) -> list[str]:
    """A command line with one path that is bad; what else is required is there, but nothing of ours."""
    (folder / "there").mkdir()
    words: list[str] = []
    last: list[str] = []
    writes = any(isinstance(one.type, Output) and (one.required or one.name == asked) for one in command.params)
    for param in command.params:
        if param.name == asked:
            value = bad
        elif param.name == "model":
            value = str(MODEL)
        elif not param.required and (writes or not isinstance(param.type, Output)):
            if param.name in ("dry_run", "once"):
                words.append(param.opts[0])
            continue
        elif isinstance(param.type, click.Choice):
            value = str(param.type.choices[0])
        else:
            value = str(folder / ("new" if isinstance(param.type, Output) else "there"))
        if isinstance(param, click.Argument):
            last.append(value)
        else:
            words += [param.opts[0], value]
    return [*words, *last]


def ended(name: str, words: list[str]) -> int:
    """The exit code of a command. Raises what is a bug."""
    try:
        COMMANDS[name].main(words, prog_name=name, standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except Exception as error:
        return failed(error, "", interrupted=False)
    return 0


def said_by(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines of stderr but those of usage."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.strip() and not line.startswith(("Usage:", "Try "))]


def test_options_of_text_are_known() -> None:
    """Every option that takes text is a path by its type, or known to be none."""
    for name, command in COMMANDS.items():
        for param in command.params:
            if isinstance(param.type, click.types.StringParamType | click.types.Path):
                assert param.name in NO_PATHS, (
                    f"{name} {param.name}: give it SOURCE, NAMED_SOURCE or an OUT_… of base/cli"
                )


@pytest.mark.parametrize("kind", BAD, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("name", "param"), CASES, ids=[f"{name} {param}" for name, param in CASES])
def test_bad_paths_are_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, param: str, kind: Any
) -> None:
    """Whatever path of whatever command is bad, in whatever way, the command ends in one line that names it."""
    command = COMMANDS[name]
    declared = next(one for one in command.params if one.name == param)
    if is_fine(declared, kind):
        return
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    bad = kind(place)
    words = words_for(command, param, str(bad), place)
    with powerless() if kind in LOCKED else contextlib.nullcontext():
        code = ended(name, words)
    said = said_by(capsys)
    assert code in (1, 2), said
    assert len(said) == 1, said
    assert kind is not a_pipe or bad.is_fifo()
    assert kind in MAY_BE_OTHERS or ascii(bad.name[:60])[1:-1] in said[0]
    assert len(said[0]) < 1000


URLS = [
    (name, str(one.name))
    for name, command in COMMANDS.items()
    for one in command.params
    if isinstance(one.type, Source | Output | Repository) and not getattr(one.type, "urls", False)
]


@pytest.mark.parametrize(("name", "param"), URLS, ids=[f"{name} {param}" for name, param in URLS])
def test_urls_are_refused_by_name(place: Path, capsys: pytest.CaptureFixture[str], name: str, param: str) -> None:
    """Every path, id or repository that can be no URL says so of one, and what it takes instead; nothing is made or asked."""
    command = COMMANDS[name]
    declared = next(one for one in command.params if one.name == param)
    assert ended(name, words_for(command, param, "zip://a::b", place)) == 2
    said = said_by(capsys)
    assert len(said) == 1, said
    assert f"zip://a::b: a URL, where {spelled(declared)} takes " in said[0]
    assert [one.name for one in place.iterdir()] == ["there"]
