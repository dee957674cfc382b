"""Results on disk: whole, finite, recognised by key, and one CSV from all of them however many jobs write."""

from __future__ import annotations

import csv
import errno
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evaluate import results
from evaluate.report.runs import read_results
from evaluate.results import families_done, merged, not_finite, result_path, tabulate, write_result
from pipeline.base.errors import CheckpointError, DamagedError
from pipeline.base.results import names_apart, read_result
from pipeline.definitions import METRICS
from support.results_files import write_results

ROOT = Path(__file__).parents[1]


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def data(key: str = "a" * 64, **scores: Any) -> dict[str, Any]:
    """The parts of a results file that the CSV reads."""
    level = {"level": 0, "n_latents": 8, "scores": {"ev": 0.5, **scores}, "scores_without_massive": {"ev": None}}
    provenance = {"member": "m", "train": {"seed": 4}}
    return {
        "key": key,
        "checkpoint": {"path": "x.safetensors", "step": 3, "sae": {"width": 8}, "provenance": provenance},
        "store": {"id": "b" * 64, "layer": 19},
        "levels": [level],
        "series": {"scr": [{"n": 5, "level": 0, "value": 0.25, "low": None, "high": None}]},
    }


def test_written_results_are_done_by_key(tmp_path: Path) -> None:
    """Results that were written are done under their key only."""
    path = result_path(tmp_path, "m", 3, "a" * 64)
    assert path.name == "m-step_000003-aaaaaaaaaa.json"
    assert families_done(path, "a" * 64) == {}
    write_result(path, data() | {"evaluation": {"families": {"ev": {}, "kl": {"dtype": "bf16"}}}})
    assert families_done(path, "a" * 64) == {"ev": {}, "kl": {"dtype": "bf16"}}
    with pytest.raises(DamagedError, match="its key is"):
        families_done(path, "a" * 10 + "b" * 54)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_infinite_number_stops_the_write(tmp_path: Path, bad: float) -> None:
    """A number that is not finite is an error that names it and nothing is written."""
    path = tmp_path / "m-step_000003-aaaaaaaaaa.json"
    with pytest.raises(CheckpointError, match=r"x\.safetensors: levels\.0\.scores\.kl_nats is not a finite number"):
        write_result(path, data(kl_nats=bad))
    assert list(tmp_path.iterdir()) == []


def test_undefined_scores_are_null_and_empty(tmp_path: Path) -> None:
    """Undefined scores are null and an empty field."""
    path = result_path(tmp_path, "m", 3, "a" * 64)
    write_result(path, data(ce_score=None))
    assert json.loads(path.read_text())["levels"][0]["scores"]["ce_score"] is None
    row = read_csv(tabulate(tmp_path))[0]
    assert row["ce_score"] == row["ev_without_massive"] == ""


def test_members_called_alike_are_apart() -> None:
    """Folders of one name are called by as many parts as tell all of them apart; steps of one member are no two."""
    told = names_apart(
        [
            ("L3-trainer_0", "/s/suite_a/L3/trainer_0"),
            ("L3-trainer_0", "/s/suite_b/L3/trainer_0"),
            ("L3-trainer_1", "/s/suite_b/L3/trainer_1"),
            ("alpha0", "/r/alpha0/checkpoints/step_000001.safetensors"),
            ("alpha0", "/r/alpha0/checkpoints/step_000002.safetensors"),
        ]
    )
    assert told == ["suite_a/L3/trainer_0", "suite_b/L3/trainer_0", "L3-trainer_1", "alpha0", "alpha0"]
    assert names_apart([("x", "x"), ("x", "a/x")]) == ["x", "a/x"]


def test_suites_called_alike_are_apart(tmp_path: Path) -> None:
    """Two suites' trainer_0 have names of their own in results.csv and in every run of a report."""
    [path] = write_results(tmp_path, alphas=(0.0,), seeds=(0,), steps=(400,))
    first = read_result(path)
    path.unlink()
    for suite in "ab":
        about = {"path": f"/s/{suite}/L3/trainer_0", "sha256": suite * 64, "provenance": {"member": "L3-trainer_0"}}
        name = result_path(tmp_path, "L3-trainer_0", 400, suite * 64)
        write_result(name, first | {"checkpoint": first["checkpoint"] | about, "key": suite * 64})
    names = {"a/L3/trainer_0", "b/L3/trainer_0"}
    assert {row["member"] for row in read_csv(tabulate(tmp_path))} == names
    assert {run.checkpoint.member for run in read_results([tmp_path]).runs} == names


def test_csv_has_a_row_each_level(tmp_path: Path) -> None:
    """The CSV has a row a checkpoint and level with training scores and series."""
    paths = write_results(tmp_path, alphas=(0.0, 0.2), seeds=(0, 1), steps=(100,))
    rows = read_csv(tabulate(tmp_path))
    assert len(rows) == 2 * 1 + 2 * 2  # a flat SAE has one level, a nested one two
    assert {row["file"] for row in rows} == {path.name for path in paths}
    nested = next(row for row in rows if row["alpha"] == "0.2" and row["level"] == "1")
    result = next(read_result(path) for path in paths if path.name == nested["file"])
    assert float(nested["kl_nats"]) == result["levels"][1]["scores"]["kl_nats"]
    points = [p["value"] for p in result["series"]["scr"] if (p["n"], p["level"]) == (20, 1)]
    assert [float(nested["scr_20"])] == points


def scored(family: str, value: float, task: str, *, settings: int = 0) -> dict[str, Any]:
    """Results of one family of texts on one task."""
    row = [{"n": 5, "level": 0, "value": value, "low": None, "high": None}]
    return data() | {
        "evaluation": {"levels": "all", "families": {family: {"settings": settings}}},
        "sample": {"n_rows": 4, "probing": {task: {"scores": [family], "rows": 9}}},
        "baselines": {},
        "series": {family: row},
        "features": {"probing": {task: {family: row}}},
    }


def test_families_are_added_to_a_file() -> None:
    """Scores of another family stand beside those that are there."""
    found = merged(scored("scr", 0.1, "books"), scored("tpp", 0.2, "books") | {"baselines": {"kl_zero": 1.0}})
    assert {name: rows[0]["value"] for name, rows in found["series"].items()} == {"scr": 0.1, "tpp": 0.2}
    assert found["features"]["probing"]["books"].keys() == {"scr", "tpp"}
    assert found["sample"]["probing"] == {"books": {"scores": ["scr", "tpp"], "rows": 9}}
    assert found["evaluation"]["families"].keys() == {"scr", "tpp"}
    assert found["baselines"] == {"kl_zero": 1.0}


def test_family_scored_anew_leaves_nothing_behind() -> None:
    """A family with other settings replaces its old self, tasks of other texts too, and no other family."""
    old = merged(scored("scr", 0.1, "books"), scored("tpp", 0.2, "books"))
    found = merged(old, scored("scr", 0.3, "news", settings=1))
    assert found["series"]["scr"][0]["value"] == 0.3
    assert found["features"]["probing"]["books"].keys() == {"tpp"}
    assert found["features"]["probing"]["news"].keys() == {"scr"}
    assert {name: task["scores"] for name, task in found["sample"]["probing"].items()} == {
        "books": ["tpp"],
        "news": ["scr"],
    }
    assert found["evaluation"]["families"] == {"scr": {"settings": 1}, "tpp": {"settings": 0}}


def test_file_of_another_version_is_refused(tmp_path: Path) -> None:
    """A file of another version is refused."""
    path = tmp_path / "m-step_000003-aaaaaaaaaa.json"
    path.write_text('{"format": "nested-sae-results", "version": 2}')
    with pytest.raises(DamagedError, match="of version 1, found 'nested-sae-results' 2"):
        read_result(path)


def test_finiteness_check_is_deep() -> None:
    """Not finite looks into lists and mappings."""
    assert list(not_finite({"a": [1.0, {"b": math.nan}], "c": None, "d": "nan", "e": 3})) == ["a.1.b"]


def test_concurrent_jobs_share_one_csv(tmp_path: Path) -> None:
    """Jobs that write at the same time leave a CSV of all results."""
    program = (
        "import sys; sys.path[:0] = ['tests']\n"
        "from pathlib import Path; from evaluate.results import *; from support.results_files import write_results\n"
        "out, seed = Path(sys.argv[1]), int(sys.argv[2])\n"
        "for step in (1, 2, 3): write_results(out, alphas=(0.2,), seeds=(seed,), steps=(step,)); tabulate(out)\n"
    )
    jobs = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(seed)], cwd=ROOT) for seed in range(3)]
    assert [job.wait() for job in jobs] == [0, 0, 0]
    rows = read_csv(tmp_path / "results.csv")
    assert sorted((row["seed"], row["step"]) for row in rows if row["level"] == "1") == [
        (str(seed), str(step)) for seed in range(3) for step in (1, 2, 3)
    ]


def test_each_metric_is_defined_once() -> None:
    """No metric id is defined twice: the later definition would silently win."""
    written = re.findall(r'Metric\(\s*"(\w+)"', (ROOT / "pipeline" / "definitions.py").read_text())
    assert len(written) == len(set(written)) == len(METRICS)


def test_metrics_have_unit_direction_definition() -> None:
    """Every metric has a unit, a direction and a definition."""
    for name, metric in METRICS.items():
        assert name == metric.id
        assert metric.unit
        assert metric.definition
        assert metric.better in ("lower", "higher", "neither")


def test_folder_without_locks_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the file system has no locks results are written all the same, and this is said; other troubles are errors."""
    codes = [errno.ENOSYS, errno.ENOLCK, errno.EIO]

    def without(_file: object, _how: int) -> None:
        raise OSError(codes.pop(0), "no")

    monkeypatch.setattr(results.fcntl, "flock", without)
    for _ in range(2):
        with results.locked(tmp_path):
            pass
    assert capsys.readouterr().err.count("its file system has no locks") == 2
    with pytest.raises(OSError, match="no"), results.locked(tmp_path):
        pass
