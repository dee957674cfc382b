"""`python -m evaluate`: exit codes, --json, --help, one clear line for what a user caused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from evaluate.__main__ import evaluate, make_config
from pipeline.base.cli import main
from pipeline.base.errors import UsageError
from support import lm_stores

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, acts.zarr and one member in runs."""
    folder = tmp_path_factory.mktemp("evaluate-cli")
    store = lm_stores.make_lm_store(folder, eval_sequences=4)
    lm_stores.save_member(folder / "runs", store, lm_stores.make_sae(store))
    return folder


def command(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "evaluate", *words, "--store", str(place / "acts.zarr")]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_second_job_does_nothing(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job prints its results as JSON, then does nothing again."""
    words = (
        str(place / "runs"),
        "--model",
        str(place / "model"),
        "--out",
        str(tmp_path),
        "--scores",
        "kl,ev",
        "--json",
    )
    first = command(place, *words)
    assert first.returncode == 0, first.stderr
    assert in_process(place, *words) == 0
    again = capsys.readouterr()
    printed = [json.loads(first.stdout), json.loads(again.out)]
    assert [done["results"][0]["skipped"] for done in printed] == [False, True]
    assert printed[0]["failed"] == []
    scores = json.loads(Path(printed[0]["results"][0]["path"]).read_text())["levels"][0]["scores"]
    assert 0 < scores["kl_nats"] < 10
    assert "nothing to evaluate: 1 done" in again.err
    assert (tmp_path / "results.csv").exists()


def test_failing_checkpoint_exits_1_last(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failing checkpoint exits 1 after the others."""
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a checkpoint")
    assert (
        in_process(place, str(bad), str(place / "runs"), "--out", str(tmp_path / "out"), "--scores", "ev", "--json")
        == 1
    )
    done = capsys.readouterr()
    found = json.loads(done.out)
    assert len(found["results"]) == 1
    assert "bad.safetensors: not a whole safetensors file" in found["failed"][0]["error"]
    assert done.err.strip().endswith("error: checkpoints that failed: 1; that have results: 1")


def in_process(place: Path, *words: str) -> int:
    """The exit code of the same program without starting a Python; its output goes to capsys."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["evaluate", *words, "--store", str(place / "acts.zarr")])
        main(evaluate, "evaluate")
    return int(str(stop.value.code))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["none"], 1, "error: none: no such checkpoint or folder"),
        (["--scores", "fid"], 2, "--scores 'fid' is not one of kl, ev, l0, coding, features"),
        (["--scores", "scr"], 2, "--scores scr needs texts with two attributes; give --scr PATH_OR_ID"),
        (["--levels", "x"], 2, "--levels 'x'"),
    ],
)
def test_user_errors_are_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    """What a user caused is one line."""
    places = [] if words[0] == "none" else [str(place / "runs")]
    assert in_process(place, *places, *words, "--out", str(tmp_path / "out")) == code
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_help_has_an_example_and_defaults() -> None:
    """Help has an example and defaults."""
    text = CliRunner().invoke(evaluate, ["--help"]).output
    assert "python -m evaluate runs/paper --store acts.zarr" in text
    for option in ("--scores", "--levels", "--all-steps", "--max-memory", "--dry-run", "--json", "--scr"):
        assert option in text
    assert "[default: 16]" in text


def options(**changes: object) -> dict[str, object]:
    plain = {"scores": None, "sources": (), "scr_text": None, "scr_attributes": None, "scr_seeds": 3}
    sizes = {"scr_train_size": 400, "scr_test_size": 100, "scr_context": 64, "scr_resample": True}
    sizes |= {"scr_pairs": (), "scr_n": "20,5", "probe_k": "1"}
    return plain | sizes | {"store": Path("s"), "out": Path("o")} | changes


def test_texts_bring_their_scores_with_them() -> None:
    """Texts bring their scores with them."""
    assert make_config(**options()).probing is None
    config = make_config(**options(sources=("data/scr",), scr_attributes="a,b"))
    assert config.probing.scores == ("scr", "tpp", "k_sparse_probe")
    assert (config.probing.attributes, config.probing.seeds) == (("a", "b"), (42, 43, 44))
    assert (config.probing.n_values, config.probing.k_values) == ((5, 20), (1,))
    paired = make_config(**options(sources=("data/scr",), scr_pairs=("a, b", "c,d"))).probing.pairs
    assert paired == (("a", "b"), ("c", "d"))
    only = make_config(**options(sources=("data/scr",), scores="kl,scr"))
    assert (only.scores, only.probing.scores) == (("kl",), ("scr",))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scr_attributes": "a"}, "--scr-attributes 'a': give two columns"),
        ({"scr_pairs": ("a,",)}, "--scr-pair 'a,': give two values"),
        ({"scr_n": "5,0"}, "--scr-n '5,0': give whole numbers from 1"),
        ({"probe_k": "x"}, "--probe-k 'x': give whole numbers"),
    ],
)
def test_what_texts_take_is_checked(wrong: dict[str, object], message: str) -> None:
    """What texts take is checked."""
    with pytest.raises(UsageError, match=message):
        make_config(**options(sources=("data/scr",), **wrong))


def test_latent_pages_are_made_once(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pages of latents are made for the members asked for and once."""
    words = (str(place / "runs"), "--model", str(place / "model"), "--out", str(tmp_path), "--scores", "ev", "--json")
    skipped = []
    for latents in ((), ("--latents", "nobody"), ("--latents", "all"), ("--latents", "all")):
        assert in_process(place, *words, *latents) == 0
        skipped.append(json.loads(capsys.readouterr().out)["results"][0]["skipped"])
    assert skipped == [False, True, False, True]
    assert len(list(tmp_path.glob("*.latents/index.js"))) == 1
