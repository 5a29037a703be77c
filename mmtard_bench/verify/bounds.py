"""What a random draw says about the samples that were not drawn: exact, without replacement.

An entry calls N samples robust, of which D are not; k are drawn and F of them fall, so that F is
hypergeometric. An honest entry has a few such samples, too: attacks have random starts, and under
another seed about 1% of its robust samples fell (docs/engine.md: 10 and 23 of about 2,400).
"""

from functools import cache

from scipy.stats import binom, hypergeom

HONEST = 0.02
"""The share of robust samples that may fall to another seed: twice what was measured."""
LEVEL = 0.01
"""The probability that an entry with that share is refused for one task and ball, at most."""
CONFIDENCE = 0.95


@cache
def allowed(drawn: int) -> int:
    """How many of the samples drawn may fall: the least t with P(Bin(k, HONEST) > t) <= LEVEL."""
    return next(t for t in range(drawn + 1) if binom.sf(t, drawn, HONEST) <= LEVEL)


def most_false(robust: int, drawn: int, fell: int) -> int:
    """The upper one-sided 95% bound on how many of the ``robust`` samples are not.

    The largest D for which ``fell`` or fewer of those drawn would fall with a probability of more
    than 5%: Clopper and Pearson's bound (1934) for a finite population.
    """
    low, high = fell, robust - drawn + fell
    while low < high:  # the probability falls with D
        middle = (low + high + 1) // 2
        if hypergeom.cdf(fell, robust, middle, drawn) > 1 - CONFIDENCE:
            low = middle
        else:
            high = middle - 1
    return low


def caught(robust: int, drawn: int, false: int) -> float:
    """The probability that an entry is refused if ``false`` of its ``robust`` samples fall."""
    return float(hypergeom.sf(allowed(drawn), robust, min(false, robust), drawn))
