"""Hostile files for fuzz tests: JSON data with values replaced, removed, renamed or nested, and bytes cut or flipped."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.base.errors import PipelineError

BAD: tuple[Any, ...] = (
    None, True, -1, 0, 3.5, 10**30, -(10**30), float("nan"), float("inf"), 1e308, "", "0", "\ud800", "../../x", "\x00",
    "</script><script>alert(1)</script>", "x" * 5000, [], {}, [[]], [None], ["a"], {"a": {}}, [1, 2, 3], {"": ""}, "auto",
)  # fmt: skip
NESTED = "[" * 100_000


def spots(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in JSON data, not too deep; of long lists the first few."""
    if len(path) > 8:
        return [path]
    inner = data.items() if isinstance(data, dict) else list(enumerate(data))[:3] if isinstance(data, list) else []
    return [path, *(spot for key, value in inner for spot in spots(value, (*path, key)))]


def mutated(data: Any, rng: random.Random) -> Any:
    """JSON data with one to three values replaced, removed, renamed or nested."""
    data = copy.deepcopy(data)
    for _ in range(rng.randint(1, 3)):
        spot = rng.choice([s for s in spots(data) if s] or [()])
        if not spot:
            return copy.deepcopy(rng.choice(BAD))
        holder = data
        for key in spot[:-1]:
            holder = holder[key]
        kind = rng.random()
        if kind < 0.15:
            del holder[spot[-1]]
        elif kind < 0.3 and isinstance(holder, dict):
            holder[str(rng.choice(BAD))] = holder.pop(spot[-1])
        elif kind < 0.4:
            deep: Any = copy.deepcopy(rng.choice(BAD))
            for _ in range(rng.choice((5, 60, 400))):
                deep = [deep]
            holder[spot[-1]] = deep
        else:
            holder[spot[-1]] = copy.deepcopy(rng.choice(BAD))
    return data


def as_bytes(data: Any, rng: random.Random) -> bytes:
    """JSON as bytes, now and then cut short, flipped or nested without end."""
    raw = bytearray(json.dumps(data).encode())
    kind = rng.random()
    if kind < 0.03:
        return raw[: rng.randrange(len(raw))]
    if kind < 0.06 and raw:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    if kind > 0.98:
        return NESTED.encode()
    return bytes(raw)


def hurt(whole: bytes, rng: random.Random) -> bytes:
    """Bytes cut short, lengthened, or a few of them replaced."""
    data = bytearray(whole)
    kind = rng.random()
    if kind < 0.2:
        return bytes(data[: rng.randrange(len(data))])
    if kind < 0.3:
        return bytes(data) + rng.randbytes(rng.randrange(1, 100))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else max(0, len(data) - rng.randrange(1, 80))
        data[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, rng.randbytes(8)])[: len(data) - at]
    return bytes(data)


def one_line_or_none(work: Callable[[], object], path: Path) -> bool:
    """Whether the work was refused; a refusal must be one line that names the file or its folder."""
    try:
        work()
    except PipelineError as error:
        said = str(error)
        assert "\n" not in said
        assert len(said) < 2000
        assert path.stem in said or str(path.parent) in said, said
        return True
    return False
