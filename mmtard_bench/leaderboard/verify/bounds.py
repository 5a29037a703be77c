"""Statistics of re-attacks: exact bounds from a random draw without replacement.

An entry calls N samples robust; D of them are not. A draw of k samples contains F broken samples,
and F has a hypergeometric distribution. An honest entry has a few broken samples as well: attacks
start at random points, and another seed broke about 1% of the robust samples of our own models
(docs/explanation/engine.md: 10 and 23 of about 2,400).

An entry has a test for each ball. At 1% per ball, the 26 balls of zeroshot13-v1 would refuse an
honest entry with a probability of up to 21%. Therefore all tests of an entry share the 1%
(Bonferroni's correction, which needs no independence): one half for the balls, one half for all
draws together. The stricter limit alone would detect an overstatement in a single ball less often.
Therefore a ball with too many broken samples for a single test at 1% gets a second, larger draw,
and its limit applies to both draws together.
"""

from functools import cache

import numpy as np
from scipy.stats import binom, hypergeom

HONEST = 0.02
"""The share of an honest entry's robust samples that another seed may break: twice the measured."""
HONEST_RANKS = 0.2
"""The share of the claims of an honest retrieval record at one cutoff that another seed may miss.

A rank moves with every other image and caption: of tiny-clip's claims under ``pgd-20`` at 5 and 10,
other seeds missed 7 of 74, of teacher-robust's 2 of 2,188 (64 images, three seeds).
"""
LEVEL = 0.01
"""The highest probability that an entry with this share in every ball is refused."""
CONFIDENCE = 0.95
SECOND = 3
"""The size of the second draw of a ball, as a multiple of the first."""


@cache
def _limit(drawn: int, level: float, honest: float = HONEST) -> int:
    """The least t with P(Bin(drawn, honest) > t) <= level."""
    return next(t for t in range(drawn + 1) if binom.sf(t, drawn, honest) <= level)


def unsuspicious(drawn: int) -> int:
    """The most broken samples of a first draw that lead to no second draw."""
    return _limit(drawn, LEVEL)


def limit_of_ball(drawn: int, balls: int) -> int:
    """The most broken samples allowed in both draws of a ball, in an entry with ``balls`` balls."""
    return _limit(drawn, LEVEL / 2 / balls)


def limit_of_entry(drawn: int) -> int:
    """The most broken samples allowed in all first draws of an entry together."""
    return _limit(drawn, LEVEL / 2)


def limit_of_claim(drawn: int, claims: int) -> int:
    """The most missed ones of ``drawn`` queries, in a run with ``claims`` cutoffs of records."""
    return _limit(drawn, LEVEL / claims, HONEST_RANKS)


def size_of_second(robust: int, drawn: int) -> int:
    """The size of a second draw from a ball with ``robust`` robust samples."""
    return min(SECOND * drawn, robust - drawn)


@cache
def most_false(robust: int, drawn: int, broken: int) -> int:
    """The one-sided upper 95% bound on the number of ``robust`` samples that are not robust.

    This is the largest D for which a draw has ``broken`` or fewer broken samples with a
    probability above 5%: the bound of Clopper and Pearson (1934) for a finite population.
    """
    low, high = broken, robust - drawn + broken
    while low < high:  # the probability falls with D
        middle = (low + high + 1) // 2
        if hypergeom.cdf(broken, robust, middle, drawn) > 1 - CONFIDENCE:
            low = middle
        else:
            high = middle - 1
    return low


@cache
def caught(robust: int, drawn: int, false: int, balls: int) -> float:
    """The probability that the draws of one ball refuse an entry with ``balls`` balls.

    ``false`` is the number of the ball's ``robust`` samples that a re-attack would break.
    """
    false, second = min(false, robust), size_of_second(robust, drawn)
    limit = limit_of_ball(drawn + second, balls)
    least = max(unsuspicious(drawn) + 1, drawn + false - robust)
    first = np.arange(least, min(drawn, false) + 1)
    rest = robust - drawn  # scipy knows no draws from nothing
    beyond = hypergeom.sf(limit - first, rest, false - first, second) if rest else first > limit
    return float(hypergeom.pmf(first, robust, false, drawn) @ beyond)
