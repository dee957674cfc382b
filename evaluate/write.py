"""A scored checkpoint becomes a results file, and pages of its latents where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from evaluate.checkpoints.find import loss_curve
from evaluate.latents.files import latents_folder
from evaluate.probing.texts import PooledLatents
from evaluate.results import add_result, definitions
from evaluate.scores.scorer import Scorer
from evaluate.work import Work
from pipeline.base.runtime import git_state, versions
from pipeline.store.reader import Store


@torch.inference_mode()
def write(work: Work, scorer: Scorer, pooled: Sequence[PooledLatents] | None) -> None:
    """Compute what is left of one checkpoint and write its files; `pooled`: its latents over texts, where scores read some.

    Raises CheckpointError, DamagedError, DiskError.
    """
    data = results(work, scorer, pooled)
    if work.job.config.wants_latents(scorer.checkpoint.member):
        write_latents(work, scorer)
    add_result(work.job.path(scorer.checkpoint), data)


def results(work: Work, scorer: Scorer, pooled: Sequence[PooledLatents] | None) -> dict[str, Any]:
    """Everything FORMAT.md lists under "Results" but format and version."""
    job, store = work.job, work.job.store
    baselines = [work.reference.baselines.numbers(k) for k in range(2)] if work.reference is not None else None
    series, features = scorer.series(), scorer.features()
    if work.probing is not None:
        probed = work.probing.score(scorer.sae, scorer.levels, pooled)
        series |= {name: [dict(row) for row in rows] for name, rows in probed.series.items()}
        features = {**features, "probing": probed.tasks}
    return {
        "key": job.key(scorer.checkpoint),
        "checkpoint": scorer.checkpoint.to_dict(),
        "store": about(store) | ({} if job.source is store else {"source": about(job.source)}),
        "evaluation": job.identity,
        "sample": sample_facts(work),
        "baselines": baselines[0] | {"without_massive": baselines[1]} if baselines else {},
        "levels": scorer.level_results(baselines),
        "series": series,
        "features": features,
        **scorer.beside(),
        "curve": loss_curve(scorer.checkpoint),
        "definitions": definitions(),
        "versions": versions(),
        "git": git_state(),
    }


def about(store: Store) -> dict[str, Any]:
    """What results say of a store."""
    found = {"id": store.id, "d_model": store.d_model, "context": store.context}
    found |= {name: store.config[name] for name in ("model", "revision", "weights_sha256", "layer", "corpus")}
    return found | ({"hook": store.config["hook"]} if "hook" in store.config else {})


def sample_facts(work: Work) -> dict[str, Any]:
    """What the averages are over."""
    kept, normal = (int(n) for n in work.survey.n_rows)
    rows = work.sample.n_sequences * work.job.store.context
    return {
        "split": "eval",
        "n_sequences": work.sample.n_sequences,
        "n_rows": rows,
        "n_tokens": kept,
        "n_tokens_without_massive": normal,
        "n_special": rows - kept,
        "n_massive": kept - normal,
        "batch_size": work.sample.batch_size,
        "device": str(work.job.device),
        "probing": work.probing.sample if work.probing is not None else {},
    }


def write_latents(work: Work, scorer: Scorer) -> None:
    """Pages of every latent, beside the results file."""
    from evaluate.latents.collect import write_latents as write_pages

    job = work.job
    suffix = job.models.suffix
    unembedding = suffix.readout() if suffix is not None else None
    folder = latents_folder(job.path(scorer.checkpoint))
    write_pages(scorer.sae, job.source, job.models.tokenizer, folder, unembedding=unembedding, quiet=True)
