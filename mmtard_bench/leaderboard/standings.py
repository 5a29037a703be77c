"""What a leaderboard shows, as facts; markdown and pages only format them. Imports without torch.

Samples that a stronger attack broke later count as broken in the worst cases only; the columns of
single records stay as they are.
"""

import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from mmtard_bench.files import suite_folder
from mmtard_bench.leaderboard.badges import Badge, badges, newest
from mmtard_bench.leaderboard.board import Board
from mmtard_bench.leaderboard.entries.breaks import Credit, lowered
from mmtard_bench.leaderboard.entries.card import Card
from mmtard_bench.leaderboard.entries.verifications import Verification
from mmtard_bench.records.compare import comparable
from mmtard_bench.records.curves import Point, eps_curves
from mmtard_bench.records.files import oldest_first
from mmtard_bench.records.recall import Recalls
from mmtard_bench.records.schema import Record, SuiteFacts, digest_of
from mmtard_bench.records.statistics import Accuracy, all_pairs, mean_accuracy
from mmtard_bench.records.worst import WorstCase, is_complete, worst_cases
from mmtard_bench.text import slug
from mmtard_bench.types import FAST_CODE

PYTHON_OBJECT = "python object"
"""The source of a model that no text can load."""

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


class Remark(NamedTuple):
    """A flag of a record, or "failed" with its error; ``where`` is the task and threat model."""

    code: str
    detail: str
    where: str


@dataclass(frozen=True)
class Cells:
    """A row on one task, of whose samples it has ``n``.

    ``robust`` is by threat model, None where it failed; ``worst`` by ball, empty in a row that is
    not complete; ``curves`` by attack, norm and surface, of attacks with two radii or more.
    """

    n: int
    clean: Accuracy | None
    robust: Mapping[str, Accuracy | None]
    worst: Mapping[str, Accuracy]
    recalls: Mapping[str, Recalls]
    curves: Mapping[str, Sequence[Point]]


@dataclass(frozen=True)
class Row:
    """One model on one suite. ``card`` and ``verified`` are those of its entry, if it has one.

    ``clean`` and ``worst`` (by ball) are averages over the tasks, None if a task is missing.
    ``forward`` and ``backward`` are passes per sample; these and ``seconds`` are summed over the
    records.
    """

    model: str
    digest: str
    source: str
    card: Card | None
    place: int | None
    complete: bool
    clean: Accuracy | None
    worst: Mapping[str, Accuracy | None]
    tasks: Mapping[str, Cells]
    remarks: tuple[Remark, ...]
    badges: tuple[Badge, ...]
    forward: float
    backward: float
    seconds: float
    verified: Verification | None
    credits: tuple[Credit, ...]
    reproduce: str


@dataclass(frozen=True)
class SuiteStandings:
    """A suite with its rows, best first. ``n`` is the most samples that a record has.

    All rows are on the same data. Where there are results on other data as well, each has
    standings of its own: ``data`` tells them apart, and ``revisions`` has the tasks that differ.

    By task, ``threats`` are the names of its threat models in the order of radii, and ``joint``
    the balls whose worst case is not just the column of one threat model. Rows are ordered, and
    have places, by the worst case in the ball ``deciding``.
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
        """Its name, and which data it is on where there are several."""
        return f"{self.name} on data {self.data}" if self.data else self.name

    @property
    def about(self) -> str:
        """Protocol, tasks, samples and seeds, and the data where there are several."""
        count, seeds = len(self.tasks), ", ".join(map(str, self.seeds))
        said = (
            f"Protocol {self.protocol or 'of its own'}; {count} task{'s' * (count > 1)}, "
            f"{self.n} samples each, seed {seeds}."
        )
        if not self.data:
            return said
        on = ", ".join(f"{task} of revision {self.revisions[task]}" for task in self.revisions)
        return f"{said} The data are {on}; results on other data are not compared with these."

    @property
    def average(self) -> str:
        """What the average of clean accuracies is called."""
        return "recall at 1" if self.metric == "retrieval" else "zero-shot average"

    @property
    def plot(self) -> str:
        """The name of the file with its plot, if it has one."""
        return f"{slug(self.title)}-scatter.svg"


@dataclass(frozen=True)
class _Raw:
    """What a row is made from: a record a place, and the worst cases with what fell since.

    ``revisions`` are those of the tasks' data.
    """

    records: tuple[Record, ...]
    revisions: Mapping[str, str]
    worst: Sequence[WorstCase]
    complete: bool
    card: Card | None = None
    verified: Verification | None = None
    credits: Sequence[Credit] = ()


def standings(board: Board) -> list[SuiteStandings]:
    """The standings of every suite of a leaderboard, in the order of ``SUITES``.

    Two digests of one name are two suites. Models that were scored on different data are in
    different standings.
    """
    suites: dict[tuple[str, str], list[_Raw]] = defaultdict(list)
    for entry in board.entries:
        for run in entry.runs:
            verified, breaks = board.verified(entry, run), board.breaks_of(entry, run)
            for suite, raw in _grouped(run.records):
                worst, credits = lowered(raw.worst, breaks)
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


def _grouped(records: Iterable[Record]) -> Iterable[tuple[SuiteFacts, _Raw]]:
    """Records by suite and model."""
    models: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in oldest_first(records):
        if record.suite is not None:
            row = (record.suite.name, record.suite.digest, record.model.name, record.model.digest)
            models[row].append(record)
    for own in models.values():
        suite = own[0].suite
        assert suite is not None
        # Of two records for one place the newer one counts.
        for revisions, group in comparable(
            ({r.task.name: r.task.revision}, r) for r in reversed(own)
        ):
            places: dict[tuple[str, str], Record] = {}
            for record in group:
                places.setdefault((record.task.name, record.threat.name), record)
            found = tuple(places[place] for place in sorted(places))
            yield suite, _Raw(found, revisions, worst_cases(found), is_complete(found))


def _by_data(raws: Iterable[_Raw]) -> list[SuiteStandings]:
    """The standings of a suite, on the newest data first."""
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


def _suite(raws: list[_Raw]) -> SuiteStandings:
    raws = _one_surface_a_task(raws)
    records = [record for raw in raws for record in raw.records]
    suite = records[0].suite
    assert suite is not None
    tasks = sorted({record.task.name for record in records})
    balls = sorted({w.ball for raw in raws for w in raw.worst}, key=_by_radius)
    samples = {t: max(len(r.samples) for r in records if r.task.name == t) for t in tasks}
    rows = [_row(raw, samples, balls) for raw in raws]
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


def _joint(raws: Iterable[_Raw], task: str, balls: Iterable[str]) -> list[str]:
    joint = {
        w.ball for raw in raws for w in raw.worst if w.task == task and (w.threats > 1 or w.fell)
    }
    return [ball for ball in balls if ball in joint]


def _deciding(balls: Sequence[str]) -> str:
    """The ball that models are ordered by: the largest of the first norm; "" if there is none."""
    return next((b for b in reversed(balls) if b.split()[0] == balls[0].split()[0]), "")


def _best_first(row: Row, deciding: str) -> tuple[bool, list[float], str, str]:
    """One ball decides, of equals the others; rows that lack a record come last."""
    worst = [row.worst.get(deciding), *row.worst.values()]
    values = [-(accuracy.value if accuracy else 0.0) for accuracy in worst]
    return not row.complete, values if row.complete else [], row.model, row.digest


def _never_better_below(rows: Iterable[Row]) -> Iterable[Row]:
    """Ordered rows, none with a better place than one above: significance is not transitive."""
    least = 0
    for row in rows:
        least = max(least, row.place or 0)
        yield replace(row, place=least) if row.place else row


def _one_surface_a_task(raws: list[_Raw]) -> list[_Raw]:
    """Where every task is attacked at one surface, a ball is one ball: averages are over all."""
    every = {(w.task, w.ball) for raw in raws for w in raw.worst}
    if len({(task, _pixels(ball)) for task, ball in every}) < len(every):
        return raws
    return [
        replace(raw, worst=[replace(w, ball=_pixels(w.ball)) for w in raw.worst]) for raw in raws
    ]


def _pixels(ball: str) -> str:
    return ball.removesuffix(" model")


def _by_radius(ball: str) -> tuple[bool, str, Fraction, str]:
    """The order of columns, for what begins with norm and eps: L-inf first, radii ascending."""
    norm, eps = ball.split()[:2]
    return norm != "linf", norm, Fraction(eps), ball


def _row(raw: _Raw, samples: Mapping[str, int], balls: Sequence[str]) -> Row:
    first = raw.records[0]
    engine = _engine(raw.records)
    done = [record.results for record in raw.records if record.results is not None]
    cells = {task: _cells(raw, task) for task in samples}
    whole = all(of.clean for of in cells.values())
    return Row(
        model=first.model.name,
        digest=first.model.digest,
        source=first.model.source,
        card=raw.card,
        place=None,
        complete=raw.complete,
        clean=_average([(of.clean, of.n) for of in cells.values()]) if whole else None,
        worst={
            ball: _average([(of.worst.get(ball), of.n) for of in cells.values()]) for ball in balls
        },
        tasks=cells,
        remarks=tuple(_remarks(raw.records)),
        badges=badges(
            raw.records,
            complete=raw.complete,
            verified=raw.verified,
            broken=sum(credit.samples for credit in raw.credits),
            engine=engine,
            samples=samples,
        ),
        forward=sum(results.forward_per_sample for results in done),
        backward=sum(results.backward_per_sample for results in done),
        seconds=sum(record.seconds for record in raw.records),
        verified=raw.verified,
        credits=tuple(raw.credits),
        reproduce=_command(raw.records, engine),
    )


def _average(parts: Iterable[tuple[Accuracy | None, int]]) -> Accuracy | None:
    """Over the tasks that have a figure; None if there are none."""
    known = [(accuracy.value, n) for accuracy, n in parts if accuracy is not None]
    return mean_accuracy(*zip(*known, strict=True)) if known else None


def _cells(raw: _Raw, task: str) -> Cells:
    records = [record for record in raw.records if record.task.name == task]
    done = {r.threat.name: r.results for r in records if r.results is not None}
    first = next(iter(done.values()), None)
    robust = {
        name: Accuracy(results.robust_accuracy, results.robust_interval)
        for name, results in done.items()
    }
    return Cells(
        n=first.n if first else 0,
        clean=Accuracy(first.clean_accuracy, first.clean_interval) if first else None,
        robust={record.threat.name: robust.get(record.threat.name) for record in records},
        worst={
            w.ball: Accuracy(w.accuracy, w.interval)
            for w in raw.worst
            if raw.complete and w.task == task
        },
        recalls={name: results.recalls for name, results in done.items() if results.recalls},
        curves={where: of[records[0].model.name] for where, of in eps_curves(records).items()},
    )


def _engine(records: Iterable[Record]) -> str:
    """What ran the attacks: "fast" if any of them did, else "reference"; "" for neither."""
    codes = [str(record.threat.parameters.get("code", "")) for record in records]
    if any(code.startswith(FAST_CODE) for code in codes):
        return "fast"
    return "reference" if "pyautoattack" in codes else ""


def _remarks(records: Iterable[Record]) -> Iterable[Remark]:
    for record in records:
        where = f"{record.task.name}, {record.threat.name}"
        for flag in record.flags:
            yield Remark(flag.code, flag.detail, where)
        if record.error is not None:
            yield Remark("failed", record.error, where)


def _command(records: Sequence[Record], engine: str) -> str:
    """The command that makes a row again, in one line; a comment where something is missing."""
    record = records[0]
    assert record.suite is not None
    source = " ".join(record.model.source.split())
    if source == PYTHON_OBJECT:
        return "# a model that Python code made: evaluate it there, with mmtard_bench.evaluate"
    name, _, overrides = record.suite.name.partition("+")
    ships = (suite_folder() / f"{name}.toml").is_file()
    words = ["mmtard-bench", "run", name if ships else f"{name}.toml", "--model", source]
    for option in filter(None, overrides.split("+")):
        words += [f"--{'n' if option[0] == 'n' else 'seed'}", re.sub("[a-z]", "", option)]
    words += ["--engine", engine] if engine == "reference" else []
    lower = any("attack_precision" in record.threat.parameters for record in records)
    words += ["--precision", "bfloat16"] if lower else []
    command = shlex.join(words)
    return command if ships else f"# with the suite's file, which does not ship: {command}"


def _places(rows: Sequence[Row], raws: Sequence[_Raw], deciding: str) -> list[int | None]:
    """One more than the number of rows that are significantly better in the deciding ball.

    Models are compared on the samples of all tasks together; two that have none in common, by
    their figures. None for rows that are not complete.
    """
    complete = [i for i, raw in enumerate(raws) if raw.complete]
    stands = [
        {
            (w.task, x): stood
            for w in raws[i].worst
            if w.ball == deciding
            for x, stood in w.stands.items()
        }
        for i in complete
    ]
    worst = [rows[i].worst.get(deciding) for i in complete]
    figures = np.array([accuracy.value if accuracy else 0.0 for accuracy in worst])
    better, compared = all_pairs(stands)
    ahead = np.where(compared, better, figures[:, None] > figures[None, :]).sum(0)
    places = dict(zip(complete, ahead.tolist(), strict=True))
    return [1 + places[i] if i in places else None for i in range(len(rows))]
