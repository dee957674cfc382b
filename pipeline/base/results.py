"""Results files as every reader takes them: their name, their seal. Layout: FORMAT.md, "Results"; `evaluate` makes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.base.digests import is_sealed
from pipeline.base.errors import DamagedError
from pipeline.base.fields import Fields, require_plain
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
    require_plain(path, data)
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
    member = checkpoint.inner("provenance").text("member", "") or Path(checkpoint.text("path")).stem
    return result_name(member, checkpoint.whole("step"), result.text("key"))
