"""The harvest stage as a list of steps: plan, check the disk, prepare the tokens, make the shards, finish.

`plan.py` settles what will be done, `announce.py` says it, `splits.py` makes the tokens, `forward.py` runs the model.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from harvest import announce
from harvest.config import HarvestConfig
from harvest.forward import fitting_batch, harvest_shards, pending_shards
from harvest.plan import Plan, make_plan
from harvest.splits import Splits, make_tokens, stored_tokens
from pipeline.base.errors import MismatchError
from pipeline.base.progress import Progress, say, silenced
from pipeline.base.runtime import DTYPES, maker, rank, versions, world_size
from pipeline.model.points import Point
from pipeline.model.split_lm import SplitLM
from pipeline.model.trial import try_model
from pipeline.store.makers import Maker, record_makers, require_extender
from pipeline.store.prepare import locked, prepare, require_space, resume
from pipeline.store.writer import StoreWriter

Barrier = Callable[[], None]
COMPUTE = ("torch", "transformers")
"""The packages that compute rows."""


def run(config: HarvestConfig, *, repair: bool = False, quiet: bool = False) -> list[str]:
    """Harvest into one store a layer, or go on with a harvest that was stopped; returns the stores' paths.

    Under torchrun rank 0 prepares and finishes, and every rank makes its own shards. Raises any PipelineError.
    """
    with workers() as barrier, silenced(quiet):
        plan = make_plan(config, repair=repair)
        makers = gathered(maker(plan.device, COMPUTE))
        if rank() == 0:
            say(announce.describe(plan))
        with locked(plan.stores.values()) if rank() == 0 else contextlib.nullcontext():
            lm: SplitLM | None = None
            if rank() == 0:
                require_space(plan.config.store, plan.stores.values(), plan.estimate)
                try_cuts(plan)
                if finds_batch_size(plan):
                    lm = load_prefix(plan, list(plan.stores))
                    plan = plan.with_batch_size(found_batch_size(plan, lm))
                prepare_stores(plan, makers, repair)
            barrier()
            make_shards(plan, lm)
            barrier()
            if rank() == 0:
                finish_stores(plan)
            barrier()
    return list(plan.stores.values())


def dry_run(config: HarvestConfig, *, repair: bool = False) -> dict[str, Any]:
    """Say what a harvest would do and take, and return it as JSON data (`announce.as_json`)."""
    plan = make_plan(config, repair=repair)
    costs = announce.cost(plan)
    if rank() == 0:
        say(f"{announce.describe(plan)}\n{announce.describe_cost(costs)}")
    return announce.as_json(plan, costs)


@contextlib.contextmanager
def workers() -> Iterator[Barrier]:
    """The processes of torchrun, as a barrier among them; alone it does nothing."""
    if world_size() == 1:
        yield lambda: None
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    try:
        yield lambda: dist.barrier() and None
    finally:
        dist.destroy_process_group()


def gathered(mine: Maker) -> list[Maker]:
    """What every process of torchrun says of itself, by rank."""
    if world_size() == 1:
        return [mine]
    import torch.distributed as dist

    found: list[Maker] = [{}] * world_size()
    dist.all_gather_object(found, mine)
    return found


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


def prepare_stores(plan: Plan, makers: Sequence[Maker], repair: bool) -> None:
    """Make every layer's store ready for its shards; tokenises only when a store needs it."""
    made: Splits | None = None
    for path in () if repair else plan.stores.values():
        require_extender(path, plan.n_train, makers, mixed=plan.config.mixed)
    for point, path in plan.stores.items():
        writer = None if repair else resume(path, plan.configs[point], plan.n_train, plan.n_eval)
        if writer is None:
            made = made or tokens_for(plan, path, repair)
            writer = prepare(path, plan.configs[point], *made, versions(), repair=repair)
        writer.sweep()
        if writer.pending("train") or writer.pending("eval"):
            record_makers(writer.store, makers, mixed=plan.config.mixed)


def tokens_for(plan: Plan, path: str, repair: bool) -> Splits:
    """A repair takes the tokens that the store holds, where they are whole; everything else reads the corpus."""
    held = stored_tokens(plan, path) if repair else None
    return held if held is not None else make_tokens(plan)


def make_shards(plan: Plan, lm: SplitLM | None = None) -> None:
    """Make this process's shards in batches of the size on record. Layers after the last one that still needs a shard are not
    loaded; `lm`: a prefix of all layers that is loaded already."""
    writers = {point: StoreWriter.open(path) for point, path in plan.stores.items()}
    require_same_tokens(writers)
    shards = pending_shards(writers, rank(), world_size())
    if not shards:
        return
    lm = lm or load_prefix(plan, sorted({point for shard in shards for point in shard.points}))
    batch_size = int(next(iter(writers.values())).store.config["batch_size"])
    n_rows = sum(shard.n_rows for shard in shards)
    label = "harvest" if world_size() == 1 else f"harvest, worker {rank()}"
    with Progress(n_rows, label, "row") as bar:
        harvest_shards(lm, writers, shards, batch_size, bar)


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
    """Write what closes every store, once all its shards are there."""
    for path in plan.stores.values():
        say(announce.finished(StoreWriter.open(path).finish()))
