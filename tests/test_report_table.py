"""Rows and groups of the report, Table 1, and what its sentences claim."""

from __future__ import annotations

import math
import re
import unittest.mock
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from scipy import stats

from evaluate.report.equal import Apart, at_equal_l0
from evaluate.report.figures import across_n
from evaluate.report.found import what_was_found
from evaluate.report.runs import read_results, sharing_label
from evaluate.report.table import make_table
from evaluate.report.wording import column_decimals, fixed, number, p_text, plus_minus, share, signed_plus_minus
from evaluate.report.write import write_report
from evaluate.statistics import Comparison, Estimate, compare, estimate, holm
from pipeline.base.errors import UsageError
from pipeline.base.files import read_json, write_json
from pipeline.definitions import METRICS
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
    expected = estimate([run.levels[-1].without_massive["ev"] for run in row.runs])
    assert expected is not None
    assert expected.half is not None
    markup = report(tmp_path)
    mean, half = plus_minus(expected).split(" ± ")
    assert re.search(rf"{mean}\s*<span class=\"half\">± {half}</span>", markup)
    for published in ("0.795", "0.787", "0.299", "85.07", "405"):
        assert published in markup


def test_holm_covers_the_primary_endpoints(tmp_path: Path) -> None:
    """KL and explained variance are tested and corrected together; all else is a difference with its interval."""
    write_results(tmp_path, steps=(400,))
    results = read_results([tmp_path])
    table = make_table(results)
    flat, *nested = results.main.rows
    tests = [at_equal_l0(results, results.main, row, id) for row in nested for id in ("kl_nats", "ev")]
    p = [test.p for test in tests if not isinstance(test, Apart) and test is not None]
    assert len(table.tested) == len(p) == 8
    assert [cell.p for _, cell in table.tested] == pytest.approx(holm(p))
    dead = table.lines[1].cells["dead"]
    assert (dead.test, dead.p, dead.verdict) == (None, None, None)
    assert dead.difference == compare(nested[0].values("dead"), flat.values("dead"))


def test_primary_endpoints_can_be_named(tmp_path: Path) -> None:
    """Other endpoints are tested when they are named, in columns of their own; an unknown one is refused."""
    write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,))
    table = make_table(read_results([tmp_path]), ["ce_score", "scr@50"])
    assert [cell.metric.id for _, cell in table.tested] == ["scr@50", "ce_score"]
    with pytest.raises(UsageError, match="no such metric"):
        make_table(read_results([tmp_path]), ["speed"])


def test_bold_only_by_corrected_test(tmp_path: Path) -> None:
    """A cell is bold only when the corrected test says so."""
    write_results(tmp_path, steps=(400,), effect=0.35, noise=0.01)
    markup = report(tmp_path)
    cells = [cell for line in make_table(read_results([tmp_path])).lines for cell in line.cells.values()]
    significant = [cell for cell in cells if cell.p is not None and cell.p < 0.05]
    only_uncorrected = [cell for cell in cells if cell.test and cell.test.p < 0.05 and cell not in significant]
    assert significant
    assert only_uncorrected
    assert markup.count("<strong") == len(significant)


def test_verdict_follows_the_metrics_direction(tmp_path: Path) -> None:
    """The verdict follows the metric's direction, and no mark beside it points another way."""
    write_results(tmp_path, steps=(400,), effect=0.8, noise=0.002)
    line = make_table(read_results([tmp_path])).lines[-1]
    assert line.cells["kl_nats"].verdict == line.cells["ev"].verdict == "worse"
    assert line.cells["kl_nats"].test.difference > 0 > line.cells["ev"].test.difference
    assert not {"▲", "▼"} & set(report(tmp_path))


def test_answer_leads_with_one_number(tmp_path: Path) -> None:
    """One sentence holds both endpoints at equal L0 with their intervals; beside it stands the difference in KL and what it
    means; sentences behind say which way, and count the tests."""
    write_results(tmp_path, steps=(400,), effect=0.8, noise=0.002)
    results = read_results([tmp_path])
    found = what_was_found(make_table(results), results)
    assert re.fullmatch(r"\+0\.\d+ ± 0\.\d+", found.figure)
    assert found.unit.startswith(
        "nats/token of KL, nested minus flat (95 % interval, corrected for 8 tests): nested is worse"
    )
    assert "% of the KL that replacing the activations by zeros costs" in found.unit
    at = ("At equal L0 (38.9", "At nearly equal L0 (38.9 against 38.8)")
    assert found.lead.startswith(at)
    assert (
        f"dictionaries (α = 0.2) are worse than flat ones in KL ({found.figure} nats/token) and explained" in found.lead
    )
    assert found.sentences[0].startswith(at)
    assert "α = 0.2 are worse than flat ones in KL: " + found.figure in found.sentences[0]
    assert "Of 8 tests of KL and explained variance at equal L0" in found.sentences[2]
    assert "worse in KL (4 of 4 rows)" in found.sentences[2]


def test_not_shown_says_detectable_difference(tmp_path: Path) -> None:
    """Without significance the difference is not shown, and the smallest that could have been stands beside it: half its
    interval, which holds 0."""
    write_results(tmp_path, steps=(400,), effect=0.0, noise=0.02)
    results = read_results([tmp_path])
    table = make_table(results)
    found = what_was_found(table, results)
    assert "not shown to differ from flat ones in KL" in found.lead
    assert "no difference is shown; the interval holds 0, and at most " in found.unit
    assert "is not shown" in found.sentences[0]
    least = re.search(r"a difference under ([\d.]+) nats/token could not have been shown", found.sentences[0])
    assert least is not None
    assert f"± {least[1]} nats/token" in found.sentences[0]
    assert "none passes" in " ".join(found.sentences)
    for _, cell in table.tested:
        assert cell.half is not None
        assert abs(cell.test.difference) < cell.half
        assert cell.half == pytest.approx(cell.test.half / stats.t.ppf(0.975, 2) * stats.t.ppf(1 - 0.025 / 8, 2))
    assert "<strong" not in report(tmp_path)


@pytest.mark.parametrize("effect", [-0.4, -0.05, 0.0, 0.03, 0.05, 0.1, 0.35, 0.8])
def test_interval_and_verdict_agree(tmp_path: Path, effect: float) -> None:
    """Whichever way the data come out: an interval leaves 0 out exactly where its verdict says better or worse, in the
    table's cells, its markup, the CSV and every sentence."""
    write_results(tmp_path, steps=(400,), effect=effect, noise=0.004)
    results = read_results([tmp_path])
    table = make_table(results)
    for line, cell in table.tested:
        outside = abs(cell.test.difference) > cell.half
        assert outside == (cell.verdict in ("better", "worse")), (line.row.label, cell.verdict)
    markup = report(tmp_path)
    shown = re.findall(r'class="verdict">([+−][\d.]+) ± ([\d.]+)</span><span class="verdict [^"]*"> ([a-z ]+)<', markup)
    assert len(shown) == 8
    texts = [(sign, half, verdict == "not shown") for sign, half, verdict in shown]
    found = what_was_found(table, results)
    for way, parts in re.findall(
        r"(worse|better|not shown to differ)([^;]*?)(?=, and (?:worse|better|not)|;|\.$)", found.lead
    ):
        texts += [(sign, half, way.startswith("not")) for sign, half in re.findall(r"([+−][\d.]+) ± ([\d.]+)", parts)]
    texts += [(*found.figure.split(" ± "), "no difference is shown" in found.unit)]
    for sentence in found.sentences:
        if match := re.search(r": ([+−][\d.]+) ± ([\d.]+)", sentence):
            texts.append((match[1], match[2], "is not shown" in sentence))
    assert len(texts) == 8 + 2 + 1 + 2
    for difference, half, unshown in texts:
        assert (abs(float(difference.replace("−", "-"))) <= float(half)) == unshown, (difference, half, unshown)


def test_difference_never_reads_like_its_half() -> None:
    """Digits enough that one sees whether 0 is inside; no sign where nothing but zeros is left; shares in words."""
    assert signed_plus_minus(0.0499, 0.0496) == "+0.0499 ± 0.0496"
    assert signed_plus_minus(-0.0499, 0.0496) == "−0.0499 ± 0.0496"
    assert signed_plus_minus(0.0184, 0.0041) == "+0.0184 ± 0.0041"
    assert signed_plus_minus(-0.0003, 5.6) == signed_plus_minus(0.0003, 5.6) == "0.0 ± 5.6"
    assert [share(x) for x in (0.0049, 0.58, 1.2, 12.0, 1e-9)] == [
        "0.49 %",
        "58 %",
        "120 %",
        "1,200 %",
        "under 0.001 %",
    ]


def test_unequal_l0_is_not_compared(tmp_path: Path) -> None:
    """Rows whose L0 differ by more than a twentieth are not comparable: no test, no verdict, and the page says so."""
    write_results(tmp_path, alphas=(0.0,), steps=(400,), l0=44)
    write_results(tmp_path, alphas=(0.2,), steps=(400,), effect=0.8, noise=0.002)
    results = read_results([tmp_path])
    table = make_table(results)
    cell = table.lines[1].cells["kl_nats"]
    assert (cell.test, cell.p, cell.verdict) == (None, None, "not comparable")
    assert cell.apart is not None
    lead = what_was_found(table, results).lead
    assert lead.startswith(
        "Nested dictionaries (α = 0.2) are not comparable with flat ones, which are not as sparse, in KL and"
    )
    assert re.fullmatch("L0 3[89][.0-9]* against 4[23][.0-9]*", cell.apart.reason)
    assert "not comparable" in what_was_found(table, results).sentences[0]
    markup = report(tmp_path)
    assert "<strong" not in markup
    assert "2 comparisons not made" in markup


def test_nearly_equal_l0_is_compared(tmp_path: Path) -> None:
    """A difference in L0 of less than a twentieth is near enough."""
    write_results(tmp_path, alphas=(0.0,), steps=(400,), l0=41)
    write_results(tmp_path, alphas=(0.2,), steps=(400,))
    results = read_results([tmp_path])
    table = make_table(results)
    assert len(table.tested) == 2
    assert re.search(r"At nearly equal L0 \(38\.\d against 39\.\d\)", what_was_found(table, results).lead)


def test_fronts_are_compared_between_their_points(tmp_path: Path) -> None:
    """Where flat dictionaries span a range, each replicate meets its own front, straight over log L0."""
    for k, l0 in ((20, 20.0), (80, 80.0)):
        write_results(tmp_path, alphas=(0.0,), steps=(400,), l0=l0, k=k)
    write_results(tmp_path, alphas=(0.2,), steps=(400,), l0=40, k=40)
    results = read_results([tmp_path])
    nested = next((g, row) for g in results.groups for row in g.rows if row.sharing)
    flats = [row for group in results.groups for row in group.rows if not row.sharing]
    found = at_equal_l0(results, *nested, "ev")
    expected = {}
    for replicate, value in nested[1].values("ev").items():
        (x0, y0), (x1, y1) = sorted((row.values("l0")[replicate], row.values("ev")[replicate]) for row in flats)
        share = math.log(nested[1].values("l0")[replicate] / x0) / math.log(x1 / x0)
        expected[replicate] = value - (y0 + share * (y1 - y0))
    assert not isinstance(found, Apart)
    assert found is not None
    assert found.n == (3, 3)
    assert found.difference == pytest.approx(sum(expected.values()) / 3)


def test_single_value_takes_the_mean_shape(tmp_path: Path) -> None:
    """A seed with one flat dictionary near that L0 is moved to it along the mean front, as the others along their own."""
    for seeds, k in (((0,), 20), ((0, 1, 2), 39), ((0,), 80)):
        write_results(tmp_path, alphas=(0.0,), seeds=seeds, steps=(400,), l0=float(k), k=k, noise=0.002)
    write_results(tmp_path, alphas=(0.2,), steps=(400,), l0=40, k=40)
    results = read_results([tmp_path])
    nested = next((g, row) for g in results.groups for row in g.rows if row.sharing)
    found = at_equal_l0(results, *nested, "ev")
    flats = [row for group in results.groups for row in group.rows if not row.sharing]
    near = next(row for row in flats if len(row.values("ev")) == 3)
    ends = [row for row in flats if row is not near]
    points = sorted((mean(row.values("l0").values()), mean(row.values("ev").values())) for row in flats)

    def on(x: float, front: list[tuple[float, float]]) -> float:
        """Straight over log x."""
        return float(np.interp(math.log(x), np.log([p[0] for p in front]), [p[1] for p in front]))

    differences = []
    for replicate, value in nested[1].values("ev").items():
        at, own = nested[1].values("l0")[replicate], (near.values("l0")[replicate], near.values("ev")[replicate])
        if replicate in ends[0].values("ev"):
            front = sorted([own, *((row.values("l0")[replicate], row.values("ev")[replicate]) for row in ends)])
            differences.append(value - on(at, front))
        else:
            differences.append(value - (own[1] + on(at, points) - on(own[0], points)))
    assert isinstance(found, Comparison)
    assert found.n == (3, 3)
    assert found.difference == pytest.approx(mean(differences))
    assert on(30, points) != on(50, points)


def test_front_of_a_replicate_must_reach(tmp_path: Path) -> None:
    """A seed whose flat dictionaries were trained to one sparsity alone, far from the nested one's, has no flat value there:
    it is left out and not taken from where its front ends."""
    for seeds, k, l0 in (((0, 1, 2, 3), 20, 20.0), ((0, 1, 2), 80, 80.0)):
        write_results(tmp_path, alphas=(0.0,), seeds=seeds, steps=(400,), l0=l0, k=k)
    write_results(tmp_path, alphas=(0.2,), seeds=(0, 1, 2, 3), steps=(400,), l0=40, k=40)
    results = read_results([tmp_path])
    nested = next((g, row) for g in results.groups for row in g.rows if row.sharing)
    found = at_equal_l0(results, *nested, "ev")
    assert isinstance(found, Comparison)
    assert found.n == (4, 3)
    assert found.kind == "Welch"


def test_coding_leads_with_explained_variance(tmp_path: Path) -> None:
    """Table 1 holds explained variance at n = 20, since a rate grows with sparsity alone; without massive rows, with them
    beside; results that have only the rate show that."""
    for path in write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,)):
        data = read_json(path)
        rate = data["series"]["sparse_coding_rate"]
        for name, shift in (("sparse_coding_ev", 0.3), ("sparse_coding_ev_without_massive", 0.1)):
            data["series"][name] = [point | {"value": shift + point["n"] / 1000} for point in rate]
        write_json(path, data)
    results = read_results([tmp_path])
    table = make_table(results)
    cell = table.lines[1].cells["sparse_coding_ev@20"]
    assert cell.estimate is not None
    assert cell.estimate.mean == pytest.approx(0.12)
    assert cell.metric.label == "explained variance at n = 20"
    assert results.main.rows[0].values("sparse_coding_ev@20", massive=True)[(0, 0)] == pytest.approx(0.32)
    assert "sparse_coding_rate@20" not in table.lines[1].cells
    panels = across_n(results).panels  # type: ignore[union-attr]
    assert {panel.title for panel in panels} >= {"explained variance of the n largest latents", "sparse coding rate"}
    write_results(tmp_path / "old", alphas=(0.0,), steps=(400,))
    assert "sparse_coding_rate@20" in make_table(read_results([tmp_path / "old"])).lines[0].cells


def test_other_settings_are_no_baseline(tmp_path: Path) -> None:
    """Flat dictionaries of another width are no front for a nested one."""
    write_results(tmp_path, alphas=(0.0,), steps=(400,), width=2048)
    write_results(tmp_path, alphas=(0.2,), steps=(400,))
    table = make_table(read_results([tmp_path]))
    assert not table.tested
    assert not table.apart


def test_orders_of_the_data_are_replicates(tmp_path: Path) -> None:
    """Trainings that differ in their order of data alone are one row of replicates, and the caveat says so."""
    for data_seed in (0, 1):
        write_results(tmp_path, alphas=(0.0, 0.2), seeds=(0, 1), steps=(400,), data_seed=data_seed)
    results = read_results([tmp_path])
    assert len(results.groups) == 1
    assert [len(row.values("ev")) for row in results.main.rows] == [4, 4]
    assert [cell.test.n for _, cell in make_table(results).tested] == [(4, 4)] * 2
    assert "2 orders of the data" in report(tmp_path)


def test_two_evaluations_are_one_row(tmp_path: Path) -> None:
    """Two evaluations of one checkpoint are one row: what both scored from the larger sample, the rest from either."""
    path = write_results(tmp_path, alphas=(0.0,), seeds=(0,), steps=(400,))[0]
    data = read_json(path)
    more = read_json(path) | {"key": "1" * 64, "sample": {"n_tokens": 90_000}, "evaluation": {"scores": ["ev"]}}
    more["levels"][0] |= {"scores": {"ev": 0.5}, "scores_without_massive": {"ev": 0.5}}
    more["series"] = {}
    write_json(tmp_path / "again-step_000400-1111111111.json", more)
    results = read_results([tmp_path])
    assert len(results.runs) == 1
    assert results.runs[0].score("ev") == 0.5
    assert results.runs[0].score("kl_nats") == data["levels"][0]["scores_without_massive"]["kl_nats"]
    assert results.runs[0].at("scr")


def test_scores_made_otherwise_are_no_replicates(tmp_path: Path) -> None:
    """SCR with other texts makes another group, named by what differs; a run without SCR stands with the first."""
    paths = write_results(tmp_path, alphas=(0.0, 0.2), seeds=(0, 1, 2, 3), steps=(100,))
    for path in paths:
        data = read_json(path)
        seed = data["checkpoint"]["provenance"]["train"]["seed"]
        scr = {"scr": {"test_size": 320, "train_size": 800 if seed == 3 else 400}}
        data["evaluation"]["families"] = {"kl": {"dtype": "bf16"}} | ({} if seed == 0 else scr)
        write_json(path, data)
    first, second = read_results([tmp_path]).groups
    assert [row.label for row in first.rows] == [row.label for row in second.rows] == ["α = 0", "α = 0.2"]
    assert [run.seed for run in first.rows[0].runs] == [0, 1, 2]
    assert [run.seed for run in second.rows[1].runs] == [3]
    assert (first.settings, second.settings) == (
        {"scr scored with": "train_size 400"},
        {"scr scored with": "train_size 800"},
    )


def test_later_letters_keep_the_baseline(tmp_path: Path) -> None:
    """First letters that were scored later, in the model's dtype and on more rows, and of some checkpoints alone, leave all of
    them in one group with their flat baseline."""
    paths = write_results(tmp_path / "rows", alphas=(0.0, 0.2, 0.5), steps=(400,))
    for path in paths:
        data = read_json(path)
        data["evaluation"] = {"families": {"ev": {}, "l0": {}}, "n_sequences": 100, "massive_multiple": 3.0}
        write_json(path, data)
        if data["checkpoint"]["provenance"]["train"]["alpha"] < 0.5:
            families = {"first_letter": {"dtype": "bf16", "seed": 0}}
            data["evaluation"] |= {"families": families, "n_sequences": 900, "dtype": "bf16"}
            data["sample"] |= {"n_tokens": 90_000, "n_sequences": 900}
            for level in data["levels"]:
                level["scores"], level["scores_without_massive"] = {"first_letter_fraction": 0.4}, {}
            write_json(tmp_path / "letters" / path.name, data)
    (group,) = read_results([tmp_path]).groups
    assert [row.label for row in group.rows] == ["α = 0", "α = 0.2", "α = 0.5"]
    assert [len(row.values("first_letter_fraction")) for row in group.rows] == [3, 3, 0]
    assert {run.evaluation["n_sequences"] for run in group.runs} == {100}


def test_other_weightings_meet_the_flat_baseline(tmp_path: Path) -> None:
    """A flat dictionary has no weights of levels: those of other weightings, too, are compared with it, and tested."""
    write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,), level_weighting="equal")
    for weighting in ("size", "random", "inner:0.75"):
        write_results(tmp_path, alphas=(0.2,), steps=(400,), level_weighting=weighting)
    results = read_results([tmp_path])
    flat = results.main.rows[0]
    assert not flat.sharing
    assert len(results.groups) == 4
    assert all(group.baseline is flat for group in results.groups)
    table = make_table(results)
    assert len(table.tested) == 8
    assert not table.apart
    for line in table.lines:
        if line.row.sharing:
            assert line.cells["ev"].difference == compare(line.row.values("ev"), flat.values("ev"))


def test_other_widths_are_lent_no_baseline(tmp_path: Path) -> None:
    """Another weighting of another width has no flat dictionary of its own kind, and is compared with none."""
    write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,), level_weighting="equal")
    write_results(tmp_path, alphas=(0.2,), steps=(400,), level_weighting="size", width=2048)
    results = read_results([tmp_path])
    assert [group.baseline is None for group in results.groups] == [False, True]
    assert len(make_table(results).tested) == 2


def test_penalties_are_named_by_target(tmp_path: Path) -> None:
    """A recipe with a penalty has no k: it is told apart by the L0 it was brought to, or by its own name alone."""
    asked = [("batchtopk", 16, 0.0), ("batchtopk", 32, 0.0), ("paper", 0, 30.0), ("jumprelu", 0, 0.0)]
    for i, (recipe, k, target) in enumerate(asked):
        write_results(tmp_path / str(i), alphas=(0.0,), seeds=(0,), steps=(400,), recipe=recipe, k=k, target_l0=target)
    labels = {group.label for group in read_results([tmp_path]).groups}
    assert labels == {"batchtopk, k 16", "batchtopk, k 32", "paper, target L0 30", "jumprelu"}
    write_results(tmp_path / "4", alphas=(0.0,), seeds=(0,), steps=(400,), recipe="paper", k=0, target_l0=60.0)
    labels = {group.label for group in read_results([tmp_path]).groups}
    assert {"paper, target L0 30", "paper, target L0 60"} < labels


def test_known_features_have_names(tmp_path: Path) -> None:
    """A shipped spec is called by its name, another by how many features it has; two that are called alike get their hash."""
    for i, (model, n) in enumerate([("truth:0aaab54dbb", 1000), ("truth:aaaaaaaaaa", 250), ("truth:bbbbbbbbbb", 250)]):
        for path in write_results(tmp_path / str(i), alphas=(0.0,), seeds=(0,), steps=(400,), width=1024 + i):
            data = read_json(path)
            data["store"] |= {"model": model, "id": f"{i}" * 64}
            write_json(path, data | {"truth": {"n_features": n}})
    names = sorted(run.store.name for run in read_results([tmp_path]).runs)
    spec = "250 known features, spec "
    assert names == [f"{spec}aaaaaaaaaa", f"{spec}bbbbbbbbbb", "forest (1,000 known features)"]
    two = read_results([tmp_path / "0", tmp_path / "1"])
    assert sorted(group.label for group in two.groups) == ["250 known features", "forest (1,000 known features)"]
    assert [name for name, _ in two.places] == [group.label for group in two.groups]
    assert (
        "aaaaaaaaaa" not in write_report([tmp_path / "1"], tmp_path / "r.html").read_text().partition("Provenance")[0]
    )


def test_averages_lead_without_massive_rows(tmp_path: Path) -> None:
    """Table, tests and sentences take averages without massive rows; those with them stand in a table of their own."""
    write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,))
    results = read_results([tmp_path])
    run = results.runs[0]
    assert run.score("kl_nats") == run.levels[-1].without_massive["kl_nats"]
    assert run.score("kl_nats", massive=True) == run.levels[-1].scores["kl_nats"]
    markup = report(tmp_path)
    assert "The same scores with massive rows in their averages" in markup
    assert "39 massive rows left out" in markup


def test_metrics_without_direction_lack_arrow() -> None:
    """L0, sparsity, evenness of use and neighbours' cosines are neither better high nor low."""
    for id in ("l0", "sparsity", "l1", "entropy", "gini", "nearest", "density"):
        assert METRICS[id].better == "neither"


def test_columns_have_equal_decimals() -> None:
    """A column's decimals are two digits of its median interval, whatever single intervals are."""
    column = [Estimate(0.5, 0.02, 3), Estimate(0.7, 0.0004, 3), Estimate(0.61, 0.011, 3)]
    assert column_decimals(column) == 3
    assert [fixed(e.mean, 3) for e in column] == ["0.500", "0.700", "0.610"]
    assert fixed(-0.0001, 2) == "0.00"
    assert column_decimals([Estimate(31.4, None, 1), Estimate(130.0, None, 1)]) == 2


def test_one_seed_makes_no_claim(tmp_path: Path) -> None:
    """One seed has no interval, no star and no claim."""
    write_results(tmp_path, seeds=(0,), effect=0.8)
    results = read_results([tmp_path])
    assert what_was_found(make_table(results), results).lead.startswith("No test is possible")
    markup = report(tmp_path)
    assert 'class="half"' not in markup
    assert "<strong" not in markup
    assert "behind the table" not in markup


def test_no_baseline_means_no_comparison(tmp_path: Path) -> None:
    """Without a flat baseline nothing is compared."""
    write_results(tmp_path, alphas=(0.1, 0.2), steps=(400,))
    results = read_results([tmp_path])
    assert not make_table(results).tested
    assert "no flat baseline" in what_was_found(make_table(results), results).lead
    report(tmp_path)


def test_flat_dictionaries_alone_make_a_report(tmp_path: Path) -> None:
    """Flat dictionaries alone make a report too."""
    write_results(tmp_path, alphas=(0.0,), steps=(400,))
    results = read_results([tmp_path])
    assert "Only flat dictionaries" in what_was_found(make_table(results), results).lead
    report(tmp_path)


def test_null_scores_are_dashes(tmp_path: Path) -> None:
    """Null scores are dashes and say how many seeds the rest are."""
    paths = write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,))
    for path in paths[:3]:
        data = read_json(path)
        data["levels"][-1]["scores"]["kl_nats"] = data["levels"][-1]["scores_without_massive"]["kl_nats"] = None
        write_json(path, data)
    data = read_json(paths[3])
    data["levels"][-1]["scores"]["ev"] = data["levels"][-1]["scores_without_massive"]["ev"] = None
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
    assert labels == ["paper, width 1024", "batchtopk, width 1024", "paper, width 2048"]


def test_groups_meet_their_own_baseline(tmp_path: Path) -> None:
    """Each group is compared with its own baseline."""
    write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,))
    write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,), layer=4)
    results = read_results([tmp_path])
    table = make_table(results)
    for line in table.lines:
        if line.row.sharing:
            flat = next(row for row in line.group.rows if not row.sharing)
            assert line.cells["ev"].difference == compare(line.row.values("ev"), flat.values("ev"))
            assert line.cells["ev"].test is not None


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


def test_hooks_have_places_of_their_own(tmp_path: Path) -> None:
    """Results of two hook points of one layer stand in places of their own, which say so."""
    write_results(tmp_path / "a", alphas=(0.0,), seeds=(0,), steps=(100,))
    for path in write_results(tmp_path / "b", alphas=(0.0,), seeds=(0,), steps=(100,)):
        data = read_json(path)
        write_json(path, data | {"store": data["store"] | {"id": "other", "hook": "mlp_out"}})
    results = read_results([tmp_path])
    assert {name for name, _ in results.places} == {"layer 3", "mlp_out of layer 3"}
    assert sorted(str(group.settings.get("hook")) for group in results.groups) == ["mlp_out", "resid_post"]
