"""A horizontal bar chart as SVG, readable on light and dark pages alike."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#3b82f6", "#e07b39", "#2ca58d", "#a56cc1")
"""Of the series, in order; like the grey of the text, of middle lightness."""
GREY = "#77808b"

WIDTH = 800
LABELS_WIDTH = 170
VALUES_WIDTH = 50
BAR_HEIGHT = 9
GROUP_GAP = 8
TITLE_HEIGHT = 30
AXIS_HEIGHT = 24


@dataclass(frozen=True, slots=True)
class Panel:
    """Groups of bars below one title."""

    title: str
    groups: Mapping[str, Mapping[str, float]]
    """Label of a group, name of a series, value."""


@dataclass(frozen=True, slots=True)
class Chart:
    """Panels one below the other, with one axis that begins at zero."""

    title: str
    note: str
    """What a value means, in one line."""
    panels: Sequence[Panel]
    lines: Sequence[float]
    """Where values are to be compared with."""

    def svg(self) -> str:
        """The chart as a document."""
        series = list(dict.fromkeys(name for bars in self._groups() for name in bars))
        colours = dict(zip(series, COLOURS, strict=False))
        scale = _Scale([value for bars in self._groups() for value in bars.values()], self.lines)
        parts = [
            _text(0, 18, self.title, size=15, weight="bold"),
            _text(0, 36, self.note),
            *_legend(colours, top=46),
        ]
        top = 66.0
        for panel in self.panels:
            parts += _panel(panel, colours, scale, self.lines, top)
            top += _panel_height(panel)
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0f}" '
            f'width="{WIDTH}" height="{top:.0f}" font-family="system-ui, sans-serif" role="img">'
        )
        return "\n".join([head, f"<title>{escape(self.title)}</title>", *parts, "</svg>", ""])

    def _groups(self) -> list[Mapping[str, float]]:
        return [bars for panel in self.panels for bars in panel.groups.values()]


class _Scale:
    """From a value to a place on the page."""

    def __init__(self, values: Sequence[float], lines: Sequence[float]) -> None:
        highest = max([*values, *lines])
        self.step = next(
            step
            for power in range(-3, 12)
            for step in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
            if highest / step <= 10
        )
        self.top = math.ceil(highest / self.step) * self.step

    def __call__(self, value: float) -> float:
        return LABELS_WIDTH + (WIDTH - LABELS_WIDTH - VALUES_WIDTH) * value / self.top

    def ticks(self) -> list[float]:
        return [number * self.step for number in range(round(self.top / self.step) + 1)]


def _panel_height(panel: Panel) -> float:
    return TITLE_HEIGHT + AXIS_HEIGHT + sum(map(_group_height, panel.groups.values()))


def _group_height(bars: Mapping[str, float]) -> float:
    return len(bars) * (BAR_HEIGHT + 1) + GROUP_GAP


def _panel(
    panel: Panel, colours: Mapping[str, str], scale: _Scale, lines: Sequence[float], top: float
) -> list[str]:
    begin = top + TITLE_HEIGHT
    end = top + _panel_height(panel) - AXIS_HEIGHT
    parts = [_text(0, top + 18, panel.title, size=13, weight="bold")]
    for tick in scale.ticks():
        parts.append(_line(scale(tick), begin, end, opacity=0.25))
        parts.append(_text(scale(tick), end + 14, f"{tick:g}", anchor="middle"))
    place = begin + GROUP_GAP / 2
    for label, bars in panel.groups.items():
        height = _group_height(bars)
        middle = place + (height - GROUP_GAP) / 2 + 4
        parts.append(_text(LABELS_WIDTH - 8, middle, label, anchor="end"))
        for number, (name, value) in enumerate(bars.items()):
            bar_top = place + number * (BAR_HEIGHT + 1)
            parts.append(
                f'<rect x="{LABELS_WIDTH}" y="{bar_top:.1f}" height="{BAR_HEIGHT}" '
                f'width="{scale(value) - LABELS_WIDTH:.1f}" fill="{colours[name]}"/>'
            )
            parts.append(_text(scale(value) + 4, bar_top + 8, f"{value:.2f}", size=9))
        place += height
    parts += [_line(scale(value), begin, end, dashes="4 3") for value in lines]
    return parts


def _legend(colours: Mapping[str, str], top: float) -> list[str]:
    parts = []
    left = 0.0
    for name, colour in colours.items():
        parts.append(f'<rect x="{left}" y="{top}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(left + 15, top + 9, name))
        left += 40 + 7 * len(name)
    return parts


def _line(x: float, begin: float, end: float, *, opacity: float = 1, dashes: str = "none") -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{begin:.1f}" y2="{end:.1f}" stroke="{GREY}" '
        f'stroke-opacity="{opacity}" stroke-dasharray="{dashes}"/>'
    )


def _text(
    x: float, y: float, text: str, *, size: int = 11, weight: str = "normal", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{GREY}">{escape(text)}</text>'
    )
