"""The suites of a leaderboard with their rows, as facts; markdown and the page only format them.

Samples that a stronger attack broke later count as broken in the worst cases only; the columns of
single records stay as they are. Imports without torch.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from mmtard_bench.leaderboard.badges import masks, newest
from mmtard_bench.leaderboard.board import Board
from mmtard_bench.leaderboard.entries.breaks import after_breaks
from mmtard_bench.leaderboard.rows import Row, Scored, row_of
from mmtard_bench.records.compare import comparable
from mmtard_bench.records.files import oldest_first
from mmtard_bench.records.schema import Record, SuiteFacts, digest_of
from mmtard_bench.records.statistics import all_pairs
from mmtard_bench.records.worst import is_complete, worst_cases
from mmtard_bench.text import slug

SUITES = (
    "zeroshot13-v1",
    "mmtard-imagenet-v1",
    "rb-standard-v1",
    "tecoa-v1",
    "digits-v1",
    "retrieval-v1",
    "text-v1",
    "curve-v1",
    "quick-v1",
    "reproduce-digits-v1",
    "reproduce-unseen-v1",
)
"""The order of suites, the most important one first. Other suites follow by name."""


@dataclass(frozen=True)
class SuiteStandings:
    """A suite with its rows, best first. ``n`` is the largest number of samples of a record.

    All rows are on the same data. If a suite has results on several data, each data has standings
    of its own: ``data`` is a short digest of the data, and ``revisions`` has the tasks that differ.

    ``threats`` has, by task, the names of the threat models in the order of radii. ``joint`` has,
    by task, the balls whose worst case differs from the column of a single threat model. The worst
    case in the ball ``deciding`` gives the rows their order and places.
    """

    name: str
    digest: str
    protocol: str | None
    metric: str
    n: int
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    balls: tuple[str, ...]
    deciding: str
    threats: Mapping[str, Sequence[str]]
    joint: Mapping[str, Sequence[str]]
    rows: tuple[Row, ...]
    data: str
    revisions: Mapping[str, str]

    @property
    def title(self) -> str:
        """The name, with the data if the suite has results on several data."""
        return f"{self.name} on data {self.data}" if self.data else self.name

    @property
    def about(self) -> str:
        """Protocol, tasks, samples and seeds, with the data if there are several."""
        count, seeds = len(self.tasks), ", ".join(map(str, self.seeds))
        said = (
            f"Protocol: {self.protocol or 'none'}; {count} task{'s' * (count > 1)} with "
            f"{self.n} samples{' each' * (count > 1)}, seed {seeds}."
        )
        if not self.data:
            return said
        on = ", ".join(
            f"revision {revision} of {task}" for task, revision in self.revisions.items()
        )
        return f"{said} Data: {on}; results on other data are in another table."

    @property
    def average(self) -> str:
        """The name of the average of clean accuracies."""
        return "recall at 1" if self.metric == "retrieval" else "zero-shot average"

    @property
    def plot(self) -> str:
        """The file name of the plot; only suites with enough complete rows have one."""
        return f"{slug(self.title)}-scatter.svg"


def standings(board: Board) -> list[SuiteStandings]:
    """The standings of every suite of a leaderboard, in the order of ``SUITES``.

    Two digests of one name are two suites. Models that were scored on different data are in
    different standings.
    """
    suites: dict[tuple[str, str], list[Scored]] = defaultdict(list)
    for entry in board.entries:
        for run in entry.runs:
            verified, breaks = board.verified(entry, run), board.breaks_of(entry, run)
            for suite, raw in _grouped(run.records):
                worst, credits = after_breaks(raw.worst, breaks)
                found = replace(
                    raw, worst=worst, card=entry.card, verified=verified, credits=credits
                )
                suites[suite.name, suite.digest].append(found)
    for suite, raw in _grouped(board.loose):
        suites[suite.name, suite.digest].append(raw)
    ordered = sorted(suites, key=lambda suite: (_rank(suite[0]), suite))
    return [suite for of in ordered for suite in _by_data(suites[of])]


def _rank(suite: str) -> int:
    return SUITES.index(suite) if suite in SUITES else len(SUITES)


def _grouped(records: Iterable[Record]) -> Iterable[tuple[SuiteFacts, Scored]]:
    """The records of each model on each suite, without records that newer ones replace."""
    models: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in oldest_first(records):
        if record.suite is not None:
            row = (record.suite.name, record.suite.digest, record.model.name, record.model.digest)
            models[row].append(record)
    for own in models.values():
        suite = own[0].suite
        assert suite is not None
        # Of two records of one task and threat model, the newer one counts.
        for revisions, group in comparable(
            ({r.task.name: r.task.revision}, r) for r in reversed(own)
        ):
            places: dict[tuple[str, str], Record] = {}
            for record in group:
                places.setdefault((record.task.name, record.threat.name), record)
            found = tuple(places[place] for place in sorted(places))
            yield suite, Scored(found, revisions, worst_cases(found), is_complete(found))


def _by_data(raws: Iterable[Scored]) -> list[SuiteStandings]:
    """The standings of a suite on each of its data, the newest data first."""
    ordered = sorted(raws, key=lambda raw: (len(raw.revisions), newest(raw.records)), reverse=True)
    groups = comparable((raw.revisions, raw) for raw in ordered)
    if len(groups) == 1:
        return [_suite(groups[0][1])]
    differ = [
        task
        for task in sorted({task for known, _ in groups for task in known})
        if len({known[task] for known, _ in groups if task in known}) > 1
    ]
    return [
        replace(
            _suite(members),
            data=digest_of(known)[:8],
            revisions={task: known[task] for task in differ if task in known},
        )
        for known, members in groups
    ]


def _suite(raws: list[Scored]) -> SuiteStandings:
    raws = _one_surface_a_task(raws)
    records = [record for raw in raws for record in raw.records]
    suite = records[0].suite
    assert suite is not None
    tasks = sorted({record.task.name for record in records})
    balls = sorted({w.ball for raw in raws for w in raw.worst}, key=_by_radius)
    samples = {t: max(len(r.samples) for r in records if r.task.name == t) for t in tasks}
    rows = [row_of(raw, samples, balls) for raw in raws]
    deciding = _deciding(balls)
    places = _places(rows, raws, deciding)
    rows = [replace(row, place=place) for row, place in zip(rows, places, strict=True)]
    rows.sort(key=lambda row: _best_first(row, deciding))
    return SuiteStandings(
        name=suite.name,
        digest=suite.digest,
        protocol=suite.protocol,
        metric=records[0].task.metric,
        n=max(samples.values()),
        seeds=tuple(sorted({record.seed for record in records})),
        tasks=tuple(tasks),
        balls=tuple(balls),
        threats={task: _threats(records, task) for task in tasks},
        joint={task: _joint(raws, task, balls) for task in tasks},
        deciding=deciding,
        rows=tuple(_never_better_below(rows)),
        data="",
        revisions={},
    )


def _threats(records: Iterable[Record], task: str) -> list[str]:
    names = {
        f"{r.threat.norm} {r.threat.eps} {r.threat.surface} {r.threat.attack}": r.threat.name
        for r in records
        if r.task.name == task
    }
    return [names[key] for key in sorted(names, key=_by_radius)]


def _joint(raws: Iterable[Scored], task: str, balls: Iterable[str]) -> list[str]:
    joint = {
        w.ball
        for raw in raws
        for w in raw.worst
        if w.task == task and (w.threats > 1 or w.broken_since)
    }
    return [ball for ball in balls if ball in joint]


def _deciding(balls: Sequence[str]) -> str:
    """The ball that orders the models: the largest of the first norm; "" if there is none."""
    return next((b for b in reversed(balls) if b.split()[0] == balls[0].split()[0]), "")


def _best_first(row: Row, deciding: str) -> tuple[bool, list[float], str, str]:
    """The sort key of rows: the deciding ball, then the others; rows without place come last."""
    worst = [row.worst.get(deciding), *row.worst.values()]
    values = [-(accuracy.value if accuracy else 0.0) for accuracy in worst]
    return row.place is None, values if row.complete else [], row.model, row.digest


def _never_better_below(rows: Iterable[Row]) -> Iterable[Row]:
    """Give no row a better place than a row above it: significance is not transitive."""
    least = 0
    for row in rows:
        least = max(least, row.place or 0)
        yield replace(row, place=least) if row.place else row


def _one_surface_a_task(raws: list[Scored]) -> list[Scored]:
    """Drop the surface from ball names if each task has one surface: averages cover all tasks."""
    every = {(w.task, w.ball) for raw in raws for w in raw.worst}
    if len({(task, _pixels(ball)) for task, ball in every}) < len(every):
        return raws
    return [
        replace(raw, worst=[replace(w, ball=_pixels(w.ball)) for w in raw.worst]) for raw in raws
    ]


def _pixels(ball: str) -> str:
    return ball.removesuffix(" model")


def _by_radius(ball: str) -> tuple[bool, str, Fraction, str]:
    """The sort key of names that begin with norm and eps: L-inf first, then ascending radii."""
    norm, eps = ball.split()[:2]
    return norm != "linf", norm, Fraction(eps), ball


def _places(rows: Sequence[Row], raws: Sequence[Scored], deciding: str) -> list[int | None]:
    """The place of each row: one more than the number of significantly better rows.

    Models are compared in the deciding ball, on the samples of all tasks together; models without
    common samples, by their figures. A row that is not complete, or has a sign of gradient masking,
    has no place (None).
    """
    ranked = [i for i, raw in enumerate(raws) if raw.complete and not masks(raw.records)]
    robust = [
        {
            (w.task, x): verdict
            for w in raws[i].worst
            if w.ball == deciding
            for x, verdict in w.robust.items()
        }
        for i in ranked
    ]
    worst = [rows[i].worst.get(deciding) for i in ranked]
    figures = np.array([accuracy.value if accuracy else 0.0 for accuracy in worst])
    better, compared = all_pairs(robust)
    ahead = np.where(compared, better, figures[:, None] > figures[None, :]).sum(0)
    places = dict(zip(ranked, ahead.tolist(), strict=True))
    return [1 + places[i] if i in places else None for i in range(len(rows))]
