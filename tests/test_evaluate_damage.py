"""Evaluation meets damaged and hostile files: found before scoring, at the cost of that one alone, nothing written outside."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from evaluate.results import working_in
from evaluate.run import EvaluateConfig, Outcome, run
from pipeline.base.errors import DiskError
from pipeline.base.files import hash_file, write_json
from pipeline.sae.checkpoint import load_checkpoint, save_checkpoint
from pipeline.store.reader import Store
from support import lm_stores


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A small store, read-only."""
    return lm_stores.make_lm_store(tmp_path_factory.mktemp("damage"), eval_sequences=4)


@pytest.fixture
def runs(store: Store, tmp_path: Path) -> Path:
    """Two members that a test may damage."""
    for seed in (0, 1):
        lm_stores.save_member(tmp_path / "runs", store, lm_stores.make_sae(store, seed=seed), seed=seed)
    return tmp_path / "runs"


def scored(store: Store, out: Path, *places: Path) -> Outcome:
    return run(EvaluateConfig(store=store.path, out=out, scores=("ev",)), places)


def test_lost_metrics_are_said(store: Store, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished member whose metrics are gone is evaluated, and that its results lack its curve is said."""
    member = sorted(runs.iterdir())[0]
    complete = member / "complete.json"
    write_json(complete, json.loads(complete.read_text()) | {"metrics_sha256": hash_file(member / "metrics.jsonl")})
    (member / "metrics.jsonl").unlink()
    assert len(scored(store, tmp_path / "out", runs).results) == 2
    assert capsys.readouterr().err.count(f"{member / 'metrics.jsonl'}: gone, so results") == 1


def with_provenance(runs: Path, **changes: Any) -> Path:
    """The first member's checkpoint with other provenance, as a file of its own."""
    sae, header = load_checkpoint(next(sorted(runs.iterdir())[0].glob("checkpoints/*")))
    path = runs.parent / "hostile.safetensors"
    save_checkpoint(path, sae, header.step, header.provenance | changes)
    return path


@pytest.mark.parametrize("member", ["../../outside/evil", "/tmp/evil", "a\0b", "x" * 300, "..", ".hidden", "é/ü"])
def test_no_name_leads_outside(store: Store, runs: Path, tmp_path: Path, member: str) -> None:
    """Whatever a checkpoint calls itself, its results lie in --out under a name of at most 255 bytes."""
    out = tmp_path / "deep" / "out"
    before = {path for path in tmp_path.rglob("*") if out not in path.parents}
    outcome = scored(store, out, with_provenance(runs, member=member))
    (written,) = (Path(entry["path"]) for entry in outcome.results)
    assert written.parent == out
    assert written.is_file()
    assert len(written.name.encode()) <= 255
    assert not written.name.startswith(".")
    after = {path for path in tmp_path.rglob("*") if out not in path.parents and path not in (out, out.parent)}
    assert after - before == {tmp_path / "hostile.safetensors"}


@pytest.mark.parametrize(
    "changes", [{"member": ["a"]}, {"member": "\ud800"}, {"store": [1]}, {"store": {"layer": {"a": "\udfff"}}}]
)
def test_header_of_wrong_types_costs_itself(store: Store, runs: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Provenance of other types is a failure of that checkpoint in one line, before scoring."""
    sae, header = load_checkpoint(next(sorted(runs.iterdir())[0].glob("checkpoints/*")))
    path = tmp_path / "hostile.safetensors"
    data = {"format": "nested-sae-checkpoint", "version": 1, "sae": sae.config.to_dict(), "step": header.step}
    data |= {"provenance": header.provenance | changes}
    save_file(sae.state_dict(), path, {name: json.dumps(value) for name, value in data.items()})
    outcome = scored(store, tmp_path / "out", path, runs)
    assert [failed for failed, _ in outcome.failed] == [path]
    assert "\n" not in str(outcome.failed[0][1])
    assert len(outcome.results) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b'{"step": 1, "loss": "\xff"}\n', "line 1 is not JSON"),
        (b'[1]\n{"step": 2}\n', "should be an object"),
        (b'{"step": "one"}\n', "'step' should be a whole number"),
        (b'{"step": 1, "loss": NaN}\n', "no number that can be"),
        (b"[" * 100_000 + b"\n", "line 1 is not JSON"),
    ],
)
def test_bad_metrics_cost_one_before_scoring(
    store: Store, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes, message: str
) -> None:
    """A damaged metrics.jsonl costs its member alone and is found before anything is scored."""
    first = sorted(runs.iterdir())[0]
    (first / "metrics.jsonl").write_bytes(damage)
    outcome = scored(store, tmp_path / "out", runs)
    assert [path.parent.parent for path, _ in outcome.failed] == [first]
    assert message in str(outcome.failed[0][1])
    assert len(outcome.results) == 1
    monkeypatch.setattr("evaluate.run.score_group", lambda *_: pytest.fail("scored"))
    assert len(scored(store, tmp_path / "other", first).failed) == 1


def test_final_outside_member_is_unread(store: Store, runs: Path, tmp_path: Path) -> None:
    """A complete.json that names a file elsewhere is damage."""
    first = sorted(runs.iterdir())[0]
    write_json(first / "complete.json", {"final": "../../elsewhere.safetensors", "sha256": "0"})
    outcome = scored(store, tmp_path / "out", first)
    assert "the final checkpoint that complete.json names is gone" in str(outcome.failed[0][1])
    write_json(first / "complete.json", {"final": 3})
    assert "'final' should be text" in str(scored(store, tmp_path / "out", first).failed[0][1])


@pytest.mark.parametrize("place", ["file", "file/under", "dangling"])
def test_out_without_folder_found_first(
    store: Store, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """An --out that cannot be written to is one line before any checkpoint is opened."""
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at" / "all" / "file")
    (tmp_path / "nowhere").write_text("")
    monkeypatch.setattr("evaluate.run.select", lambda *_: pytest.fail("opened"))
    with pytest.raises(DiskError, match="no folder to write to"):
        scored(store, tmp_path / place, runs)


def leave(out: Path) -> list[Path]:
    """What killed jobs leave: a partly written file, pages whose results never came; and pages that have results."""
    out.mkdir()
    left = [out / "a-step_000001-0123456789.json.77.partial", out / "a-step_000001-0123456789.latents"]
    left[0].write_text("{")
    for pages in (left[1], out / "b-step_000001-0123456789.latents"):
        pages.mkdir()
        (pages / "page_0000.js").write_text("")
    (out / "b-step_000001-0123456789.json").write_text("{}")
    return left


def test_leftovers_of_killed_jobs_are_swept(tmp_path: Path) -> None:
    """A job that is alone deletes partly written files and pages without results, nothing else."""
    left = leave(tmp_path / "out")
    with working_in(tmp_path / "out"):
        assert not any(path.exists() for path in left)
    assert (tmp_path / "out" / "b-step_000001-0123456789.latents" / "page_0000.js").exists()


def test_leftovers_stay_beside_another_job(tmp_path: Path) -> None:
    """What may be another job's unfinished work is left alone."""
    left = leave(tmp_path / "out")
    with open(tmp_path / "out" / ".jobs", "w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with working_in(tmp_path / "out"):
            assert all(path.exists() for path in left)


@pytest.mark.parametrize("damage", ["gone", "pipe", "dangling", "no checkpoints", "no final", "closed"])
def test_damaged_member_is_named(
    store: Store, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Whatever is gone of a member's folder, evaluating all of them names it and scores the others."""
    first = sorted(runs.iterdir())[0]
    config = first / "config.json"
    if damage in ("gone", "pipe", "dangling"):
        config.unlink()
    if damage == "pipe":
        os.mkfifo(config)
    elif damage == "dangling":
        config.symlink_to(tmp_path / "nowhere")
    elif damage == "no checkpoints":
        shutil.rmtree(first / "checkpoints")
    elif damage == "no final":
        next(first.glob("checkpoints/*")).write_bytes(b"")
    elif damage == "closed":  # root may look into every folder
        config.unlink()
        for name in ("is_file", "is_dir"):
            monkeypatch.setattr(Path, name, closed(first, getattr(Path, name)))
    outcome = scored(store, tmp_path / "out", runs)
    ((failed, error),) = outcome.failed
    assert first in (failed, *failed.parents)
    assert str(first) in str(error)
    assert len(outcome.results) == 1


def closed(folder: Path, look: Callable[[Path], bool]) -> Callable[[Path], bool]:
    """A look at a path that fails in this folder, as it does in another's."""

    def refused(path: Path) -> bool:
        if path.parent == folder:
            raise PermissionError(errno.EACCES, "Permission denied")
        return look(path)

    return refused
