"""From records to ``leaderboard/README.md``. Imports without torch."""

from collections.abc import Collection, Iterable, Sequence

from mmtard_bench.leaderboard.badges import LEGEND
from mmtard_bench.leaderboard.board import Board
from mmtard_bench.leaderboard.reported import reported_section
from mmtard_bench.leaderboard.rows import Row
from mmtard_bench.leaderboard.standings import SuiteStandings, standings
from mmtard_bench.records.statistics import Accuracy
from mmtard_bench.records.tables import RECALL_HEADERS, recall_cells, with_interval
from mmtard_bench.text import escape, table

_INTRODUCTION = """\
# Leaderboard

This leaderboard compares how well CLIP models classify or retrieve images, both clean images and
images that an attacker has changed slightly to make the model fail. Each section below is a suite:
a fixed set of tasks and threat models. `mmtard-bench leaderboard` writes this file from the records
under `entries/`; do not edit it.

**Figures.** Accuracies are in percent, with Wilson's 95% interval in brackets. The average over
tasks has the interval of all their samples pooled. A sample is robust if the model classifies it
correctly and no attack breaks it. The worst case counts a sample as robust only if it is robust
under every threat model of one norm and eps.

**Places.** A section orders its models by one worst case: the one with the largest radius of its
first norm. The place of a model is 1 plus the number of models that are significantly better there;
but no row gets a better place than the row above it. "Significantly better" is decided by McNemar's
exact test on the same samples of all tasks, at 5% after Holm's correction over all pairs of models.
`mmtard-bench compare` compares two models in detail. A row needs no verification to have a place:
its submitted figures decide.

**Cost** is the number of forward + backward passes per sample, over all records of a row. The
seconds are those of the machine that made the records.

**Badges** stand behind each row:
"""


def render(board: Board, beside: Collection[str] = ()) -> str:
    """The leaderboard as markdown: a section per suite, and below them what others reported.

    ``beside`` holds the names of the page's files, if there is a page: its plots are shown here
    too.
    """
    sections = [_section(suite, beside) for suite in standings(board)]
    page = "The same as a page: [index.html](index.html).\n" if "index.html" in beside else ""
    legend = "".join(f"- **{escape(text)}**: {escape(meaning)}\n" for _, text, meaning in LEGEND)
    parts = [_INTRODUCTION, legend, page, *sections, reported_section(board.reported)]
    return "\n".join(part for part in parts if part)


def _section(suite: SuiteStandings, beside: Collection[str]) -> str:
    parts = [
        f"## {escape(suite.title)}",
        escape(suite.about),
        _overview(suite),
        f"![clean against robust accuracy]({suite.plot})" if suite.plot in beside else "",
        *(f"### {escape(task)}\n\n{_task_table(suite, task)}" for task in suite.tasks),
        _recall_table(suite.rows) if suite.metric == "retrieval" else "",
        _remarks(suite.rows),
        _credits(suite.rows),
        _verified(suite.rows),
        _runs(suite.rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _overview(suite: SuiteStandings) -> str:
    worst = [f"worst case {ball}" for ball in suite.balls]
    headers = ["place", "model", suite.average, *worst, "badges"]
    lines = [
        [
            "-" if row.place is None else str(row.place),
            escape(row.model),
            _cell(row.clean),
            *(_cell(row.worst[ball]) for ball in suite.balls),
            escape("; ".join(badge.text for badge in row.badges)),
        ]
        for row in suite.rows
    ]
    return table(lines, headers)


def _task_table(suite: SuiteStandings, task: str) -> str:
    threats, balls = suite.threats[task], suite.joint[task]
    lines = []
    for row in suite.rows:
        of = row.tasks[task]
        robust = [
            "failed"
            if name in of.robust and of.robust[name] is None
            else _cell(of.robust.get(name))
            for name in threats
        ]
        worst = [_cell(of.worst.get(ball)) for ball in balls]
        lines.append([escape(row.model), _cell(of.clean), *robust, *worst])
    return table(lines, ["model", "clean", *threats, *(f"worst case {ball}" for ball in balls)])


def _cell(accuracy: Accuracy | None) -> str:
    return "-" if accuracy is None else with_interval(*accuracy)


def _recall_table(rows: Sequence[Row]) -> str:
    lines = [
        [escape(row.model), escape(task), threat, *cells]
        for row in rows
        for task, of in row.tasks.items()
        for threat, recalls in of.recalls.items()
        for cells in recall_cells(recalls)
    ]
    text = (
        "Recall in percent. Clean and robust accuracy above are image-to-text recall at 1. The "
        "attacks aim at that recall only, so the other attacked recalls are upper bounds."
    )
    return f"{text}\n\n{table(lines, ['model', 'task', 'threat model', *RECALL_HEADERS])}"


def _remarks(rows: Sequence[Row]) -> str:
    return _bullets(
        "Flags:",
        (
            f"{escape(row.model)}, {escape(where)}: **{escape(code)}**: {escape(detail)}"
            for row in rows
            for code, detail, where in row.remarks
        ),
    )


def _credits(rows: Sequence[Row]) -> str:
    return _bullets(
        "Broken since by stronger attacks, counted in the worst cases only:",
        (
            f"{escape(row.model)}: {credit.samples} sample{'s' * (credit.samples > 1)} by "
            f"{escape(credit.by)}, {credit.date}"
            f"{f' ({credit.paper})' if credit.paper else ''}"
            for row in rows
            for credit in row.credits
        ),
    )


def _verified(rows: Sequence[Row]) -> str:
    return _bullets(
        "Verified:",
        (
            f"{escape(row.model)}: {of.level} by {escape(of.by)} on {of.date} with version "
            f"{escape(of.version)}: {escape(of.detail)}"
            for row in rows
            if (of := row.verified)
        ),
    )


def _bullets(title: str, lines: Iterable[str]) -> str:
    said = [f"- {line}" for line in dict.fromkeys(lines)]
    return "\n".join([title, "", *said]) if said else ""


def _runs(rows: Sequence[Row]) -> str:
    """The cost of each row, and the command that reproduces it."""
    headers = ["model", "passes per sample", "seconds"]
    lines = [
        [
            escape(row.model),
            f"{row.forward:,.0f} + {row.backward:,.0f}",
            f"{row.seconds:,.0f}",
        ]
        for row in rows
    ]
    commands = [f"    {row.reproduce}    # weights {row.digest[:8]}" for row in rows]
    return "\n".join(
        ["### Cost", "", table(lines, headers), "", "To reproduce a row:", "", *commands]
    )
