"""Where metrics go besides metrics.jsonl: TensorBoard and Weights & Biases, both optional and both without a network."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, Protocol, runtime_checkable

from pipeline.base.errors import UsageError
from pipeline.base.files import read_lines
from pipeline.base.progress import say
from train.config import LOGS
from train.folder import Folder, plain

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
"""What must be importable for a kind."""


@runtime_checkable
class Log(Protocol):
    """A further place for one member's scalars; `begun` says whether it had any before it was opened."""

    begun: bool

    def write(self, metrics: Mapping[str, Any]) -> None:
        """One logged line, with its step."""

    def close(self) -> None:
        """Flush and close."""


def scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of each; lists by level become ev/level_1, ev/level_2, …"""
    for name, value in metrics.items():
        if isinstance(value, list):
            yield from ((f"{name}/level_{i + 1}", float(one)) for i, one in enumerate(value))
        elif name != "step":
            yield name, float(value)


class LogUnavailable(Exception):
    """A log that is installed but cannot be opened now: no login, no server."""


@cache
def say_once(text: str) -> None:
    """Say it, but not again for another member of this process."""
    say(text)


class TensorBoard:
    """OUT/tensorboard/<run id>: `tensorboard --logdir OUT/tensorboard`. Steps after `step` are written again."""

    def __init__(self, folder: Folder, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = folder.out / "tensorboard" / run_id(folder)
        self.begun = any(place.glob("events.out.tfevents.*"))
        self.writer = SummaryWriter(str(place), purge_step=step + 1)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Every scalar at its step."""
        for name, value in scalars(metrics):
            self.writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


class WeightsAndBiases:
    """A run a member, called by its name and stores. Offline unless WANDB_MODE says otherwise; `wandb sync
    OUT/wandb/*` uploads."""

    def __init__(self, folder: Folder, step: int) -> None:
        import wandb

        self.begun = any((folder.out / "wandb").glob(f"*run-*-{run_id(folder)}"))
        folder.out.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "nested-sae"),
                mode=os.environ.get("WANDB_MODE", "offline"),
                dir=str(folder.out),
                id=run_id(folder),
                name=run_id(folder),
                config=plain(folder.config),
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise LogUnavailable(f"wandb: {' '.join(str(error).split())}") from error

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Every scalar at its step."""
        self.run.log(dict(scalars(metrics)), step=metrics["step"])

    def close(self) -> None:
        """Flush and close."""
        self.run.finish()


def run_id(folder: Folder) -> str:
    """A member's name and the ids of its store and target: what no other training has."""
    stores = (folder.store, folder.store.get("target"))
    return "-".join([folder.name, *(str(store["id"])[:10] for store in stores if store)])


def require_logs(kinds: tuple[str, ...]) -> None:
    """Raise UsageError for an unknown kind of log, and for one whose package is missing: before any folder is made."""
    if unknown := [kind for kind in kinds if kind not in LOGS]:
        raise UsageError(f"--log {unknown[0]}: known are {', '.join(LOGS)}")
    for kind in kinds:
        try:
            importlib.import_module(PACKAGES.get(kind, "json"))
        except ImportError as error:
            raise UsageError(f"--log {kind} needs the package {kind}: pip install 'nested-sae[log]'") from error


def open_logs(kinds: tuple[str, ...], folder: Folder, step: int) -> list[Log]:
    """The logs asked for besides metrics.jsonl, for one member that goes on after `step`; one that is new gets the lines up to
    there, of a shorter training that is extended too. One that cannot be opened now is said once, and training goes on
    without it. Their packages are there: `require_logs`."""
    makers: dict[str, Callable[[Folder, int], Log]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    logs: list[Log] = []
    for kind in kinds:
        if kind == "jsonl":
            continue
        try:
            log = makers[kind](folder, step)
        except LogUnavailable as error:
            say_once(
                f"{error}; training goes on without it, metrics.jsonl has all (wandb login, or WANDB_MODE=offline)"
            )
            continue
        logs.append(log)
        if step and not log.begun:
            for line in read_lines(folder.path / "metrics.jsonl"):
                log.write(json.loads(line))
    return logs
