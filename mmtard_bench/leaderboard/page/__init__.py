"""The leaderboard as one HTML file that needs no server and no network, and as plots.

Read ``build.py`` (the HTML file) first, then ``facts.py`` (its data) and ``plots.py`` (SVG files).
"""

from mmtard_bench.leaderboard.board import Board
from mmtard_bench.leaderboard.page.build import build
from mmtard_bench.leaderboard.page.plots import plots


def site(board: Board, *, beside: str) -> dict[str, str]:
    """The page and the plots as texts by file name; ``beside`` is the name of the markdown file."""
    return {"index.html": build(board, beside=beside), **plots(board)}
