"""The harvest stage as a list of steps: plan, check the disk, prepare the tokens, make the shards, finish.

`plan.py` settles what will be done, `announce.py` says it, `splits.py` makes the tokens, `forward.py` runs the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harvest import announce
from harvest.blocks import sweep_blocks
from harvest.config import HarvestConfig
from harvest.forward import Shard, fitting_batch, harvest_shards, pending_shards
from harvest.group import Group, workers
from harvest.plan import Plan, make_plan
from harvest.splits import Splits, make_tokens, stored_tokens, tokenise_part
from harvest.steps import Note, Share, Steps, drop_notes, makers_of, read_notes, require_all
from pipeline.base.errors import DamagedError, MismatchError, StoreError
from pipeline.base.progress import Progress, say, silenced
from pipeline.base.runtime import DTYPES, maker, rank, require_world, versions, world_size
from pipeline.model.points import Point
from pipeline.model.split_lm import SplitLM
from pipeline.model.trial import try_model
from pipeline.store.layout import SPLITS
from pipeline.store.makers import Maker, add_makers, record_makers, require_extender, require_makers
from pipeline.store.prepare import holds_tokens, locked, prepare, require_space, resume
from pipeline.store.reader import finished
from pipeline.store.writer import StoreWriter

COMPUTE = ("torch", "transformers")
"""The packages that compute rows."""


def run(
    config: HarvestConfig,
    *,
    repair: bool = False,
    quiet: bool = False,
    steps: Steps = Steps(),  # noqa: B008 (frozen)
) -> list[str]:
    """Harvest into one store a layer, or go on with a harvest that was stopped; returns the stores' paths.

    Under torchrun every rank tokenises its own documents and makes the shards that it is handed, and rank 0 prepares and
    finishes. `steps`: only some of this, for job arrays without torch.distributed. Raises any PipelineError.
    """
    with workers() as group, silenced(quiet):
        if steps.prepare and steps.part is not None:
            config = config.replace(device="cpu")  # tokenising needs no other
        plan = make_plan(config, repair=repair)
        if rank() == 0:
            say(announce.describe(plan))
        if steps.prepare and steps.part is not None:
            if needs_text(plan, repair):
                tokenise_part(plan, *dataclasses.astuple(steps.part.among(rank(), world_size())))
            return list(plan.stores.values())
        makers = group.gathered(maker(plan.device, COMPUTE))
        alone = locked(plan.stores.values(), shared=not steps.is_alone)
        with alone if rank() == 0 else contextlib.nullcontext():
            lm = prepare_all(plan, makers, repair, group, steps)
            if steps.make:
                make_part(plan, lm, makers, group, steps)
            if steps.finish and rank() == 0:
                finish_stores(plan)
            group.barrier()
    return list(plan.stores.values())


def prepare_all(plan: Plan, makers: Sequence[Maker], repair: bool, group: Group, steps: Steps) -> SplitLM | None:
    """The step before shards, by all processes of the group; the prefix of the model, where it was loaded for it.

    Where it is not asked for, raises StoreError unless it was done, and MismatchError unless for this model, corpus and options.
    """
    lm: SplitLM | None = None
    if not steps.prepare:
        if rank() == 0:
            require_prepared(plan)
        group.barrier()
        return None
    if rank() == 0:
        require_space(plan.config.store, plan.stores.values(), plan.estimate)
        try_cuts(plan)
        if finds_batch_size(plan):
            lm = load_prefix(plan, list(plan.stores))
            plan = plan.with_batch_size(found_batch_size(plan, lm))
    if world_size() > 1 and group.told(needs_text(plan, repair)):
        tokenise_part(plan, rank(), world_size())
        group.barrier()
    if rank() == 0:
        prepare_stores(plan, makers, repair, makes=steps.make)
        sweep_blocks(plan.corpora.scratch, plan.name)
    group.barrier()
    return lm


def needs_text(plan: Plan, repair: bool) -> bool:
    """Whether a store lacks its tokens, so that the corpus is read. (A repair finds out while it reads the store.)"""
    return not repair and any(not holds_tokens(path, plan.n_train, plan.n_eval) for path in plan.stores.values())


def require_prepared(plan: Plan) -> None:
    """Raise StoreError unless every store is ready for its shards; MismatchError for another model, corpus or option."""
    for point, path in plan.stores.items():
        if resume(path, plan.configs[point], plan.n_train, plan.n_eval) is None:
            raise StoreError(
                f"{path}: is not prepared for {plan.n_train:,} training sequences; run --prepare-only first"
            )


def make_part(plan: Plan, lm: SplitLM | None, makers: Sequence[Maker], group: Group, steps: Steps) -> None:
    """This process's shards of all, or of a part, which leaves its notes in the stores."""
    notes: list[tuple[StoreWriter, Note]] = []
    if steps.part is not None and rank() == 0:
        for path in plan.stores.values():
            writer = StoreWriter.open(path)
            before = read_notes(writer.files)
            require_makers(writer.store, makers, mixed=plan.config.mixed, also=makers_of(before))
            mine = [one for one in before if one.share == steps.part]  # from when it was killed: rows may be of that
            note = Note.here(steps.part, world_size(), makers_of([*mine, Note.here(steps.part, 1, makers)]))
            note.write(writer.files)
            notes.append((writer, note))
    group.barrier()
    make_shards(plan, lm, steps.part or Share(), group)
    group.barrier()
    for writer, note in notes:
        dataclasses.replace(note, ended=True).write(writer.files)


def dry_run(config: HarvestConfig, *, repair: bool = False) -> dict[str, Any]:
    """Say what a harvest would do and take, and return it as JSON data (`announce.as_json`)."""
    require_world()
    plan = make_plan(config, repair=repair)
    costs = announce.cost(plan)
    if rank() == 0:
        say(f"{announce.describe(plan)}\n{announce.describe_cost(costs)}")
    return announce.as_json(plan, costs)


def try_cuts(plan: Plan) -> None:
    """Before a new store is begun: the model, cut at its layers, must compute what it computes whole. Raises ModelError."""
    c = plan.config
    if plan.is_new and not try_model(
        plan.info, list(plan.stores), c.dtype, plan.device, c.attention, trust_remote_code=c.trust_remote_code
    ):
        say("note     the model does not fit here whole: that it can be scored from there was not tried")


def finds_batch_size(plan: Plan) -> bool:
    """Whether the size of a batch is found by trying: on a GPU, for a new store, where none was asked for."""
    return plan.is_new and not plan.asked_batch_size and plan.device.type == "cuda"


def found_batch_size(plan: Plan, lm: SplitLM) -> int:
    """Sequences of a batch that fit, the planned number at most."""
    c = plan.config
    assert c.batch_size is not None, "settled by the plan"
    found = fitting_batch(lm, c.context, c.batch_size, DTYPES[c.store_dtype])
    if found < c.batch_size:
        say(f"batch    {found} sequences, as {c.batch_size} do not fit into the memory of {plan.device}")
    return found


def prepare_stores(plan: Plan, makers: Sequence[Maker], repair: bool, *, makes: bool = True) -> None:
    """Make every layer's store ready for its shards; tokenises only when a store needs it. makes: these makers will make them."""
    made: Splits | None = None
    for path in plan.stores.values():
        gather_notes(path, plan.config.mixed)
    for path in () if repair else plan.stores.values():
        require_extender(path, plan.n_train, makers, mixed=plan.config.mixed)
    for point, path in plan.stores.items():
        writer = None if repair else resume(path, plan.configs[point], plan.n_train, plan.n_eval)
        if writer is None:
            made = made or tokens_for(plan, path, repair)
            writer = prepare(path, plan.configs[point], *made, versions(), repair=repair)
        writer.sweep()
        if makes and (writer.pending("train") or writer.pending("eval")):
            record_makers(writer.store, makers, mixed=plan.config.mixed)


def tokens_for(plan: Plan, path: str, repair: bool) -> Splits:
    """A repair takes the tokens that the store holds, where they are whole; everything else reads the corpus."""
    held = stored_tokens(plan, path) if repair else None
    return held if held is not None else make_tokens(plan)


def gather_notes(path: str, mixed: bool) -> None:
    """Put down in a store's root who made its parts."""
    try:
        writer = StoreWriter.open(path)
    except (StoreError, DamagedError):
        return  # there is none, or whoever goes on with it will say so
    if notes := read_notes(writer.files):
        add_makers(writer.store, makers_of(notes), mixed=mixed)


def make_shards(plan: Plan, lm: SplitLM | None, share: Share, group: Group) -> None:
    """Make the share's shards in batches of the size on record, each by the process of the group that asks next. Layers after the
    last one that still needs a shard are not loaded; `lm`: a prefix of all layers that is loaded already."""
    writers = {point: StoreWriter.open(path) for point, path in plan.stores.items()}
    require_same_tokens(writers)
    first = next(iter(writers.values()))
    n_shards = sum(first.split(name).n_shards for name in SPLITS)
    ours = [k for k in range(n_shards) if share.part_of(k, world_size()) == share.i]
    pending = pending_shards(writers)
    left = [pending.get(k) for k in ours]
    if not any(left):
        return
    lm = lm or load_prefix(plan, sorted({point for shard in left if shard for point in shard.points}))
    batch_size = int(first.store.config["batch_size"])
    label = "harvest" if share.n == 1 else f"harvest, part {share}"
    with Progress(sum(shard.n_rows for shard in left if shard), label, "row") as bar:
        harvest_shards(lm, writers, taken(left, group, bar), batch_size, bar)


def taken(shards: Sequence[Shard | None], group: Group, bar: Progress) -> Iterator[Shard]:
    """Those of them that are left to do and handed to this process when it asks, so that a slow one holds nobody up. What others
    were handed meanwhile counts as done in the bar."""
    seen = 0
    for i in group.handed_out(len(shards)):
        bar.advance(sum(shard.n_rows for shard in shards[seen:i] if shard))
        seen = i + 1
        if (mine := shards[i]) is not None:
            yield mine
    bar.advance(sum(shard.n_rows for shard in shards[seen:] if shard))


def load_prefix(plan: Plan, points: Sequence[Point]) -> SplitLM:
    """The model up to the last of the points, compiled where that was asked for."""
    c = plan.config
    lm = SplitLM.load(
        str(plan.info.folder),
        dtype=c.dtype,
        device=plan.device,
        part="prefix",
        layers=points,
        attention=c.attention,
        device_map=c.device_map,
        trust_remote_code=c.trust_remote_code,
    )
    if c.compile:
        lm.compile()
    return lm


def require_same_tokens(writers: Mapping[Point, StoreWriter]) -> None:
    """Raise MismatchError unless the stores hold the same tokens, so that one pass serves them all."""
    tokens = {point: writer.store.attributes["tokens_sha256"] for point, writer in writers.items()}
    if len({sha["train"] + sha["eval"] for sha in tokens.values()}) > 1:
        raise MismatchError(
            f"{', '.join(writer.store.where for writer in writers.values())}: hold different tokens (one was extended, the "
            f"other not in the same steps); harvest one layer at a time"
        )


def finish_stores(plan: Plan) -> None:
    """Write what closes every store, once all its shards are there. Raises StoreError naming the parts that are missing."""
    for path in plan.stores.values():
        writer = StoreWriter.open(path)
        require_all(writer, read_notes(writer.files))
        gather_notes(path, plan.config.mixed)
        store = StoreWriter.open(path).finish()
        drop_notes(writer.files)
        say(finished(store))
    sweep_blocks(plan.corpora.scratch, plan.name)
