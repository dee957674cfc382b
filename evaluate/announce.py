"""What a job says before it works: what its texts and its checkpoints will take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from evaluate import plan as planning
from evaluate.checkpoints.find import Checkpoint, resolve_levels
from evaluate.job import Job
from evaluate.probing.first_letter import Words, make_prompts
from evaluate.probing.job import Texts, most_rows
from evaluate.scores.structure import meta_seconds
from pipeline.base.files import human_bytes
from pipeline.base.progress import format_seconds, say


def announce_texts(job: Job, todo: Sequence[Checkpoint], texts: Sequence[Texts]) -> None:
    """Say what the texts of SCR, TPP and sparse probing will take; nothing where there are none."""
    probing = job.config.probing
    if probing is None:
        return
    n_texts, rows = sum(len(part.texts) for part in texts), most_rows(probing, texts)
    _, both_ways = planning.sae_cost([c.sae for c in todo], job.store.d_model, job.device)
    _, prefix = job.models.cost.prefix(job.models.point.layer)
    say(
        f"texts for {', '.join(probing.scores)}: {n_texts:,} of at most {probing.context} tokens; "
        f"at most about {format_seconds(rows * prefix)} once for the layers up to "
        f"{job.models.point.layer}, {format_seconds(rows * both_ways / 2)} to encode them for all checkpoints"
    )


def announce_words(job: Job, todo: Sequence[Checkpoint]) -> None:
    """Say what words in prompts will take; nothing where there are none."""
    if (words := job.words) is None:
        return
    some = Words(words.text[:200], words.train[:200])
    longest = max(
        (len(ids) for ids in job.models.tokenizer(make_prompts(some, job.config.seed))["input_ids"]), default=0
    )
    _, both_ways = planning.sae_cost([c.sae for c in todo], job.store.d_model, job.device)
    _, prefix = job.models.cost.prefix(job.models.point.layer)
    n = len(words.text)
    once = format_seconds(n * longest * prefix)
    say(
        f"first letters: {n:,} words in prompts of about {longest} tokens; about {once} once for the "
        f"layers up to {job.models.point.layer}, {format_seconds(n * both_ways / 2)} to encode them for all checkpoints"
    )


def announce(job: Job, todo: Sequence[Checkpoint], plan: planning.Plan) -> None:
    """Say what the passes over the store's rows will take."""
    tokens, groups = job.n_sequences * job.store.context, -(-len(todo) // plan.group)
    passes = planning.suffix_passes(todo, job.config.levels) + groups + 1
    flop, seconds = planning.sae_cost([c.sae for c in todo], job.store.d_model, job.device)
    through_model = ""
    if job.lm is not None:
        suffix_flop, suffix_seconds = job.models.cost.suffix(job.models.point.layer)
        flop, seconds = flop + passes * suffix_flop, seconds + passes * suffix_seconds
        through_model = f"{passes} passes of the layers after {job.store.config['layer']}, "
    say(
        f"evaluate: {len(todo)} checkpoints on {tokens:,} tokens of {job.store.where}; {through_model}"
        f"{flop * tokens / 1e12:,.3g} TFLOP in all, about {format_seconds(seconds * tokens)}"
    )
    if "structure" in job.config.scores:
        sizes = Counter(c.sae.levels[i] for c in todo for i in resolve_levels(job.config.levels, c))
        seconds = sum(n * meta_seconds(m, job.store.d_model, job.device) for m, n in sizes.items())
        say(f"  structure: {sizes.total()} meta-dictionaries, about {format_seconds(seconds)}")
    say(
        f"  {plan.batch} sequences a batch, {plan.group} checkpoints at once ({groups} pass{'es' * (groups > 1)} over the "
        f"rows), peak memory at most {human_bytes(plan.peak)} on {job.device}"
    )
