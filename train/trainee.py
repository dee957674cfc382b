"""One member with its folder: advances, logs, is checkpointed, fails or finishes, all on its own."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.base.errors import DivergedError
from pipeline.base.files import disk_errors, hash_file, human_bytes
from pipeline.base.progress import say
from pipeline.base.runtime import git_state, versions
from pipeline.sae.foreign.reader import load_sae
from pipeline.store.requests import Traffic
from train.feed.loader import Feeds
from train.folder import Keep
from train.held_out import HeldOut, is_due
from train.log import Log, open_logs
from train.plan import RunConfig, Task
from train.step.member import Batch, Member, dead_share
from train.step.snapshot import Snapshot
from train.step.weights import path_of
from train.stores import Stores, require_hook
from train.writer import Writer


@dataclass(frozen=True)
class Outcome:
    """What became of one member: its final checkpoint, or the problem that ended it."""

    folder: Path
    step: int
    final: Path | None
    problem: str = ""

    def to_data(self) -> dict[str, Any]:
        """As JSON data."""
        final = None if self.final is None else str(self.final)
        return {"folder": str(self.folder), "step": self.step, "final": final, "problem": self.problem or None}

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Outcome:
        """As another process printed it."""
        final = None if data["final"] is None else Path(data["final"])
        return Outcome(Path(data["folder"]), data["step"], final, data["problem"] or "")


def in_order(shares: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """Outcomes in the order of the grid, of processes that each took every n-th member."""
    turns = itertools.zip_longest(*shares)
    return [outcome for turn in turns for outcome in turn if outcome is not None]


class Trainee:
    """A member with its folder: advances, logs, is checkpointed, fails."""

    def __init__(
        self,
        job: RunConfig,
        task: Task,
        member: Member,
        writer: Writer,
        n_kept: int,
        writes: bool,
        held_out: HeldOut | None,
    ) -> None:
        self.job = job
        self.task = task
        self.folder = task.folder
        self.member = member
        self.writer = writer
        self.n_kept = n_kept
        self.keep = Keep.parse(job.keep)
        self.writes = writes
        self.held_out = held_out if writes else None
        self.problem = ""
        self.logged = task.step  # the last step that was logged
        self.written = task.step  # the last step whose state is on disk
        self.saved = task.step  # the last one whose state was handed to the writer, and when that was
        self.saved_at = time.monotonic()
        self.metrics: dict[str, Any] = {}
        self.stack = contextlib.ExitStack()
        self.logs: list[Log] = []

    def __enter__(self) -> Trainee:
        if self.writes:
            self.stack.callback(os.close, self.folder.prepare(self.task.order))
        metrics_sha256 = None
        if self.task.step:
            state = self.folder.read_state()
            self.member.load_state(state.tensors)
            metrics_sha256 = state.metrics_sha256
        elif self.task.config.init_from:
            source = load_sae(path_of(self.task.config.init_from))[0]
            require_hook(source.made_for, self.folder.store)
            self.member.load_weights(source)
        if self.writes:
            self.folder.truncate(self.member.n_steps)
            if metrics_sha256 is not None:
                self.folder.require_metrics(self.task.step, metrics_sha256)
            self.open_logs()
        return self

    def open_logs(self) -> None:
        """Open what --log asks for."""
        for log in open_logs(self.job.log, self.folder, self.member.n_steps):
            self.logs.append(log)
            self.stack.callback(log.close)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    @property
    def waits(self) -> bool:
        """Whether it still needs a batch, of now or later."""
        return not self.problem and self.member.n_steps < self.task.config.steps

    def takes(self, step: int) -> bool:
        """Whether it needs the batch of this step."""
        return self.waits and self.member.n_steps == step

    def advance(self, batch: Batch, clock: Clock) -> None:
        """One step, and what is due after it. A loss that is not finite ends this member alone."""
        try:
            self.member.step(batch)
            self.after_step(clock)
        except DivergedError as error:
            self.problem = str(error)
            say(f"error: {error}")

    def after_step(self, clock: Clock) -> None:
        """Log and checkpoint when it is time. Raises DivergedError."""
        step, config = self.member.n_steps, self.task.config
        last = step == config.steps
        if last or step % config.log_every == 0:
            self.log(clock)
        minutes = self.job.checkpoint_minutes
        if last or step % config.checkpoint_every == 0:
            self.save(sae=True, state=minutes is None or last)
        elif minutes is not None and self.writes and time.monotonic() - self.saved_at >= 60 * minutes:
            self.save(sae=False)

    def require_finite(self, finite: bool) -> None:
        """Raise DivergedError when a loss or gradient since the last logged step was not `finite`."""
        if finite:
            return
        self.writer.finish()
        last = (
            f"the last good state is that of step {self.written}"
            if self.written
            else "there is no checkpoint before that"
        )
        raise DivergedError(
            f"{self.folder.path}: the loss or a gradient was not finite between steps {self.logged + 1} and "
            f"{self.member.n_steps}; {last}; lower --lr or raise --lr-warmup-steps"
        )

    def log(self, clock: Clock) -> None:
        """One line of metrics, a function of the config, and one of timings, a function of the machine. Raises DivergedError."""
        scores = None
        if self.held_out is not None and is_due(self.task.config, self.member.n_steps):
            scores = self.held_out.scores(self.member.sae_here())
        metrics = self.member.metrics(scores)
        told = [metrics["loss"], metrics["grad_norm"], *metrics.get("eval_ev", ())]
        self.require_finite(all(map(math.isfinite, told)))
        self.metrics = metrics | {"epoch": self.member.n_rows / self.n_kept}
        self.logged = self.member.n_steps
        if not self.writes:
            return
        self.folder.append("metrics.jsonl", self.metrics)
        self.folder.append("timings.jsonl", {"step": self.member.n_steps} | clock.lap(self.folder.name))
        for log in self.logs:
            log.write(self.metrics)

    def save(self, *, sae: bool, state: bool = True) -> None:
        """Snapshot the member and have it written in the background: a checkpoint of the SAE first, then the training state,
        those asked for, then retention. Nothing is fetched: where a loss between lines was not finite, the copy says so, nothing
        is written, and the next line ends the member, in all processes at once."""
        step, folder = self.member.n_steps, self.folder
        if state:
            self.saved, self.saved_at = step, time.monotonic()
        if not self.writes:
            return
        metrics_sha256 = hash_file(folder.path / "metrics.jsonl") if state else ""
        snapshot = Snapshot(self.member.state() if state else self.member.weights | self.member.counters())
        make_sae, provenance = (self.member.sae_of_state(), self.provenance()) if sae else (None, {})

        def write() -> None:
            tensors = snapshot.tensors()
            if not self.member.was_finite(tensors):
                return
            with disk_errors(folder.path):
                if make_sae is not None:
                    dead = dead_share(tensors["rows_since_fired"], provenance["fired_rows"])
                    folder.write_checkpoint(make_sae(tensors), step, provenance | {"dead": float(dead)})
                if state:
                    folder.write_state(tensors, step, metrics_sha256)
                    self.written = step
                folder.retain(self.keep)

        sae_bytes = sum(4 * weight.numel() for weight in self.member.weights.values()) if sae else 0
        self.writer.submit(write, snapshot.n_bytes + sae_bytes)

    def provenance(self) -> dict[str, Any]:
        """FORMAT.md, "Checkpoint": where this SAE comes from, but for the share of dead latents."""
        return {
            "member": self.folder.name,
            "train": self.folder.description(self.task.order)["config"],
            "store": dict(self.folder.store),
            "versions": versions(),
            "git": git_state(),
            "rows_seen": self.member.n_rows,
            "fired_rows": self.member.dead_rows,
        }

    def outcome(self) -> Outcome:
        """The end: a finished member's final checkpoint is named on disk."""
        final = self.folder.checkpoint_path(self.task.config.steps) if not self.problem else None
        if final is not None and self.writes:
            self.folder.finish(self.keep, self.job.keep_state)
        return Outcome(self.folder.path, self.member.n_steps, final, self.problem)


class Clock:
    """Rows/s, the share of time spent waiting for data and what was asked of object storage, since each member's last line and
    overall. `stores`: those that may be at a URL."""

    def __init__(self, loader: Feeds, batch_size: int, stores: Stores) -> None:
        self.loader = loader
        self.batch_size = batch_size
        self.stores = stores
        self.start = time.perf_counter()
        self.begun = stores.traffic
        self.laps: dict[str, tuple[float, float, int, Traffic | None]] = {}

    def lap(self, name: str) -> dict[str, float]:
        """rows_per_s of the stream and wait (fraction) since this name's last lap, of a store at a URL bytes_per_s, requests and
        retries too; seconds since the pass began."""
        now, waited, rows = time.perf_counter(), self.loader.waited, self.loader.n_delivered * self.batch_size
        t0, waited0, rows0, asked0 = self.laps.get(name, (self.start, 0.0, 0, self.begun))
        asked = self.stores.traffic
        self.laps[name] = now, waited, rows, asked
        seconds = max(now - t0, 1e-9)
        line = {
            "rows_per_s": (rows - rows0) / seconds,
            "wait": (waited - waited0) / seconds,
            "seconds": now - self.start,
        }
        if asked is not None and asked0 is not None:
            line["bytes_per_s"] = (asked.n_bytes - asked0.n_bytes) / seconds
            line["requests"] = asked.n_requests - asked0.n_requests
            line["retries"] = asked.n_retries - asked0.n_retries
        return line

    def say_traffic(self) -> None:
        """Say what was asked of object storage, and at what rate, since the store was opened."""
        if (asked := self.stores.traffic) is not None and self.begun is not None:
            rate = (asked.n_bytes - self.begun.n_bytes) / max(time.perf_counter() - self.start, 1e-9)
            cached = f"; {self.stores.cache.text()}" if self.stores.cache is not None else ""
            say(f"object storage: {asked.text()}, {human_bytes(rate)}/s, wait {100 * self.wait:.0f} %{cached}")

    @property
    def wait(self) -> float:
        """Share of the time since the pass began that was spent waiting for data."""
        return self.loader.waited / max(time.perf_counter() - self.start, 1e-9)

    def say_if_starved(self) -> None:
        """Say so when the feed, and not arithmetic, set the pace."""
        if self.wait > 0.2 and self.loader.n_delivered > 50:
            say(
                f"waited {100 * self.wait:.0f} % of the time for data: this run is bound by the feed, not by arithmetic"
            )


def summary(trainees: Sequence[Trainee], clock: Clock, step: int) -> str:
    """The short line behind the progress bar: one value for one member, smallest–largest for several.

    Empty unless one of them was logged after `step` steps.
    """
    if all(trainee.logged != step for trainee in trainees):
        return ""
    lines = [t.metrics for t in trainees if t.metrics and not t.problem]
    if not lines:
        return ""
    parts = [
        f"{name} {spread([line[name][-1] if isinstance(line[name], list) else line[name] for line in lines])}"
        for name in ("loss", "ev", "l0", "dead")
    ]
    return " ".join([*parts, f"wait {100 * clock.wait:.0f}%"])


def spread(values: Sequence[float]) -> str:
    """0.61, or 0.61–0.74."""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low}–{high}"
