"""The worst case over attacks: per sample, over all threat models of one norm and eps."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mmtard_bench.errors import InputError
from mmtard_bench.records.files import oldest_first
from mmtard_bench.records.schema import Record, ThreatFacts
from mmtard_bench.records.statistics import wilson


@dataclass(frozen=True)
class WorstCase:
    """Which samples are robust under every threat model of one task and ball, by id, in order.

    A ball is norm, eps and surface, and how many edits of the text go with them; ``threat`` is one
    of the ball's, ``threats`` is how many there are, and ``broken_since`` counts the samples that a
    stronger attack broke after the records were made.
    """

    task: str
    ball: str
    threat: ThreatFacts
    threats: int
    robust: Mapping[str, bool]
    broken_since: int = 0

    @property
    def accuracy(self) -> float:
        """The share of robust samples."""
        return sum(self.robust.values()) / len(self.robust)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        return wilson(sum(self.robust.values()), len(self.robust))


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
        robust = {
            samples[0].id: all(sample.robust for sample in samples)
            for samples in zip(*(record.samples for record in group), strict=True)
        }
        found.append(WorstCase(task, ball, group[0].threat, len(group), robust))
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


STRENGTH = (
    "autoattack-standard",
    "apgd-pair-5r",
    "apgd-pair",
    "autoattack-rand",
    "cw-linf-{}",
    "pgd-{}",
    "cw-l2",
)
"""Attacks on pixels, the strongest first; {} is a number of steps, more of which are stronger."""


@dataclass(frozen=True)
class Ball:
    """What the records of one task and ball say together: a ball is norm, eps and surface.

    ``edits`` says whether the attacker may change class names, too, or alone.
    """

    task: str
    name: str
    records: tuple[Record, ...]

    @property
    def edits(self) -> bool:
        """Whether its attacks change class names."""
        return any("edits" in record.threat.parameters for record in self.records)

    @property
    def strongest(self) -> Record:
        """The record of the strongest attack, by ``STRENGTH``."""
        return min(self.records, key=lambda record: _weakness(record.threat.attack))

    @cached_property
    def robust(self) -> list[str]:
        """The ids of the samples that no attack broke: the worst case."""
        (case,) = worst_cases(self.records)
        return [name for name, robust in case.robust.items() if robust]

    @cached_property
    def broken(self) -> list[str]:
        """The ids of the samples that every record has right on the clean image, and some broke."""
        columns = zip(*(record.samples for record in self.records), strict=True)
        right = (column for column in columns if all(sample.clean_correct for sample in column))
        return [column[0].id for column in right if not all(sample.robust for sample in column)]


def balls_of(records: Iterable[Record]) -> list[Ball]:
    """The balls of the records of a run, in order of their first records."""
    return [Ball(task, name, tuple(group)) for (task, name), group in by_ball(records).items()]


def _weakness(attack: str) -> tuple[int, int]:
    steps = re.search(r"[0-9]+$", attack)
    names = (attack, re.sub(r"[0-9]+$", "{}", attack))
    place = next((i for i, known in enumerate(STRENGTH) if known in names), len(STRENGTH))
    return place, -int(steps[0]) if steps else 0
