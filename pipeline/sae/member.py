"""A training member's folder as anyone may read it: config, what completes it, metrics, rolling state. `train` writes it.

Layout: FORMAT.md, "Training folder".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.base.digests import is_sealed
from pipeline.base.errors import CheckpointError, DamagedError
from pipeline.base.fields import Fields
from pipeline.base.files import hash_file, read_json, read_lines
from pipeline.sae.checkpoint import load_tensors
from pipeline.sae.folders import member_folder

FORMAT, VERSION = "nested-sae-member", 1
STATE_FORMAT, STATE_VERSION = "nested-sae-training-state", 2


@dataclass(frozen=True)
class State:
    """A rolling training state: of which member, after how many steps, and the hash of the metrics up to there."""

    member: str
    step: int
    metrics_sha256: str
    tensors: dict[str, Tensor]


def read_state(path: Path) -> State:
    """The rolling state in a file. Raises CheckpointError or DamagedError."""
    tensors, header = load_tensors(path, STATE_FORMAT, STATE_VERSION)
    header.only("format", "version", "step", "member", "metrics_sha256", "crc32c")
    return State(header.text("member"), header.whole("step"), header.text("metrics_sha256"), tensors)


def read_config(folder: Path) -> Fields:
    """A member's config.json: `config`, `store`, `order`. Raises CheckpointError when it is none of ours, DamagedError when
    it is gone or changed since it was written."""
    path = folder / "config.json"
    try:
        data = read_json(path)
    except FileNotFoundError as error:
        raise DamagedError(f"{path}: gone; put it back, or move this member away and train it again") from error
    found = (data.get("format"), data.get("version")) if isinstance(data, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise CheckpointError(
            f"{folder}: expected a {FORMAT} of version {VERSION} in config.json, found {str(found[0])[:40]!r}"
        )
    is_sealed(path, data)
    return Fields(path, data)


def require_own(path: Path, provenance: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a checkpoint that lies in the folder of another member, as its config tells, or of one trained on
    another store; DamagedError as `read_config`."""
    if (folder := member_folder(path)) is None:
        return
    own, trained = read_config(folder), provenance.get("train")
    member = str(provenance.get("member"))[:100]
    if trained is not None and dict(own.inner("config").data) != trained:
        raise CheckpointError(f"{path}: is of member {member!a}, lies in the folder of {folder.name}; put it back")
    here, there = own.inner("store").data, provenance.get("store") or {}
    if "id" in here and "id" in there and here["id"] != there["id"]:
        raise CheckpointError(
            f"{path}: is of member {member!a} on store {str(there['id'])[:10]!a}, lies in the folder of {folder.name} on store "
            f"{str(here['id'])[:10]!a}; put it back"
        )


@dataclass(frozen=True)
class Completion:
    """What complete.json says: the final checkpoint and its hash, and those of config.json and metrics.jsonl; None, as without
    a seal, where an older version wrote it."""

    final: Path
    sha256: str
    config_sha256: str | None
    metrics_sha256: str | None
    is_sealed: bool


def read_completion(folder: Path) -> Completion | None:
    """What completed a member; None while it is trained. Raises DamagedError."""
    path = folder / "complete.json"
    if not path.exists():
        return None
    fields = Fields(path, read_json(path))
    final = folder / "checkpoints" / Path(fields.text("final")).name
    hashes = (fields.text("sha256"), fields.some_text("config_sha256"), fields.some_text("metrics_sha256"))
    return Completion(final, *hashes, is_sealed(path, fields.data))


def require_recorded(folder: Path, completion: Completion) -> None:
    """Raise DamagedError unless config.json and metrics.jsonl of a finished member, where they are there, are those that
    complete.json recorded."""
    recorded = {"config.json": completion.config_sha256, "metrics.jsonl": completion.metrics_sha256}
    for name, digest in recorded.items():
        if digest is not None and (folder / name).exists() and hash_file(folder / name) != digest:
            what = "lines that were" if name == "metrics.jsonl" else "config that was"
            raise DamagedError(f"{folder / name}: not the {what} recorded; restore it, or train this member again")


def final_checkpoint(folder: Path, completion: Completion) -> Path:
    """The final checkpoint of a finished member. Raises DamagedError when it is gone or another one."""
    final = completion.final
    if not final.is_file():
        raise DamagedError(f"{final}: the final checkpoint that complete.json names is gone; train the member again")
    if (found := hash_file(final)) != completion.sha256:
        raise DamagedError(
            f"{final}: SHA-256 {found[:10]}…, complete.json says {completion.sha256[:10]}…; train it again"
        )
    return final


def lines_until(path: Path, step: float) -> list[str]:
    """The lines of a metrics.jsonl, or timings.jsonl, up to a step, in order, without a torn one; none where there is no file."""
    lines = read_lines(path, "replace") if path.exists() else []
    return [line for line in lines if line_step(line) <= step]


def line_step(line: str) -> float:
    """The step of a line of metrics; infinity for a torn one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return float("inf")


def hash_lines(lines: list[str]) -> str:
    """SHA-256 of lines as the file holds them."""
    return hashlib.sha256(lines_bytes(lines)).hexdigest()


def lines_bytes(lines: list[str]) -> bytes:
    """Lines as the file holds them."""
    return "".join(line + "\n" for line in lines).encode()
