"""Numbers, counts and lists as a reader sees them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from evaluate.statistics import Estimate


def count(n: int, noun: str, plural: str = "") -> str:
    """1 seed, 3 seeds, 15 dictionaries."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def tidy(sentence: str) -> str:
    """A sentence whose numbers do not part from their signs at the end of a line."""
    for sign in (" = ", " ± "):
        sentence = sentence.replace(sign, sign.replace(" ", "\u00a0"))
    return sentence.replace(" %", "\u00a0%")


def percent(share: float) -> str:
    """58 %."""
    return f"{100 * share:.0f} %"


def share(of: float) -> str:
    """0.49 %, 1.2 %, 58 %, 1,200 %: two digits, or whole."""
    return f"{100 * of:.2g} %" if 1e-3 <= 100 * of < 99.5 else f"{100 * of:,.0f} %" if of >= 0.5 else "under 0.001 %"


def signed(text: str) -> str:
    """Hyphens of negative numbers as minus signs."""
    return text.replace("-", "−")


MOST_PLACES = 8
"""Decimals of a number, at most."""


def decimals(half: float) -> int:
    """Decimals that show two digits of an interval's half-width."""
    return min(MOST_PLACES, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else 4


def number(value: float, half: float | None = None) -> str:
    """A mean to the precision of its interval; four significant digits without one."""
    if half:
        return fixed(value, decimals(half))
    return signed(f"{value:,.4g}" if 1e-4 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}")


def half_text(half: float) -> str:
    """The half-width of an interval with two digits."""
    return f"{half:.{decimals(half)}f}"


def plus_minus(e: Estimate) -> str:
    """0.523 ± 0.012, or the mean alone for one seed."""
    return number(e.mean) if e.half is None else f"{number(e.mean, e.half)} ± {half_text(e.half)}"


def signed_plus_minus(difference: float, half: float) -> str:
    """+0.018 ± 0.004: a difference and half its interval, its sign shown; with digits enough that the two do not read alike,
    since whether 0 is inside depends on which is the larger."""
    places = decimals(half)
    while places < MOST_PLACES and fixed(abs(difference), places) == fixed(half, places) and abs(difference) != half:
        places += 1
    sign = "+" if difference > 0 and float(f"{difference:.{places}f}") else ""
    return f"{sign}{fixed(difference, places)} ± {half:.{places}f}"


def column_decimals(estimates: Sequence[Estimate]) -> int:
    """Decimals for a whole column: two digits of its median interval, or four of its smallest value without intervals."""
    if halves := sorted(e.half for e in estimates if e.half):
        return min(4, decimals(halves[len(halves) // 2]))
    least = min((abs(e.mean) for e in estimates if e.mean), default=1.0)
    return min(4, max(0, 3 - math.floor(math.log10(least))))


def fixed(value: float, places: int) -> str:
    """A number with so many decimals, and a minus sign that is one."""
    return signed(f"{value if round(value, places) else 0.0:,.{places}f}")


def first_upper(text: str) -> str:
    """Text with its first letter as a sentence begins, the rest as it is."""
    return text[:1].upper() + text[1:]


def listed(parts: Iterable[str]) -> str:
    """a; a and b; a, b and c."""
    *some, last = parts
    return f"{', '.join(some)} and {last}" if some else last


def p_text(p: float) -> str:
    """A p value to two digits, never rounded to 0."""
    return f"{p:.2g}" if p >= 1e-4 else "under 0.0001"
