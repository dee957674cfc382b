"""`python -m train`: see `run.py`."""

from __future__ import annotations

if __name__ == "__main__":
    from pipeline.base import startup  # before what takes time to import

    startup.begin()

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import click
import torch

from pipeline.base.cli import COUNT, COUNT_OR_AUTO, OUT_FOLDER, SIZE, SOURCE, STORE, Remembering, main, print_json
from pipeline.base.errors import DivergedError, UsageError
from pipeline.base.files import read_json
from pipeline.base.runtime import rank, resolve_device
from pipeline.base.spread import Others, cores_divided, environment, n_processes
from pipeline.store.layout import Layout, SplitLayout
from pipeline.store.reader import Store
from train import plan
from train.announce import announce, announce_planned, say_costs
from train.feed.loader import Mode
from train.folder import Folder, check_out
from train.log import KINDS
from train.options import field_options, make_grid, read_config_file
from train.parallel import Processes
from train.plan import RunConfig
from train.run import own_members, run
from train.step.sparse import Choice
from train.stores import Stores
from train.trainee import Outcome


@click.command(cls=Remembering, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--store",
    type=STORE,
    required=True,
    help="Activation store that harvest made; a URL (s3://bucket/acts.zarr) is read from there, window by window.",
)
@click.option(
    "--cache",
    type=OUT_FOLDER,
    help="Keep chunks of a store at a URL in this folder, which trainings may share; what was not used for longest goes.",
)
@click.option("--cache-size", type=SIZE, default="100GB", show_default=True, help="The most that --cache may take.")
@click.option(
    "--target",
    type=STORE,
    help="Train transcoders: from the rows of --store to those of this store, of the same tokens. One pass of harvest --hook "
    "mlp_in --hook mlp_out makes both.",
)
@click.option("--out", type=OUT_FOLDER, required=True, help="Folder of the members; it may grow.")
@click.option(
    "--config",
    type=SOURCE,
    is_eager=True,
    callback=read_config_file,
    expose_value=False,
    help="TOML file with the same names as these options; a list repeats one. An option given here wins.",
)
@field_options
@click.option(
    "--mode",
    type=click.Choice(["auto", "global", "window"]),
    default="auto",
    show_default=True,
    help="Order of rows. global: an exact permutation over mapped shards; window: permuted chunks in windows, for "
    "stores larger than memory and compressed ones; auto: global where the store fits into memory, on CUDA into the GPU's "
    "beside the members.",
)
@click.option("--window-rows", type=COUNT, help="Rows a window spans; two are held in memory.  [262144]")
@click.option("--threads", type=COUNT, default=2, show_default=True, help="Threads that gather rows.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--keep",
    default="last:3,every:1000",
    show_default=True,
    help="Checkpoints that stay: the last so many, those at multiples of so many steps, or all. The final one always.",
)
@click.option("--keep-state", is_flag=True, help="A finished member's training state stays too, for --extend.")
@click.option(
    "--checkpoint-minutes",
    type=click.FLOAT,
    help="Write the training state, three times an SAE's bytes, from which a stopped run goes on, every so many minutes.  [with "
    "every checkpoint of the SAE, --checkpoint-every steps]",
)
@click.option(
    "--extend",
    is_flag=True,
    help="Begin with the kept state of a shorter training in OUT that is the same but for --steps: bit for bit as if these had "
    "been asked for at first, or refused with the reason (a decay that ended with it, say).",
)
@click.option(
    "--log",
    type=click.Choice(KINDS),
    multiple=True,
    default=("jsonl",),
    help="Further places for metrics; repeat it. metrics.jsonl is always written. wandb is offline unless WANDB_MODE is set.",
)
@click.option(
    "--processes",
    type=COUNT_OR_AUTO,
    default=1,
    show_default=True,
    help="Share members out over so many processes of this machine, its cores divided among them; auto: one a core, or one a "
    "GPU. On a CPU several small members train about twice as fast so, each bit for bit as alone with as many threads.",
)
@click.option(
    "--data-parallel",
    is_flag=True,
    help="Under torchrun: all processes train every member, each on its share of the batch, instead of sharing members out.",
)
@click.option(
    "--cuda-graphs",
    is_flag=True,
    help="On CUDA: replay each step as one graph. For small SAEs, whose kernels take longer to launch than to run.",
)
@click.option(
    "--sparse",
    type=click.Choice(get_args(Choice)),
    default="auto",
    show_default=True,
    help="topk, batchtopk: matrix products over active latents alone, once k has stopped falling. auto: from width 65,536 on, "
    "on GPUs on which that was measured to be faster (none yet).",
)
@click.option(
    "--verify-first", is_flag=True, help="Check every byte of the store before the first step, not beside it."
)
@click.option("--dry-run", is_flag=True, help="Print members, memory, disk and a rough time; train nothing.")
@click.option(
    "--planned",
    type=SOURCE,
    metavar="FILE",
    help="With --dry-run, for a store that is not there yet: what harvest --dry-run --json printed.",
)
@click.option(
    "--elsewhere",
    is_flag=True,
    help="With --dry-run: plan for another machine, so that members need not fit into this one's memory.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the members and their final checkpoints as JSON on stdout."
)
def command(
    store: Path | str,
    cache: Path | None,
    cache_size: int,
    target: Path | str | None,
    out: Path,
    mode: Mode,
    window_rows: int | None,
    threads: int,
    device: str,
    keep: str,
    keep_state: bool,
    checkpoint_minutes: float | None,
    extend: bool,
    log: tuple[str, ...],
    processes: int | str,
    data_parallel: bool,
    cuda_graphs: bool,
    sparse: Choice,
    verify_first: bool,
    dry_run: bool,
    planned: Path | None,
    elsewhere: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train nested sparse autoencoders on an activation store.

    Options of a training can be repeated, and the grid is their product: every member of it is trained on one read of
    the store, bit for bit as if it were trained alone. A folder in OUT holds one member. Finished members are skipped
    and stopped ones go on, so the same command can be run again at any time, and with more values.

    Under torchrun, and with --processes, members are shared out over processes; under torchrun with --data-parallel each member's
    batches are.

    \b
    Example: three seeds of a flat and of a nested SAE
        python -m train --store acts.zarr --out sae --width 4096 --alpha 0 --alpha 0.2 --seed 0 --seed 1 --seed 2
    """
    members = make_grid(given, None if planned is not None else lambda max_norm: kept_rows(store, target, max_norm))
    job = RunConfig(
        store,
        out,
        members,
        device,
        mode,
        window_rows,
        threads,
        keep,
        keep_state,
        checkpoint_minutes,
        log,
        verify_first,
        data_parallel,
        cuda_graphs,
        sparse,
        extend,
        target,
        cache,
        cache_size,
    )
    if planned is not None and not dry_run:
        raise UsageError("--planned goes with --dry-run")
    if elsewhere and not dry_run:
        raise UsageError("--elsewhere goes with --dry-run")
    if data_parallel and processes != 1:
        raise UsageError(
            "--processes shares members out and --data-parallel every batch; give one of them, the latter under torchrun"
        )
    resolved = resolve_device(device)
    n = n_processes(processes, n_unfinished(job, resolved), resolved)
    if dry_run:
        outcomes, cost = show_plan(job, resolved, n, planned, elsewhere=elsewhere)
    else:
        with Others("train", n, "members") as others:
            own = run(job)
            outcomes = in_order([own, *([from_data(one) for one in part["members"]] for part in others.results())])
    if as_json and not (data_parallel and rank()):
        print_json({"members": [as_data(outcome) for outcome in outcomes]} | ({"cost": cost} if dry_run else {}))
    if failed := [outcome for outcome in outcomes if outcome.problem]:
        raise DivergedError(
            f"{len(failed)} of {len(outcomes)} members diverged: {', '.join(outcome.folder.name for outcome in failed)}"
        )


def kept_rows(store: Path | str, target: Path | str | None, max_norm: float | None) -> int:
    """Rows of one epoch of a store, or of the rows that two have in common."""
    both = Stores(Store.open(store, check=False), None if target is None else Store.open(target, check=False))
    return int(both.kept("train", max_norm).in_chunks().sum())


def in_order(shares: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """Outcomes in the order of the grid, of processes that each took every n-th member."""
    turns = itertools.zip_longest(*shares)
    return [outcome for turn in turns for outcome in turn if outcome is not None]


def as_data(outcome: Outcome) -> dict[str, Any]:
    """One member's outcome as JSON data."""
    final = None if outcome.final is None else str(outcome.final)
    return {"folder": str(outcome.folder), "step": outcome.step, "final": final, "problem": outcome.problem or None}


def from_data(data: Mapping[str, Any]) -> Outcome:
    """One member's outcome as another process printed it."""
    final = None if data["final"] is None else Path(data["final"])
    return Outcome(Path(data["folder"]), data["step"], final, data["problem"] or "")


def planned_rows(path: Path | str, plan_file: Path) -> SplitLayout:
    """Training rows of the store at `path`, as a plan of harvest says. Raises UsageError when the plan has none there."""
    for one in read_json(plan_file)["stores"]:
        if one["path"] == path or Path(one["path"]).absolute() == Path(path).absolute():
            return SplitLayout("train", Layout.from_config(one["config"]), one["n_sequences"]["train"])
    raise UsageError(f"{plan_file}: plans no store at {path}; give harvest and train the same --store")


def n_unfinished(job: RunConfig, device: torch.device) -> int:
    """Members of the grid that are not finished."""
    members = own_members(job, Processes(0, 1, device, None))
    return sum(Folder(job.out, config, {}).final() is None for config in members)


def show_plan(
    job: RunConfig, device: torch.device, n: int, planned: Path | None = None, *, elsewhere: bool = False
) -> tuple[list[Outcome], dict[str, Any]]:
    """Print what `run` would do in n processes; where members stand as outcomes, and what the rest costs (`plan.cost`) with
    the `seconds` that were measured on `device_type`.

    `elsewhere`: members that this machine has no memory for are planned too, in passes of their own; there are no seconds then.
    """
    check_out(job.out)
    if planned is None:
        stores = Stores.open(job.store, job.target)
        rows = stores.train.shape
    else:
        rows = planned_rows(job.store, planned)
        target = None if job.target is None else planned_rows(job.target, planned)
    shares, costs, fits = [], [], True
    with cores_divided(n), environment({"LOCAL_WORLD_SIZE": str(n)} if n > 1 else {}):
        for rank_ in range(n):
            members = own_members(job, Processes(rank_, n, device, None))
            free = plan.free_memory(device)
            tasks = (
                plan.make_tasks(job, stores, members, device, sys.maxsize if elsewhere else free)
                if planned is None
                else plan.planned_tasks(job, rows, members, target)
            )
            if elsewhere and (largest := plan.largest_memory(rows, tasks, device)) > free:
                free, fits = largest, False
            passes = plan.make_passes(rows, tasks, device, free)
            if planned is None:
                announce(stores, tasks, passes, device)
            else:
                announce_planned(rows, tasks, passes, device)
            shares.append(tasks)
            costs.append(plan.cost(rows, passes, device))
        seconds = say_costs(job, rows, [task for tasks in shares for task in tasks], device, n, measure=fits)
    outcomes = [[Outcome(task.folder.path, task.step, task.folder.final()) for task in tasks] for tasks in shares]
    total = {name: sum(cost[name] for cost in costs) for name in costs[0]}
    return in_order(outcomes), total | {"seconds": seconds, "device_type": device.type}


if __name__ == "__main__":
    main(command, "train", "the state of every member is written; run the same command again to go on")
