"""Intervals and tests for accuracies. Imports without torch."""

import math
from collections.abc import Hashable, Mapping, Sequence
from statistics import mean
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion (Wilson, 1927)."""
    z = 1.959963984540054
    centre = (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(successes * (n - successes) / n + z * z / 4)
    # At the ends the bounds are exact; in floating point they would miss by a rounding error.
    return (
        0.0 if successes == 0 else max(centre - half, 0.0),
        1.0 if successes == n else min(centre + half, 1.0),
    )


LEVEL = 0.05
"""Of every test; intervals are at one minus this."""


Floats = NDArray[np.float64]


Truths = NDArray[np.bool_]


Key = TypeVar("Key", bound=Hashable)


def mcnemar(only_a: ArrayLike, only_b: ArrayLike) -> Floats:
    """Two-sided p of McNemar's exact test: is a discordant sample one model's as often as not?

    The discordant samples are binomial with a half if neither model is better (McNemar, 1947;
    Fagerland, Lydersen and Laake, 2013, for the exact form, which errs on the careful side).
    """
    from scipy.stats import binom  # takes a second to import, and only comparisons need it

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


class Pairs(NamedTuple):
    """All pairs of M models, as (M, M) truths: who is significantly better than whom, and which
    two were compared at all, on common samples.
    """

    better: Truths
    compared: Truths


def all_pairs(robust: Sequence[Mapping[Key, bool]]) -> Pairs:
    """Compare models with each other, each given as which of its samples stand.

    McNemar's exact test on the common samples, Holm's correction over all pairs that have any.
    """
    places = {key: i for i, key in enumerate(dict.fromkeys(key for of in robust for key in of))}
    right, wrong = np.zeros((2, len(robust), len(places)))
    for i, of in enumerate(robust):
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


class Accuracy(NamedTuple):
    """A share of samples in [0, 1] with its 95% interval."""

    value: float
    interval: tuple[float, float]


def mean_accuracy(shares: Sequence[float], sizes: Sequence[int]) -> Accuracy:
    """The mean over tasks with a 95% interval, for samples that are drawn for each task alone.

    The tasks are taken as they are, not as drawn from others. Wilson's interval of all samples
    pooled: where tasks have equally many it is conservative, the more so the more they differ. For
    others the size is what gives the mean its variance, pooled or stratified, whichever is larger
    (an effective sample size: Korn and Graubard, 1998). Of one task it is Wilson's interval.
    """
    value, tasks = mean(shares), len(shares)
    size = tasks**2 / sum(1 / n for n in sizes)
    spread = sum(p * (1 - p) / n for p, n in zip(shares, sizes, strict=True)) / tasks**2
    if spread * size > value * (1 - value):
        size = value * (1 - value) / spread
    return Accuracy(value, wilson(value * size, size))
