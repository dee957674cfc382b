import click
import pytest

from pipeline.base.cli import COUNT, SIZE, main
from pipeline.base.errors import CorpusError, UsageError
from pipeline.base.progress import Progress, say, silenced
from pipeline.experiment.experiment import Experiment
from pipeline.experiment.stages import options


@pytest.mark.parametrize(
    ("text", "number"),
    [("10_000_000", 10_000_000), ("10M", 10_000_000), ("1.5k", 1500), ("7", 7), ("2,000", 2000), ("1B", 10**9)],
)
def test_counts_read_as_people_write(text: str, number: int) -> None:
    """Counts are read as people write them."""
    assert COUNT.convert(text, None, None) == number


@pytest.mark.parametrize("text", ["", "ten", "1.5", "-3", "1e6", "3MM"])
def test_what_is_no_count_is_refused(text: str) -> None:
    """What is not a count is refused."""
    with pytest.raises(click.BadParameter):
        COUNT.convert(text, None, None)


@pytest.mark.parametrize(("text", "number"), [("2GB", 2 * 10**9), ("500M", 500 * 10**6), ("12", 12), ("1GiB", 10**9)])
def test_sizes_take_a_unit(text: str, number: int) -> None:
    """Sizes take a unit."""
    assert SIZE.convert(text, None, None) == number


@pytest.mark.parametrize(
    ("error", "code"), [(CorpusError("bad corpus"), 1), (UsageError("bad option"), 2), (KeyboardInterrupt(), 130)]
)
def test_exit_codes_tell_disk_from_typo(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit codes tell a disk from a typo."""

    @click.command()
    def command() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit) as stop:
        main(command, "x")
    assert stop.value.code == code
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert (str(error) or "run the same command again") in printed


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


def test_settings_become_options() -> None:
    """Settings become options: a list repeats and true is a flag."""
    words = options({"alpha": [0, 0.2], "recipe": "paper", "repair": True, "compile": False})
    assert words == ["--alpha", "0", "--alpha", "0.2", "--recipe", "paper", "--repair"]
    assert options({"layernorm-rescale": False}, negatable=True) == ["--no-layernorm-rescale"]


@pytest.mark.parametrize("name", ["demo", "paper"])
def test_shipped_experiments_are_readable_by_name(name: str, tmp_path: object) -> None:
    """Shipped experiments are readable by name."""
    from pathlib import Path

    experiment = Experiment.read(Path(f"{name}.toml"))
    assert experiment.train[0]["alpha"] == [0, 0.1, 0.2, 0.3, 0.5]


def test_silence_holds_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """Inside the block neither lines nor progress are written; nested blocks and what comes after are as before."""
    with silenced(), silenced(False):
        say("a")
        with Progress(1, "work", "row") as bar:
            bar.advance(1)
    say("b")
    assert capsys.readouterr().err == "b\n"
