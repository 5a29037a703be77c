"""Two models on the same samples: who is better, and how surely. Imports without torch.

Samples are counted as in McNemar's table: ``both`` models stand, ``only_a``, ``only_b``, neither.
Everything takes arrays of such counts, so that many comparisons cost one call.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mmtard_bench.errors import InputError
from mmtard_bench.records.files import oldest_first
from mmtard_bench.records.schema import Record
from mmtard_bench.records.statistics import (
    LEVEL,
    difference_interval,
    holm,
    mcnemar,
)
from mmtard_bench.records.worst import worst_cases

T = TypeVar("T")


def comparable(
    items: Iterable[tuple[Mapping[str, str], T]],
) -> list[tuple[dict[str, str], list[T]]]:
    """Group things so that in a group each task is on one revision of its data.

    Each comes with its revisions by task, and joins the first group that it fits. Groups come with
    theirs. One sample id of two revisions may be two images, so it is never paired.
    """
    groups: list[tuple[dict[str, str], list[T]]] = []
    for revisions, item in items:
        for known, members in groups:
            if all(known.get(task, revision) == revision for task, revision in revisions.items()):
                known.update(revisions)
                members.append(item)
                break
        else:
            groups.append((dict(revisions), [item]))
    return groups


@dataclass(frozen=True)
class Comparison:
    """Two models on the samples of one task, clean or under attack.

    ``what`` is "clean", a threat model, or the worst case in a ball; ``a`` and ``b`` are accuracies
    in [0, 1], ``interval`` is that of a - b; ``only_a`` counts the samples on which a alone stands.
    ``p_holm`` is corrected for all comparisons that were made together.
    """

    suite: str
    task: str
    what: str
    n: int
    a: float
    b: float
    interval: tuple[float, float]
    only_a: int
    only_b: int
    p: float
    p_holm: float

    @property
    def better(self) -> str:
        """Which is significantly better, "a" or "b"; "" for neither."""
        if self.p_holm > LEVEL:
            return ""
        return "a" if self.only_a > self.only_b else "b"


def compare(a: Sequence[Record], b: Sequence[Record]) -> list[Comparison]:
    """Compare the records of two models, each with the other's of the same suite, task and threat.

    Records on other samples, failed ones, and what only one model has are left out, also of the
    worst cases. Raises InputError if nothing is left.
    """
    mine, other = _by_place(a), _by_place(b)
    shared = [place for place in mine if place in other]
    if not shared:
        raise InputError(
            "The two share no finished record of one suite, task and threat model on the same "
            "samples, so there is nothing to compare; run the same suite on both, with the same "
            "--n and --seed."
        )
    first = _verdicts({place: mine[place] for place in shared})
    second = _verdicts({place: other[place] for place in shared})
    tables = np.array([_table(first[key], second[key]) for key in first])
    both, only_a, only_b, n = tables.T
    low, high = difference_interval(both, only_a, only_b, n)
    p = mcnemar(only_a, only_b)
    corrected = holm(p)
    return [
        Comparison(
            suite=group[0],
            task=group[2],
            what=what,
            n=int(n[i]),
            a=float((both[i] + only_a[i]) / n[i]),
            b=float((both[i] + only_b[i]) / n[i]),
            interval=(float(low[i]), float(high[i])),
            only_a=int(only_a[i]),
            only_b=int(only_b[i]),
            p=float(p[i]),
            p_holm=float(corrected[i]),
        )
        for i, (group, what) in enumerate(first)
    ]


Group = tuple[str, str, str, str, str]
"""Suite, its digest, task, revision of the data, digest of the sample ids: records side by side."""


def _by_place(records: Iterable[Record]) -> dict[tuple[Group, str], Record]:
    """Finished records by group and threat model; of two for one place the newer one."""
    places = {}
    for record in oldest_first(records):
        if record.results is not None:
            suite, task = record.suite, record.task
            on = (suite.name, suite.digest) if suite else ("", "")
            group = (*on, task.name, task.revision, record.sample_ids_digest)
            places[group, record.threat.name] = record
    return dict(sorted(places.items()))


def _verdicts(places: Mapping[tuple[Group, str], Record]) -> dict[tuple[Group, str], list[bool]]:
    """Which samples stand: clean, against each threat model, in each worst case over several."""
    groups: dict[Group, list[Record]] = defaultdict(list)
    for (group, _), record in places.items():
        groups[group].append(record)
    found = {}
    for group, records in groups.items():
        found[group, "clean"] = [sample.clean_correct for sample in records[0].samples]
        for record in records:
            found[group, record.threat.name] = [sample.robust for sample in record.samples]
        for worst in worst_cases(records):
            if worst.threats > 1:
                found[group, f"worst case {worst.ball}"] = list(worst.robust.values())
    return found


def _table(a: Sequence[bool], b: Sequence[bool]) -> tuple[int, int, int, int]:
    """McNemar's table: both, only a, only b; and how many there are."""
    pairs = Counter(zip(a, b, strict=True))
    return pairs[True, True], pairs[True, False], pairs[False, True], len(a)
