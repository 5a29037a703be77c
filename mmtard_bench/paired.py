"""Two models on the same samples: who is better, and how surely. Imports without torch.

Samples are counted as in McNemar's table: ``both`` models stand, ``only_a``, ``only_b``, neither.
Everything takes arrays of such counts, so that many comparisons cost one call.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from mmtard_bench.errors import InputError
from mmtard_bench.records import Record, oldest_first, wilson
from mmtard_bench.summary import worst_cases

LEVEL = 0.05
"""Of every test; intervals are at one minus this."""

Floats = NDArray[np.float64]
Truths = NDArray[np.bool_]
Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T")


def mcnemar(only_a: ArrayLike, only_b: ArrayLike) -> Floats:
    """Two-sided p of McNemar's exact test: is a discordant sample one model's as often as not?

    The discordant samples are binomial with a half if neither model is better (McNemar, 1947;
    Fagerland, Lydersen and Laake, 2013, for the exact form, which errs on the careful side).
    """
    only_a, only_b = np.asarray(only_a), np.asarray(only_b)
    tail = binom.cdf(np.minimum(only_a, only_b), only_a + only_b, 0.5)
    return np.minimum(2 * np.asarray(tail, dtype=np.float64), 1.0)


def holm(p: ArrayLike) -> Floats:
    """P-values (K,) of a family, corrected so that any false finding in it is as rare as the level.

    Step-down after Holm (1979); holds whatever the tests have to do with each other.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def difference_interval(
    both: ArrayLike, only_a: ArrayLike, only_b: ArrayLike, n: ArrayLike
) -> tuple[Floats, Floats]:
    """The 95% interval of accuracy a minus accuracy b, each in [-1, 1].

    Wilson's intervals of both accuracies, squared and added with the correlation of the pairs:
    method 10 of Newcombe (1998), Statistics in Medicine 17, 2635-2650.
    """
    both, only_a, only_b, n = (np.asarray(x, dtype=np.float64) for x in (both, only_a, only_b, n))
    neither = n - both - only_a - only_b
    a, b = (both + only_a) / n, (both + only_b) / n
    bounds = np.vectorize(wilson, otypes=[float, float])
    (low_a, high_a), (low_b, high_b) = bounds(both + only_a, n), bounds(both + only_b, n)
    product = both * neither - only_a * only_b
    product = np.where(product > 0, np.maximum(product - n / 2, 0), product)
    margins = np.sqrt(a * (1 - a) * b * (1 - b)) * n**2
    phi = np.divide(product, margins, out=np.zeros_like(product), where=margins > 0)
    down, up = a - low_a, high_b - b
    low = a - b - np.sqrt(np.maximum(down**2 - 2 * phi * down * up + up**2, 0))
    down, up = b - low_b, high_a - a
    high = a - b + np.sqrt(np.maximum(down**2 - 2 * phi * down * up + up**2, 0))
    return np.maximum(low, -1), np.minimum(high, 1)


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


class Pairs(NamedTuple):
    """All pairs of M models, as (M, M) truths: who is significantly better than whom, and which
    two were compared at all, on common samples.
    """

    better: Truths
    compared: Truths


def all_pairs(stands: Sequence[Mapping[Key, bool]]) -> Pairs:
    """Compare models with each other, each given as which of its samples stand.

    McNemar's exact test on the common samples, Holm's correction over all pairs that have any.
    """
    places = {key: i for i, key in enumerate(dict.fromkeys(key for of in stands for key in of))}
    right, wrong = np.zeros((2, len(stands), len(places)))
    for i, of in enumerate(stands):
        columns = np.fromiter((places[key] for key in of), dtype=np.intp, count=len(of))
        verdicts = np.fromiter(of.values(), dtype=np.bool_, count=len(of))
        right[i, columns], wrong[i, columns] = verdicts, ~verdicts
    known = right + wrong
    only = right @ wrong.T
    compared = known @ known.T > 0
    first, second = np.nonzero(np.triu(compared, 1))
    p = np.ones_like(only)
    p[first, second] = p[second, first] = holm(mcnemar(only[first, second], only[second, first]))
    return Pairs((p <= LEVEL) & (only > only.T), compared)


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
            "--limit and --seed."
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
                found[group, f"worst case {worst.ball}"] = list(worst.stands.values())
    return found


def _table(a: Sequence[bool], b: Sequence[bool]) -> tuple[int, int, int, int]:
    """McNemar's table: both, only a, only b; and how many there are."""
    pairs = Counter(zip(a, b, strict=True))
    return pairs[True, True], pairs[True, False], pairs[False, True], len(a)
