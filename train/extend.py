"""A longer training that begins where a shorter one ended: bit for bit what it would have been, or refused with the reason."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from pipeline.base.errors import DamagedError, PipelineError, UsageError
from pipeline.base.files import canonical_json, write_bytes
from pipeline.base.progress import say
from pipeline.sae.member import hash_lines, lines_bytes, lines_until, read_config
from train.config import TrainConfig
from train.folder import Folder, plain
from train.held_out import is_due
from train.plan import RunConfig
from train.step.sample import n_held
from train.step.schedules import Controller, adapts, kept_a_row, learning_rate, sparsity_ramp
from train.stores import Stores

FOLLOW_STEPS = ("lr_warmup_steps", "lr_decay_steps", "sparsity_warmup_steps", "dead_after_rows")
"""Fields that recipes settle by the length of a training, where they are not given."""


def extend(job: RunConfig, stores: Stores, members: Sequence[TrainConfig]) -> None:
    """Give every new member of `members` (dtype resolved) the state of the longest shorter one in OUT that is the same but for
    its steps. Raises UsageError, saying why, when there is none or a longer one would have been another by then."""
    for config in members:
        folder = Folder(job.out, config, stores.identity(config))
        if folder.final() is None and not folder.state_path.exists():
            hand_on(shorter(folder), folder)


def shorter(folder: Folder) -> Folder:
    """The longest member that may be gone on with as this one. Raises UsageError naming what keeps the nearest from it."""
    found = sorted(siblings(folder), key=lambda one: (one.state_path.exists(), one.config.steps))
    if not found:
        raise UsageError(
            f"--extend: {folder.out} holds no shorter training that is {folder.name} but for its steps; leave --extend out to "
            "train it from the start"
        )
    last = found[-1]
    if problem := next(differences(last, folder), None):
        raise UsageError(f"--extend: {last.name}, of {last.config.steps} steps, cannot be gone on with: {problem}")
    return last


def siblings(folder: Folder) -> Iterator[Folder]:
    """Shorter members beside this one, of the same store, whose configs differ at most in what follows from the steps."""
    asked = plain(folder.config)
    for path in sorted(folder.out.glob("*/config.json")):
        try:
            config = TrainConfig.from_dict(dict(read_config(path.parent).inner("config").data))
        except (PipelineError, TypeError, ValueError):  # none of these is one to go on with
            continue
        there = plain(config)
        differ = {name for name in asked | there if asked.get(name) != there.get(name)}
        one = Folder(folder.out, config, folder.store)
        if config.steps < folder.config.steps and differ <= {"steps", *FOLLOW_STEPS} and one.path == path.parent:
            one.recorded_order()  # raises where it was trained on another store
            yield one


def differences(one: Folder, longer: Folder) -> Iterator[str]:
    """Why a training would not have come to this state had it been asked for more steps, reason by reason."""
    a, b = one.config, longer.config
    if not one.state_path.exists():
        trained = one.final() is not None
        yield (
            "its state was not kept; train it with --keep-state"
            if trained
            else "it was begun and has no state yet; train it"
        )
        return
    for name in FOLLOW_STEPS:
        if (there := getattr(a, name)) != (asked := getattr(b, name)):
            yield f"{name} was {there}, now {asked}, since it follows the steps; give --{name.replace('_', '-')} {there}"
    step = one.read_state().step
    if n := next((n for n in range(step) if schedules(a, n) != schedules(b, n)), None):
        yield f"from step {n} on its schedules are others (a decay ends with the training); give --lr-decay-steps 0 to both"
    if a.target_l0 and step:
        rates = [(c.rate, c.horizon) for c in (controller(a), controller(b))]
        if rates[0] != rates[1]:
            yield "how fast --target-l0 is followed depends on the steps"
    if n_held(a) != n_held(b):
        yield "it was too short to hold all rows that batchtopk's threshold is taken from"
    if step == a.steps and step % a.log_every:
        yield f"its last line of metrics, of step {step}, is one that a longer one has not; train multiples of --log-every"


def schedules(config: TrainConfig, n: int) -> tuple[float, ...]:
    """What the config alone decides at the update after `n` steps."""
    return learning_rate(config, n), sparsity_ramp(config, n), kept_a_row(config, n), adapts(config, n + 1)


def controller(config: TrainConfig) -> Controller:
    """What holds a wanted L0."""
    return Controller(config.target_l0, config.steps, torch.device("cpu"))


def hand_on(one: Folder, longer: Folder) -> None:
    """Begin the longer member with the shorter one's metrics and state; the state last, so that a kill leaves none."""
    state = one.read_state()
    order: Mapping[str, Any] | None = one.recorded_order()
    assert order is not None, "it is there"
    lock = longer.prepare(order)
    try:
        metrics, timings = (lines_until(one.path / name, state.step) for name in ("metrics.jsonl", "timings.jsonl"))
        if hash_lines(metrics) != state.metrics_sha256:
            raise DamagedError(
                f"{one.path / 'metrics.jsonl'}: lines were lost or changed; train {longer.name} from the start"
            )
        if not is_due(longer.config, state.step):
            metrics = [*metrics[:-1], *map(without_held_out, metrics[-1:])]
        write_bytes(longer.path / "metrics.jsonl", lines_bytes(metrics))
        write_bytes(longer.path / "timings.jsonl", lines_bytes(timings))
        longer.write_state(state.tensors, state.step, hash_lines(metrics))
    finally:
        os.close(lock)
    say(f"{longer.name} goes on from step {state.step} of {one.name}")


def without_held_out(line: str) -> str:
    """A line of metrics without the scores that only the last line of a training has at its step."""
    data = {name: value for name, value in json.loads(line).items() if not name.startswith("eval_")}
    return canonical_json(data)
