"""A member of a training on disk: its folder, config, checkpoints, rolling state, metrics. Layout: FORMAT.md, "Training folder".

Whatever moment a process is killed at, the state and the lines of metrics up to its step are whole, and the same
command goes on from there to the same bytes.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_type_hints

from torch import Tensor

from pipeline.base.digests import sealed, unvouch, vouch
from pipeline.base.errors import DamagedError, DiskError, MismatchError, UsageError
from pipeline.base.fields import Fields
from pipeline.base.files import (
    canonical_json,
    disk_errors,
    hash_config,
    hash_file,
    lock_folder,
    read_bytes,
    read_lines,
    regular,
    require_same,
    sweep_partials,
    write_bytes,
    write_json,
)
from pipeline.sae.checkpoint import read_header, save_checkpoint, save_tensors
from pipeline.sae.folders import may_be_member
from pipeline.sae.member import (
    FORMAT,
    STATE_FORMAT,
    STATE_VERSION,
    VERSION,
    State,
    line_step,
    lines_bytes,
    read_completion,
    read_config,
    read_state,
    require_own,
    require_recorded,
)
from pipeline.sae.nested import NestedSAE
from train.config import TrainConfig

NAME = re.compile(r"(alpha([0-9.e-]+|auto)|levels\d+)-seed\d+-[0-9a-f]{10}")
OTHERS = {"tensorboard", "wandb"}
"""Folders beside the members' that `--log` makes."""


LATER = {"skip": False, "level_lr": 0.0, "threshold_pull": 0.0}
"""Fields that came later, each with what all was before it: left out at that, so that members keep their names."""


def plain(config: TrainConfig) -> dict[str, Any]:
    """A config as JSON data in which equal configs are equal text: 0 in a field of floats is 0.0."""
    hints = get_type_hints(TrainConfig)
    data = {name: value for name, value in config.to_dict().items() if name not in LATER or value != LATER[name]}
    return {
        name: float(value) if type(value) is int and float in (hints[name], *get_args(hints[name])) else value
        for name, value in data.items()
    }


def member_name(config: TrainConfig) -> str:
    """alpha0.2-seed0-<first 10 of the hash of the config>; alphaauto-…, and levels5-… when levels were given."""
    alpha = config.alpha if isinstance(config.alpha, str | None) else f"{config.alpha:g}"
    shape = f"levels{len(config.levels)}" if alpha is None else f"alpha{alpha}"
    return f"{shape}-seed{config.seed}-{hash_config(plain(config))[:10]}"


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the `last` so many, those at multiples of `every` steps (0: none), and always the final one."""

    last: int
    every: int

    @staticmethod
    def parse(text: str) -> Keep:
        """Read `last:3,every:1000`, either part alone, or `all`. Raises UsageError."""
        if text == "all":
            return Keep(1, 1)
        parts = dict(re.findall(r"(last|every):(\d+)", text))
        if not parts or ",".join(f"{name}:{n}" for name, n in parts.items()) != text or not int(parts.get("last", 1)):
            raise UsageError(f"--keep {text}: write last:3,every:1000, or one of the two with last at least 1, or all")
        return Keep(int(parts.get("last", 1)), int(parts.get("every", 0)))

    def kept(self, steps: Iterable[int]) -> set[int]:
        """Those of the steps at which checkpoints exist that stay."""
        there = sorted(steps)
        return {step for step in there if self.every and step % self.every == 0} | set(there[-self.last :])

    def n_kept(self, every: int, steps: int) -> int:
        """How many stay of those of a whole training, which are at multiples of `every` before `steps`, and at `steps`."""
        before = (steps - 1) // every
        old = max(before + 1 - self.last, 0)
        of_old = old // (self.every // math.gcd(self.every, every)) if self.every else 0
        return of_old + before - old + 1


@dataclass(frozen=True)
class Folder:
    """One member's folder. `store` and `order` are what its config leaves out and its bytes depend on."""

    out: Path
    config: TrainConfig
    store: Mapping[str, Any]

    @cached_property
    def name(self) -> str:
        """The folder's name: an identity of the config."""
        return member_name(self.config)

    @property
    def path(self) -> Path:
        """OUT/name."""
        return self.out / self.name

    @property
    def state_path(self) -> Path:
        """The rolling training state."""
        return self.path / "state.safetensors"

    def checkpoint_path(self, step: int) -> Path:
        """checkpoints/step_000100.safetensors."""
        return self.path / "checkpoints" / f"step_{step:06d}.safetensors"

    def recorded_order(self) -> dict[str, Any] | None:
        """The order of rows that a member on disk is trained in; None when it is new.

        Raises MismatchError when the folder was made with another config or store, DamagedError when it does not say.
        """
        path = self.path / "config.json"
        if not may_be_member(self.path):
            return None
        fields = read_config(self.path)
        order = fields.inner("order")
        order.one_of("mode", ("global", "computed", "window"))
        order.some_whole("window_rows")
        require_same(path, identity(fields), identity(Fields(path, self.description(order.data))), "this member")
        return dict(order.data)

    def description(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """What config.json holds."""
        config, store = plain(self.config), dict(self.store)
        return sealed({"format": FORMAT, "version": VERSION, "config": config, "store": store, "order": dict(order)})

    def prepare(self, order: Mapping[str, Any]) -> int:
        """Make the folder, or sweep what a killed process left; returns a descriptor that holds its lock until closed.

        Raises DiskError when another process trains this member.
        """
        with disk_errors(self.path):
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock = lock_folder(self.path, "training this member")
        sweep_partials(self.path)
        if not (self.path / "config.json").exists():
            write_json(self.path / "config.json", self.description(order))
        return lock

    def final(self) -> Path | None:
        """The final checkpoint of a finished member, else None. Raises DamagedError when it is gone, and where complete.json
        speaks of another config or other metrics than are here; CheckpointError when it is another member's, or of another step.
        """
        if (completion := read_completion(self.path)) is None:
            return None
        require_recorded(self.path, completion)
        if not completion.final.exists():
            path = self.path / "complete.json"
            raise DamagedError(
                f"{completion.final}: gone, though {path} names it; delete {path} to train the end again"
            )
        require_own(completion.final, read_header(completion.final).provenance)
        return completion.final

    def step(self) -> int:
        """Steps that are on disk: what a run would go on from."""
        if self.final() is not None:
            return self.config.steps
        return self.read_state().step if self.state_path.exists() else 0

    def read_state(self) -> State:
        """The rolling state. Raises DamagedError when its bytes changed, MismatchError for another member's."""
        try:
            state = read_state(self.state_path)
        except DamagedError as error:
            raise DamagedError(f"{error}; or delete {self.state_path} to train this member from the start") from error
        if state.member != self.name:
            raise MismatchError(
                f"{self.state_path}: expected the state of {self.name}, found that of {state.member[:100]!a}; put the right "
                "one back, or delete it to train this member from the start"
            )
        return state

    def write_state(self, state: Mapping[str, Tensor], step: int, metrics_sha256: str) -> None:
        """Replace the rolling state; the metrics up to it, whose hash it keeps, are on disk before it is."""
        for name in ("metrics.jsonl", "timings.jsonl"):
            sync_file(self.path / name)
        header = {
            "format": STATE_FORMAT,
            "version": STATE_VERSION,
            "step": step,
            "member": self.name,
            "metrics_sha256": metrics_sha256,
        }
        save_tensors(self.state_path, state, header)

    def write_checkpoint(self, sae: NestedSAE, step: int, provenance: Mapping[str, Any]) -> None:
        """Write one checkpoint whole."""
        save_checkpoint(self.checkpoint_path(step), sae, step, provenance)

    def retain(self, keep: Keep) -> None:
        """Delete the checkpoints that the rule does not keep."""
        there = {
            int(path.stem.removeprefix("step_")): path
            for path in (self.path / "checkpoints").glob("step_*.safetensors")
        }
        kept = keep.kept(there) | {self.config.steps}
        for step in there.keys() - kept:
            there[step].unlink()

    def finish(self, keep: Keep, keep_state: bool) -> None:
        """Name the final checkpoint in complete.json and drop the rolling state, unless it is to be kept."""
        self.retain(keep)  # again: a kill may have come between the last checkpoint and what it puts an end to
        final = self.checkpoint_path(self.config.steps)
        record = {
            "final": str(final.relative_to(self.path)),
            "sha256": hash_file(final),
            "config_sha256": hash_file(self.path / "config.json"),
            "metrics_sha256": hash_file(self.path / "metrics.jsonl"),
        }
        vouch(self.path / "timings.jsonl")
        write_json(self.path / "complete.json", sealed(record))
        if not keep_state:
            self.drop_state()

    def drop_state(self) -> None:
        """Delete the rolling state of a finished member, where it still is: a kill may have come just before."""
        self.state_path.unlink(missing_ok=True)

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl or timings.jsonl; a kill can tear only the last one."""
        with disk_errors(self.path), open(self.path / name, "a", opener=regular) as file:
            file.write(canonical_json(line) + "\n")

    def require_metrics(self, step: int, sha256: str) -> None:
        """Raise DamagedError when the lines of metrics up to a step are not those of this hash: some were lost or changed."""
        path = self.path / "metrics.jsonl"
        found = hashlib.sha256(read_bytes(path) if path.exists() else b"").hexdigest()
        if found != sha256:
            raise DamagedError(
                f"{path}: lines up to step {step} were lost or changed (sha256 {found[:10]}, in the state {sha256[:10]}); put "
                f"them back, or delete {self.state_path} to train this member from the start"
            )

    def truncate(self, step: int) -> None:
        """Take back lines of metrics and timings beyond a step, and a torn one; more will be appended."""
        unvouch(self.path / "timings.jsonl")
        for name in ("metrics.jsonl", "timings.jsonl"):
            path = self.path / name
            lines = read_lines(path, "replace") if path.exists() else []
            kept = [line for line in lines if line_step(line) <= step]
            if not path.exists() or len(kept) < len(lines):
                write_bytes(path, lines_bytes(kept))


def sync_file(path: Path) -> None:
    """fsync a file that others append to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


FOR_LIVE = ("architecture_sha256", "tokenizer_sha256", "bos", "special_ids", "parse_special")
"""What a store says of its model's config.json and of how its tokens were made, which a live model is compared with. Its id fixes
them, and members of before they were recorded go on."""


def identity(description: Fields) -> dict[str, Any]:
    """What of config.json must not change while a member is trained."""
    parts = {part: dict(description.inner(part).data) for part in ("config", "store", "order")}
    return parts | {"store": {name: value for name, value in parts["store"].items() if name not in FOR_LIVE}}


def check_out(out: Path) -> None:
    """Raise DiskError when OUT is a file, or a folder that holds other things and no member."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DiskError(f"{out}: is a file; choose a folder for --out")
    names = sorted(path.name for path in out.iterdir() if path.is_dir() and not path.name.startswith("."))
    foreign = [name for name in names if name not in OTHERS and not NAME.fullmatch(name)]
    if foreign and len(foreign) == len([name for name in names if name not in OTHERS]):
        raise DiskError(
            f"{out}: holds something else ({', '.join(foreign[:3])}); choose an empty or new folder for --out"
        )
