"""Level "re-attacked": samples of the same data that the suite does not list.

A model that has seen the published samples is better on them than on others. Samples that nobody
can know in advance are drawn from the rest of the data, classified, and some of them attacked.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from scipy.stats import hypergeom

from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.again import Outcome, attack_again
from mmtard_bench.evaluation.bench import Bench
from mmtard_bench.evaluation.device import Resources, full_float32
from mmtard_bench.leaderboard.verify.reattacked import places_of
from mmtard_bench.leaderboard.verify.well_formed import Formed, Place
from mmtard_bench.models.clip import Clip
from mmtard_bench.records.worst import Ball
from mmtard_bench.tasks.prompts import understood
from mmtard_bench.tasks.samples import TaskData, load_others

MOST = 1000
"""The most fresh samples that are classified for a task."""
LEVEL = 1e-4
"""The highest probability that an entry to which all samples are alike is refused."""


@dataclass(frozen=True)
class Shares:
    """``right`` of ``n`` published samples against ``fresh_right`` of ``fresh`` ones."""

    what: str
    right: int
    n: int
    fresh_right: int
    fresh: int

    @property
    def p(self) -> float:
        """One-sided p of Fisher's exact test: are published samples easier? (Fisher, 1934)."""
        right = self.right + self.fresh_right
        return float(hypergeom.sf(self.right - 1, self.n + self.fresh, right, self.n))

    @property
    def line(self) -> str:
        """The shares and the test, in words."""
        return (
            f"{self.what} {self.right} of {self.n} published, {self.fresh_right} of {self.fresh} "
            f"fresh samples (published easier: p = {self.p:.2g})"
        )


def require_alike(
    formed: Formed,
    clip: Clip,
    resources: Resources,
    *,
    count: int,
    seed: int,
    tell: Callable[[str], None],
) -> str:
    """Compare each task's published samples with fresh ones; ``count`` of those are attacked.

    The ball of a task in which the most samples are robust is attacked, by its strongest attack.

    Returns:
        A summary.

    Raises:
        InputError: If the published samples are easier for the model than fresh ones.
    """
    tasks: dict[str, list[tuple[Ball, Place]]] = {}
    for ball, place in places_of(formed):
        tasks.setdefault(place.data.task.name, []).append((ball, place))
    found: list[Shares] = []
    silent: list[str] = []
    for task, group in tasks.items():
        where = f"{formed.suite.name}, {task}"
        data = _fresh(group[0][1], seed)
        if isinstance(data, str):
            silent.append(task)
            tell(f"re-attacked: {where}: no fresh samples: {data}")
            continue
        for shares in _compared(group, data, clip, resources, count=count, seed=seed):
            tell(f"re-attacked: {where}: {shares.line}")
            if shares.p < LEVEL / 2 / len(tasks):
                raise InputError(f"{where}: {shares.line}. The model knows the published samples.")
            found.append(shares)
    if not found:
        return "; no fresh samples"
    least = min(found, key=lambda shares: shares.p)
    missing = f", none of {', '.join(silent)}" if silent else ""
    return f"; fresh samples: {least.line}{missing}"


def _fresh(place: Place, seed: int) -> TaskData | str:
    """Samples of the task that the suite does not list, or why there are none."""
    task, known = place.data.task, place.data.manifest.ids
    if task.metric == "retrieval":
        return "other images would make another gallery"
    try:
        data = load_others(task, known, n=min(MOST, len(known)), seed=seed)
        return "the suite lists all of the data" if data is None else data.without_damaged()
    except InputError as error:  # it speaks against the data here, not against the entry
        return str(error)


def _compared(
    group: list[tuple[Ball, Place]],
    data: TaskData,
    clip: Clip,
    resources: Resources,
    *,
    count: int,
    seed: int,
) -> list[Shares]:
    """Clean accuracy; then robust accuracy, unless every ball is of attacks on text."""
    record = group[0][1].record
    n = len(record.samples)
    with full_float32():
        bench = Bench(clip, understood(clip, data), "model", resources)
        right = sum(verdict.right for verdict in bench.clean())
    clean = sum(sample.clean_correct for sample in record.samples)
    found = [Shares("correct:", clean, n, right, len(data.labels))]
    pixels = [pair for pair in group if pair[1].threat.norm != "levenshtein"]
    if not pixels:
        return found
    ball, place = max(pixels, key=lambda pair: len(pair[0].robust))
    some = data.at(range(min(count, len(data.labels))))
    other = random.Random(f"{seed}|fresh").randrange(2**32)
    outcomes = list(attack_again(clip, some, place.threat, resources, seed=other))
    robust = sum(map(_robust, outcomes))
    return [*found, Shares(f"robust ({ball.name}):", len(ball.robust), n, robust, len(outcomes))]


def _robust(outcome: Outcome) -> bool:
    return outcome.before == outcome.label and not outcome.broken
