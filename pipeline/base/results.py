"""Results files as every reader takes them: their name, their seal. Layout: FORMAT.md, "Results"; `evaluate` makes them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pipeline.base.digests import is_sealed
from pipeline.base.errors import DamagedError
from pipeline.base.fields import Fields
from pipeline.base.files import read_json, safe_name

FORMAT, VERSION = "nested-sae-results", 1
NAME = re.compile(r".+-step_\d+-[0-9a-f]{10}\.json")
"""Of a results file where `evaluate` put it; a file with another name says nothing about what is in it."""


def result_name(member: str, step: int, key: str) -> str:
    """The name of a checkpoint's results file."""
    return f"{safe_name(member)}-step_{step:06d}-{key[:10]}.json"


def read_result(path: Path) -> dict[str, Any]:
    """Read one results file. Raises DamagedError when it is not one, of another version, holds what JSON of ours cannot, says
    what it did not say when it was written, or lies under the name of another's."""
    data = read_json(path)
    found = (data.get("format"), data.get("version")) if isinstance(data, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise DamagedError(
            f"{path}: expected {FORMAT} of version {VERSION}, found {str(found[0])[:40]!r} {str(found[1])[:40]}; move it away"
        )
    if is_sealed(path, data) and NAME.fullmatch(path.name) and (own := own_name(Fields(path, data))) != path.name:
        raise DamagedError(f"{path}: holds the results of {own}; give it its own name back, or move it away")
    return dict(data)


def own_name(result: Fields) -> str:
    """The name that a results file should have. Raises DamagedError where it does not say."""
    checkpoint = result.inner("checkpoint")
    return result_name(member_of(checkpoint), checkpoint.whole("step"), result.text("key"))


def member_of(checkpoint: Fields) -> str:
    """The name that a results file's checkpoint has, else its file's. Raises DamagedError."""
    return checkpoint.inner("provenance").text("member", "") or Path(checkpoint.text("path", "None")).stem


def names_apart(members: Sequence[tuple[str, str]]) -> list[str]:
    """Names of members, given as (name, path of a checkpoint): where those of several folders are called alike, as trainer_0 of
    two suites, each is called by as many of its folder's last parts as tell them all apart."""
    folders = [
        Path(path).parent.parent if Path(path).parent.name == "checkpoints" else Path(path) for _, path in members
    ]
    alike: dict[str, set[Path]] = {}
    for (name, _), folder in zip(members, folders):
        alike.setdefault(name, set()).add(folder)
    return [
        name if len(alike[name]) == 1 else telling_part(folder, alike[name])
        for (name, _), folder in zip(members, folders)
    ]


def telling_part(folder: Path, among: Collection[Path]) -> str:
    """The last parts of a folder's path, as few as are different for all of some folders."""
    most = max(len(one.parts) for one in among)
    n = next(n for n in range(1, most + 1) if len({one.parts[-n:] for one in among}) == len(among))
    return "/".join(part.strip("/") for part in folder.parts[-n:])
