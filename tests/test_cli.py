import errno
import importlib
import os
from pathlib import Path

import click
import pytest

from pipeline.__main__ import outline
from pipeline.base.cli import COUNT, OUT_STORE, SIZE, WHOLE, Output, main
from pipeline.base.errors import CorpusError, DiskError, UsageError
from pipeline.base.progress import Progress, say, silenced
from pipeline.experiment.experiment import Experiment
from pipeline.experiment.stages import options
from support import lm_stores


class PanicException(BaseException):
    """As what libraries written in Rust end with."""


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10_000_000", 10_000_000),
        ("10M", 10_000_000),
        ("1.5k", 1500),
        ("7", 7),
        ("2,000", 2000),
        ("1B", 10**9),
        (str(2**53 + 1), 2**53 + 1),
    ],
)
def test_counts_read_as_people_write(text: str, number: int) -> None:
    """Counts are read as people write them."""
    assert COUNT.convert(text, None, None) == number


@pytest.mark.parametrize("text", ["", "ten", "1.5", "-3", "1e6", "3MM", "9" * 19, "1" + "0" * 5000])
def test_what_is_no_count_is_refused(text: str) -> None:
    """What is not a count is refused."""
    with pytest.raises(click.BadParameter):
        COUNT.convert(text, None, None)


def test_numbers_beyond_files_are_refused() -> None:
    """What no reader of ours takes from a file is not written there: 2⁶³ and more, on either side of zero."""
    assert WHOLE.convert("-9", None, None) == -9
    for number in (2**63, -(2**63)):
        with pytest.raises(click.BadParameter, match="more than can be counted"):
            WHOLE.convert(str(number), None, None)


@pytest.mark.parametrize(("text", "number"), [("2GB", 2 * 10**9), ("500M", 500 * 10**6), ("12", 12), ("1GiB", 10**9)])
def test_sizes_take_a_unit(text: str, number: int) -> None:
    """Sizes take a unit."""
    assert SIZE.convert(text, None, None) == number


@pytest.mark.parametrize(
    ("error", "code"), [(CorpusError("bad corpus"), 1), (UsageError("bad option"), 2), (KeyboardInterrupt(), 130)]
)
def test_exit_codes_tell_disk_from_typo(
    error: BaseException, code: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit codes tell a disk from a typo."""

    @click.command()
    def command() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as stop:
        main(command, "x")
    assert stop.value.code == code
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    assert (str(error) or "run the same command again") in printed


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FileExistsError(errno.EEXIST, "File exists", "/a/b"), "error: /a/b: File exists; something else is there"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/b"), "a file stands where a folder should"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a/b"), "a folder stands where a file should"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/a/b"), "choose a shorter name"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "/a/b"), "links lead in a circle"),
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), "choose a path on another disk"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "a file or a connection: No space left on device; make room",
        ),
        (
            OSError(errno.EIO, "Input/output error", "/a", None, "/b"),
            "error: /a and /b: Input/output error; the disk failed",
        ),
        (OSError("two\nlines"), "error: a file or a connection: two lines; look at it"),
        (MemoryError(), "error: not enough memory (MemoryError)"),
        (
            RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried"),
            "error: not enough memory",
        ),
        (CorpusError("two\nlines"), "error: two lines"),
        (PanicException("range end index 10"), "error: a library gave up (range end index 10)"),
    ],
)
def test_system_errors_are_one_line(
    error: BaseException, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an operating system or a memory refuses is one line that names the path and what to do."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as stop:
        main(click.Command("x", callback=fail), "x")
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert says in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("place", "folder", "says"),
    [
        ("file", True, "is a file, expected a folder"),
        ("folder", False, "is a folder, expected a file"),
        ("file/under", True, "file is a file, so nothing can lie under it"),
        ("file/under/more", False, "file is a file, so nothing can lie under it"),
        ("dangling", True, "a link there may lead to nothing"),
        ("dangling/under", True, "a link there may lead to nothing"),
        ("loop", True, "its links lead in a circle"),
        ("n" * 240, False, "a name of 240 bytes is too long here"),
        ("new/" + "é" * 130 + "/x", True, "a name of 260 bytes is too long here"),
        ("shut/new", True, "shut cannot be written"),
    ],
)
def test_impossible_outputs_are_found_first(
    tmp_path: Path, place: str, folder: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that can never be written is one line when the options are read, before any work; nothing is made."""
    for name in ("folder", "shut"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    may = os.access
    monkeypatch.setattr(
        "os.access", lambda path, how: path != tmp_path / "shut" and may(path, how)
    )  # tests may run as root
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DiskError, match=says) as refusal:
        Output(folder=folder).convert(tmp_path / place, None, None)
    assert "\n" not in str(refusal.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_possible_outputs_are_left_alone(tmp_path: Path) -> None:
    """A path that can be written, one that is there and a URL come back as they are; nothing is made."""
    (tmp_path / "file").write_text("")
    for place, folder in (
        (tmp_path / "a" / "b", True),
        (tmp_path, True),
        (tmp_path / "file", False),
        (tmp_path / "c", False),
    ):
        assert Output(folder=folder).convert(str(place), None, None) == place
    assert OUT_STORE.convert("s3://bucket/acts.zarr", None, None) == "s3://bucket/acts.zarr"
    assert OUT_STORE.convert(str(tmp_path / "a"), None, None) == str(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [5.0]), (None, [])])
def test_rank_0_says_an_error_first(rank: str | None, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun further ranks wait before they say an error, which ends them when rank 0 has it too."""
    waited: list[float] = []
    monkeypatch.setattr("pipeline.base.cli.time.sleep", waited.append)
    monkeypatch.setattr("sys.argv", ["x"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if rank is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        monkeypatch.setenv("RANK", rank)

    def fail() -> None:
        raise CorpusError("bad corpus")

    with pytest.raises(SystemExit):
        main(click.Command("x", callback=fail), "x")
    assert waited == waits


def test_wrong_option_exits_with_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong option exits with two."""
    monkeypatch.setattr("sys.argv", ["x", "--nope"])
    with pytest.raises(SystemExit) as stop:
        main(click.Command("x", callback=lambda: None), "x")
    assert stop.value.code == 2


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model, its store and a member trained on it."""
    folder = tmp_path_factory.mktemp("devices")
    store = lm_stores.make_lm_store(folder, eval_sequences=4)
    member = lm_stores.save_member(folder / "runs", store, lm_stores.make_sae(store))
    return {
        "STORE": str(store.path),
        "MODEL": str(store.config["model"]),
        "SAE": str(member),
        "CORPUS": str(Path(__file__).parent.parent / "data" / "corpus"),
    }


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("harvest", "--model MODEL --layer 1 --corpus CORPUS --tokens 2k --context 32 --store OUT"),
        ("train", "--store STORE --out OUT --alpha 0"),
        ("evaluate", "SAE --store STORE --out OUT"),
        ("pipeline", "inspect SAE --text words --out OUT"),
        ("evaluate.explain", "SAE --store STORE --latents 1 --prompts OUT"),
        ("evaluate.latents.neuronpedia", "SAE --store STORE --out OUT --creator us"),
    ],
)
def test_every_command_asks_for_devices(places: dict[str, str], tmp_path: Path, program: str, words: str) -> None:
    """Whatever takes --device refuses mps by the same function, before it writes anything."""
    named = places | {"OUT": str(tmp_path / "out")}
    module = importlib.import_module(program if program.endswith("neuronpedia") else f"{program}.__main__")
    own = [one for one in vars(module).values() if isinstance(one, click.Command)]
    command = max(own, key=lambda one: isinstance(one, click.Group))  # pipeline has a group of many
    given = [named.get(word, word) for word in words.split()] + ["--device", "mps"]
    with pytest.raises(UsageError, match=r"^--device mps: not supported \(sums are in float64"):
        command.main(given, standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_all_devices_are_tried() -> None:
    """The commands above are all that have an option --device."""
    root = Path(__file__).parent.parent
    files = [path for top in ("pipeline", "harvest", "train", "evaluate") for path in (root / top).rglob("*.py")]
    have = {str(path.relative_to(root)) for path in files if 'option("--device",' in path.read_text()}
    assert have == {
        "harvest/__main__.py",
        "train/__main__.py",
        "evaluate/__main__.py",
        "evaluate/explain/__main__.py",
        "evaluate/latents/neuronpedia.py",
        "pipeline/__main__.py",
    }


def test_settings_become_options() -> None:
    """Settings become options: a list repeats and true is a flag."""
    words = options({"alpha": [0, 0.2], "recipe": "paper", "repair": True, "compile": False})
    assert words == ["--alpha", "0", "--alpha", "0.2", "--recipe", "paper", "--repair"]
    assert options({"layernorm-rescale": False}, negatable=True) == ["--no-layernorm-rescale"]


@pytest.mark.parametrize("name", ["demo", "paper"])
def test_shipped_experiments_are_readable_by_name(name: str, tmp_path: object) -> None:
    """Shipped experiments are readable by name."""
    experiment = Experiment.read(Path(f"{name}.toml"))
    assert experiment.train[0]["alpha"] == [0, 0.1, 0.2, 0.3, 0.5]


@pytest.mark.parametrize("what", ["pipe", "folder"])
def test_log_that_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """A log that is a pipe nobody reads, or a folder, is named once; what is said is said, and nothing waits."""
    log = tmp_path / "a.log"
    os.mkfifo(log) if what == "pipe" else log.mkdir()
    monkeypatch.setenv("PIPELINE_LOG", str(log))
    say("one")
    say("two")
    said = capsys.readouterr().err
    assert said.count(f"{log}: nothing more is logged here") == 1
    assert "one\n" in said
    assert said.endswith("two\n")


def test_silence_holds_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """Inside the block neither lines nor progress are written; nested blocks and what comes after are as before."""
    with silenced(), silenced(False):
        say("a")
        with Progress(1, "work", "row") as bar:
            bar.advance(1)
    say("b")
    assert capsys.readouterr().err == "b\n"


def test_progress_ends_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    """Where more is done than was planned, that is the total: never more than 100 %."""
    with Progress(100, "tokenise part 0 of 2", "token") as bar:
        bar.advance(1136)
    line = capsys.readouterr().err
    assert "100 %, 1,136 of 1,136 tokens" in line


def test_terminals_are_not_steered(capsys: pytest.CaptureFixture[str]) -> None:
    """What a name of others would do to a terminal is spelled out: in lines, beside progress, and in what `describe` prints."""
    name = "\x1b[31mred\x1b]0;title\x07\nerror: \u202egnp"
    say(f"first\nsecond {name!s}".replace("\nerror", " error"))
    with Progress(2, "evaluate", "sequence") as bar:
        bar.advance(2, name)
    said = capsys.readouterr().err + "".join(outline({name: [name], "inner": {"member": name}}))
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "\u202e" not in said
    assert said.count("⟨U+001B⟩[31mred") == 4
    assert said.splitlines()[0] == "first"
    assert said.count("\n") == 3
