"""The progress of a record: settled samples, the most passes left, and the estimated time left."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mmtard_bench.attacks.base import AttackResult, Gauge, Pulse
from mmtard_bench.records.schema import Sample
from mmtard_bench.tasks.watched import Watched

_SECONDS = 0.25
"""Seconds between two reports."""


@dataclass(frozen=True)
class Progress:
    """The progress of a record.

    ``settled`` of ``total`` samples have a verdict. ``robust`` counts the samples, of ``seen``
    ones, that are not broken so far. ``pulse`` describes the running attack. ``passes_left`` is the
    largest number of passes that this process still needs, which it needs if all remaining samples
    are robust; None if the attack states no budget. ``seconds_left`` is an estimate, or None.
    """

    settled: int
    robust: int
    seen: int
    total: int
    pulse: Pulse = field(default_factory=Pulse)
    passes_left: int | None = None
    seconds_left: float | None = None


class Headway:
    """Counts the progress of one process's share of a record.

    ``done``: samples that already have a verdict. ``todo``: how many samples this process attacks.
    ``budget``: the most passes that one sample costs.

    A robust sample costs the whole budget; a broken sample costs the passes until it broke. The
    estimate assumes that every sample under attack is robust, and that later samples cost what the
    samples so far cost on average. It falls when samples break and never rises otherwise.
    """

    def __init__(
        self,
        done: Iterable[Sample],
        *,
        todo: int,
        total: int,
        budget: int | None,
        report: Callable[[Progress], None],
    ) -> None:
        before = [sample.robust for sample in done]
        self._before, self._robust_before = len(before), sum(before)
        self._todo, self._total, self._budget = todo, total, budget
        self._report = report
        self._seen = self._wrong = self._settled = self._broken = self._spent = 0
        self._gauge: Gauge = Pulse
        self._watched: Watched | None = None
        self._started = time.monotonic()
        self._due = 0.0

    def judged(self, *, wrong: int, right: int) -> None:
        """Count clean verdicts of more samples. Misclassified samples are settled."""
        self._seen += wrong + right
        self._wrong += wrong
        self._settled += wrong
        self._tell()

    def begin(self, watched: Watched) -> None:
        """Begin to count the passes of an attack on ``watched``."""
        self._watched, self._gauge = watched, Pulse
        watched.passes, watched.beat = 0, self._beat

    def watch(self, gauge: Gauge) -> None:
        """See ``Work``."""
        self._gauge = gauge

    def end(self, found: Iterable[AttackResult]) -> None:
        """Count the results of an attack that has ended or was aborted."""
        for result in found:
            self._settled += len(result.broken_by)
            self._broken += len(result.broken_by) - result.broken_by.count(None)
            self._spent += sum(result.forward) + sum(result.backward)
        self._watched, self._gauge = None, Pulse
        self._tell()

    def _beat(self) -> None:
        if time.monotonic() >= self._due:
            self._tell()

    def _tell(self) -> None:
        pulse = self._gauge()
        now = time.monotonic()
        self._due = now + _SECONDS
        settled = self._settled + pulse.settled
        robust = self._seen - self._wrong - self._broken - pulse.broken
        left, seconds = self._left(pulse, self._seen - settled, now - self._started)
        self._report(
            Progress(
                settled=self._before + settled,
                robust=self._robust_before + robust,
                seen=self._before + self._seen,
                total=self._total,
                pulse=pulse,
                passes_left=left,
                seconds_left=seconds,
            )
        )

    def _left(self, pulse: Pulse, attacked: int, elapsed: float) -> tuple[int | None, float | None]:
        """The most passes left and the seconds left, with this many samples under attack."""
        unseen = self._todo - self._seen
        if self._budget is None:
            settled = self._settled + pulse.settled
            known = settled > 0 and not attacked
            return None, elapsed / settled * unseen if known else None
        spent = self._spent + pulse.spent
        passes = self._watched.passes if self._watched else 0
        here = max(attacked * self._budget - (passes - pulse.spent), 0)
        made = self._spent + passes
        if not made:
            return here + unseen * self._budget, None
        each = (spent + attacked * self._budget) / self._seen
        return here + unseen * self._budget, (here + unseen * each) * elapsed / made
