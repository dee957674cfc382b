"""The paper's own figures, in the columns of Table 1 that they most likely belong to; a note explains each mark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A cell: what was printed and the note's mark (both empty where nothing was), over so many columns and rows."""

    text: str
    mark: str
    columns: int = 1
    rows: int = 1


ROWS = (("Flat, as published", "0.795"), ("Nested, as published", "0.787"))
"""One KL figure each."""
SHARED = {"ev": ("0.299", "b"), "l0": ("85.07", "c"), "sparsity": ("85.07", "c")}
"""Figures of which one is on record for both."""
SPANS = {"kl_nats": "kl_score", "l0": "sparsity"}
"""Columns that a figure may belong to either of."""


def published_rows(ids: Sequence[str]) -> list[tuple[str, list[Published]]]:
    """A label and cells for each of the paper's two dictionaries, under the columns given."""
    covered = {other for id, other in SPANS.items() if id in ids}
    rows = []
    for i, (label, kl) in enumerate(ROWS):
        cells = []
        for id in ids:
            columns = 2 if SPANS.get(id) in ids else 1
            if id in covered or (i and id in SHARED):
                continue
            if id in ("kl_nats", "kl_score"):
                cells.append(Published(kl, "a", columns))
            elif id in SHARED:
                cells.append(Published(*SHARED[id], columns, len(ROWS)))
            else:
                cells.append(Published("", ""))
        rows.append((label, cells))
    return rows
