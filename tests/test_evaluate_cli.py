"""`python -m evaluate`: exit codes, --json, --help, one clear line for what a user caused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lm_stores
import pytest
from click.testing import CliRunner

from evaluate.__main__ import evaluate, make_config
from pipeline.errors import UsageError

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
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_job_prints_its_results_as_json_then_does_nothing_again(place: Path, tmp_path: Path) -> None:
    words = (str(place / "runs"), "--model", str(place / "model"), "--out", str(tmp_path), "--scores", "kl,ev", "--json")
    first, again = command(place, *words), command(place, *words)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr
    printed = [json.loads(done.stdout) for done in (first, again)]
    assert [done["results"][0]["skipped"] for done in printed] == [False, True]
    assert printed[0]["failed"] == []
    scores = json.loads(Path(printed[0]["results"][0]["path"]).read_text())["levels"][0]["scores"]
    assert 0 < scores["kl_nats"] < 10
    assert "nothing to evaluate: 1 done" in again.stderr
    assert (tmp_path / "results.csv").exists()


def test_a_failing_checkpoint_exits_1_after_the_others(place: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a checkpoint")
    done = command(place, str(bad), str(place / "runs"), "--out", str(tmp_path / "out"), "--scores", "ev", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert len(found["results"]) == 1
    assert "bad.safetensors: not a whole safetensors file" in found["failed"][0]["error"]
    assert done.stderr.strip().endswith("error: 1 checkpoints failed, 1 have results")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["none"], 1, "error: none: no such checkpoint or folder"),
        (["--scores", "fid"], 2, "--scores 'fid' is not one of kl, ev, l0, coding, features"),
        (["--scores", "scr"], 2, "--scores scr needs texts with two attributes; give --scr PATH_OR_ID"),
        (["--levels", "x"], 2, "--levels 'x'"),
    ],
)
def test_what_a_user_caused_is_one_line(place: Path, tmp_path: Path, words: list[str], code: int, message: str) -> None:
    places = [] if words[0] == "none" else [str(place / "runs")]
    done = command(place, *places, *words, "--out", str(tmp_path / "out"))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_help_has_an_example_and_defaults() -> None:
    text = CliRunner().invoke(evaluate, ["--help"]).output
    assert "python -m evaluate runs/paper --store acts.zarr" in text
    for option in ("--scores", "--levels", "--all-steps", "--max-memory", "--dry-run", "--json", "--scr"):
        assert option in text
    assert "[default: 16]" in text


def options(**changes: object) -> dict[str, object]:
    plain = {"scores": None, "sources": (), "scr_text": None, "scr_attributes": None, "scr_seeds": 3}
    sizes = {"scr_train_size": 400, "scr_test_size": 100, "scr_context": 64}
    return plain | sizes | {"store": Path("s"), "out": Path("o")} | changes


def test_texts_bring_their_scores_with_them() -> None:
    assert make_config(**options()).probing is None
    config = make_config(**options(sources=("data/scr",), scr_attributes="a,b"))
    assert config.probing.scores == ("scr", "tpp", "k_sparse_probe")
    assert (config.probing.attributes, config.probing.seeds) == (("a", "b"), (42, 43, 44))
    only = make_config(**options(sources=("data/scr",), scores="kl,scr"))
    assert (only.scores, only.probing.scores) == (("kl",), ("scr",))


def test_one_attribute_is_not_two() -> None:
    with pytest.raises(UsageError, match="give two columns"):
        make_config(**options(sources=("data/scr",), scr_attributes="a"))
