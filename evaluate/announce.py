"""What a job says before it works: what its texts and its checkpoints will take.

Every process of a job measures, one speaks: each then measures as it will work, beside the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from evaluate import plan as planning
from evaluate.checkpoints.find import Checkpoint, resolve_levels
from evaluate.job import Job
from evaluate.probing.first_letter import Words, make_prompts
from evaluate.probing.job import Texts
from evaluate.scores.absorption import absorption_seconds
from evaluate.scores.structure import meta_seconds
from pipeline.base.files import human_bytes
from pipeline.base.progress import format_seconds, say
from pipeline.base.spread import is_shown

SOME_TEXTS = 256
"""Texts whose tokens are counted, spread over all of them."""


def announce_texts(job: Job, todo: Sequence[Checkpoint], texts: Sequence[Texts]) -> None:
    """Say what the texts of SCR, TPP and sparse probing will take; nothing where there are none."""
    probing = job.config.probing
    if probing is None:
        return
    every = [text for part in texts for text in part.texts]
    some = every[:: len(every) // SOME_TEXTS + 1]
    ids = job.models.tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
    lengths = [min(len(one) + 1, probing.context) for one in ids]
    rows = len(every) * sum(lengths) / len(lengths)
    _, one_way = planning.sae_cost([c.sae for c in todo], job.store.d_model, job.device, over=planning.ENCODED)
    _, prefix = job.models.cost.prefix(job.models.point.layer)
    if is_shown():
        say(
            f"texts for {', '.join(probing.scores)}: {len(every):,} of at most {probing.context} tokens, about {rows:,.0f}; "
            f"about {format_seconds(rows * prefix)} once for the layers up to {job.models.point.layer}, "
            f"{format_seconds(rows * one_way)} to encode them for all checkpoints"
        )


def announce_words(job: Job, todo: Sequence[Checkpoint]) -> None:
    """Say what words in prompts will take; nothing where there are none."""
    if (words := job.words) is None:
        return
    some = Words(words.text[:200], words.train[:200])
    longest = max(
        (len(ids) for ids in job.models.tokenizer(make_prompts(some, job.config.seed))["input_ids"]), default=0
    )
    _, one_way = planning.sae_cost([c.sae for c in todo], job.store.d_model, job.device, over=planning.ENCODED)
    _, prefix = job.models.cost.prefix(job.models.point.layer)
    n = len(words.text)
    once = format_seconds(n * longest * prefix)
    if is_shown():
        say(
            f"first letters: {n:,} words in prompts of about {longest} tokens; about {once} once for the "
            f"layers up to {job.models.point.layer}, {format_seconds(n * one_way)} to encode them for all checkpoints"
        )


def announce(job: Job, todo: Sequence[Checkpoint], plan: planning.Plan) -> None:
    """Say what the passes over the store's rows will take, and what is done for each checkpoint after its pass."""
    tokens, groups = job.n_sequences * job.store.context, -(-len(todo) // plan.group)
    passes = planning.suffix_passes(todo, job.config.levels) + groups + 1
    flop, seconds = planning.sae_cost([c.sae for c in todo], job.store.d_model, job.device)
    through_model = ""
    if job.lm is not None:
        suffix_flop, suffix_seconds = job.models.cost.suffix(job.models.point.layer)
        flop, seconds = flop + passes * suffix_flop, seconds + passes * suffix_seconds
        through_model = f"{passes} passes of the layers after {job.store.config['layer']}, "
    after = after_passes(job, todo)
    if not is_shown():
        return
    say(
        f"evaluate: {len(todo)} checkpoints on {tokens:,} tokens of {job.store.where}; {through_model}"
        f"{flop * tokens / 1e12:,.3g} TFLOP in all, about {format_seconds(seconds * tokens)}"
    )
    for what, seconds in after.items():
        say(f"  then {what}: about {format_seconds(seconds)}")
    say(
        f"  {plan.batch} sequences a batch, {plan.group} checkpoints at once ({groups} pass{'es' * (groups > 1)} over the "
        f"rows), peak memory at most {human_bytes(plan.peak)} on {job.device}"
    )


def after_passes(job: Job, todo: Sequence[Checkpoint]) -> dict[str, float]:
    """What is done for checkpoints after the passes that takes long, and its seconds."""
    n_rows, d_model, found = job.n_sequences * job.store.context, job.store.d_model, dict[str, float]()
    sizes = [c.sae.levels[i] for c in todo for i in resolve_levels(job.config.levels, c)]
    if "structure" in job.config.scores:
        times = {size: meta_seconds(size, d_model, job.device) for size in set(sizes)}
        found[f"structure, {len(sizes)} meta-dictionaries"] = sum(times[size] for size in sizes)
    if "absorption" in job.config.scores:
        found["absorption"] = len(sizes) * absorption_seconds(n_rows)
    if paged := [c for c in todo if job.config.wants_latents(c.member)]:
        lens = job.models.cost.head_flop if job.lm is not None else 0.0
        seconds = sum(planning.pages_seconds(c.sae, d_model, lens, n_rows, job.device) for c in paged)
        found[f"pages of the latents of {len(paged)} checkpoint{'s' * (len(paged) > 1)}"] = seconds
    return found
