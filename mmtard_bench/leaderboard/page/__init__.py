"""The leaderboard as one HTML file that needs no server and no network, and as plots."""

from mmtard_bench.leaderboard.board import Board
from mmtard_bench.leaderboard.page.build import build
from mmtard_bench.leaderboard.page.plots import plots


def site(board: Board, *, beside: str) -> dict[str, str]:
    """The texts of the page and of the plots by file name; ``beside`` is the markdown file's."""
    return {"index.html": build(board, beside=beside), **plots(board)}
