"""What a harvest says: what it will do and take, before it does it, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harvest.plan import Plan
from pipeline.base.files import beside, free_bytes, human_bytes, is_url
from pipeline.base.progress import format_seconds
from pipeline.base.runtime import DTYPES, cpu_has_bf16
from pipeline.model.cost import measure_forward
from pipeline.store.writer import writing_bytes

HARVEST_OVER_FORWARD = 1.05
"""A harvest's time over that of its forward passes, for the estimate (tests/bench/bench_harvest.py)."""


def describe(plan: Plan) -> str:
    """What will be done, in a few lines, with the estimate of its size."""
    c = plan.config
    at_most = "" if c.codec == "none" else "at most "
    rows, n_stores = (plan.n_train + plan.n_eval) * c.context, len(plan.stores)
    free = "" if is_url(c.store) else f", {human_bytes(free_bytes(beside(c.store)))} free"
    lines = [
        f"model    {c.model}, {', '.join(map(str, plan.stores))} of {plan.info.n_layers}, d_model {plan.info.d_model}",
        f"tokens   {plan.n_train * c.context:,} for training, {plan.n_eval * c.context:,} for evaluation, "
        f"in sequences of {c.context}, "
        + (f"BOS {', '.join(map(str, plan.packing.first))} first" if len(plan.packing.first) else "no BOS"),
        f"compute  {plan.device}, {c.dtype} (stored as {c.store_dtype}), {c.attention} attention, "
        f"{c.batch_size} sequences a batch",
        f"store    {c.store}: {rows:,} rows × {n_stores} stores, {at_most}{human_bytes(plan.estimate)}{free}",
    ]
    if c.dtype == "bf16" and plan.device.type == "cpu" and not cpu_has_bf16():
        lines.append("note     this CPU multiplies float32 faster than bf16: use --dtype float32")
    return "\n".join(lines)


def describe_cost(c: Mapping[str, float]) -> str:
    """Time and memory, roughly: a batch measured now, the layers that run, and what harvest adds."""
    return (
        f"time     about {format_seconds(c['seconds'])} ({c['flop']:.2g} FLOP, a batch of a few layers measured now)\n"
        f"memory   about {human_bytes(c['memory'])}: weights of the layers that run, a batch, a shard of each store, what is open"
    )


def cost(plan: Plan) -> dict[str, float]:
    """FLOP, seconds and bytes of memory that all of a harvest takes; and of one token in the layers after the last."""
    c, info = plan.config, plan.info
    assert c.batch_size is not None, "settled by the plan"
    n_tokens, dtype = (plan.n_train + plan.n_eval) * c.context, DTYPES[c.dtype]
    measured = measure_forward(
        info, c.dtype, plan.device, c.batch_size, c.context, c.attention, trust_remote_code=c.trust_remote_code
    )
    flop, seconds = measured.prefix(max(point.layer for point in plan.stores))
    suffix_flop, suffix_seconds = measured.suffix(max(point.layer for point in plan.stores))
    rows = c.batch_size * c.context * 12 * info.d_model
    stores = sum(writing_bytes(config, plan.n_train, plan.n_eval) for config in plan.configs.values())
    tokens = 10 * int(c.shard_rows or 0)  # of the shard whose rows are computed, and their masks
    embedding = info.vocab * info.d_model
    return {
        "flop": flop * n_tokens,
        "seconds": HARVEST_OVER_FORWARD * seconds * n_tokens,
        "memory": dtype.itemsize * (flop / 2 + embedding + rows) + tokens + stores,
        "suffix_flop": suffix_flop,
        "suffix_seconds": suffix_seconds,
    }


def as_json(plan: Plan, costs: Mapping[str, float]) -> dict[str, Any]:
    """A plan as JSON data: `stores` (layer, path, config, n_sequences), `bytes`, `cost`."""
    n_sequences = {"train": plan.n_train, "eval": plan.n_eval}
    stores = [
        {**point.recorded, "path": path, "config": plan.configs[point], "n_sequences": n_sequences}
        for point, path in plan.stores.items()
    ]
    return {"stores": stores, "bytes": plan.estimate, "cost": dict(costs)}
