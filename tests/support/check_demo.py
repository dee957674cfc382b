"""Check a finished demo: every member scored, the numbers those of SAEs that work, the report whole. Used by .ci/run."""

import json
import math
import sys
from pathlib import Path

ALPHAS, SEEDS = {0.0, 0.1, 0.2, 0.3, 0.5}, {0, 1, 2}
WANTED = {("batchtopk", alpha, seed) for alpha in ALPHAS for seed in SEEDS} | {("paper", 0.2, seed) for seed in SEEDS}
L0 = 32


def main(out: Path) -> None:
    results = [json.loads(path.read_text()) for path in sorted((out / "results").rglob("*.json"))]
    trained = [r["checkpoint"]["provenance"]["train"] for r in results]
    members = {(config["recipe"], config["alpha"], config["seed"]) for config in trained}
    assert members == WANTED, members
    for result in results:
        check_result(result)
    page = (out / "report.html").read_text()
    assert "Table 1" in page
    assert page.count("<svg") >= 3
    assert "http://" not in page.replace("http://www.w3.org", ""), "the report must need no network"
    print(f"demo: {len(results)} checkpoints scored, report of {len(page) // 1000} kB")


def check_result(result: dict) -> None:
    whole = result["levels"][-1]["scores"]
    baselines = result["baselines"]
    assert 0.4 < whole["ev"] < 1, whole["ev"]
    assert 0 < whole["kl_nats"] < baselines["kl_mean"], (whole["kl_nats"], baselines)
    assert baselines["ce_clean"] < whole["ce"] < baselines["ce_zero"]
    assert abs(whole["l0"] - L0) < 0.25 * L0, whole["l0"]  # held-out documents are others than those trained on
    assert math.isclose(whole["sparsity"], 1 - whole["l0"] / result["checkpoint"]["sae"]["width"], abs_tol=1e-6)
    assert any(row["value"] is not None for row in result["series"]["scr"])
    shared = result["levels"][0]["scores"]
    assert len(result["levels"]) == 1 or shared["ev"] < whole["ev"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
