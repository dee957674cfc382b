import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.errors import DamagedError
from pipeline.base.fields import DEEPEST, HUGE, LARGEST, require_plain

EDGES = st.sampled_from([LARGEST - 1, LARGEST, -LARGEST, 1 - LARGEST, HUGE, -HUGE, 0.99 * HUGE, math.nan, math.inf])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | EDGES | st.just("\ud800")
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("\udfff"), inner))


def is_right(value: Any) -> bool:
    """What the rule says, one value after another."""
    if isinstance(value, Mapping):
        return all(is_right(key) and is_right(one) for key, one in value.items())
    if isinstance(value, list):
        return all(map(is_right, value))
    if isinstance(value, str):
        return not any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, bool) or value is None:
        return True
    return abs(value) < (LARGEST if isinstance(value, int) else HUGE)


@given(VALUES)
def test_plain_data_is_told_apart(value: Any) -> None:
    """Numbers that can be and Unicode pass, wherever they stand; all else is refused by one line."""
    if is_right(value):
        require_plain(Path("some.json"), value)
    else:
        with pytest.raises(DamagedError, match=r"some\.json: '"):
            require_plain(Path("some.json"), value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, HUGE, -HUGE, LARGEST, -LARGEST, "\ud800", "é\udfff"])
def test_impossible_values_are_refused(bad: Any) -> None:
    """Each kind of what cannot be is refused, as a value, in a list and in an object."""
    for value in (bad, [bad], {"a": bad}):
        assert not is_right(value)
        with pytest.raises(DamagedError):
            require_plain(Path("some.json"), value)


@pytest.mark.parametrize("bad", [math.nan, "\ud800", LARGEST])
def test_place_of_what_is_wrong(bad: Any) -> None:
    """The message names the place by keys and numbers."""
    with pytest.raises(DamagedError, match=r"'a\.1\.b'"):
        require_plain(Path("some.json"), {"a": [0, {"b": bad}]})


def test_depth_has_an_end() -> None:
    """Lists in lists are refused from DEEPEST on."""
    nested: Any = []
    holds_one: Any = [1]
    for _ in range(DEEPEST):
        nested, holds_one = [nested], [holds_one]
    require_plain(Path("some.json"), nested)
    require_plain(Path("some.json"), holds_one[0])
    with pytest.raises(DamagedError, match=f"nested deeper than {DEEPEST}"):
        require_plain(Path("some.json"), holds_one)
    with pytest.raises(DamagedError, match=f"nested deeper than {DEEPEST}"):
        require_plain(Path("some.json"), [nested])
