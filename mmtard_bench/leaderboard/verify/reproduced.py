"""Level "reproduced": run the whole suite again, with the engine and seed of the records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.checks import SampleCode
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.evaluate import execute
from mmtard_bench.evaluation.job import prepare
from mmtard_bench.leaderboard.verify.well_formed import Formed, Place
from mmtard_bench.models.clip import Clip
from mmtard_bench.records.curves import known_from_above
from mmtard_bench.records.recall import CUTOFFS
from mmtard_bench.records.schema import Record
from mmtard_bench.records.tables import percent

SHARE = 0.01
"""The share of a record's samples that may be robust on one side only; at least two."""


@dataclass(frozen=True)
class Comparison:
    """How many samples are robust in the entry's record only, and in the new record only."""

    place: Place
    entry_only: int
    ours_only: int

    @property
    def allowed(self) -> int:
        """The number of samples that may be robust on one side only."""
        return max(2, int(SHARE * len(self.place.record.samples)))


def reproduce(
    formed: Formed, clip: Clip, resources: Resources, *, tell: Callable[[str], None]
) -> list[Comparison]:
    """Run the suite again and compare every record sample by sample.

    Returns:
        A comparison per record.

    Raises:
        InputError: If an evaluation fails, if too many samples are robust on one side only, if the
            entry claims higher recalls under attack, or if its record lacks a flag.
    """
    done: dict[str, list[Record]] = {}
    found = []
    for place in formed.places:
        above = done.setdefault(place.data.task.name, [])
        record = _again(place, formed, clip, resources, above)
        above.append(record)
        found.append(_compared(place, record))
        last = found[-1]
        tell(
            f"{place.name}: robust {percent(record.robust_accuracy)}%, the entry says "
            f"{percent(place.record.robust_accuracy)}% ({last.entry_only} samples for the entry "
            f"only, {last.ours_only} here only; {record.seconds:.0f} s)"
        )
        for count, whose, how in (
            (last.entry_only, "for the entry", "over"),
            (last.ours_only, "here", "under"),
        ):
            if count > last.allowed:
                raise InputError(
                    f"{place.name}: {count} samples are robust {whose} alone; at most "
                    f"{last.allowed} may be by rounding, so the entry {how}states its robustness."
                )
        _require_recalls(place, record)
        _require_flags(place, record)
    return found


def _again(
    place: Place, formed: Formed, clip: Clip, resources: Resources, above: Sequence[Record]
) -> Record:
    suite = formed.suite
    job = prepare(clip, place.data, place.threat, seed=suite.seed, suite=suite, engine=place.engine)
    known, notes = known_from_above(place.threat, above) if suite.curve else ({}, [])
    record = execute(job, replace(resources, black_box=False), known=known, notes=notes)
    if record.status != "ok":
        raise InputError(f"{place.name}: the evaluation fails here: {record.error}")
    return record


def _require_recalls(place: Place, ours: Record) -> None:
    """Compare recalls under attack. They follow from ranks, which no other level checks."""
    theirs = place.record.results.recalls if place.record.results else None
    here = ours.results.recalls if ours.results else None
    if theirs is None or here is None:
        return
    for name in ("image_to_text_attacked", "text_to_image_attacked"):
        for k, claimed, found in zip(
            CUTOFFS, getattr(theirs, name), getattr(here, name), strict=True
        ):
            if claimed - found > SHARE:
                raise InputError(
                    f"{place.name}: the entry says {percent(claimed)}% for {name} at {k}, here it "
                    f"is {percent(found)}%."
                )


def _require_flags(place: Place, ours: Record) -> None:
    """Require flags that depend on which attack broke a sample: an entry could hide them."""
    given = {flag.code for flag in place.record.flags}
    missing = [f for f in ours.flags if f.code in get_args(SampleCode) and f.code not in given]
    if missing:
        raise InputError(
            f"{place.name}: the record lacks the flag '{missing[0].code}': {missing[0].detail}."
        )


def _compared(place: Place, record: Record) -> Comparison:
    pairs = [
        (theirs.robust, ours.robust)
        for theirs, ours in zip(place.record.samples, record.samples, strict=True)
    ]
    return Comparison(place, pairs.count((True, False)), pairs.count((False, True)))
