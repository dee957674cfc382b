"""Check a finished demo: every member scored, the numbers those of SAEs that work, the report whole and opening with what
nesting buys, in words that its own numbers bear out. Used by .ci/run."""

import csv
import json
import math
import sys
from pathlib import Path
from statistics import mean

ALPHAS, SEEDS = {0.0, 0.1, 0.2, 0.3, 0.5}, {0, 1, 2}
L0, ENDS, KNOWN_L0 = 32, (16, 64), 7
WANTED = {("batchtopk", L0, alpha, seed) for alpha in ALPHAS for seed in SEEDS}
WANTED |= {("batchtopk", k, alpha, 0) for k in ENDS for alpha in (0.0, 0.2)} | {
    ("paper", 0, 0.2, seed) for seed in SEEDS
}
KNOWN = {("batchtopk", KNOWN_L0, alpha, seed) for alpha in (0.0, 0.2) for seed in SEEDS}
SILENT, MISSED = "truth_parent_silent", "truth_parent_missed"


def main(out: Path) -> None:
    results = [json.loads(path.read_text()) for path in sorted((out / "results").glob("*/*-step_*.json"))]
    known = [result for result in results if result["store"]["model"].startswith("truth:")]
    real = [result for result in results if result not in known]
    assert {member(result) for result in real} == WANTED
    assert {member(result) for result in known} == KNOWN
    for result in real:
        check_result(result)
    for result in known:
        check_known(result)
    page = (out / "report.html").read_text()
    assert "Table 1" in page
    assert page.count("<svg") >= 3
    check_opening(out, page, known)
    assert "http://" not in page.replace("http://www.w3.org", ""), "the report must need no network"
    print(f"demo: {len(results)} checkpoints scored, report of {len(page) // 1000} kB")


def check_result(result: dict) -> None:
    whole = result["levels"][-1]["scores"]
    baselines = result["baselines"]
    assert 0.4 < whole["ev"] < 1, whole["ev"]
    assert 0 < whole["kl_nats"] < baselines["kl_mean"], (whole["kl_nats"], baselines)
    assert baselines["ce_clean"] < whole["ce"] < baselines["ce_zero"]
    wanted = member(result)[1] or L0
    assert abs(whole["l0"] - wanted) < 0.25 * wanted, whole["l0"]  # held-out documents are others than those trained on
    assert math.isclose(whole["sparsity"], 1 - whole["l0"] / result["checkpoint"]["sae"]["width"], abs_tol=1e-6)
    assert any(row["value"] is not None for row in result["series"]["scr"])
    shared = result["levels"][0]["scores"]
    assert len(result["levels"]) == 1 or shared["ev"] < whole["ev"]
    every = result["absorption"]["levels"][-1]["all"]
    assert every["n_labels"] >= 3
    assert every["n"] > 500
    assert 0 <= whole["absorption_full"] <= 1
    assert 0 <= whole["absorption_fraction"] <= 1
    assert whole["absorption_f1"] > 0.2
    assert whole["absorption_recall"] > 0.2


def check_known(result: dict) -> None:
    """A dictionary of known features: it works, and each rate of silence is over rows enough."""
    whole, truth = result["levels"][-1]["scores"], result["truth"]
    assert 0.5 < whole["ev"] < 1, whole["ev"]
    assert abs(whole["l0"] - KNOWN_L0) < 0.1 * KNOWN_L0, whole["l0"]
    assert 0 < whole[SILENT] < 1
    assert whole["truth_mcc"] > 0.4
    assert min(truth["n_parent_and_child"], truth["n_parent_alone"]) > 1000
    assert len(truth["trees"]) == 3
    assert all(len(tree) == 13 for tree in truth["trees"])  # three children of each of a root's three children


def check_opening(out: Path, page: str, known: list[dict]) -> None:
    """The report opens with the sentence and the figure of what nesting buys, and both say what the results hold."""
    opening = page[page.index("What was found") : page.index("Table 1")]
    assert "Where the features are known" in opening
    assert "On real rows" in opening
    assert "Figure 1. Quality against sparsity" in opening
    assert "Figure 2. What nesting buys and costs" in opening
    assert opening.count("Three trees: ") >= 3
    assert "lines join the means of last checkpoints of one kind trained to different L0" in opening
    with open(out / "report_files" / "nesting.csv") as file:
        drawn = [row for row in csv.DictReader(file) if row["score"] == "truth_absorption"]
    assert len(drawn) == len(KNOWN)
    absorbed = {alpha: [absorption(r) for r in known if member(r)[2] == alpha] for alpha in (0.0, 0.2)}
    for alpha, values in absorbed.items():
        found = [float(row["value"]) for row in drawn if row["row"] == f"α = {alpha:g}"]
        assert sorted(found) == sorted(values), (alpha, found, values)
    lower = mean(absorbed[0.2]) < mean(absorbed[0.0])
    known_said = opening[opening.index("Where the features are known") :].partition("flat, ")[0]
    assert ("is lower with nesting" not in known_said) or lower
    assert ("is higher with nesting" not in known_said) or not lower


def absorption(result: dict) -> float:
    """How much more often a parent's latent is silent under a child than it is missed alone."""
    whole = result["levels"][-1]["scores"]
    return whole[SILENT] - whole[MISSED]


def member(result: dict) -> tuple[str, int, float, int]:
    """What tells a member from others of its store."""
    config = result["checkpoint"]["provenance"]["train"]
    return config["recipe"], config["k"], config["alpha"], config["seed"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
