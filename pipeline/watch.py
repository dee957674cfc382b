"""How trainings do while they run: a table in the terminal, or a local page that renews itself. Reads files, loads no torch.

All of it comes from the members' folders (config.json, metrics.jsonl, timings.jsonl, complete.json), written by `train`, read
here as data that anyone may have written: numbers are checked, names escaped, a torn last line is left out.
"""

from __future__ import annotations

import html
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.digests import write_vouched
from pipeline.base.errors import UsageError
from pipeline.base.files import is_locked, read_bytes
from pipeline.base.progress import format_seconds
from pipeline.sae.folders import is_member

SHOWN = ("loss", "ev", "l0", "dead", "eval_ev", "eval_l0")
"""Columns and figures, in order; of a list by level the last, the whole dictionary."""
TITLES = {
    "loss": "loss",
    "ev": "explained variance, rows of training",
    "l0": "L0, rows of training",
    "dead": "dead latents, fraction",
    "eval_ev": "explained variance, held-out rows",
    "eval_l0": "L0, held-out rows",
}
MOST_POINTS, MOST_LINES = 400, 12
"""Points of a curve; members drawn, the first ones: more are told apart by the table alone."""
QUIET = 600.0
"""Seconds without a new line of metrics after which a training is said to be quiet."""
COLOURS = ("#3366cc", "#dc3912", "#109618", "#990099", "#0099c6", "#b77322")
DASHES = ("", "6 3")
"""MOST_LINES members differ in colour or in dashes."""


@dataclass(frozen=True)
class Watched:
    """One member as it stands. curves: name of SHOWN → (step, value), thinned; last: the newest of each; unread: lines of its
    metrics that are no such lines."""

    name: str
    step: int
    steps: int
    state: str
    rows_per_s: float | None
    curves: Mapping[str, Sequence[tuple[int, float]]]
    last: Mapping[str, float]
    unread: int


def watched(runs: Path, now: float) -> list[Watched]:
    """Every member in a folder, or the member that it is, by name. Raises UsageError when there is none."""
    folders = [runs] if is_member(runs) else [folder for folder in runs.glob("*/") if is_member(folder)]
    folders.sort(key=lambda folder: [(text, int(part or 0)) for text, part in re.findall(r"(\D*)(\d*)", folder.name)])
    members = [read_member(folder, now) for folder in folders]
    if not members:
        raise UsageError(f"{runs}: holds no training member yet; give --out of python -m train")
    return members


def read_member(folder: Path, now: float) -> Watched:
    """One member from its files."""
    found, unread = read_lines(folder / "metrics.jsonl")
    timings, _ = read_lines(folder / "timings.jsonl")
    curves = {name: thinned([(line["step"], line[name]) for line in found if name in line]) for name in SHOWN}
    step = int(found[-1]["step"]) if found else 0
    speed = timings[-1].get("rows_per_s") if timings else None
    last = {name: curve[-1][1] for name, curve in curves.items() if curve}
    return Watched(folder.name, step, asked_steps(folder), state_of(folder, now), speed, curves, last, unread)


def read_lines(path: Path) -> tuple[list[dict[str, float]], int]:
    """Finite numbers of every whole line that has a step (of a list the last), and how many lines are none. A last line without
    its end is being written, and neither."""
    try:
        text = read_bytes(path)
    except OSError:
        return [], 0
    lines = text.split(b"\n")[:-1]
    numbers = [numbers_of(line) for line in lines]
    good = [found for found in numbers if "step" in found]
    return good, len(lines) - len(good)


def numbers_of(line: bytes) -> dict[str, float]:
    """The finite numbers of a JSON object; {} for what is none."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(data, dict):
        return {}
    values = {name: value[-1] if isinstance(value, list) and value else value for name, value in data.items()}
    return {name: float(value) for name, value in values.items() if is_number(value)}


def is_number(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100 and math.isfinite(value)
    )


def thinned(curve: Sequence[tuple[float, float]]) -> list[tuple[int, float]]:
    """At most MOST_POINTS of a curve, the first and the last among them."""
    n = len(curve)
    picked = range(n) if n <= MOST_POINTS else [round(i * (n - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)]
    return [(int(curve[i][0]), curve[i][1]) for i in picked]


def asked_steps(folder: Path) -> int:
    """Steps of the whole training; 0 where its config does not say."""
    try:
        steps = json.loads(read_bytes(folder / "config.json"))["config"]["steps"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0
    return steps if type(steps) is int and 0 < steps < 2**53 else 0


def state_of(folder: Path, now: float) -> str:
    """How a member stands, and that its config.json is gone or unreadable: nothing else reads such a one."""
    state = progress_of(folder, now)
    try:
        json.loads(read_bytes(folder / "config.json"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{state}; config.json {'gone' if isinstance(error, FileNotFoundError) else 'unreadable'}: put it back"
    return state


def progress_of(folder: Path, now: float) -> str:
    """finished; training, while a process holds the folder's lock; stopped, where none does; quiet for a while, new.

    A lock is seen on the machine that holds it, over a network's disk not always: hence a member that nobody seems to hold is
    said to be quiet after QUIET seconds, and until then stopped or elsewhere; where locks cannot be asked, training till then.
    """
    if (folder / "complete.json").exists():
        return "finished"
    held = is_locked(folder)
    try:
        age = now - (folder / "metrics.jsonl").stat().st_mtime
    except OSError:
        return "stopped before its first line, or on another machine" if held is False else "new"
    if age >= QUIET:
        return f"{'training, ' if held else ''}quiet for {format_seconds(age)}"
    return "stopped, or on another machine" if held is False else "training"


def cells(member: Watched) -> list[str]:
    """One row of the table."""
    of = f"{member.step:,}" + (f" of {member.steps:,}" if member.steps else "")
    values = [f"{member.last[name]:.4g}" if name in member.last else "–" for name in SHOWN]
    speed = "–" if member.rows_per_s is None else f"{member.rows_per_s:,.0f}"
    left = f"{member.state}; {member.unread} lines unreadable" if member.unread else member.state
    return [member.name, of, *values, speed, left]


HEAD = ["member", "step", "loss", "ev", "L0", "dead", "held-out ev", "held-out L0", "rows/s", "state"]


def table(members: Sequence[Watched]) -> str:
    """All members, aligned, for a terminal; characters that would move its cursor are spelled out."""
    rows = [HEAD, *([plain(cell) for cell in cells(member)] for member in members)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def plain(text: str) -> str:
    """Printable text."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def page(members: Sequence[Watched], title: str, every: float) -> str:
    """A whole page that loads nothing, runs nothing and renews itself every so many seconds until all are finished."""
    drawn = members[:MOST_LINES]
    done = all(member.state == "finished" for member in members)
    refresh = "" if done else f'<meta http-equiv="refresh" content="{max(1, round(every))}">'
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *HEAD))
    rows = "".join(row(member, key(i) if i < len(drawn) else "") for i, member in enumerate(members))
    figures = "".join(figure(name, [member.curves[name] for member in drawn]) for name in SHOWN)
    more = f"<p>The first {MOST_LINES} are drawn.</p>" if len(members) > len(drawn) else ""
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name=viewport content="width=device-width">{refresh}<title>{shown(title)}</title><style>{STYLE}</style></head>'
        f"<body><h1>{shown(title)}</h1><div class=wide><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"{more}<div class=figures>{figures}</div></body></html>\n"
    )


STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.4 system-ui, sans-serif; margin: 1rem auto; max-width: 80rem; padding: 0 1rem }
h1 { font-size: 1.2rem; overflow-wrap: anywhere } h2 { font-size: 1rem; margin: .5rem 0 0 } .wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15rem .6rem; text-align: left; white-space: nowrap }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem }
svg { width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: currentColor }
.axis { stroke: currentColor; opacity: .35 }
"""


def row(member: Watched, line: str) -> str:
    """A member's row of the page's table, behind a piece of its line."""
    return f"<tr><td>{line}</td>" + "".join(f"<td>{shown(cell)}</td>" for cell in cells(member)) + "</tr>"


def shown(text: str) -> str:
    """Text of others as HTML."""
    return html.escape(plain(text))


def stroke(i: int) -> str:
    """How the i-th member's line is drawn."""
    colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
    return f'fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash}"'


def key(i: int) -> str:
    """A short piece of the i-th member's line."""
    return f'<svg viewBox="0 0 24 8" style="width:24px"><path d="M0 4H24" {stroke(i)}/></svg>'


def mark(points: Sequence[tuple[float, float]], i: int) -> str:
    """The i-th member's curve through some places of a figure, a dot where it has one alone, hollow for a dashed line."""
    if len(points) == 1:
        colour, is_dashed = COLOURS[i % len(COLOURS)], bool(DASHES[i // len(COLOURS) % len(DASHES)])
        look = f'fill="{"none" if is_dashed else colour}" stroke="{colour}"'
        return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" {look}/>'
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{line}" {stroke(i)} stroke-linecap="round"/>'


WIDTH, HEIGHT, LEFT, BOTTOM = 480, 220, 46, 20


def figure(name: str, curves: Sequence[Sequence[tuple[int, float]]]) -> str:
    """One figure of all members' curves over steps, logarithmic where a loss is above 0; empty when nobody has a point."""
    points = [point for curve in curves for point in curve]
    if not points:
        return ""
    log = name == "loss" and min(y for _, y in points) > 0
    steps, values = [x for x, _ in points], [math.log10(y) if log else y for _, y in points]
    x0, x1, y0, y1 = min(steps), max(steps), min(values), max(values)

    def place(point: tuple[int, float]) -> tuple[float, float]:
        value = math.log10(point[1]) if log else point[1]
        x = LEFT + (WIDTH - LEFT - 4) * ((point[0] - x0) / (x1 - x0) if x1 > x0 else 1.0)
        y = 6 + (HEIGHT - BOTTOM - 6) * (1 - ((value - y0) / (y1 - y0) if y1 > y0 else 0.5))
        return x, y

    paths = "".join(mark([place(point) for point in curve], i) for i, curve in enumerate(curves) if curve)
    low, high = (f"{10**y if log else y:.3g}" for y in (y0, y1))
    base, title, right = HEIGHT - BOTTOM, shown(TITLES[name]), f'x="{LEFT - 4}" text-anchor="end"'
    return (
        f'<div><h2>{title}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f'<path class="axis" fill="none" d="M{LEFT} 6V{base}H{WIDTH - 4}"/>{paths}'
        f'<text y="14" {right}>{high}</text><text y="{base}" {right}>{low}</text>'
        + (f'<text x="{LEFT}" y="{HEIGHT - 5}">{x0:,}</text>' if x1 > x0 else "")
        + f'<text x="{WIDTH - 4}" y="{HEIGHT - 5}" text-anchor="end">step {x1:,}</text></svg></div>'
    )


def looks(runs: Path, every: float, once: bool) -> Iterator[list[Watched]]:
    """The members now, and again every so many seconds until all are finished."""
    while True:
        members = watched(runs, time.time())
        yield members
        if once or all(member.state == "finished" for member in members):
            return
        time.sleep(every)


def write_page(path: Path, members: Sequence[Watched], runs: Path, every: float) -> None:
    """Replace the page."""
    write_vouched(path, page(members, str(runs), every).encode())


def screen(text: str, is_terminal: bool, again: bool) -> str:
    """The table, in place of the one before where a terminal shows it."""
    return f"\x1b[H\x1b[2J{text}" if is_terminal and again else text
