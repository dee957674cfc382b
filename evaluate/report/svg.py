"""Draws one panel with matplotlib and turns it into SVG that can stand inside a page, many on one page.

Inside the page text stays text and takes the page's font, colours are the page's variables (so that they follow light
and dark), and ids carry the panel's name so that they do not clash. The file saved beside it stands alone.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

INK, RULE, PAPER, QUIET = "#010203", "#010204", "#010205", "#010206"
N_SERIES = 12
SERIES = [f"#0102{16 + i:02x}" for i in range(N_SERIES)]
"""Stand-in colours while drawing: the page and the saved file each put in their own."""
BLOCK_COLOURS = {"shared": "#01023a", "specialised": "#01023b"}
LIGHT = {INK: "#222222", RULE: "#dddddd", PAPER: "#ffffff", QUIET: "#8a8d94"} | {
    BLOCK_COLOURS["shared"]: "#0072b2",
    BLOCK_COLOURS["specialised"]: "#d55e00",
}
RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.6,
    "path.simplify_threshold": 0.2,
    "text.parse_math": False,
}


WIDTH, TITLE_WIDTH, LINE_HEIGHT = 4.1, 50, 0.16
"""Inches across a panel; letters of a title that fit above its axes; inches that each further line adds to a panel."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One set of axes. `draw` plots into it; `tips` are texts by artist gid, shown when the artist is pointed at; `height` and
    `width` in inches, of which a page makes what there is room for; a small one stands three in a row."""

    id: str
    title: str
    xlabel: str
    ylabel: str
    draw: Callable[[Axes], None]
    tips: Mapping[str, str] = field(default_factory=dict)
    height: float = 2.9
    width: float = WIDTH
    small: bool = False

    @cached_property
    def drawn(self) -> str:
        """The panel as matplotlib writes it, still in stand-in colours, with a legend that the page hides. A long title, which
        names all settings of a group, takes several lines, and the panel grows by them."""
        lines = textwrap.wrap(self.title, int(TITLE_WIDTH * self.width / WIDTH), break_on_hyphens=False)
        with matplotlib.rc_context(RC):
            canvas = Canvas(
                figsize=(self.width, self.height + LINE_HEIGHT * max(len(lines) - 1, 0)), layout="constrained"
            )
            axes = canvas.add_subplot()
            self.draw(axes)
            axes.set_title("\n".join(lines))
            axes.set_xlabel(self.xlabel)
            axes.set_ylabel(self.ylabel)
            handles, labels = axes.get_legend_handles_labels()
            if once := dict(zip(labels, handles)):
                axes.legend(once.values(), once.keys(), loc="best").set_in_layout(False)
            buffer = io.StringIO()
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            canvas.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        return buffer.getvalue()


def palette(n: int) -> tuple[list[str], list[str]]:
    """Colours of n ordered series on light and on dark paper: the first (flat) is ink, the others run through viridis."""
    colours = matplotlib.colormaps["viridis"]

    def run(low: float, high: float) -> list[str]:
        steps = [low + (high - low) * i / max(n - 2, 1) for i in range(n - 1)]
        return [matplotlib.colors.to_hex(colours(step)) for step in steps]

    return ["#222222", *run(0.15, 0.78)], ["#eeeeee", *run(0.4, 0.95)]


def style(n_series: int) -> str:
    """The page's colour variables, for light and dark."""
    light, dark = palette(n_series)
    blocks = "--shared:{};--specialised:{};"
    rules = ["".join(f"--s{i}:{colour};" for i, colour in enumerate(colours)) for colours in (light, dark)]
    rules[0] += blocks.format("#0072b2", "#d55e00")
    rules[1] += blocks.format("#56b4e9", "#e69f00")
    return f":root{{{rules[0]}}}@media screen and (prefers-color-scheme:dark){{:root{{{rules[1]}}}}}"


def inline(panel: Panel) -> Markup:
    """The panel for the page."""
    drawn = panel.drawn[panel.drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", drawn, count=1)
    drawn = drawn.replace('<g id="legend_1">', '<g id="legend_1" class="own-legend">')
    drawn = re.sub(r'\bid="', f'id="{panel.id}-', drawn)
    drawn = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{panel.id}-", drawn).replace("xlink:href", "href")
    for gid, tip in panel.tips.items():
        opening = f'<g id="{panel.id}-{gid}">'
        assert opening in drawn, f"no artist {gid} in panel {panel.id}"
        drawn = drawn.replace(opening, f'<g class="tip" tabindex="0"><title>{escape(tip)}</title>')
    variables = {INK: "currentColor", RULE: "var(--rule)", PAPER: "var(--paper)", QUIET: "var(--quiet)"}
    variables |= {colour: f"var(--{name})" for name, colour in BLOCK_COLOURS.items()}
    variables |= {colour: f"var(--s{i})" for i, colour in enumerate(SERIES)}
    drawn = recolour(drawn, variables).replace("'DejaVu Sans'", "var(--sans)")
    role = "group" if panel.tips else "img"
    return Markup(drawn.replace("<svg ", f'<svg role="{role}" aria-label="{escape(panel.title)}" ', 1))


def standalone(panel: Panel, n_series: int) -> bytes:
    """The panel as a file of its own, on white, with its legend."""
    light, _ = palette(n_series)
    return recolour(panel.drawn, LIGHT | dict(zip(SERIES, light))).encode()


def recolour(drawn: str, colours: Mapping[str, str]) -> str:
    """Put real colours in place of stand-ins."""
    for stand_in, colour in colours.items():
        drawn = drawn.replace(stand_in, colour)
    return drawn
