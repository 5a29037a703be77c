"""Statistics of a study: paired differences, and the training steps to reach the baseline."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Study:
    """A family of recipes: the methods, the baseline, and the suites that score the students."""

    family: str
    methods: tuple[str, ...]
    baseline: str
    robust_suite: str
    unseen_suite: str


@dataclass(frozen=True)
class Variant:
    """A kind of student: the recipe of a method with its changes. ``label`` names it in a study."""

    label: str
    method: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """The verdicts of one student, on the same samples for every student, and its training curve.

    ``clean``, ``robust`` and ``unseen`` have a truth value per sample. ``curve`` has points (step,
    seconds, robust validation accuracy). ``at_chance`` says that the clean accuracy, on either
    data, is not above chance. ``parameters`` is the number of trained parameters.
    """

    clean: Sequence[bool]
    robust: Sequence[bool]
    unseen: Sequence[bool]
    curve: Sequence[tuple[float, float, float]]
    at_chance: bool = False
    parameters: int = 0


METRICS = ("clean", "robust", "unseen")


def verdicts(scores: Sequence[Score], metric: str) -> Matrix:
    """The verdicts of one method as 0 or 1, (seeds, samples)."""
    return np.array([getattr(score, metric) for score in scores], dtype=np.float64)


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its 95% confidence interval."""

    mean: float
    low: float
    high: float


def paired_difference(ours: Matrix, baseline: Matrix) -> Difference:
    """The mean difference of two methods, (seeds, samples) each, paired by seed and sample.

    The interval covers other seeds and other samples. The variance of the mean is the sum of the
    variance over seeds and the variance over samples, which is conservative for crossed effects
    (Owen, 2007, "The pigeonhole bootstrap"). The t quantile has the degrees of freedom of that sum
    (Satterthwaite, 1946). With one seed the interval is infinite.
    """
    gap = ours - baseline
    seeds, samples = gap.shape
    mean = float(gap.mean())
    if seeds < 2:
        return Difference(mean, -math.inf, math.inf)
    parts = np.array([gap.mean(1).var(ddof=1) / seeds, gap.mean(0).var(ddof=1) / samples])
    variance = float(parts.sum())
    if not variance:
        return Difference(mean, mean, mean)
    freedom = variance**2 / float((parts**2 / [seeds - 1, samples - 1]).sum())
    reach = float(stats.t.ppf(0.975, freedom) * math.sqrt(variance))
    return Difference(mean, mean - reach, mean + reach)


def mean_curve(scores: Sequence[Score]) -> Matrix:
    """The mean curve over seeds, (points, 3): step, seconds, robust validation accuracy."""
    mean: Matrix = np.array([score.curve for score in scores], dtype=np.float64).mean(0)
    return mean


def cost_of(curve: Matrix, target: float) -> tuple[float, float]:
    """The (steps, seconds) after which a curve first reaches ``target``, linearly interpolated.

    Both are infinite if it never does. The smallest result is the first point of the curve.
    """
    robust = curve[:, 2]
    above = np.flatnonzero(robust >= target)
    if not len(above):
        return math.inf, math.inf
    at = int(above[0])
    if at == 0:
        return float(curve[0, 0]), float(curve[0, 1])
    share = (target - robust[at - 1]) / (robust[at] - robust[at - 1])
    steps, seconds = curve[at - 1, :2] + share * (curve[at, :2] - curve[at - 1, :2])
    return float(steps), float(seconds)


def times_cheaper(ours: Matrix, baseline: Matrix) -> tuple[float, float]:
    """How many times fewer (steps, seconds) reach the baseline's final accuracy; 0 if never."""
    target = float(baseline[-1, 2])
    steps, seconds = cost_of(ours, target)
    base_steps, base_seconds = cost_of(baseline, target)
    return base_steps / steps, base_seconds / seconds
