"""What nesting buys and costs: the sentence is true of made-up data whichever way it comes out; the figure and the table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from evaluate.report import svg
from evaluate.report.figures import Figure, Missing
from evaluate.report.found import what_was_found
from evaluate.report.nesting import control, nesting, nesting_table
from evaluate.report.nesting_found import nesting_found
from evaluate.report.reading import read_run
from evaluate.report.runs import Results, read_results
from evaluate.report.scored import Container
from evaluate.report.table import make_table
from evaluate.report.wording import half_text, signed_plus_minus
from evaluate.report.write import write_report
from pipeline.base.errors import DamagedError
from pipeline.base.files import read_json, write_json
from support.results_files import add_nesting, write_results

NOISE = {0: -0.002, 1: 0.0, 2: 0.003}
"""What a seed adds, flat; nested half of it, so that differences vary."""


def made_up(
    folder: Path,
    silent: float = 0.0,
    ev: float = 0.0,
    *,
    f1: float | None = 0.0,
    missed: float = 0.0,
    l0: float = 40.0,
    seeds: tuple[int, ...] = (0, 1, 2),
    id: str = "truth_parent_silent",
) -> Results:
    """Flat dictionaries, and nested ones that differ from them by so much."""
    for path in write_results(folder, alphas=(0.0, 0.2), seeds=seeds, steps=(400,)):
        train = read_json(path)["checkpoint"]["provenance"]["train"]
        nested, noise = train["alpha"] > 0, NOISE[train["seed"]] * (0.5 if train["alpha"] else 1)
        scores = {id: 0.3 + noise + silent * nested, "ev": 0.8 + noise + ev * nested, "l0": l0 if nested else 40.0}
        beside = {"truth_parent_missed": 0.1 + missed * nested + noise / 3}
        for family in {"absorption", id.removesuffix("_fraction").removesuffix("_parent_silent")}:
            beside |= {f"{family}_recall": 0.9 + noise}
            beside |= {} if f1 is None else {f"{family}_f1": 0.7 + noise + f1 * nested}
        add_nesting(path, **scores, **beside)
    return read_results([folder])


def said(results: Results) -> str:
    return " ".join(nesting_found(make_table(results), results))


def verdicts(text: str) -> list[str]:
    """The sentences that say what nesting buys."""
    return re.findall(r"So (?:nesting|neither)[^.]*\.", text)


BOUGHT = {
    "absorption": "less absorption",
    "misses": "fewer misses",
    "F1": "a higher F1",
    "explained variance": "more explained variance",
}
PAID = {
    "absorption": "more absorption",
    "misses": "more misses",
    "F1": "a lower F1",
    "explained variance": "less explained variance",
}


@pytest.mark.parametrize("id", ["truth_parent_silent", "absorption_fraction"])
@pytest.mark.parametrize("silent", [-0.1, 0.0, 0.1])
@pytest.mark.parametrize("f1", [-0.1, 0.0, 0.1])
@pytest.mark.parametrize("ev", [-0.1, 0.0, 0.1])
def test_sentence_follows_the_data(tmp_path: Path, id: str, silent: float, f1: float, ev: float) -> None:
    """Absorption, F1 and explained variance, each lost, kept or won: one verdict, which holds each where it belongs, the
    finding above it and the lead of the page say the same of absorption, and every interval agrees with its words."""
    results = made_up(tmp_path, silent, ev, f1=f1, id=id)
    check_agreement(results, -silent, 0.0, f1, ev)


@pytest.mark.parametrize("missed", [-0.1, 0.0, 0.1, 0.2])
@pytest.mark.parametrize("silent", [-0.1, 0.0, 0.1])
def test_misses_are_weighed_with_absorption(tmp_path: Path, silent: float, missed: float) -> None:
    """Silence that rises by as much as misses do is no absorption; misses themselves are bought or paid."""
    check_agreement(made_up(tmp_path, silent, missed=missed), round(missed - silent, 6), -missed, 0.0, 0.0)


def check_agreement(results: Results, absorption: float, misses: float, f1: float, ev: float) -> None:
    """Signs above 0 are good. The verdict, the finding and the lead hold them, and no interval says otherwise."""
    text = said(results)
    (found,) = verdicts(text)
    signs = {"absorption": absorption, "F1": f1, "explained variance": ev}
    if "Where the features are known" in text:
        signs["misses"] = misses
    here, _, rest = found.partition("; a difference in ")
    bought, _, paid = here.partition(", and pays for it with ")
    if "buys nothing that is shown: there is" in here or here.startswith("So neither"):
        bought, paid = "", here
    assert {name for name in signs if BOUGHT[name] in bought} == {name for name, x in signs.items() if x > 0}
    assert {name for name in signs if PAID[name] in paid} == {name for name, x in signs.items() if x < 0}
    assert {name for name in signs if name in rest} == {name for name, x in signs.items() if x == 0}
    assert found.startswith("So neither") == (not any(signs.values()))
    words = {-1: "is higher with nesting: nested", 0: "is not shown: nested", 1: "is lower with nesting: nested"}
    sign = (absorption > 0) - (absorption < 0)
    assert [key for key, part in words.items() if part in text] == [sign]
    lead = what_was_found(make_table(results), results).lead
    clauses = {
        -1: "nested ones absorb more",
        0: "a difference in absorption is not shown",
        1: "nested ones absorb less",
    }
    assert [key for key, part in clauses.items() if part in lead] == [sign]
    for gap, half, unshown in re.findall(
        r"\(([+−][\d.]+) ± ([\d.]+)(?:, corrected for \d+ tests)?(; not shown)?", text
    ):
        assert (abs(float(gap.replace("−", "-"))) <= float(half)) == bool(unshown), text


def test_unscored_f1_is_not_spoken_of(tmp_path: Path) -> None:
    """Results without F1 have a verdict on absorption and explained variance alone."""
    text = said(made_up(tmp_path, -0.1, -0.1, f1=None))
    assert verdicts(text) == [
        "So nesting buys less absorption here, and pays for it with less explained variance; a difference in misses is not shown."
    ]
    assert "F1" not in text


def test_f1_against_absorption_is_said(tmp_path: Path) -> None:
    """More absorption with a higher F1: what is bought is the F1, with its numbers."""
    text = said(made_up(tmp_path, 0.1, -0.1, f1=0.1))
    assert verdicts(text) == [
        "So nesting buys a higher F1 here, and pays for it with more absorption and less explained variance; a difference in "
        "misses is not shown."
    ]
    assert re.search(r"F1 of the features’ latents is 0\.80\d* ± [\d.]+ against 0\.70\d* ± [\d.]+ flat \(", text), text


def test_correction_widens_said_interval(tmp_path: Path) -> None:
    """A difference in explained variance whose own 95 % interval leaves 0 out, and that of its corrected test does not: the
    sentence has the wider one, and says not shown."""
    results = made_up(tmp_path, -0.1, -0.004)
    table = make_table(results)
    cell = table.lines[1].cells["ev"]
    assert cell.test is not None
    assert cell.half is not None
    assert cell.test.half < abs(cell.test.difference) < cell.half
    assert cell.verdict == "not shown"
    text = " ".join(nesting_found(table, results))
    assert f"± {half_text(cell.half)}, corrected for 2 tests; not shown to differ)" in text
    assert verdicts(text) == [
        "So nesting buys less absorption here; a difference in misses, F1 or explained variance is not shown."
    ]


@pytest.mark.parametrize("id", ["truth_absorption", "absorption_fraction", "truth_f1", "truth_parent_missed"])
def test_tested_endpoints_are_said_once(tmp_path: Path, id: str) -> None:
    """Whatever is named a primary endpoint, each sentence has the interval of its corrected test and no other."""
    measured = "truth_parent_silent" if id.startswith("truth") else id
    made_up(tmp_path, -0.004, -0.004, f1=0.004, missed=0.0041, id=measured)
    results = read_results([tmp_path])
    table = make_table(results, [id, "ev", "kl_nats"])
    cell = table.lines[1].cells[id]
    assert cell.test is not None
    assert cell.half is not None
    assert cell.half > cell.test.half
    said = " ".join((what_was_found(table, results).lead, *nesting_found(table, results)))
    corrected, own = (signed_plus_minus(cell.test.difference, half) for half in (cell.half, cell.test.half))
    assert corrected in said
    assert own not in said


def test_sentences_say_the_data_numbers(tmp_path: Path) -> None:
    """Means, the difference, mere misses and what is beyond them."""
    text = said(made_up(tmp_path, -0.1, -0.05))
    spread = r"\d* ± [\d.]+"
    assert re.search(rf"nested \(α = 0\.2\) 0\.100{spread} against 0\.200{spread} flat, −0\.100\d* ± ", text), text
    silent = rf"a child of it on, 200 cases, the parent’s latent is silent on 0\.200{spread} against 0\.300{spread} flat \(−0"
    assert re.search(silent, text), text
    missed = rf"with none on, 300 cases, it is missed on 0\.100{spread} against 0\.100{spread} flat \([^)]*; not shown to differ"
    assert re.search(missed, text), text
    assert re.search(r"Explained variance is 0\.750\d* ± [\d.]+ against 0\.800\d*", text), text


def test_real_rows_name_what_stands_beside(tmp_path: Path) -> None:
    """Absorption on real rows is said with labels, rows, best-latent F1 and recall."""
    text = said(made_up(tmp_path, -0.1, id="absorption_fraction"))
    assert "On real rows, at equal L0 (40 against 40), absorption, the part of a label" in text
    assert "carry, is lower with nesting: nested" in text
    assert "5 labels (1 left out), 1,234 rows; an undertrained dictionary scores falsely low" in text
    assert "best-latent F1 0.70" in text
    assert "recall 0.90" in text


def test_first_letters_are_said_and_drawn(tmp_path: Path) -> None:
    """Absorption of first letters in prompts has a sentence, what stands beside it, a panel and columns of its own."""
    results = made_up(tmp_path, -0.1, id="first_letter_fraction")
    text = said(results)
    assert (
        "On words in prompts that ask for their first letter, at equal L0 (40 against 40), absorption, the part of"
        in text
    )
    assert "5 letters (0 left out), 1,234 words; an undertrained dictionary scores falsely low" in text
    found = nesting(results)
    assert isinstance(found, Figure)
    assert found.panels[0].id == "nesting-first_letter_fraction"
    assert nesting_table(results).heads["first_letter_recall"] == "recall of letter latents"


@pytest.mark.parametrize(
    ("letters", "why"),
    [
        ({"probes": {"a": 0.7}, "why": "<b>"}, "of 26, 1 have a probe that finds them on unseen words, too few"),
        ({"why": "<b>"}, "the prompts are longer than the model’s positions"),
    ],
)
def test_letters_without_a_number_are_said(tmp_path: Path, letters: dict[str, object], why: str) -> None:
    """Once, in our own words, and nothing of it is drawn; where another evaluation has the number, nothing is said."""
    made_up(tmp_path / "results", -0.1)
    for path in (tmp_path / "results").glob("*-step_*.json"):
        data = read_json(path)
        data["levels"][-1]["scores"]["first_letter_fraction"] = None
        write_json(path, data | {"first_letter": letters})
    text = said(read_results([tmp_path / "results"]))
    assert text.count(f"First letters were asked for in prompts and not scored: {why}.") == 1
    assert "<b>" not in text
    assert "On words in prompts" not in text


def test_unequal_sparsity_claims_nothing(tmp_path: Path) -> None:
    """Dictionaries that are not equally sparse are not compared."""
    text = said(made_up(tmp_path, -0.1, l0=60.0))
    assert "not equally sparse (L0 60 against 40), so absorption is not compared" in text
    assert not verdicts(text)


def test_single_seed_claims_nothing(tmp_path: Path) -> None:
    """One seed gives numbers and no claim."""
    text = said(made_up(tmp_path, -0.1, seeds=(0,)))
    assert "without an interval, which takes two seeds, no more is claimed" in text
    assert not verdicts(text)


def test_results_without_absorption_open_as_before(tmp_path: Path) -> None:
    """Where nothing of it was scored there is no sentence, and the figure says why it is missing."""
    write_results(tmp_path, alphas=(0.0, 0.2), steps=(400,))
    results = read_results([tmp_path])
    assert said(results) == ""
    assert isinstance(nesting(results), Missing)
    assert not nesting_table(results).lines


def test_figure_has_a_mark_a_dictionary(tmp_path: Path) -> None:
    """Six dictionaries, six marks that can be pointed at, three trees in every level of the flat and the nested one."""
    found = nesting(made_up(tmp_path, -0.1))
    assert isinstance(found, Figure)
    assert [panel.id for panel in found.panels] == ["nesting-truth_absorption", "trees-0", "trees-1", "trees-2"]
    runs = {(run.sharing, run.seed): run for run in made_up(tmp_path, -0.1).runs}
    for row in found.numbers:
        run = runs[(0.2,) if row["row"] == "α = 0.2" else (), row["seed"]]
        assert row["value"] == run.score("truth_parent_silent") - run.score("truth_parent_missed")  # type: ignore[operator]
    assert len(found.panels[0].tips) == len(found.numbers) == 6
    assert {row["row"] for row in found.numbers} == {"α = 0", "α = 0.2"}
    drawn = [svg.inline(panel) for panel in found.panels]
    assert drawn[0].count('class="tip"') == 6
    assert "var(--shared)" not in drawn[1]  # flat: ink
    assert "var(--shared)" in drawn[2]


def test_trees_join_features_of_one_latent(tmp_path: Path) -> None:
    """Every second child has its parent's latent: one thick line of two in each tree, its number twice."""
    found = nesting(made_up(tmp_path, -0.1))
    assert isinstance(found, Figure)
    drawn = found.panels[1].drawn
    assert drawn.count("stroke-width: 3;") == 3
    assert len(re.findall(r">3</text>", drawn)) == 2


def test_table_holds_every_level(tmp_path: Path) -> None:
    """A line a level that has such scores; structure stands with the whole, the flat control at the level's size and density."""
    table = nesting_table(made_up(tmp_path, -0.1))
    assert [(line.row.label, line.level) for line in table.lines] == [("α = 0", "whole"), ("α = 0.2", "whole")]
    assert table.lines[1].found["structure_excess"].mean == pytest.approx(0.3)
    assert table.lines[1].found["structure_meta"].mean == pytest.approx(0.6)
    assert table.lines[1].found["structure_control"].mean == pytest.approx((0.12 + 0.42) / 2)  # .2 is half way, in log
    assert table.lines[0].found.keys().isdisjoint({"structure_excess", "structure_control"})
    assert table.heads["absorption_f1"] == "best-latent F1"


@pytest.mark.parametrize(
    ("level", "value"),
    [
        ((0.2, 0.1), 0.1),
        ((0.21, 0.1), 0.1),
        ((0.3, 0.1), None),
        ((0.2, 0.41), 0.4),
        ((0.2, 0.5), None),
        ((0.2, 0.05), None),
    ],
)
def test_control_matches_size_and_density(level: tuple[float, float], value: float | None) -> None:
    """Flat sets of another size, or nowhere near as dense, are no control."""
    sets = [Container(0.2, 0.1, 0.1), Container(0.2, 0.4, 0.4), Container(0.5, 0.1, 0.9)]
    assert control(Container(*level, 0.7), sets) == (None if value is None else pytest.approx(value))


def test_report_opens_with_costs_and_gains(tmp_path: Path) -> None:
    """One sentence on quality and absorption, the fronts, what nesting buys, the sentences behind; then Table 1, then curves."""
    made_up(tmp_path / "results", -0.1)
    page = write_report([tmp_path / "results"], tmp_path / "r.html").read_text()
    first = page.index("What was found")
    parts = (
        "nested ones absorb less",
        "Figure 1. Quality",
        "Figure 2. What nesting buys",
        "is lower with",
        "Table 1",
        "Figure 3.",
    )
    order = [page.index(part, first) for part in parts]
    assert order == sorted(order)
    assert page.index("Figure 3. Training loss") < page.index("<h2>What nesting buys</h2>")
    assert (tmp_path / "r_files" / "nesting_levels.csv").exists()


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [{"feature": 0, "parent": -1, "depth": 0, "levels": []}],
        [{"feature": 0, "parent": -1, "depth": 3, "levels": [{"latent": 1, "cosine": 1}]}],
        [{"feature": 0, "parent": -1, "depth": 0, "levels": [{"latent": "x", "cosine": 1}]}],
        [{"feature": 0, "parent": -1, "depth": 0, "levels": [{"latent": 1, "cosine": 1}]}] * 2,
        "roots",
    ],
)
def test_odd_trees_are_refused(tmp_path: Path, nodes: object) -> None:
    """Trees that are none are named by field when results are read."""
    path = write_results(tmp_path, alphas=(0.0,), seeds=(0,), steps=(400,))[0]
    write_json(path, read_json(path) | {"truth": {"trees": [nodes]}})
    with pytest.raises(DamagedError, match=r"truth\.trees\.0"):
        read_run(path)
