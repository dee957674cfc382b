"""Values out of a JSON file that anyone may have written: each is checked when it is taken, and a message names it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.base.errors import DamagedError

DEEPEST = 32
"""Levels of nesting that any file of ours stays under."""
LARGEST, HUGE = 2**63, 1e100
"""Whole numbers from here on are no count of anything; other numbers from here on are no measurement, and overflow."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Halves of characters, which JSON can spell and no file of text holds."""


def require_plain(path: Path, data: object) -> None:
    """Raise DamagedError unless JSON data is nested less than DEEPEST deep, its numbers finite and its text Unicode."""
    if problem := next(problems(data), None):
        raise DamagedError(f"{path}: {problem}; restore it or make it again")


def problems(data: object, name: str = "", depth: int = 0) -> Iterator[str]:
    """What is wrong with JSON data, value by value."""
    where = name[:80].encode("ascii", "backslashreplace").decode() or "it"
    if depth > DEEPEST:
        yield f"{where!r} is nested deeper than {DEEPEST}"
    elif is_plain(data):
        return
    elif isinstance(data, str):
        if SURROGATE.search(data):
            yield f"{where!r} is text that is not Unicode"
    elif isinstance(data, int | float):
        yield f"{where!r} is no number that can be, found {str(data)[:24]}"
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from problems(key, f"{name}.(key)", depth)
            if depth == DEEPEST or not is_plain(value):
                yield from problems(value, f"{name}.{key}".lstrip("."), depth + 1)
    elif isinstance(data, list):
        for i, value in enumerate(data):
            if depth == DEEPEST or not is_plain(value):
                yield from problems(value, f"{name}.{i}", depth + 1)


def is_plain(value: object) -> bool:
    """Whether a value is a number that can be, ASCII text, true, false or nothing: at once, since files hold millions."""
    kind = type(value)
    if kind is int:
        return -LARGEST < value < LARGEST  # type: ignore[operator]
    if kind is float:
        return -HUGE < value < HUGE  # type: ignore[operator]
    return value is None or kind is bool or (kind is str and value.isascii())  # type: ignore[attr-defined]


class Fields:
    """One object of a JSON file. A value is checked when it is taken: DamagedError names path, field, expected and found."""

    def __init__(self, path: Path, data: object, name: str = "") -> None:
        self.path, self.name = path, name
        if not isinstance(data, Mapping):
            raise self.wrong("", "an object", data)
        self.data: Mapping[str, Any] = data

    def wrong(self, name: str, expected: str, found: object) -> DamagedError:
        """The error that says what a field should be, to raise."""
        where = ".".join(part for part in (self.name, name) if part)[-120:] or "it"
        shown = "nothing" if found is None else f"{type(found).__name__} {str(found)[:40]!a}"
        return DamagedError(f"{self.path}: {where!a} should be {expected}, found {shown}; restore it or make it again")

    def text(self, name: str, default: str | None = None) -> str:
        """Text; the default where there is none."""
        value = self.data.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, "text", value)
        return value

    def some_text(self, name: str) -> str | None:
        """Text, or None where there is none."""
        return None if self.data.get(name) is None else self.text(name)

    def one_of(self, name: str, known: Sequence[str]) -> str:
        """One of the texts that are known."""
        value = self.text(name)
        if value not in known:
            raise self.wrong(name, f"one of {', '.join(known)}", value)
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.data.get(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def only(self, *names: str) -> None:
        """Raise DamagedError for a field that is none of these."""
        if unknown := [name for name in self.data if name not in names]:
            shown = ascii(unknown[0][:40])
            raise DamagedError(
                f"{self.path}: {self.name or 'it'} has a field {shown}, which is not known here; another version made it, or "
                "nobody did"
            )

    def whole(self, name: str, default: int | None = None, *, least: int = 0, most: int | None = None) -> int:
        """A whole number of at least `least`, and at most `most`; the default where there is none."""
        value = self.data.get(name)
        if value is None and default is not None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < least
            or (most is not None and value > most)
        ):
            upper = "on" if most is None else f"to {most}"
            raise self.wrong(name, f"a whole number from {least} {upper}", value)
        return value

    def some_whole(self, name: str) -> int | None:
        """A whole number, or None where there is none."""
        return None if self.data.get(name) is None else self.whole(name)

    def some_number(self, name: str) -> float | None:
        """A number, or None where there is none."""
        value = self.data.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number or null", value)
        return float(value)

    def number(self, name: str, *, least: float = -math.inf) -> float:
        """A number of at least `least`."""
        value = self.some_number(name)
        if value is None or value < least:
            raise self.wrong(name, f"a number from {least:g} on", value)
        return value

    def numbers(self, name: str) -> dict[str, float]:
        """An object of numbers; those that are null are left out, as are objects within it."""
        return {key: value for key, value in self.numbers_or_nulls(name).items() if value is not None}

    def numbers_or_nulls(self, name: str) -> dict[str, float | None]:
        """An object of numbers and nulls; objects within it are left out."""
        inner = self.inner(name)
        return {key: inner.some_number(key) for key, value in inner.data.items() if not isinstance(value, Mapping)}

    def texts(self, name: str) -> dict[str, str]:
        """An object of texts."""
        inner = self.inner(name)
        return {key: inner.text(key) for key in inner.data}

    def inner(self, name: str) -> Fields:
        """An object within; empty where there is none."""
        return Fields(
            self.path, {} if self.data.get(name) is None else self.data[name], f"{self.name}.{name}".lstrip(".")
        )

    def items(self, name: str) -> list[Any]:
        """A list; empty where there is none."""
        value = self.data.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(name, "a list", value)
        return value

    def full_list(self, name: str, length: int, *, least: float = -math.inf, most: float = math.inf) -> list[float]:
        """A list of so many numbers, each from `least` to `most`."""
        values = self.list_of_numbers(name, length)
        for value in values:
            if value is None or not least <= value <= most:
                raise self.wrong(name, f"numbers from {least:g} to {most:g}", value)
        return [value for value in values if value is not None]

    def list_of_texts(self, name: str, length: int | None = None) -> list[str]:
        """A list of texts, of a length where one is given."""
        values = self.items(name)
        if length is not None and len(values) != length:
            raise self.wrong(name, f"a list of {length}", values)
        if bad := [value for value in values if not isinstance(value, str)]:
            raise self.wrong(name, "a list of texts", bad[0])
        return list(values)

    def objects(self, name: str) -> list[Fields]:
        """A list of objects."""
        return [
            Fields(self.path, value, f"{self.name}.{name}.{i}".lstrip(".")) for i, value in enumerate(self.items(name))
        ]

    def list_of_numbers(self, name: str, length: int | None = None) -> list[float | None]:
        """A list of numbers or nulls, of a length where one is given."""
        values = self.items(name)
        if length is not None and len(values) != length:
            raise self.wrong(name, f"a list of {length}", values)
        for value in values:
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise self.wrong(name, "a list of numbers or nulls", value)
        return [None if value is None else float(value) for value in values]

    def list_of_wholes(self, name: str) -> list[int]:
        """A list of whole numbers from 0 on."""
        for value in self.items(name):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise self.wrong(name, "a list of whole numbers", value)
        return list(self.items(name))
