"""Plots of robust against clean accuracy as SVG files, for pages without scripts."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from mmtard_bench.leaderboard.board import Board
from mmtard_bench.leaderboard.page.build import asset
from mmtard_bench.leaderboard.page.facts import COLOURS, SHAPES
from mmtard_bench.leaderboard.rows import Row
from mmtard_bench.leaderboard.standings import SuiteStandings, standings
from mmtard_bench.records.statistics import Accuracy
from mmtard_bench.text import printable

FEWEST = 3
"""The fewest complete rows that get a plot."""

_SIZE = 330.0
_LEFT, _TOP, _BOTTOM, _GAP, _LEGEND = 52, 40, 52, 24, 210
_LONGEST = 28
MOST_PANELS = 3

Scale = tuple[float, float]


def plots(board: Board) -> dict[str, str]:
    """SVG texts by file name: SUITE-scatter.svg for each suite with enough complete rows."""
    found = {}
    for suite in standings(board):
        rows = [row for row in suite.rows if row.complete]
        if len(rows) >= FEWEST and suite.balls:
            found[suite.plot] = scatter(suite, rows)
    return found


def palette() -> dict[str, tuple[str, str]]:
    """The colours of the style sheet by name, as pairs (light, dark) of "#rrggbb"."""
    found = re.findall(r"--([a-z0-9-]+): light-dark\((#\w{6}), (#\w{6})\);", asset("page.css"))
    return {name: (light, dark) for name, light, dark in found}


def scatter(suite: SuiteStandings, rows: Sequence[Row]) -> str:
    """A panel per ball, with whiskers at the 95% intervals, and a legend.

    A suite with more than ``MOST_PANELS`` balls gets only the panel of the deciding ball.
    """
    balls = suite.balls if len(suite.balls) <= MOST_PANELS else (suite.deciding,)
    panels = len(balls)
    width = panels * (_LEFT + _SIZE + _GAP) + _LEGEND
    height = max(_TOP + _SIZE + _BOTTOM, _TOP + 22 * len(rows) + 10)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img">',
        f"<title>{_text(f'Clean against robust accuracy on {suite.title}', 100)}</title>",
        _style(),
        f'<rect class="paper" width="{width:g}" height="{height:g}"/>',
    ]
    for number, ball in enumerate(balls):
        left = number * (_LEFT + _SIZE + _GAP) + _LEFT
        parts += _panel(rows, ball, suite.average, left)
    parts += _legend(rows, panels * (_LEFT + _SIZE + _GAP))
    return "\n".join([*parts, "</svg>\n"])


def _panel(rows: Sequence[Row], ball: str, average: str, left: float) -> Iterable[str]:
    points = [(i, row.clean, row.worst[ball]) for i, row in enumerate(rows)]
    known = [(i, clean, worst) for i, clean, worst in points if clean and worst]
    x_scale, y_scale = _tens([c for _, c, _ in known]), _tens([w for _, _, w in known])
    bottom = _TOP + _SIZE
    yield _words(left, 22, f"worst case {ball}, %", "start")
    yield _words(left + _SIZE, bottom + 38, f"{average}, %", "end")
    for tick in _ticks(x_scale):
        x = left + _along(tick, x_scale)
        yield f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom:g}"/>'
        yield _words(x, bottom + 18, f"{tick:g}", "middle")
    for tick in _ticks(y_scale):
        y = bottom - _along(tick, y_scale)
        yield f'<path class="grid" d="M{left:g} {y:.1f}H{left + _SIZE:g}"/>'
        yield _words(left - 8, y + 4, f"{tick:g}", "end")
    for number, clean, worst in known:
        x, low, high = (left + _along(100 * v, x_scale) for v in (clean.value, *clean.interval))
        y, down, up = (bottom - _along(100 * v, y_scale) for v in (worst.value, *worst.interval))
        line = f"M{low:.1f} {y:.1f}H{high:.1f}M{x:.1f} {down:.1f}V{up:.1f}"
        yield f'<path class="whisker s{number % COLOURS}" d="{line}"/>'
        yield _mark(number, x, y)


def _legend(rows: Sequence[Row], left: float) -> Iterable[str]:
    for number, row in enumerate(rows):
        y = _TOP + 8 + 22 * number
        yield _mark(number, left, y)
        yield _words(left + 14, y + 4, row.model, "start")


def _mark(number: int, x: float, y: float) -> str:
    hollow = number % (2 * len(SHAPES)) >= len(SHAPES)
    return (
        f'<path class="s{number % COLOURS}{" hollow" * hollow}" d="{SHAPES[number % len(SHAPES)]}" '
        f'transform="translate({x:.1f} {y:.1f})"/>'
    )


def _words(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(text)}</text>'


def _text(text: str, longest: int = _LONGEST) -> str:
    """Text from a record in a drawing: one line, no markup, only the end of a long text."""
    line = " ".join(printable(text).split())
    return escape(line if len(line) <= longest else f"...{line[3 - longest :]}")


def _tens(accuracies: Sequence[Accuracy]) -> Scale:
    """An axis from ten to ten percent around the intervals, at least twenty points long."""
    low = min((math.floor(10 * a.interval[0]) for a in accuracies), default=0)
    high = max((math.ceil(10 * a.interval[1]) for a in accuracies), default=10)
    if high - low < 2:
        low, high = max(0, high - 2), max(2, high)
    return 10.0 * low, 10.0 * high


def _ticks(scale: Scale) -> Iterable[int]:
    low, high = map(int, scale)
    return range(low, high + 1, 20 if high - low > 60 else 10)


def _along(percent: float, scale: Scale) -> float:
    """The position of a value on an axis, in units of the drawing."""
    return (percent - scale[0]) / (scale[1] - scale[0]) * _SIZE


def _style() -> str:
    """Styles of both themes; a viewer shows the theme of its reader."""
    light, dark = ({name: both[i] for name, both in palette().items()} for i in (0, 1))
    return (
        "<style>text{font:13px system-ui,sans-serif}.whisker{stroke-opacity:.55}"
        f"{_rules(light)}@media (prefers-color-scheme:dark){{{_rules(dark)}}}</style>"
    )


def _rules(colours: Mapping[str, str]) -> str:
    series = "".join(
        f".s{i}{{fill:{colours[f'series-{i}']};stroke:{colours[f'series-{i}']}}}"
        for i in range(COLOURS)
    )
    return (
        f".paper{{fill:{colours['paper']}}}text{{fill:{colours['quiet']}}}"
        f".grid{{stroke:{colours['line']}}}{series}"
        ".hollow{fill:none;stroke-width:1.75}"
    )
