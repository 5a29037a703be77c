"""PGD (Madry et al., 2018) on the cross-entropy or the margin, until a sample is broken."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mmtard_bench.attacks.base import random_start
from mmtard_bench.attacks.fast.passes import Passes
from mmtard_bench.attacks.fast.rows import Search, State
from mmtard_bench.attacks.losses import Loss
from mmtard_bench.attacks.pgd import step_size_of, unit


@dataclass(frozen=True, kw_only=True)
class Pgd(Search):
    """The same start and steps as ``attacks.pgd``, which takes all of them."""

    loss: Loss

    def begin(self, images: Tensor, keys: Sequence[tuple[object, ...]]) -> State:
        """See ``Search``."""
        start = random_start(images, norm=self.norm, eps=self.eps, keys=keys)
        ball = self.ball(images)
        return {**ball, "points": self.project({"images": images, **ball}, images + start)}

    def step(self, state: State, passes: Passes) -> tuple[Tensor, Tensor]:
        """See ``Search``."""
        points, labels = state["points"], state["labels"]
        logits, _, gradient = passes.gradient(
            points, lambda logits: self.loss(logits, labels, labels)
        )
        length = step_size_of(self.eps, self.steps)
        state["points"] = self.project(state, points.add(unit(gradient, self.norm), alpha=length))
        state["at"] = state["at"] + 1
        return points, self.found(state, logits)
