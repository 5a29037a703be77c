"""The data of the page, as JSON: figures in percent, rounded as in the markdown leaderboard."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mmtard_bench.leaderboard.badges import LEGEND
from mmtard_bench.leaderboard.board import Board
from mmtard_bench.leaderboard.entries.folder import Entry
from mmtard_bench.leaderboard.entries.verifications import LEVELS
from mmtard_bench.leaderboard.reported import reported_tables
from mmtard_bench.leaderboard.rows import Row
from mmtard_bench.leaderboard.standings import SuiteStandings, standings
from mmtard_bench.records.statistics import Accuracy
from mmtard_bench.records.tables import RECALL_HEADERS, recall_cells

Facts = dict[str, Any]
Figure = list[float] | None

_FIELDS = {
    "authors": "authors",
    "paper": "paper",
    "code": "code",
    "weights": "weights",
    "digest": "digest of the weights",
    "architecture": "architecture",
    "parameters": "parameters",
    "pretraining_data": "pre-training data",
    "finetuning_data": "fine-tuning data",
    "training_threat": "trained against",
    "licence": "licence",
    "contact": "contact",
    "adversarials": "digest of the adversarial images",
}
"""The names of a card's fields on the page, in their order."""


def page_facts(board: Board) -> Facts:
    """Everything that the page shows; texts of records and cards are not escaped."""
    suites = standings(board)
    # Records of one's own runs may have two suites of one name.
    named = Counter(suite.title for suite in suites)
    names = [f"{s.title} {s.digest[:8]}" if named[s.title] > 1 else s.title for s in suites]
    return {
        "shapes": SHAPES,
        "legend": LEGEND,
        "recall_headers": ["task", "threat model", *RECALL_HEADERS],
        "suites": [_suite(suite, name) for suite, name in zip(suites, names, strict=True)],
        "models": {entry.card.name: _model(entry, board) for entry in board.entries},
        "reported": [
            {"title": f"{title} (reported)", "headers": headers, "rows": rows}
            for title, headers, rows in reported_tables(board.reported)
        ],
    }


def _suite(suite: SuiteStandings, name: str) -> Facts:
    return {
        "name": name,
        "about": suite.about,
        "average": suite.average,
        "balls": suite.balls,
        "deciding": suite.deciding,
        "tasks": [
            {
                "name": task,
                "threats": suite.threats[task],
                "joint": suite.joint[task],
                "curves": sorted({name for row in suite.rows for name in row.tasks[task].curves}),
            }
            for task in suite.tasks
        ],
        "rows": [_row(row, number) for number, row in enumerate(suite.rows)],
    }


def _row(row: Row, number: int) -> Facts:
    return {
        "model": row.model,
        "digest": row.digest,
        "mark": number,
        "place": row.place,
        "clean": _figure(row.clean),
        "worst": _figures(row.worst),
        "level": LEVELS.index(row.verified.level) if row.verified else None,
        "badges": row.badges,
        "forward": round(row.forward),
        "backward": round(row.backward),
        "seconds": round(row.seconds),
        "reproduce": row.reproduce,
        "remarks": row.remarks,
        "credits": [credit.__dict__ for credit in row.credits],
        "tasks": {
            task: {
                "clean": _figure(cells.clean),
                "robust": {k: _figure(v) or "failed" for k, v in cells.robust.items()},
                "worst": _figures(cells.worst),
                "curves": {
                    name: [[p.eps, *_percent(p.accuracy, *p.interval)] for p in points]
                    for name, points in cells.curves.items()
                },
            }
            for task, cells in row.tasks.items()
        },
        "recalls": [
            [task, threat, *cells]
            for task, of in row.tasks.items()
            for threat, recalls in of.recalls.items()
            for cells in recall_cells(recalls)
        ],
    }


def _figures(accuracies: Mapping[str, Accuracy | None]) -> dict[str, Figure]:
    return {name: _figure(accuracy) for name, accuracy in accuracies.items()}


def _figure(accuracy: Accuracy | None) -> Figure:
    return None if accuracy is None else _percent(accuracy.value, *accuracy.interval)


def _percent(*shares: float) -> list[float]:
    return [round(100 * share, 1) for share in shares]


def _model(entry: Entry, board: Board) -> Facts:
    card = entry.card.model_dump()
    current = {run.digest for run in entry.runs}
    return {
        "card": [[title, _texts(card[field])] for field, title in _FIELDS.items()],
        "history": [
            {**found.model_dump(exclude={"entry", "records"}), "current": found.records in current}
            for found in board.verifications
            if found.entry == entry.card.name
        ],
    }


def _texts(value: object) -> list[str]:
    """The texts of a card's field; [] if the submitter left it out."""
    if isinstance(value, list):
        return [str(part) for part in value]
    if value is None:
        return []
    return [f"{value:,}" if isinstance(value, int) else str(value)]


SHAPES = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",  # a circle
    "M-4-4H4V4H-4z",
    "M0-5.5L5 4H-5z",
    "M0-5.5L5.5 0L0 5.5L-5.5 0z",
    "M0 5.5L5-4H-5z",
    "M-1.7-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7z",  # a plus
    "M-5-2.5L-2.5-5L0-2.5L2.5-5L5-2.5L2.5 0L5 2.5L2.5 5L0 2.5L-2.5 5L-5 2.5L-2.5 0z",  # a cross
)
"""Outlines around the origin, about 10 wide: first all of them filled, then all of them hollow."""

COLOURS = 6
"""The number of ``--series-N`` colours in the style sheet. It does not divide the number of shapes,
so that rows of the same shape differ in colour."""
