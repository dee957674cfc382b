"""Peers in the training benchmark."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import bench_train

PEERS = """#!/usr/bin/env python3
import json, sys, time
print(json.dumps(["quick", "endless", "crashing"]), flush=True)
for line in sys.stdin:
    if line.strip() == "endless":
        open(sys.argv[0] + ".asleep", "w").close()
        time.sleep(3600)
    if line.strip() == "crashing":
        sys.exit(1)
    print(0.25, flush=True)
"""


class WhenAsleep(threading.Thread):
    """A limit that is over when the peer that never ends has begun, however slow the machine."""

    def __init__(self, place: Path, kill: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.place, self.kill, self.done = place, kill, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.01):
            if self.place.exists():
                self.place.unlink()
                self.kill()
                return

    def cancel(self) -> None:
        self.done.set()


def test_endless_peer_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that takes too long, or ends, costs itself alone: the others, and ours, are still measured."""
    stand_in = tmp_path / "python"
    stand_in.write_text(PEERS)
    stand_in.chmod(0o755)
    place = tmp_path / "python.asleep"
    monkeypatch.setattr("bench_train.threading.Timer", lambda _seconds, kill: WhenAsleep(place, kill))
    monkeypatch.setattr(bench_train, "OURS", {})
    medians = bench_train.measure_shape((8, 16, 4), 1, "float32", torch.device("cpu"), str(stand_in))
    assert list(medians) == ["floor", "quick"]
    assert medians["quick"] == 0.25
