"""Rows and groups of the report, Table 1, and what its sentences claim."""

from __future__ import annotations

import re
import unittest.mock
from pathlib import Path

import pytest

from evaluate.report.found import headline
from evaluate.report.runs import read_results, sharing_label
from evaluate.report.table import make_table
from evaluate.report.wording import number, p_text, plus_minus
from evaluate.report.write import write_report
from evaluate.statistics import Estimate, compare, estimate, holm
from pipeline.base.errors import UsageError
from pipeline.base.files import read_json, write_json
from support.results_files import write_latent_pages, write_results


def report(folder: Path) -> str:
    """A report's markup, without figures: drawing them is most of the work."""
    with unittest.mock.patch("evaluate.report.write.make_figures", return_value=[]):
        return write_report([folder], folder / "report.html").read_text()


def test_table_1_holds_means_and_intervals(tmp_path: Path) -> None:
    """Table 1 holds means, intervals and the paper's own figures."""
    write_results(tmp_path, steps=(400,))
    results = read_results([tmp_path])
    row = results.main.rows[2]
    expected = estimate([run.levels[-1].scores["ev"] for run in row.runs])
    assert expected is not None
    assert expected.half is not None
    markup = report(tmp_path)
    mean, half = plus_minus(expected).split(" ± ")
    assert re.search(rf"{mean}<span class=\"half\">± {half}</span>", markup)
    for published in ("0.795", "0.787", "0.299", "85.07", "405"):
        assert published in markup


def test_holm_covers_every_test_once(tmp_path: Path) -> None:
    """Holm runs over all tests of the table with rescaled columns counted once."""
    write_results(tmp_path, steps=(400,))
    results = read_results([tmp_path])
    table = make_table(results)
    ids = ["kl_nats", "ce_score", "ev", "l0", "dead", "sparse_coding_rate@20", "scr@20"]
    flat, *nested = results.main.rows
    tests = [compare(row.values(id), flat.values(id)) for row in nested for id in ids]
    p = [test.p for test in tests if test is not None]
    assert table.n_tests == len(p) == 28
    assert [cell.p for _, cell in table.tested] == pytest.approx(holm(p))
    cells = table.lines[1].cells
    assert cells["kl_score"].p == cells["kl_nats"].p
    assert cells["sparsity"].p == cells["l0"].p


def test_bold_only_by_corrected_test(tmp_path: Path) -> None:
    """A cell is bold only when the corrected test says so."""
    write_results(tmp_path, steps=(400,), effect=0.5, noise=0.01)
    markup = report(tmp_path)
    cells = [cell for line in make_table(read_results([tmp_path])).lines for cell in line.cells.values()]
    significant = [cell for cell in cells if cell.p is not None and cell.p < 0.05]
    only_uncorrected = [cell for cell in cells if cell.test and cell.test.p < 0.05 and cell not in significant]
    assert significant
    assert only_uncorrected
    assert markup.count("<strong") == len(significant)


def test_verdict_follows_the_metrics_direction(tmp_path: Path) -> None:
    """The verdict follows the metric's direction."""
    write_results(tmp_path, steps=(400,), effect=0.8, noise=0.002)
    line = make_table(read_results([tmp_path])).lines[-1]
    assert line.cells["kl_nats"].verdict == line.cells["kl_score"].verdict == "worse"
    assert line.cells["ev"].verdict == "worse"


def test_first_sentence_counts_significant_differences(tmp_path: Path) -> None:
    """Significant differences are counted in the first sentence."""
    write_results(tmp_path, steps=(400,), effect=0.8, noise=0.002)
    results = read_results([tmp_path])
    table = make_table(results)
    first = headline(table, results)[0]
    n = sum(cell.verdict is not None for _, cell in table.tested)
    assert f"Of 28 comparisons of nested with flat dictionaries, {n} are significant" in first
    assert "worse in KL (4 of 4 rows)" in first


def test_no_difference_says_none(tmp_path: Path) -> None:
    """No difference is said to be none."""
    write_results(tmp_path, steps=(400,), effect=0.0, noise=0.02)
    results = read_results([tmp_path])
    assert headline(make_table(results), results)[0].startswith(
        "No difference between nested and flat dictionaries is significant"
    )
    assert "<strong" not in report(tmp_path)


def test_one_seed_makes_no_claim(tmp_path: Path) -> None:
    """One seed has no interval, no star and no claim."""
    write_results(tmp_path, seeds=(0,), effect=0.8)
    results = read_results([tmp_path])
    assert headline(make_table(results), results)[0].startswith("No test is possible")
    markup = report(tmp_path)
    assert 'class="half"' not in markup
    assert "<strong" not in markup
    assert "tests behind the table" not in markup


def test_no_baseline_means_no_comparison(tmp_path: Path) -> None:
    """Without a flat baseline nothing is compared."""
    write_results(tmp_path, alphas=(0.1, 0.2), steps=(400,))
    results = read_results([tmp_path])
    assert make_table(results).n_tests == 0
    assert "no flat baseline" in headline(make_table(results), results)[0]
    report(tmp_path)


def test_flat_dictionaries_alone_make_a_report(tmp_path: Path) -> None:
    """Flat dictionaries alone make a report too."""
    write_results(tmp_path, alphas=(0.0,), steps=(400,))
    results = read_results([tmp_path])
    assert "Only flat dictionaries" in headline(make_table(results), results)[0]
    report(tmp_path)


def test_null_scores_are_dashes(tmp_path: Path) -> None:
    """Null scores are dashes and say how many seeds the rest are."""
    paths = write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,))
    for path in paths[:3]:
        data = read_json(path)
        data["levels"][-1]["scores"]["kl_nats"] = None
        write_json(path, data)
    data = read_json(paths[3])
    data["levels"][-1]["scores"]["ev"] = None
    write_json(paths[3], data)
    markup = report(tmp_path)
    assert 'title="not computed, or undefined"' in markup
    assert "n = 2" in markup


def test_rows_take_last_checkpoints(tmp_path: Path) -> None:
    """Rows take the last checkpoint of each member."""
    write_results(tmp_path, alphas=(0.0, 0.2), steps=(100, 300))
    results = read_results([tmp_path])
    assert len(results.runs) == 12
    assert [[run.step for run in row.runs] for row in results.main.rows] == [[300] * 3, [300] * 3]


def test_groups_differ_by_fewest_settings(tmp_path: Path) -> None:
    """Groups are told apart by as few settings as do it."""
    write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,))
    write_results(tmp_path, alphas=(0.0,), steps=(400,), recipe="batchtopk", k=32, lambda_shared=0.0)
    write_results(tmp_path, alphas=(0.0,), steps=(400,), width=2048)
    labels = [group.label for group in read_results([tmp_path]).groups]
    assert labels == ["recipe paper, width 1024", "recipe batchtopk, width 1024", "recipe paper, width 2048"]


def test_groups_meet_their_own_baseline(tmp_path: Path) -> None:
    """Each group is compared with its own baseline."""
    write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,))
    write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,), layer=4)
    results = read_results([tmp_path])
    table = make_table(results)
    for line in table.lines:
        if line.row.sharing:
            flat = next(row for row in line.group.rows if not row.sharing)
            assert line.cells["ev"].test == compare(line.row.values("ev"), flat.values("ev"))


def test_levels_are_named_by_shares() -> None:
    """Several levels are named by their shares."""
    assert sharing_label(()) == "α = 0"
    assert sharing_label((0.2,)) == "α = 0.2"
    assert sharing_label((1 / 16, 1 / 4)) == "levels 1/16, 1/4, 1"


def test_foreign_sae_stands_in_table(tmp_path: Path) -> None:
    """An SAE made elsewhere stands in the table."""
    paths = write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,))
    data = read_json(paths[0])
    data["checkpoint"] |= {"provenance": {}, "path": "theirs/sae_weights.safetensors", "sha256": "f" * 64}
    write_json(tmp_path / "theirs-step_000000-0123456789.json", data)
    results = read_results([tmp_path])
    assert any("made elsewhere" in group.label for group in results.groups)
    report(tmp_path)


def test_repeated_checkpoint_counts_once(tmp_path: Path) -> None:
    """A checkpoint given twice counts once and the result with latent pages is taken."""
    path = write_results(tmp_path, alphas=(0.0,), seeds=(0,), steps=(400,))[0]
    data = read_json(path)
    data |= {"key": "0" * 64}
    twin = tmp_path / "alpha0-seed0-x-step_000400-0000000000.json"
    write_json(twin, data)
    write_latent_pages(twin, ["one"])
    assert [run.path for run in read_results([tmp_path, path, twin]).runs] == [twin]


def test_conflicting_steps_are_refused(tmp_path: Path) -> None:
    """Two checkpoints that claim the same step of a run are refused."""
    path = write_results(tmp_path, alphas=(0.0,), seeds=(0,), steps=(400,))[0]
    data = read_json(path)
    data["checkpoint"]["sha256"] = "e" * 64
    write_json(tmp_path / "again-step_000400-0000000000.json", data)
    with pytest.raises(UsageError, match="same run and step"):
        read_results([tmp_path])


def test_numbers_show_digits_of_their_interval() -> None:
    """Numbers show two digits of their interval."""
    assert plus_minus(Estimate(0.52345, 0.01234, 3)) == "0.523 ± 0.012"
    assert plus_minus(Estimate(85.07, 12.3, 3)) == "85 ± 12"
    assert plus_minus(Estimate(1234.5, 250.0, 3)) == "1,234 ± 250"
    assert plus_minus(Estimate(0.52345, None, 1)) == "0.5234"
    assert number(-0.5, 0.01) == "−0.500"
    assert (p_text(0.0312), p_text(1e-9)) == ("0.031", "under 0.0001")
