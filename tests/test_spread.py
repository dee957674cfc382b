"""`--processes`: members shared out over processes equal members alone, and the processes end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.base.errors import UsageError
from pipeline.base.processes import SPREAD_VARIABLE
from pipeline.base.spread import cores_divided, n_processes, rank_environment

ROOT = Path(__file__).parents[1]
GRID = ["--alpha", "0", "--alpha", "0.25", "--alpha", "0.5", "--width", "32", "--k", "4", "--batch-size", "32"]
GRID += ["--device", "cpu", "--dtype", "float32", "--threads", "1", "--eval-every", "0"]
CPU = torch.device("cpu")


def start(store: Path, out: Path, *words: str, steps: int = 40, threads: int = 1) -> subprocess.Popen[str]:
    """`python -m train` on GRID with further words, so many threads in all."""
    words = (*words, "--steps", str(steps), "--checkpoint-every", str(max(steps // 8, 10)))
    return subprocess.Popen(
        [sys.executable, "-m", "train", "--store", str(store), "--out", str(out), *GRID, *words, "--json"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[list[dict[str, Any]], str]:
    """The members that it printed, and what it said; it has to end well."""
    output, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return json.loads(output)["members"], said


def files(out: Path) -> dict[str, bytes]:
    """Every file of the members that is the same whenever it is made."""
    kept = [path for path in sorted(out.rglob("*")) if path.is_file() and not path.name.startswith("timings.jsonl")]
    return {str(path.relative_to(out)): path.read_bytes() for path in kept}


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What becomes true while a process runs."""
    for _ in range(6000):
        if found := what():
            return found
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("it never came")


def children(process: subprocess.Popen[str]) -> list[int]:
    """The processes that it started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits to be taken note of."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_shared_out_members_equal_single_ones(tiny_store: Path, tmp_path: Path) -> None:
    """Two processes of one thread make the bytes that one of one thread makes, and members are told in the grid's order."""
    two, said = finish(start(tiny_store, tmp_path / "two", "--processes", "auto", threads=2))
    one, _ = finish(start(tiny_store, tmp_path / "one"))
    assert "2 processes of 1 threads share the members out" in said
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert [Path(m["folder"]).name for m in two] == [Path(m["folder"]).name for m in one]
    assert all(m["step"] == 40 and m["final"] and not m["problem"] for m in two)
    _, again = finish(start(tiny_store, tmp_path / "two", "--processes", "auto", threads=2))
    assert "processes" not in again  # nothing is left to share out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the others live on")
def test_killed_first_takes_others_along(tiny_store: Path, tmp_path: Path) -> None:
    """kill -9 of the first process ends the others at once: nobody writes on behind the back of the next run."""
    out = tmp_path / "out"
    process = start(tiny_store, out, "--processes", "3", steps=10_000, threads=3)
    others = wait_for(lambda: len(list(out.glob("*/metrics.jsonl"))) == 3 and children(process), process)
    process.kill()
    process.communicate()
    for _ in range(200):
        if all(has_ended(pid) for pid in others):
            break
        time.sleep(0.05)
    assert len(others) == 2
    assert all(has_ended(pid) for pid in others)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_stopped_first_stops_others(tiny_store: Path, tmp_path: Path, number: int) -> None:
    """A signal to the first process has all write their states; the same command goes on to the same bytes."""
    out, n = tmp_path / "out", 800
    process = start(tiny_store, out, "--processes", "2", steps=n, threads=2)
    others = wait_for(lambda: len(list(out.glob("*/metrics.jsonl"))) == 3 and children(process), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 130, said
    assert "stopped; the state of every member is written" in said
    assert all(has_ended(pid) for pid in others)
    members, _ = finish(start(tiny_store, out, "--processes", "2", steps=n, threads=2))
    finish(start(tiny_store, tmp_path / "whole", steps=n))
    assert all(member["step"] == n for member in members)
    assert files(out) == files(tmp_path / "whole")


def test_failed_other_is_shown(tiny_store: Path, tmp_path: Path) -> None:
    """What another process fails of is said, with what to do; the first one's members are finished all the same."""
    members, _ = finish(start(tiny_store, tmp_path, "--dry-run"))
    broken = Path(members[1]["folder"])
    broken.mkdir()
    (broken / "config.json").write_text("{")
    process = start(tiny_store, tmp_path, "--processes", "2", threads=2)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 1
    assert f"error: {broken / 'config.json'}" in said
    assert said.splitlines()[-1].startswith(
        "error: process 1 of 2 ended with exit code 1 (what it said is above); run the"
    )
    assert (Path(members[0]["folder"]) / "complete.json").exists()


def test_diverged_member_elsewhere_is_named(tiny_store: Path, tmp_path: Path) -> None:
    """A member that diverges in another process is an outcome like any other."""
    words = ["--lr", "1e-3", "--lr", "1e30"]
    process = start(tiny_store, tmp_path, *words, "--processes", "2", threads=2)
    output, said = process.communicate(timeout=600)
    assert output, said
    members = json.loads(output)["members"]
    assert process.returncode == 1
    assert "members diverged" in said.splitlines()[-1]
    assert any(member["problem"] for member in members[1::2])
    assert all(Path(m["folder"]).name in said.splitlines()[-1] for m in members if m["problem"])


def test_dry_run_plans_for_processes(tiny_store: Path, tmp_path: Path) -> None:
    """A dry run shows each process's members and a time for all."""
    members, said = finish(start(tiny_store, tmp_path / "out", "--dry-run", "--processes", "2", threads=2))
    assert "2 members, 0 finished" in said
    assert "1 members, 0 finished" in said
    assert " in 2 processes (" in said
    assert len(members) == 3
    assert not (tmp_path / "out").exists()


def test_a_process_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto is a process a core, never more than members; CUDA devices are counted there."""
    with cores_divided(1):
        torch.set_num_threads(4)
        assert [n_processes("auto", n, CPU) for n in (0, 1, 3, 9)] == [1, 1, 3, 4]
        assert n_processes(8, 9, CPU) == 8
        assert n_processes(8, 3, CPU) == 3
        with cores_divided(3) as each:
            assert each == torch.get_num_threads() == 1
        assert torch.get_num_threads() == 4
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert n_processes("auto", 9, torch.device("cuda")) == 2
    with pytest.raises(UsageError, match="--processes 3: 2 CUDA devices"):
        n_processes(3, 9, torch.device("cuda"))


@pytest.mark.parametrize("variable", [SPREAD_VARIABLE, "TORCHELASTIC_RUN_ID"])
def test_launched_processes_start_none(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun, and in a process that was started so, auto is one; more are refused."""
    monkeypatch.setenv(variable, "2")
    assert n_processes("auto", 9, CPU) == 1 == n_processes(1, 9, CPU)
    with pytest.raises(UsageError, match="a launcher set WORLD_SIZE=1 and shares the work out"):
        n_processes(2, 9, CPU)


def test_less_than_one_process_is_refused() -> None:
    """No process is no number of processes."""
    with pytest.raises(UsageError, match="--processes 0: must be at least 1, or auto"):
        n_processes(0, 9, CPU)


def test_ranks_are_as_torchruns() -> None:
    """A process is told its rank, how many there are and its threads."""
    told = rank_environment(1, 3, 2)
    assert (told["RANK"], told["LOCAL_RANK"], told["WORLD_SIZE"], told["LOCAL_WORLD_SIZE"]) == ("1", "1", "3", "3")
    assert told["OMP_NUM_THREADS"] == told["MKL_NUM_THREADS"] == "2"


def evaluated(runs: Path, store: Path, out: Path, *words: str) -> tuple[dict[str, Any], str]:
    """What `python -m evaluate` prints, in two threads, and what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "evaluate", runs, "--store", store, "--scores", "ev,l0", "--out", out, "--json", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout), done.stderr


def test_shared_out_checkpoints_are_scored(tiny_store: Path, tmp_path: Path) -> None:
    """Two processes score what one scores, say it in one order, name what fails; done, they are not started again."""
    members, _ = finish(start(tiny_store, tmp_path / "runs", threads=2))
    broken = Path(members[1]["final"])  # of the second process
    broken.write_bytes(broken.read_bytes()[:-1] + b"?")
    one, _ = evaluated(tmp_path / "runs", tiny_store, tmp_path / "one")
    two, said = evaluated(tmp_path / "runs", tiny_store, tmp_path / "two", "--processes", "2")
    assert "2 processes of 1 threads share the checkpoints out" in said
    assert [entry["member"] for entry in two["results"]] == [entry["member"] for entry in one["results"]]
    assert two["failed"] == one["failed"] != []
    assert f"failed: {broken}" in said
    numbers = [json.loads(Path(entry["path"]).read_text())["levels"][-1]["scores"]["ev"] for entry in one["results"]]
    again = [json.loads(Path(entry["path"]).read_text())["levels"][-1]["scores"]["ev"] for entry in two["results"]]
    assert again == pytest.approx(numbers, rel=1e-6)
    tables = [(tmp_path / name / "results.csv").read_text() for name in ("one", "two")]
    assert tables[0].count("\n") == tables[1].count("\n") == 4  # a line a level
    done, said = evaluated(tmp_path / "runs", tiny_store, tmp_path / "two", "--processes", "2")
    assert all(entry["skipped"] for entry in done["results"])
    assert "processes" not in said
