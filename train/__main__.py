"""`python -m train`: see `run.py`."""

from __future__ import annotations

if __name__ == "__main__":
    from pipeline.base import startup  # before what takes time to import

    startup.begin()

from pathlib import Path
from typing import Any, get_args

import click

from pipeline.base.cli import (
    COUNT,
    COUNT_OR_AUTO,
    OUT_FOLDER,
    SIZE,
    SOURCE,
    STORE,
    Remembering,
    main,
    only_reads,
    print_json,
)
from pipeline.base.errors import DivergedError, UsageError
from train.config import LOGS, Mode, Sparse
from train.options import field_options, make_grid, read_config_file

A_MILLION = 1_000_000
"""Rows of a store that is not there yet, where options are only read."""


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
    type=click.Choice(get_args(Mode)),
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
    type=click.Choice(LOGS),
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
    type=click.Choice(get_args(Sparse)),
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
    sparse: Sparse,
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
    from train.plan import RunConfig

    def rows_an_epoch(max_norm: float | None) -> int:
        if only_reads():
            return A_MILLION
        from train.run import kept_rows

        return kept_rows(store, target, max_norm)

    members = make_grid(given, None if planned is not None else rows_an_epoch)
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
    if only_reads():
        return
    from pipeline.base.runtime import rank, resolve_device
    from pipeline.base.spread import Others, n_processes
    from train.dry_run import show_plan
    from train.run import n_unfinished, run
    from train.trainee import Outcome, in_order

    resolved = resolve_device(device)
    n = n_processes(processes, n_unfinished(job, resolved), resolved)
    if dry_run:
        outcomes, cost = show_plan(job, resolved, n, planned, elsewhere=elsewhere)
    else:
        with Others("train", n, "members") as others:
            own = run(job)
            outcomes = in_order(
                [own, *([Outcome.from_data(one) for one in part["members"]] for part in others.results())]
            )
    if as_json and not (data_parallel and rank()):
        print_json({"members": [outcome.to_data() for outcome in outcomes]} | ({"cost": cost} if dry_run else {}))
    if failed := [outcome for outcome in outcomes if outcome.problem]:
        raise DivergedError(
            f"{len(failed)} of {len(outcomes)} members diverged: {', '.join(outcome.folder.name for outcome in failed)}"
        )


if __name__ == "__main__":
    main(command, "train", "the state of every member is written; run the same command again to go on")
