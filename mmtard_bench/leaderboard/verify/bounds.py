"""What a random draw says about the samples that were not drawn: exact, without replacement.

An entry calls N samples robust, of which D are not; k are drawn and F of them are broken, so that F
is hypergeometric. An honest entry has a few such samples, too: attacks have random starts, and
another seed broke about 1% of its robust samples (docs/engine.md: 10 and 23 of about 2,400).

An entry has many balls, and a test for each: at 1% a ball, the 26 of zeroshot13-v1 would refuse an
honest entry with up to 21%. So the 1% is shared by all tests of an entry, as Bonferroni does, which
needs no independence: one half is for the balls, one for all draws together. That alone would catch
an overstatement in one ball much more rarely; therefore a ball in which too many samples are broken
for one ball alone is drawn from again, and its limit is for both draws.
"""

from functools import cache

import numpy as np
from scipy.stats import binom, hypergeom

HONEST = 0.02
"""The share of robust samples that another seed may break: twice what was measured."""
LEVEL = 0.01
"""The probability that an entry with that share everywhere is refused, at most."""
CONFIDENCE = 0.95
SECOND = 3
"""How many times as large as the first draw of a ball the second one is."""


@cache
def _limit(drawn: int, level: float) -> int:
    """The least t with P(Bin(drawn, HONEST) > t) <= level."""
    return next(t for t in range(drawn + 1) if binom.sf(t, drawn, HONEST) <= level)


def unsuspicious(drawn: int) -> int:
    """How many of a first draw may be broken without a second draw."""
    return _limit(drawn, LEVEL)


def limit_of_ball(drawn: int, balls: int) -> int:
    """How many of both draws of a ball may be broken, in an entry with so many balls."""
    return _limit(drawn, LEVEL / 2 / balls)


def limit_of_entry(drawn: int) -> int:
    """How many of all first draws of an entry together may be broken."""
    return _limit(drawn, LEVEL / 2)


def size_of_second(robust: int, drawn: int) -> int:
    """How many of the ``robust`` samples of a ball a second draw takes."""
    return min(SECOND * drawn, robust - drawn)


@cache
def most_false(robust: int, drawn: int, broken: int) -> int:
    """The upper one-sided 95% bound on how many of the ``robust`` samples are not.

    The largest D for which ``broken`` or fewer of those drawn would be broken with a probability
    of more than 5%: Clopper and Pearson's bound (1934) for a finite population.
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
    """The probability that the draws of a ball refuse an entry with so many balls.

    ``false`` of the ball's ``robust`` samples are broken where they are drawn.
    """
    false, second = min(false, robust), size_of_second(robust, drawn)
    limit = limit_of_ball(drawn + second, balls)
    least = max(unsuspicious(drawn) + 1, drawn + false - robust)
    first = np.arange(least, min(drawn, false) + 1)
    rest = robust - drawn  # scipy knows no draws from nothing
    beyond = hypergeom.sf(limit - first, rest, false - first, second) if rest else first > limit
    return float(hypergeom.pmf(first, robust, false, drawn) @ beyond)
