"""How arrays are cut into programs."""

from __future__ import annotations

ROWS, TILE_ROWS, LATENTS = 256, 16, 128
"""Of a pass over [row, latent]: rows of a program, rows of them at a time, latents of a program."""

TALL, LONG = 4, 512
"""Of a pass along rows: rows of a program, and numbers of them at a time."""


def ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def next_power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
