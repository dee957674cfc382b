"""The table of a grid: mean and 95 % interval over seeds of every trainer, shape and L0.

python tests/peers/table.py OUT/scores.jsonl
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for a two-sided 95 % interval, by the number of seeds."""

Line = dict[str, Any]


def interval(values: list[float], digits: int) -> str:
    """Mean ± half the 95 % interval over seeds; the number alone where there is one seed."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) not in T_95:
        return mean
    return f"{mean} ± {T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def row(lines: list[Line]) -> str:
    """One line of the table from its seeds."""
    first = lines[0]
    nested = len(first["levels"]) > 1
    levels = ", ".join(f"{share:g}" for share in first["levels"])

    def column(part: str, name: str, digits: int) -> str:
        return interval([line[part][name] for line in lines], digits)

    cells = [f"L0 {first['k']}", levels, first["trainer"] + (f" ({first['tag']})" if first.get("tag") else "")]
    cells += [f"{first['lr']:g}", str(len(lines)), column("whole", "l0", 1), column("whole", "ev", 4)]
    cells += [column("whole", "kl", 4)]
    cells += [column("first", "l0", 1), column("first", "ev", 4), column("first", "kl", 4)] if nested else ["", "", ""]
    cells += [f"{statistics.mean(line['dead'] for line in lines):.3f}"]
    cells += [f"{statistics.median(line['cpu_s_per_1m'] for line in lines):.0f}"]
    return "| " + " | ".join(cells) + " |"


def print_table(path: Path) -> None:
    """Markdown to stdout, sorted by L0, shape, trainer and learning rate."""
    groups: dict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for text in path.read_text().splitlines():
        line = json.loads(text)
        names = ("steps", "width", "k", "levels", "trainer", "tag", "lr")
        groups[tuple(str(line.get(name, "")).rjust(12) for name in names)].append(line)
    titles = [
        "asked",
        "levels",
        "trainer",
        "lr",
        "seeds",
        "L0",
        "EV",
        "KL",
        "first: L0",
        "EV",
        "KL",
        "dead",
        "CPU s per 1M",
    ]
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for key in sorted(groups):
        print(row(groups[key]))


if __name__ == "__main__":
    print_table(Path(sys.argv[1]))
