"""Run in its own process by test_evaluate: prints how much resident memory a job added, and what its plan promised."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from evaluate.job import Job
from evaluate.run import EvaluateConfig, Outcome, score_all
from evaluate.select import select
from evaluate.work import plan
from support import lm_stores, tiny_models

VOCAB = 100_000


def main(folder: Path, limit: int) -> None:
    """Evaluate two wide SAEs on a model with a large head."""
    plain = tiny_models.make_model
    tiny_models.make_model = lambda path, kind, dtype: plain(path, kind, dtype=dtype, vocab_size=VOCAB)
    store = lm_stores.make_lm_store(folder, eval_sequences=32)
    saes = [lm_stores.make_sae(store, levels=(512, 4096), seed=seed) for seed in (0, 1)]
    paths = [lm_stores.save_member(folder / "runs", store, sae, seed=i) for i, sae in enumerate(saes)]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before = pages * resource.getpagesize()
    scores = ("kl", "ev", "l0")
    config = EvaluateConfig(store.path, folder / "out", batch_size=32, max_memory=limit, scores=scores)
    job, outcome = Job.of(config, store), Outcome()
    todo = select(job, [next((path / "checkpoints").iterdir()) for path in paths]).todo[scores]
    planned = plan(job, todo, 0)
    score_all(job, todo, (), outcome)
    assert len(outcome.results) == 2, outcome.failed
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"grown": grown, "peak": planned.peak, "batch": planned.batch, "chunk": planned.chunk}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
