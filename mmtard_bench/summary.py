"""Records side by side: worst cases, and tables for a terminal. Imports without torch."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tabulate import tabulate

from mmtard_bench.errors import InputError
from mmtard_bench.recall import CUTOFFS, Recalls
from mmtard_bench.records import Record, ThreatFacts, oldest_first, wilson

RECALL_HEADERS = ("query", *(f"R@{k}" for k in CUTOFFS), *(f"attacked R@{k}" for k in CUTOFFS))
"""What ``recall_cells`` gives."""


class Accuracy(NamedTuple):
    """A share of samples in [0, 1] with its 95% interval."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class WorstCase:
    """Which samples stand against every threat model of one task and ball, by id, in order.

    A ball is norm, eps and surface, and how many edits of the text go with them; ``threat`` is one
    of the ball's, ``threats`` how many there are.
    """

    task: str
    ball: str
    threat: ThreatFacts
    threats: int
    stands: Mapping[str, bool]
    fell: int = 0

    @property
    def accuracy(self) -> float:
        """Share of the samples that stand."""
        return sum(self.stands.values()) / len(self.stands)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        return wilson(sum(self.stands.values()), len(self.stands))


def by_ball(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """The records of each task and ball, in order of their first ones."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.task.name, record.threat.ball].append(record)
    return groups


def worst_cases(records: Iterable[Record]) -> list[WorstCase]:
    """Per-sample AND over the threat models of one task and ball.

    A failed record makes its worst case unknown, so it is left out. Raises InputError if records
    of one task do not hold the same samples of one revision of the data.
    """
    found = []
    for (task, ball), group in by_ball(records).items():
        if any(record.status != "ok" for record in group):
            continue
        if len({(record.task.revision, record.sample_ids_digest) for record in group}) != 1:
            raise InputError(
                f"The records of {task} do not hold the same samples of the same data. Run the "
                "suite again, so that all of them are on the data as they are now."
            )
        stands = {
            samples[0].id: all(sample.robust for sample in samples)
            for samples in zip(*(record.samples for record in group), strict=True)
        }
        found.append(WorstCase(task, ball, group[0].threat, len(group), stands))
    return found


def counted(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """The records of one model on one suite that count together, and those that do not, in order.

    Of two records for one place the newer one counts; on a task, those that are of the same data,
    samples, prompts and seed as the newest one.
    """
    ordered = oldest_first(records)
    places = {(record.task.name, record.threat.name): record for record in ordered}
    newest = {record.task.name: record for record in ordered}
    kept = {id(r) for r in places.values() if _of(r) == _of(newest[r.task.name])}
    return [r for r in records if id(r) in kept], [r for r in records if id(r) not in kept]


def _of(record: Record) -> tuple[object, ...]:
    return record.task, record.sample_ids_digest, record.seed


def is_complete(records: Sequence[Record]) -> bool:
    """Whether a run's records are all there and finished. Without a suite, whatever is there."""
    expected = max((r.suite.records for r in records if r.suite), default=len(records))
    places = {(record.task.name, record.threat.name) for record in records}
    return len(places) == expected and all(record.results for record in records)


def percent(value: float) -> str:
    """0.583 -> "58.3"."""
    return f"{100 * value:.1f}"


def with_interval(value: float, interval: tuple[float, float]) -> str:
    """An accuracy in percent with its interval: "58.3 [53.9, 62.5]"."""
    return f"{percent(value)} [{percent(interval[0])}, {percent(interval[1])}]"


def table_of(records: Sequence[Record]) -> str:
    """A run for the terminal: accuracies in percent with 95% intervals, cost, flags, errors."""
    rows = [_row(record) for record in records]
    worst = worst_cases(records) if is_complete(records) else []
    rows += [
        [w.task, f"worst case {w.ball}", "", with_interval(w.accuracy, w.interval), "", "", ""]
        for w in worst
        if w.threats > 1
    ]
    headers = ["task", "threat model", "clean %", "robust %", "forward", "backward", "seconds"]
    text = tabulate(rows, headers=headers, disable_numparse=True)
    rows = [
        [record.task.name, record.threat.name, *cells]
        for record in records
        if record.results and record.results.recalls
        for cells in recall_cells(record.results.recalls)
    ]
    if rows:
        headers = ["task", "threat model", *RECALL_HEADERS]
        text += f"\n\n{tabulate(rows, headers=headers, disable_numparse=True)}"
    remarks = list(_remarks(records))
    return "\n".join([text, "", *remarks]) if remarks else text


def recall_cells(recalls: Recalls) -> list[list[str]]:
    """Recalls in percent, a row a direction."""
    return [
        ["image to text", *map(percent, recalls.image_to_text + recalls.image_to_text_attacked)],
        ["text to image", *map(percent, recalls.text_to_image + recalls.text_to_image_attacked)],
    ]


def _row(record: Record) -> list[str]:
    results = record.results
    accuracies = ["-", "FAILED", "-", "-"]
    if results is not None:
        accuracies = [
            with_interval(results.clean_accuracy, results.clean_interval),
            with_interval(results.robust_accuracy, results.robust_interval),
            f"{results.forward_per_sample:.0f}",
            f"{results.backward_per_sample:.0f}",
        ]
    return [record.task.name, record.threat.name, *accuracies, f"{record.seconds:.1f}"]


def _remarks(records: Sequence[Record]) -> Iterable[str]:
    said: dict[str, str] = {}
    for record in records:
        where = f"{record.task.name}, {record.threat.name}"
        if record.error is not None:
            said[f"error: {record.error}"] = where
        for flag in record.flags:
            said.setdefault(f"flag {flag.code}: {flag.detail}", where)
        for note in record.notes:
            said.setdefault(f"note: {note}", where)
    return (f"{text} ({where})" for text, where in said.items())
