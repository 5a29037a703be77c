"""The learning rate as a function of the step."""

import math

from mmtard_bench.train.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up over ``warmup`` of the steps, then half a cosine to zero.

    Nothing to save or restore: it follows from the step, counted from 0.
    """
    warm = round(recipe.warmup * recipe.steps)
    if step < warm:
        return recipe.learning_rate * (step + 1) / warm
    share = (step - warm) / max(recipe.steps - warm, 1)
    return recipe.learning_rate * (0.5 + 0.5 * math.cos(math.pi * share))
