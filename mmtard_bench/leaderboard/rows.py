"""A row of the leaderboard: one model on one suite, as facts. Imports without torch."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mmtard_bench.files import suite_folder
from mmtard_bench.leaderboard.badges import Badge, badges
from mmtard_bench.leaderboard.entries.breaks import Credit
from mmtard_bench.leaderboard.entries.card import Card
from mmtard_bench.leaderboard.entries.verifications import Verification
from mmtard_bench.records.curves import Point, eps_curves
from mmtard_bench.records.recall import Recalls
from mmtard_bench.records.schema import Record
from mmtard_bench.records.statistics import Accuracy, mean_accuracy
from mmtard_bench.records.worst import WorstCase
from mmtard_bench.types import FAST_CODE

PYTHON_OBJECT = "python object"
"""The source of a model object from Python, which no model spec can load."""


class Remark(NamedTuple):
    """A flag of a record, or "failed" with its error; ``where`` is the task and threat model."""

    code: str
    detail: str
    where: str


@dataclass(frozen=True)
class Cells:
    """The figures of a row on one task with ``n`` samples.

    ``robust`` is by threat model, None if the record failed. ``worst`` is by ball, empty if the row
    is not complete. ``curves`` is by attack, norm and surface, for attacks with two or more radii.
    """

    n: int
    clean: Accuracy | None
    robust: Mapping[str, Accuracy | None]
    worst: Mapping[str, Accuracy]
    recalls: Mapping[str, Recalls]
    curves: Mapping[str, Sequence[Point]]


@dataclass(frozen=True)
class Row:
    """One model on one suite. ``card`` and ``verified`` come from its entry; None without one.

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
class Scored:
    """A model's records in one suite, from which a row is made.

    There is one record per task and threat model. ``worst`` counts samples that were broken later
    as broken. ``revisions`` has the data revision of each task.
    """

    records: tuple[Record, ...]
    revisions: Mapping[str, str]
    worst: Sequence[WorstCase]
    complete: bool
    card: Card | None = None
    verified: Verification | None = None
    credits: Sequence[Credit] = ()


def row_of(raw: Scored, samples: Mapping[str, int], balls: Sequence[str]) -> Row:
    """Make a row without its place, with the tasks of ``samples`` and the worst cases of ``balls``.

    ``samples`` has the largest number of samples that any row of the suite has, by task.
    """
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
    """The average over the tasks that have a figure; None if none has."""
    known = [(accuracy.value, n) for accuracy, n in parts if accuracy is not None]
    return mean_accuracy(*zip(*known, strict=True)) if known else None


def _cells(raw: Scored, task: str) -> Cells:
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
    """The engine: "fast" if it ran any attack, else "reference" if that did, else ""."""
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
    """The command that reproduces a row, in one line; a comment says if something is missing."""
    record = records[0]
    assert record.suite is not None
    source = " ".join(record.model.source.split())
    if source == PYTHON_OBJECT:
        return "# a model object from Python: score it there, with mmtard_bench.evaluate"
    name, _, overrides = record.suite.name.partition("+")
    ships = (suite_folder() / f"{name}.toml").is_file()
    words = ["mmtard-bench", "run", name if ships else f"{name}.toml", "--model", source]
    for option in filter(None, overrides.split("+")):
        words += [f"--{'n' if option[0] == 'n' else 'seed'}", re.sub("[a-z]", "", option)]
    words += ["--engine", engine] if engine == "reference" else []
    lower = any("attack_precision" in record.threat.parameters for record in records)
    words += ["--precision", "bfloat16"] if lower else []
    command = shlex.join(words)
    return command if ships else f"# needs the file of the suite, which does not ship: {command}"
