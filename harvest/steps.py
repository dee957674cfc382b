"""Which of a harvest's three steps a process takes: prepare, make the shards or a part of them, finish.

Without torch.distributed, a job array takes them one after the other on many machines. A part leaves a note in the store while it
is being made: who makes its rows, and whether it came to its end, so that lost parts can be named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.errors import DamagedError, StoreError, UsageError
from pipeline.base.fields import Fields
from pipeline.base.files import is_url
from pipeline.store.backend import Files
from pipeline.store.layout import PARTS
from pipeline.store.makers import Maker
from pipeline.store.writer import StoreWriter

MOST_NOTE_BYTES = 1 << 16


@dataclass(frozen=True)
class Share:
    """Part i of n, from 0."""

    i: int = 0
    n: int = 1

    @staticmethod
    def parse(text: str) -> Share:
        """`I/N`. Raises UsageError."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise UsageError(f"--part {text}: expected I/N, a part of N, counted from 0: 0/8 to 7/8")
        return Share(int(match[1]), int(match[2]))

    def among(self, rank: int, world: int) -> Share:
        """The share of one of `world` processes that take this one together."""
        return Share(self.i * world + rank, self.n * world)

    def part_of(self, k: int, world: int) -> int:
        """The part of shard number k, where `world` processes take a part together: their shards stand side by side."""
        return k % (self.n * world) // world

    def __str__(self) -> str:
        return f"{self.i}/{self.n}"


@dataclass(frozen=True)
class Steps:
    """What is done now. `part`: of the documents while preparing, else of the shards. Raises UsageError."""

    prepare: bool = True
    make: bool = True
    finish: bool = True
    part: Share | None = None

    @staticmethod
    def of(*, prepare_only: bool, part: str | None, finish_only: bool) -> Steps:
        """What options say."""
        if prepare_only and finish_only:
            raise UsageError("--prepare-only and --finish-only: give one of them, or neither for all of a harvest")
        if finish_only and part is not None:
            raise UsageError(f"--finish-only --part {part}: parts have no end of their own; leave --part out")
        share = None if part is None else Share.parse(part)
        if prepare_only:
            return Steps(make=False, finish=False, part=share)
        if finish_only:
            return Steps(prepare=False, make=False)
        return Steps() if share is None else Steps(prepare=False, finish=False, part=share)

    @property
    def is_alone(self) -> bool:
        """Whether nobody else may write the stores meanwhile."""
        return self.part is None


@dataclass(frozen=True)
class Note:
    """What a part says of itself: its share, of how many processes each, who makes its rows, where it runs, whether it ended."""

    share: Share
    world: int
    makers: tuple[Maker, ...]
    host: str
    ended: bool = False

    @staticmethod
    def here(share: Share, world: int, makers: Sequence[Maker]) -> Note:
        """Of this machine, now."""
        return Note(share, world, tuple(makers), socket.gethostname())

    @property
    def key(self) -> str:
        """Its file in the store."""
        return f"{PARTS}/{self.share.i}-{self.share.n}.json"

    def write(self, files: Files) -> None:
        """Into the store."""
        about = dataclasses.asdict(self) | {"share": [self.share.i, self.share.n]}
        files.write(self.key, json.dumps(about).encode())


def read_notes(files: Files) -> list[Note]:
    """Of all parts, in order. Raises DamagedError."""
    notes = []
    for key in files.keys():  # noqa: SIM118 (not a dict)
        if re.fullmatch(rf"{PARTS}/\d+-\d+\.json", key):
            notes.append(read_note(files, key))
    return sorted(notes, key=lambda note: (note.share.n, note.share.i))


def read_note(files: Files, key: str) -> Note:
    """One. Raises DamagedError."""
    try:
        data: Any = json.loads(files.read(key, most=MOST_NOTE_BYTES))
        fields = Fields(Path(files.where(key)), data)
        i, n = fields.list_of_wholes("share")
        makers = tuple({str(k): str(v) for k, v in maker.items()} for maker in data["makers"])
        return Note(Share(i, n), fields.whole("world", least=1), makers, fields.text("host"), fields.flag("ended"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{files.where(key)}: no note of a part; delete it and run that part again") from error


def drop_notes(files: Files) -> None:
    """When the store is finished."""
    for key in files.keys():  # noqa: SIM118 (not a dict)
        if key.startswith(f"{PARTS}/"):
            files.delete(key)
    if not is_url(folder := files.where(PARTS)):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def makers_of(notes: Iterable[Note]) -> list[Maker]:
    """Who made rows, each once."""
    found: list[Maker] = []
    for note in notes:
        found += [maker for maker in note.makers if maker not in found]
    return found


MOST_NAMED = 12
"""Parts that a message names, of however many that are missing."""


def require_all(writer: StoreWriter, notes: Sequence[Note]) -> None:
    """Raise StoreError naming the parts whose shards are missing, with how far each came."""
    offset, missing = writer.split("train").n_shards, []
    for split, first in (("train", 0), ("eval", offset)):
        missing += [first + k for k in writer.pending(split)]
    if not missing:
        return
    total = offset + writer.split("eval").n_shards
    if writer.store.complete:
        raise DamagedError(
            f"{writer.store.where}: finished, but the commit records of {len(missing):,} of {total:,} shards are damaged (number "
            f"{missing[0]} first); run harvest --repair"
        )
    head = f"{writer.store.where}: {len(missing):,} of {total:,} shards are not made"
    sizes = {(note.share.n, note.world) for note in notes}
    if len(sizes) != 1:
        raise StoreError(f"{head} (number {missing[0]} first); run the parts, or harvest without --finish-only")
    [(n, world)] = sizes
    lost = sorted({Share(0, n).part_of(k, world) for k in missing})
    raise StoreError(f"{head}, those of --part {named_parts(lost, notes)}; run these parts again, then --finish-only")


def named_parts(parts: Iterable[int], notes: Sequence[Note], *, but_ended: bool = False) -> str:
    """Parts of one division by number, with where each ran and whether it ended; `but_ended`: none that did."""
    said = {note.share.i: f"on {note.host}, {'ended' if note.ended else 'not ended'}" for note in notes}
    ended = {note.share.i for note in notes if note.ended and but_ended}
    lost = [i for i in parts if i not in ended]
    named = ", ".join(f"{i}/{notes[0].share.n} ({said.get(i, 'not begun')})" for i in lost[:MOST_NAMED])
    return named + (f" and {len(lost) - MOST_NAMED} more" if len(lost) > MOST_NAMED else "")
