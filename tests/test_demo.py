"""The demo, killed once in each of its stages at a random moment and started again: the same stores, SAEs and scores."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from test_experiment import snapshot

ROOT = Path(__file__).parents[1]
STAGES = ("harvest", "train", "evaluate", "report")


def start(out: Path) -> subprocess.Popen[bytes]:
    """The demo into a folder, in a process of its own."""
    words = [sys.executable, "-m", "pipeline", "demo", "--out", str(out)]
    return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)


def begun(out: Path, stage: str, runs: int) -> bool:
    """Whether the stage's log shows that it began more than `runs` times."""
    log = out / "logs" / f"{stage}.log"
    return log.exists() and log.read_text(errors="replace").count("$ python -m ") > runs


def wait_for(process: subprocess.Popen[bytes], out: Path, stage: str, runs: int) -> None:
    """Wait until the stage begins; fail when the demo ends before."""
    while not begun(out, stage, runs):
        assert process.poll() is None, f"the demo ended before {stage}"
        time.sleep(0.02)


def scores(out: Path) -> dict[str, Any]:
    """Every results file but for where its checkpoint lies."""
    found = {}
    for path in sorted((out / "results").rglob("*-step_*.json")):
        found[path.name] = json.loads(path.read_text())
        del found[path.name]["checkpoint"]["path"]
    return found


@pytest.mark.slow
def test_demo_survives_kills_in_each_stage(tmp_path: Path) -> None:
    """The demo killed once in each stage ends with the same result."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole)
    times = []
    for stage in STAGES:
        wait_for(process, whole, stage, 0)
        times.append(time.monotonic())
    assert process.wait() == 0
    lengths = [b - a for a, b in zip(times, [*times[1:], time.monotonic()])]
    rng = random.Random()
    for stage, length in zip(STAGES, lengths):
        log = killed / "logs" / f"{stage}.log"
        runs = log.read_text(errors="replace").count("$ python -m ") if log.exists() else 0
        process = start(killed)
        wait_for(process, killed, stage, runs)
        delay = rng.uniform(0.05, 0.7) * length  # lengths differ from run to run
        time.sleep(delay)
        assert process.poll() is None, f"{stage} was over before {delay:.1f} s of {length:.1f} s"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.5)
        print(f"killed {stage} {delay:.1f} s after it began; it takes {length:.1f} s")
        assert not (killed / "report.html").exists()
    assert start(killed).wait() == 0
    assert snapshot(killed) == snapshot(whole)
    assert scores(killed) == scores(whole)
    assert len(scores(whole)) == 24
    pages = [(out / "report.html").read_text().replace(str(out), "OUT") for out in (whole, killed)]
    assert pages[0] == pages[1]
