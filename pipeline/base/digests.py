"""Digests of what artefacts say, so that what changed after it was written is found: accidents, not forgers.

A JSON file of ours carries its own, as `seal`: the hash of the canonical JSON of all else in it. Folders of other files have
a `digests.json` beside them, itself sealed: the SHA-256 of each file's bytes. A file that stands alone and is read by other
programs (a table, a page, a script, a log) has NAME.sha256 beside it, which `sha256sum -c` reads too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.base.errors import DamagedError, PipelineError
from pipeline.base.fields import Fields
from pipeline.base.files import (
    canonical_json,
    hash_file,
    json_bytes,
    read_bytes,
    read_json,
    sha256,
    write_alone,
    write_json,
)

DIGESTS = "digests.json"
FORMAT, VERSION = "nested-sae-digests", 1
BESIDE = ".sha256"
"""Suffix of the digest of one file, beside it."""


def seal_of(data: Mapping[str, Any]) -> str:
    """The hash of all but the seal, as a reader of the file finds it."""
    plain = json.loads(canonical_json(dict(data)))
    return sha256(canonical_json({name: value for name, value in plain.items() if name != "seal"}))


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data with their seal."""
    return {**data, "seal": seal_of(data)}


def write_sealed(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file, which no other process writes, with its seal."""
    write_alone(path, json_bytes(sealed(data)))


def is_sealed(path: Path, data: Mapping[str, Any]) -> bool:
    """Whether data of a file carry a seal; False for files of before there were any. Raises DamagedError when it is wrong."""
    if "seal" not in data:
        return False
    if data["seal"] != seal_of(data):
        raise DamagedError(f"{path}: what it says changed since it was written (seal); restore it or make it again")
    return True


def write_digests(place: Path, name: str, files: Mapping[str, str]) -> None:
    """Write a file of digests at `place`. `name`: of what they are, its own; `files`: path from there → SHA-256 in hex."""
    write_json(place, sealed({"format": FORMAT, "version": VERSION, "name": name, "files": dict(files)}))


def read_digests(place: Path) -> Fields:
    """A file of digests: `name` and `files`. Raises DamagedError, also where a path leads elsewhere."""
    fields = Fields(place, read_json(place))
    if (fields.data.get("format"), fields.data.get("version")) != (FORMAT, VERSION) or not is_sealed(
        place, fields.data
    ):
        raise DamagedError(f"{place}: no {FORMAT} of version {VERSION} with a seal; make what lies beside it again")
    for name in fields.texts("files"):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise DamagedError(f"{place}: names {name[:80]!a}, which lies elsewhere; make what lies beside it again")
    return fields


def digest_problems(place: Path, root: Path, name: str = "") -> list[str]:
    """Every file under `root` that is not what the digests at `place` say, one line each; and digests of another `name`."""
    try:
        fields = read_digests(place)
        if name and (found := fields.text("name")) != name:
            return [f"{place}: digests of {found[:120]!a}, expected those of {name!a}; put the right ones back"]
        return [
            problem for file, digest in fields.texts("files").items() if (problem := problem_of(root / file, digest))
        ]
    except PipelineError as error:
        return [str(error)]


def problem_of(path: Path, digest: str) -> str:
    """What is wrong with a file that should have this digest; nothing where it has."""
    if not path.is_file():
        return f"{path}: gone, though {DIGESTS} names it; make it again"
    if (found := hash_file(path)) != digest:
        return f"{path}: SHA-256 {found[:10]}, {DIGESTS} says {digest[:10]!a}; it changed since it was written, make it again"
    return ""


def beside(path: Path) -> Path:
    """Where the digest of a file that stands alone is."""
    return path.with_name(path.name + BESIDE)


def unvouch(path: Path) -> None:
    """Take the digest beside a file away: before it is written, or appended to."""
    beside(path).unlink(missing_ok=True)


def vouch(path: Path) -> None:
    """Write the digest of a file beside it, once it is done. Raises DiskError."""
    write_alone(beside(path), os.fsencode(f"{hash_file(path)}  {path.name}\n"))


def write_vouched(path: Path, data: bytes) -> None:
    """Write a whole file that no other process writes, then its digest beside it; killed in between, it has none."""
    unvouch(path)
    write_alone(path, data)
    vouch(path)


def beside_problem(path: Path) -> str:
    """What is wrong with a file that has a digest beside it; nothing where it is what was written."""
    said = read_bytes(beside(path))[: 64 + 2 + 255 + 1]
    digest, _, _ = said.decode(errors="replace").partition("  ")
    if not re.fullmatch("[0-9a-f]{64}", digest) or said[66:] != os.fsencode(f"{path.name}\n"):
        return f"{beside(path)}: is no digest of {path.name} as sha256sum writes it; make the file again"
    if not path.is_file():
        return f"{path}: gone, though {beside(path).name} is there; make it again"
    if (found := hash_file(path)) != digest:
        changed = "it changed since it was written, make it again"
        return f"{path}: SHA-256 {found[:10]}, {beside(path).name} says {digest[:10]}; {changed}"
    return ""


def require_digests(place: Path, root: Path, name: str = "") -> None:
    """Raise DamagedError for the first file that is not what the digests say; where there are none, nothing is known."""
    if place.exists() and (problems := digest_problems(place, root, name)):
        raise DamagedError(problems[0])
