"""kill -9 at any moment, then the same command: the bytes of a run that was never interrupted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.sae.checkpoint import load_checkpoint
from support.train_crasher import crash_config
from train.folder import Folder, read_state
from train.run import run

pytestmark = pytest.mark.usefixtures("one_thread")


States = dict[tuple[str, int], dict[str, Tensor]]


@pytest.fixture(scope="module")
def uninterrupted(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, States]:
    """The folder of a run that nobody killed, and every state that it wrote."""
    out, states = tmp_path_factory.mktemp("whole") / "out", {}
    write_state = Folder.write_state

    def note(folder: Folder, state: dict[str, Tensor], step: int, metrics_sha256: str) -> None:
        states[folder.name, step] = {name: tensor.clone() for name, tensor in state.items()}
        write_state(folder, state, step, metrics_sha256)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "write_state", note)
        run(crash_config(tiny_store, out))
    return out, states


def crash(store: Path, out: Path, seed: int, kills: int, how: str) -> int:
    """Run the crasher; the number of children that were killed before their end."""
    words = [sys.executable, str(Path(__file__).parent / "support" / "train_crasher.py")]
    words += [str(store), str(out), str(seed), str(kills), how]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_same_run(out: Path, whole: Path, states: States) -> None:
    """Same files, checkpoints, metrics; and every state that a kill left is one that the whole run wrote."""
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*"))
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == names
    for name in names:
        if name.endswith(".safetensors"):
            (a, header_a), (b, header_b) = load_checkpoint(out / name), load_checkpoint(whole / name)
            assert_same_tensors(a.state_dict(), b.state_dict())
            assert without_git(header_a.provenance) == without_git(header_b.provenance)
        elif name.endswith(("metrics.jsonl", "config.json")):
            assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    for path in Path(f"{out}.states").glob("*"):
        state = read_state(path)
        assert_same_tensors(state.tensors, states[state.member, state.step])


def without_git(provenance: dict[str, Any]) -> dict[str, Any]:
    """Provenance less the state of the checkout, which may change while tests run."""
    return {name: value for name, value in provenance.items() if name != "git"}


def test_kills_at_random_moments_change_nothing(
    tiny_store: Path, tmp_path: Path, uninterrupted: tuple[Path, States]
) -> None:
    """Kills at random moments change nothing."""
    assert crash(tiny_store, tmp_path / "out", seed=0, kills=5, how="random") == 5
    assert_same_run(tmp_path / "out", *uninterrupted)


def test_kills_within_writes_change_nothing(
    tiny_store: Path, tmp_path: Path, uninterrupted: tuple[Path, States]
) -> None:
    """Kills within writes change nothing."""
    assert crash(tiny_store, tmp_path / "out", seed=17, kills=8, how="writes") > 4
    assert_same_run(tmp_path / "out", *uninterrupted)
    assert list(Path(f"{tmp_path / 'out'}.states").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["random", "writes"])
@pytest.mark.parametrize("seed", [5, 20, 40])
def test_many_kills_change_nothing(
    tiny_store: Path, tmp_path: Path, uninterrupted: tuple[Path, States], seed: int, how: str
) -> None:
    """Many kills change nothing."""
    assert crash(tiny_store, tmp_path / "out", seed, kills=40, how=how) >= {"random": 40, "writes": 1}[how]
    assert_same_run(tmp_path / "out", *uninterrupted)
