"""Watching a training: what its files say, as a table and as a page that loads nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.__main__ import cli
from pipeline.base.errors import UsageError
from pipeline.base.files import lock_folder
from pipeline.experiment.describe import describe
from pipeline.watch import MOST_POINTS, page, read_lines, table, thinned, watched

NOW = 1_000_000.0


def member(
    runs: Path, name: str, lines: list[Any], *, steps: int = 100, finished: bool = False, tail: str = ""
) -> Path:
    """A member's folder with these lines of metrics; the last was written a minute ago."""
    folder = runs / name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": {"steps": steps}}))
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + tail)
    (folder / "timings.jsonl").write_text(json.dumps({"step": 20, "rows_per_s": 12345.6}) + "\n")
    os.utime(folder / "metrics.jsonl", (NOW - 60, NOW - 60))
    if finished:
        (folder / "complete.json").write_text("{}")
    return folder


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "ev": [0.25, 0.5], "l0": 8.0, "dead": 0.125} | more


def test_the_table_says_where_members_stand(tmp_path: Path) -> None:
    """Newest values, the whole dictionary's of a list, held-out ones of the last line that has them."""
    member(tmp_path, "a", [line(10, eval_ev=[0.1, 0.2], eval_l0=[3.0, 7.5]), line(20)])
    member(tmp_path, "b", [line(100)], finished=True)
    lock = lock_folder(tmp_path / "a", "training this member")
    head, a, b = table(watched(tmp_path, NOW)).splitlines()
    os.close(lock)
    assert head.split()[:4] == ["member", "step", "loss", "ev"]
    assert a.split() == ["a", "20", "of", "100", "0.05", "0.5", "8", "0.125", "0.2", "7.5", "12,346", "training"]
    assert b.split()[-1] == "finished"


def test_members_stand_in_order(tmp_path: Path) -> None:
    """Seed 2 before seed 10."""
    for name in ("a-seed10", "a-seed2", "b", "a-seed1"):
        member(tmp_path, name, [line(10)])
    assert [one.name for one in watched(tmp_path, NOW)] == ["a-seed1", "a-seed2", "a-seed10", "b"]


def test_quiet_training_is_said(tmp_path: Path) -> None:
    """No line for an hour."""
    member(tmp_path, "a", [line(10)])
    assert watched(tmp_path, NOW + 3600)[0].state.startswith("quiet for 1 h")


def test_killed_training_is_not_training(tmp_path: Path) -> None:
    """Who holds the folder's lock is training; killed at once, it has stopped, and asking left nothing behind."""
    member(tmp_path, "a", [line(10)])
    before = sorted(tmp_path.rglob("*"))
    program = (
        "import sys; from pathlib import Path; from pipeline.base.files import lock_folder; "
        "held = lock_folder(Path(sys.argv[1]), ''); print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "a")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "held\n"
        assert watched(tmp_path, NOW)[0].state == "training"
        assert watched(tmp_path, NOW + 3600)[0].state.startswith("training, quiet for 1 h")
        trainer.kill()
    assert watched(tmp_path, NOW)[0].state == "stopped, or on another machine"
    assert sorted(tmp_path.rglob("*")) == before


def test_lock_that_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a disk has no locks, a training is one until it is quiet."""
    member(tmp_path, "a", [line(10)])
    monkeypatch.setattr("pipeline.watch.is_locked", lambda folder: None)
    assert watched(tmp_path, NOW)[0].state == "training"
    assert watched(tmp_path, NOW + 3600)[0].state.startswith("quiet for 1 h")


@pytest.mark.parametrize(("data", "said"), [(None, "gone"), (b"{", "unreadable")])
def test_lost_config_is_said(tmp_path: Path, data: bytes | None, said: str) -> None:
    """A member whose config.json is gone or damaged is shown, and what to do; describe names it beside the others."""
    config = member(tmp_path, "a", [line(10)]) / "config.json"
    member(tmp_path, "b", [line(10)])
    config.unlink()
    if data is not None:
        config.write_bytes(data)
    (a, _) = watched(tmp_path, NOW)
    assert a.state.endswith(f"config.json {said}: put it back")
    assert "config.json" in describe(str(tmp_path))["a"]["problem"]


def test_torn_last_line_left_out(tmp_path: Path) -> None:
    """It is being written."""
    member(tmp_path, "a", [line(10)], tail='{"step": 20, "lo')
    (found,) = watched(tmp_path, NOW)
    assert (found.step, found.unread) == (10, 0)


@pytest.mark.parametrize("bad", ["{", "[1]", '{"loss": 1}', '{"step": "9"}', '{"step": 1e999}', "[" * 5000])
def test_broken_lines_are_counted(tmp_path: Path, bad: str) -> None:
    """And everything else is shown."""
    member(tmp_path, "a", [line(10), bad, line(20)])
    (found,) = watched(tmp_path, NOW)
    assert (found.step, found.unread) == (20, 1)
    assert "1 lines unreadable" in table([found])


def test_values_no_numbers_not_drawn(tmp_path: Path) -> None:
    """NaN, true and text."""
    member(tmp_path, "a", ['{"step": 10, "loss": NaN, "l0": true, "ev": "x", "dead": 0.5}'])
    (found,) = watched(tmp_path, NOW)
    assert dict(found.last) == {"dead": 0.5}


def test_the_page_escapes_and_loads_nothing(tmp_path: Path) -> None:
    """A member's name is text; no address, no script; a policy forbids both."""
    member(tmp_path, "<img src=x onerror=alert(1)>", [line(10), line(20)])
    text = page(watched(tmp_path, NOW), "<script>alert(1)</script>", 5)
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;img src=x" in text
    assert "http:" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text


def test_page_renews_until_done(tmp_path: Path) -> None:
    """And no longer."""
    member(tmp_path, "a", [line(10)])
    assert '<meta http-equiv="refresh" content="7">' in page(watched(tmp_path, NOW), "runs", 7)
    (tmp_path / "a" / "complete.json").write_text("{}")
    assert "refresh" not in page(watched(tmp_path, NOW), "runs", 7)


def test_curves_stand_where_their_values_are(tmp_path: Path) -> None:
    """The largest value at the top, the smallest on the axis, first step left, last step right."""
    member(tmp_path, "a", [line(10, l0=30.0), line(20, l0=10.0)])
    text = page(watched(tmp_path, NOW), "runs", 5)
    drawn = text[text.index("L0, rows of training") :]
    assert '<path d="M46.0 6.0L476.0 200.0"' in drawn


def test_a_single_point_is_a_dot(tmp_path: Path) -> None:
    """A member with one held-out line has a mark where it stands, its step named once."""
    member(tmp_path, "a", [line(100, eval_ev=0.7)], finished=True)
    text = page(watched(tmp_path, NOW), "runs", 5)
    drawn = text[text.index("explained variance, held-out rows") :]
    assert '<circle cx="476.0" cy="103.0" r="3"' in drawn
    assert drawn.count(">100</text>") == 0
    assert drawn.count(">step 100</text>") == 1


def test_long_curves_keep_their_ends() -> None:
    """Thinned to MOST_POINTS."""
    kept = thinned([(i, float(i)) for i in range(5000)])
    assert len(kept) == MOST_POINTS
    assert (kept[0], kept[-1]) == ((0, 0.0), (4999, 4999.0))


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    """A member that has just begun."""
    assert read_lines(tmp_path / "metrics.jsonl") == ([], 0)


def test_the_command_writes_table_and_page(tmp_path: Path) -> None:
    """Once; without a member it says so in one line."""
    member(tmp_path / "runs", "a", [line(10)])
    words = ["watch", str(tmp_path / "runs"), "--once"]
    assert "10 of 100" in CliRunner().invoke(cli, words, catch_exceptions=False).output
    CliRunner().invoke(cli, [*words, "--page", str(tmp_path / "w.html")], catch_exceptions=False)
    assert (tmp_path / "w.html").read_text().startswith("<!doctype html>")
    (tmp_path / "none").mkdir()
    found = CliRunner().invoke(cli, ["watch", str(tmp_path / "none"), "--once"])
    assert isinstance(found.exception, UsageError)
