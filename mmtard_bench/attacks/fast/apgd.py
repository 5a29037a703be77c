"""Auto-PGD (Croce and Hein, 2020, section 3): steps that halve when they stop paying.

The rules are the reference code's, of which a test holds that the same start leads through the
same points; what is ours is that every row counts its own steps and leaves when it is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mmtard_bench.attacks.base import norm_of, sample_generator
from mmtard_bench.attacks.fast.passes import Passes
from mmtard_bench.attacks.fast.rows import Search, State, choose
from mmtard_bench.attacks.losses import Loss
from mmtard_bench.attacks.pgd import unit

RISING = 0.75
"""The share of steps since the last checkpoint that must have raised the loss."""


def checkpoints(steps: int) -> dict[int, int]:
    """After which steps the step size is reconsidered, and how many steps each looks back on."""
    period, least, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found, at = {}, 0
    while at + period <= steps:
        at += period
        found[at] = period
        period = max(period - shrink, least)
    return found


@dataclass(frozen=True, kw_only=True)
class Apgd(Search):
    """APGD on a loss, from a random point of the ball's surface."""

    loss: Loss
    steps: int = 100

    def begin(self, images: Tensor, keys: Sequence[tuple[object, ...]]) -> State:
        """See ``Search``."""
        offsets = torch.stack([self._offset(images.shape[1:], key) for key in keys])
        points = (images + self.eps * offsets.to(images)).clamp(0, 1)
        zeros = images.new_zeros(len(keys))
        return {
            **self.ball(images),
            "points": points,
            "old": points.clone(),
            "best": points.clone(),
            "best_gradient": torch.zeros_like(points),
            "step_size": zeros + 2 * self.eps,
            "best_loss": zeros - torch.inf,
            "last_loss": zeros.clone(),
            "checked_loss": zeros.clone(),
            "rises": zeros,
            "halved": torch.ones_like(zeros, dtype=torch.bool),
        }

    def _offset(self, shape: torch.Size, key: tuple[object, ...]) -> Tensor:
        """A random direction of norm one."""
        generator = sample_generator(*key)
        if self.norm == "linf":
            direction = torch.rand(shape, generator=generator) * 2 - 1
        else:
            direction = torch.randn(shape, generator=generator)
        return direction / norm_of(direction[None], self.norm)

    def step(self, state: State, passes: Passes) -> tuple[Tensor, Tensor]:
        """See ``Search``."""
        points, labels = state["points"], state["labels"]
        targets = state.get("targets", labels)
        logits, loss, gradient = passes.gradient(
            points, lambda logits: self.loss(logits, labels, targets)
        )
        base, gradient = self._reconsider(state, points, loss, gradient)
        step_size = state["step_size"].view(-1, 1, 1, 1)
        ahead = self.project(state, torch.addcmul(base, unit(gradient, self.norm), step_size))
        moved = torch.lerp(base, ahead, 0.75).add_(base - state["old"], alpha=0.25)
        # The first step has nothing behind it to carry on.
        moved = choose(state["at"] == 0, ahead, moved)
        state["points"], state["old"] = self.project(state, moved), base
        state["at"] = state["at"] + 1
        return points, self.found(state, logits)

    def _reconsider(
        self, state: State, points: Tensor, loss: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Remember the best point; at a checkpoint halve the steps that stopped paying.

        Returns where to step from and the gradient there: the best point's if its steps halved.
        """
        at = state["at"]
        better = loss > state["best_loss"]
        best = choose(better, points, state["best"])
        best_gradient = choose(better, gradient, state["best_gradient"])
        best_loss = torch.where(better, loss, state["best_loss"])
        # As in the reference code, the first step's loss is compared with zero.
        rises = state["rises"] + ((loss > state["last_loss"]) & (at > 0))
        state["last_loss"] = torch.where(at > 0, loss, 0.0)
        checked_loss = torch.where(at > 0, state["checked_loss"], loss)

        period = _periods(self.steps, at.device)[at]
        stalled = ~state["halved"] & (checked_loss >= best_loss)
        due = period > 0
        halve = due & ((rises <= RISING * period) | stalled)
        state["halved"] = torch.where(due, halve, state["halved"])
        state["checked_loss"] = torch.where(due, best_loss, checked_loss)
        state["rises"] = torch.where(due, 0.0, rises)
        state["step_size"] = torch.where(halve, state["step_size"] / 2, state["step_size"])
        state["best"], state["best_gradient"], state["best_loss"] = best, best_gradient, best_loss
        return choose(halve, best, points), choose(halve, best_gradient, gradient)


@lru_cache(maxsize=8)
def _periods(steps: int, device: torch.device) -> Tensor:
    """For each number of steps made the length of the period that ends there, or 0."""
    found = checkpoints(steps)
    return torch.tensor([found.get(at, 0) for at in range(steps + 1)], device=device)
