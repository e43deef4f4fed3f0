"""The drawings of a report, as SVG that takes its colours from the page around it. Imports matplotlib only when it draws."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.report_html import Plot, bytes_tick, seconds_tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUM_COLOURS = 6
# Drawn in these, then replaced by the page's own colours, so that one drawing serves light and dark.
_INK, _GRID = "#010101", "#020202"
_SERIES = [f"#03030{i}" for i in range(NUM_COLOURS)]
_MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚"}
_WIDTH, _HEIGHT = 4.6, 3.2
_MAX_POINTS = 300
_MAX_BARS = 16
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stepdown",
    "text.parse_math": False,
    "font.size": 9.0,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True, slots=True)
class Point:
    """One rung: its accuracy with an interval (shares, 0 to 1) and what it costs: bytes, or seconds (None where unknown)."""

    label: str
    accuracy: float
    interval: tuple[float, float]
    cost: float | None


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot over training steps."""

    label: str
    series: int
    """Which colour and mark: the same thing keeps its own from plot to plot."""
    steps: Sequence[float]
    values: Sequence[float]
    marked: bool = False
    """Few measured points (a validation): each is marked."""


def accuracy_against_size(points: Sequence[Point]) -> Plot:
    """Accuracy with its interval against the size of the weights, in bytes; a rung of unknown size is a dashed line across."""
    return _accuracy_against("size", points, "weights on disk", bytes_tick)


def accuracy_against_latency(points: Sequence[Point]) -> Plot:
    """Accuracy with its interval against the seconds that one item takes by itself; a rung that was not timed is a dashed line across."""
    return _accuracy_against("latency", points, "time for one item by itself", seconds_tick)


def _accuracy_against(what: str, points: Sequence[Point], x_label: str, tick: Callable[[float], str]) -> Plot:
    costs = [p.cost for p in points if p.cost]
    shifts = _side_by_side(costs)

    def draw(axes: Axes) -> None:
        _cost_axis(axes, costs, tick)
        for i, point in enumerate(points):
            colour, marker = _series(i)
            if not point.cost:
                axes.axhline(100 * point.accuracy, color=colour, linestyle="--", linewidth=1.5)
                continue
            low, high = (100 * abs(point.accuracy - end) for end in point.interval)
            x = point.cost * shifts.pop(0)
            axes.errorbar([x], [100 * point.accuracy], [[low], [high]], color=colour, marker=marker, markersize=7, capsize=4, linewidth=1.5)
        ends = [100 * end for p in points for end in p.interval]
        margin = 0.06 * (max(ends) - min(ends)) + 0.5
        axes.set_ylim(max(0.0, min(ends) - margin), min(100.0 + margin / 2, max(ends) + margin))
        axes.set_xlabel(x_label)
        axes.set_ylabel("test accuracy, %")

    caption = f"Bars are 95 % intervals. Rungs of nearly the same {what} are set side by side."
    if len(costs) < len(points):
        caption += f" A dashed line is a rung whose {what} is not known."
    title = f"Accuracy against {what}"
    return Plot(title, _svg(title, draw), [_legend(point.label, i) for i, point in enumerate(points)], caption)


def bars(title: str, shares: Mapping[str, float], x_label: str) -> Plot:
    """A bar for each share (0 to 1), the first on top."""

    def draw(axes: Axes) -> None:
        axes.barh(list(shares), [100 * share for share in shares.values()], color=_series(0)[0], height=0.62)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.grid(visible=False, axis="y")
        stride = math.ceil(len(shares) / _MAX_BARS)
        axes.set_yticks(range(0, len(shares), stride), list(shares)[::stride])
        axes.set_xlabel(x_label)

    return Plot(title, _svg(title, draw), [])


def curves(title: str, lines: Sequence[Curve], y_label: str, *, logarithmic: bool, x_label: str = "step") -> Plot:
    """Lines over training steps, or over what `x_label` says.

    The vertical axis is logarithmic where that is asked for and every value is positive.
    """
    values = [value for line in lines for value in line.values]

    def draw(axes: Axes) -> None:
        for line in lines:
            colour, marker = _series(line.series)
            stride = max(1, math.ceil(len(line.steps) / _MAX_POINTS))
            mark = marker if line.marked else ""
            axes.plot(line.steps[::stride], line.values[::stride], color=colour, linewidth=1.4, marker=mark, markersize=4)
        if logarithmic and min(values) > 0:
            axes.set_yscale("log")
            _log_ticks(axes.set_ylim, axes.set_yticks, min(values) / 1.1, max(values) * 1.1, "{:g}".format)
            axes.minorticks_off()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return Plot(title, _svg(title, draw), [_legend(line.label, line.series) for line in lines])


def _legend(label: str, i: int) -> tuple[str, str, str]:
    return label, f"var(--series-{i % NUM_COLOURS})", list(_MARKERS.values())[i % len(_MARKERS)]


def _svg(title: str, draw: Callable[[Axes], None]) -> str:
    """One drawing as an inline `<svg>`: no metadata, ids of its own, colours from the page, as wide as its container."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_GRID)
        axes.tick_params(length=0)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline_svg(buffer.getvalue(), title)


def _inline_svg(text: str, title: str) -> str:
    name = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = text.replace(_INK, "var(--ink-soft)").replace(_GRID, "var(--rule)")
    for i, colour in enumerate(_SERIES):
        text = text.replace(colour, f"var(--series-{i})")
    return text


def _series(i: int) -> tuple[str, str]:
    return _SERIES[i % NUM_COLOURS], list(_MARKERS)[i % len(_MARKERS)]


def _cost_axis(axes: Axes, costs: Sequence[float], tick: Callable[[float], str]) -> None:
    if not costs:
        axes.set_xticks([])
        return
    axes.set_xscale("log")
    _log_ticks(axes.set_xlim, axes.set_xticks, min(costs) / 1.6, max(costs) * 1.6, tick)
    axes.minorticks_off()


def _log_ticks(
    set_limits: Callable[[float, float], object],
    set_ticks: Callable[[Sequence[float], Sequence[str]], object],
    low: float,
    high: float,
    text: Callable[[float], str],
) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, thinned until at most six are left."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors if low <= factor * 10.0**decade <= high]
        if len(ticks) <= 6:
            break
    ticks = ticks[:: math.ceil(len(ticks) / 6)] if ticks else [math.sqrt(low * high)]
    set_limits(low, high)
    set_ticks(ticks, [text(tick) for tick in ticks])


def _side_by_side(sizes: Sequence[float]) -> list[float]:
    """A factor for each size that sets points of nearly the same size beside one another on a logarithmic axis."""
    if not sizes:
        return []
    span = math.log(max(sizes) / min(sizes)) + 2 * math.log(1.6)
    near, step = 0.05 * span, 0.045 * span
    factors = []
    for i, size in enumerate(sizes):
        peers = [j for j, other in enumerate(sizes) if abs(math.log(other / size)) < near]
        factors.append(math.exp(step * (peers.index(i) - (len(peers) - 1) / 2)))
    return factors
