"""The learning rate as a function of the step."""

import math


def learning_rate(step: int, *, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over a share ``warmup`` of the steps, then half a cosine to zero.

    Nothing to save or restore: it follows from the step, counted from 0.
    """
    warm = round(warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    share = (step - warm) / max(steps - warm, 1)
    return peak * (0.5 + 0.5 * math.cos(math.pi * share))
