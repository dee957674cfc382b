"""Numbers, counts and lists as a reader sees them."""

from __future__ import annotations

import math

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


def signed(text: str) -> str:
    """Hyphens of negative numbers as minus signs."""
    return text.replace("-", "−")


def decimals(half: float) -> int:
    """Decimals that show two digits of an interval's half-width."""
    return min(8, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else 4


def number(value: float, half: float | None = None) -> str:
    """A mean to the precision of its interval; four significant digits without one."""
    if half:
        return signed(f"{value:,.{decimals(half)}f}")
    return signed(f"{value:,.4g}" if 1e-4 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}")


def half_text(half: float) -> str:
    """The half-width of an interval with two digits."""
    return f"{half:.{decimals(half)}f}"


def plus_minus(e: Estimate) -> str:
    """0.523 ± 0.012, or the mean alone for one seed."""
    return number(e.mean) if e.half is None else f"{number(e.mean, e.half)} ± {half_text(e.half)}"


def p_text(p: float) -> str:
    """A p value to two digits, never rounded to 0."""
    return f"{p:.2g}" if p >= 1e-4 else "under 0.0001"
