"""What nesting buys and costs, in sentences that are true whichever way the data come out; measures and pairs: `nesting.py`."""

from __future__ import annotations

from collections.abc import Sequence

from evaluate.report.equal import NEAR, mean_of
from evaluate.report.nesting import MEASURES, Gap, Measure, Pair, pair_of
from evaluate.report.runs import Results
from evaluate.report.scored import ABSORBED, MISSED, SILENT
from evaluate.report.table import Table
from evaluate.report.wording import count, listed, signed_plus_minus


def nesting_found(table: Table, results: Results) -> tuple[str, ...]:
    """What nesting buys and costs, in sentences: first where features are known, then on real rows; and why a number that
    was asked for is not there."""
    missing = {run.no_letters: None for group in results.groups for row in group.rows for run in row.runs}
    found = [sentence for measure, pair in spoken_of(results) for sentence in sentences(table, measure, pair)]
    return tuple(sentence for sentence in (*found, *missing) if sentence)


def spoken_of(results: Results) -> list[tuple[Measure, Pair]]:
    """Every measure of absorption that a nested row and a flat one of its group have, with these."""
    return [(measure, pair) for measure in MEASURES if (pair := pair_of(results, measure.metric))]


def absorption_clause(table: Table, results: Results) -> str:
    """In half a sentence, which way absorption differs with nesting, measure by measure, each with its interval; empty where
    none was measured."""
    ways: dict[str, list[str]] = {}
    for measure, pair in spoken_of(results):
        where = measure.where[0].lower() + measure.where[1:]
        difference = pair.difference(table, measure.metric)
        if unequal(pair):
            ways.setdefault("it is not compared", []).append(f"{where} (L0 is not equal)")
        elif difference is None:
            ways.setdefault("it has no interval", []).append(where)
        else:
            change = {"lower": "less", "higher": "more", "": ""}[direction(difference)]
            way = f"nested ones absorb {change}" if change else "a difference in absorption is not shown"
            ways.setdefault(way, []).append(f"{where} ({signed_plus_minus(difference.difference, difference.half)})")
    return ", and ".join(f"{way} {listed(parts)}" for way, parts in ways.items())


def unequal(pair: Pair) -> str:
    """Why the pair is not compared: its L0; empty where both are equally sparse, or nearly."""
    own, flat = (mean_of(row.values("l0")) for row in (pair.nested, pair.flat))
    if not own or not flat:
        return "L0 was not scored"
    return "" if 1 / (1 + NEAR) <= own / flat <= 1 + NEAR else f"L0 {own:.3g} against {flat:.3g}"


def sentences(table: Table, measure: Measure, pair: Pair) -> list[str]:
    """What one measure of absorption says of the pair: the finding, what stands beside it, and what follows from both."""
    where, what, metric = measure.where, measure.what, measure.metric
    own, flat = (mean_of(row.values("l0")) for row in (pair.nested, pair.flat))
    name = f"nested ({pair.nested.label})"
    values = f"{pair.both(metric)} flat"
    if sparsity := unequal(pair):
        return [
            f"{where}, {name} and flat dictionaries are not equally sparse ({sparsity}), so absorption is not compared."
        ]
    at = f"at {'equal' if f'{own:.3g}' == f'{flat:.3g}' else 'nearly equal'} L0 ({own:.3g} against {flat:.3g})"
    difference = pair.difference(table, metric)
    if difference is None:
        return [
            f"{where}, {at}, {what} is {name} {values}; without an interval, which takes two seeds, no more is claimed."
        ]
    change = direction(difference)
    shown = f"{name} {values}, {signed_plus_minus(difference.difference, difference.half)}"
    said = f"{what} is {change} with nesting" if change else f"a difference in {what} is not shown"
    changes = [("absorption", "less absorption", "more absorption", good(change, low=True))]
    if metric == ABSORBED:
        missed = pair.difference(table, MISSED)
        changes.append(("misses", "fewer misses", "more misses", good(direction(missed), low=True)))
    if f1 := pair.difference(table, measure.f1):
        changes.append(("F1", "a higher F1", "a lower F1", good(direction(f1))))
    cost = pair.difference(table, "ev")
    ev = good(direction(cost))
    changes.append(("explained variance", "more explained variance", "less explained variance", ev))
    return [
        f"{where}, {at}, {said}: {shown}.",
        beside(table, measure, pair),
        f1_sentence(table, measure, pair),
        f"Explained variance is {pair.both('ev')} flat{interval_text(cost)}.",
        verdict(changes),
    ]


def good(change: str, *, low: bool = False) -> str:
    """better, worse or nothing: what a change is worth, where high values are good, or low ones."""
    return "" if not change else "better" if (change == "lower") == low else "worse"


def direction(difference: Gap | None) -> str:
    """lower or higher where the interval leaves 0 out, else nothing."""
    if difference is None or abs(difference.difference) <= difference.half:
        return ""
    return "lower" if difference.difference < 0 else "higher"


def verdict(changes: Sequence[tuple[str, str, str, str]]) -> str:
    """What was bought and what was paid. Of each thing: its name, what it is called when it is bought and when it is paid,
    and what became of it: better, worse or nothing that is shown."""
    bought = [bought for _, bought, _, change in changes if change == "better"]
    paid = [paid for _, _, paid, change in changes if change == "worse"]
    open_ones = [name for name, _, _, change in changes if not change]
    rest = (
        f"; a difference in {', '.join(open_ones[:-1])}{' or ' if len(open_ones) > 1 else ''}{open_ones[-1]} is not shown"
        if open_ones
        else ""
    )
    if bought and paid:
        return f"So nesting buys {listed(bought)} here, and pays for it with {listed(paid)}{rest}."
    if bought:
        return f"So nesting buys {listed(bought)} here{rest}."
    if paid:
        return f"So nesting costs here and buys nothing that is shown: there is {listed(paid)}{rest}."
    return f"So neither what nesting buys nor what it costs is shown here{rest}."


def beside(table: Table, measure: Measure, pair: Pair) -> str:
    """What must be known to read absorption: both rates of silence; or whether the label's latents are any good, and on what."""
    if measure.metric == ABSORBED:
        cases = next((run.parents for run in pair.nested.runs if run.parents), None)
        with_child, alone = (f", {n:,} cases" for n in cases) if cases else ("", "")
        return (
            f"With a child of it on{with_child}, the parent’s latent is silent on {pair.both(SILENT)} flat"
            f"{interval_text(pair.difference(table, SILENT))}; with none on{alone}, it is missed on {pair.both(MISSED)} flat"
            f"{interval_text(pair.difference(table, MISSED))}."
        )
    family, on = (
        measure.family,
        [run.labels[measure.family] for run in pair.nested.runs if measure.family in run.labels],
    )
    n = (
        f"{count(on[0].n_labels, measure.label)} ({on[0].n_left_out} left out), {count(on[0].n_rows, measure.row)}; "
        if on
        else ""
    )
    return (
        f"Read with it ({n}an undertrained dictionary scores falsely low): best-latent F1 {pair.both(measure.f1)} flat"
        f"{interval_text(pair.difference(table, measure.f1))}, "
        f"recall {pair.both(f'{family}_recall')} flat."
    )


def interval_text(difference: Gap | None) -> str:
    """A difference with its interval in brackets, what that was corrected for, and whether it leaves 0 out."""
    if difference is None:
        return ""
    corrected = f", {difference.corrected}" if difference.corrected else ""
    said = "" if direction(difference) else "; not shown to differ"
    return f" ({signed_plus_minus(difference.difference, difference.half)}{corrected}{said})"


def f1_sentence(table: Table, measure: Measure, pair: Pair) -> str:
    """F1 of known features' latents; of labels it is said with what stands beside absorption."""
    if measure.metric != ABSORBED or not (both := pair.both(measure.f1)):
        return ""
    return f"F1 of the features’ latents is {both} flat{interval_text(pair.difference(table, measure.f1))}."
