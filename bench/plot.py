"""Draws bars as SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

COLOURS = {"floor": "#8b949e", "linkrx": "#1f6feb", "peer": "#d29922"}
LEGEND = {"floor": "by hand", "linkrx": "linkrx", "peer": "what else there is"}
WIDTH, NAMES, VALUES, LINE, GAP = 880, 300, 170, 20, 46
WIDE = 10  # if the largest value is more than this many times the smallest, a scale is logarithmic


def number(value: float) -> str:
    """A number with at least three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


@dataclass
class Bar:
    """One reader: its name, nanoseconds per packet, ratio to the reader that it is compared with, and a key of COLOURS."""

    name: str
    ns: float
    ratio: float
    kind: str


@dataclass
class Panel:
    """The readers of one source and size."""

    title: str
    bars: list[Bar]


class Scale:
    """Maps nanoseconds to a position on the page."""

    def __init__(self, values: list[float]) -> None:
        least, most = min(values), max(values)
        room = WIDTH - NAMES - VALUES
        self.logarithmic = most > WIDE * least
        if self.logarithmic:
            self._from = math.floor(math.log10(least))
            self._each = room / (math.log10(most) - self._from)
            self.marks = [10.0**power for power in range(self._from, math.floor(math.log10(most)) + 1)]
        else:
            self._each = room / most
            step = 10.0 ** math.floor(math.log10(most))
            step = step if most >= 4 * step else step / 2 if most >= 2 * step else step / 4
            self.marks = [step * k for k in range(int(most / step) + 1)]

    def __call__(self, value: float) -> float:
        """The position of a value."""
        return NAMES + (math.log10(value) - self._from if self.logarithmic else value) * self._each


def svg(title: str, panels: list[Panel]) -> str:
    """The panels below each other, each on a scale of its own."""
    if not panels:
        raise SystemExit("nothing to plot: test_lone.py, test_paced.py and test_work.py were not measured")
    parts: list[str] = []

    def text(x: float, y: float, what: str, style: str = "") -> None:
        parts.append(f'<text x="{x:.0f}" y="{y:.0f}"{style}>{escape(what)}</text>')

    text(12, 28, title, ' font-size="17" font-weight="bold"')
    x = 12.0
    for kind, meaning in LEGEND.items():
        parts.append(f'<rect x="{x:.0f}" y="42" width="12" height="12" fill="{COLOURS[kind]}"/>')
        text(x + 18, 53, meaning)
        x += 38 + 7 * len(meaning)
    y = 60.0
    for panel in panels:
        y += GAP
        scale, bottom = Scale([bar.ns for bar in panel.bars]), y + LINE * len(panel.bars)
        text(12, y - 16, panel.title, ' font-weight="bold"')
        if scale.logarithmic:
            text(WIDTH - 12, y - 16, "logarithmic scale", ' text-anchor="end" fill="#57606a" font-size="11"')
        for mark in scale.marks:
            at = scale(mark)
            parts.append(
                f'<line x1="{at:.0f}" x2="{at:.0f}" y1="{y - 8:.0f}" y2="{bottom - 4:.0f}" stroke="#d0d7de"/>'
            )
            text(at, y - 11, f"{mark:,.0f}", ' text-anchor="middle" fill="#57606a" font-size="11"')
        for bar in panel.bars:
            end = max(NAMES + 2, scale(bar.ns))
            text(NAMES - 8, y + 11, bar.name, ' text-anchor="end"')
            parts.append(
                f'<rect x="{NAMES}" y="{y:.0f}" width="{end - NAMES:.0f}" height="{LINE - 5}" '
                f'fill="{COLOURS[bar.kind]}"/>'
            )
            text(end + 6, y + 11, f"{number(bar.ns)} ns, ratio {number(bar.ratio)}")
            y += LINE
    height = y + 12
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
            f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="system-ui, sans-serif" font-size="13">',
            '<rect width="100%" height="100%" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )
