"""Targeted FAB (Croce and Hein, 2020, "Minimally distorted adversarial examples").

Each step linearises the border to the target class and projects onto it. A projection inside the
box has one unknown, how far to go; the reference code finds it by sorting all pixels, this one by
Newton's method, which climbs a concave function with one corner a pixel and needs a few sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtard_bench.attacks.base import norm_of
from mmtard_bench.attacks.fast.losses import target_gap
from mmtard_bench.attacks.fast.passes import Passes
from mmtard_bench.attacks.fast.rows import Search, State
from mmtard_bench.types import Norm

OVERSHOOT = 1.05
TOWARDS_START = 0.1
BACK = 0.9
ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class Fab(Search):
    """FAB towards one target class a variant, from the image itself.

    A row is done as soon as it has an adversarial image within eps: how close it could get is not
    asked for.
    """

    name: str = "fab-t"
    steps: int = 100
    forward: int = 2
    targeted: bool = True

    def begin(self, images: Tensor, keys: Sequence[tuple[object, ...]]) -> State:  # noqa: ARG002
        """See ``Search``: nothing about it is random."""
        return {"points": images.clone()}

    def step(self, state: State, passes: Passes) -> tuple[Tensor, Tensor]:
        """See ``Search``."""
        images, labels, looked = state["images"], state["labels"], state["points"]
        logits = passes.logits(looked)
        outside = logits.argmax(1) != labels
        found = self.found(state, logits)
        # From an adversarial point that is too far away go back some of the way.
        back = 1 - (1 - BACK) * outside.to(looked).view(-1, 1, 1, 1)
        points = torch.lerp(images, looked, back)
        _, gap, gradient = passes.gradient(
            points, lambda logits: target_gap(logits, labels, state["targets"])
        )
        here = to_plane(points, gradient, -gap, norm=self.norm)
        ahead = (gradient * (points - images)).flatten(1).sum(1)
        there = to_plane(images, gradient, ahead - gap, norm=self.norm)
        near = norm_of(here, self.norm).clamp_min(1e-8)
        far = norm_of(there, self.norm).clamp_min(1e-8)
        share = (near / (near + far)).clamp_max(TOWARDS_START).view(-1, 1, 1, 1)
        moved = torch.lerp(
            points.add(here, alpha=OVERSHOOT), images.add(there, alpha=OVERSHOOT), share
        )
        state["points"] = moved.clamp(0, 1)
        state["at"] = state["at"] + 1
        return looked, found

    def found(self, state: State, logits: Tensor) -> Tensor:
        """See ``Search``."""
        distance = norm_of(state["points"] - state["images"], self.norm)
        return (logits.argmax(1) != state["labels"]) & (distance <= self.eps)


def to_plane(points: Tensor, normal: Tensor, offset: Tensor, *, norm: Norm) -> Tensor:
    """The least steps (N, ...) that reach <normal, step> = offset and stay in the box [0, 1].

    ``points`` and ``normal`` are (N, ...), ``offset`` (N,). In either norm a pixel moves with the
    sign of its part of the normal, in L-inf all equally far and in L2 in proportion, until it meets
    the box; the distance is where the sum of what they contribute, concave in it, reaches the
    offset. Where the box is too small for that, every pixel goes as far as it can.
    """
    shape = points.shape
    weight = normal.flatten(1)
    # CLIP's gradients can be so small that their squares vanish.
    largest = weight.abs().amax(1)
    scale = torch.where(largest > 0, largest, 1.0)
    weight = weight / scale[:, None] * offset.sign()[:, None]
    needed = offset.abs() / scale
    points = points.flatten(1)
    room = torch.where(weight > 0, 1 - points, points)
    size = weight.abs()
    rate = torch.ones_like(size) if norm == "linf" else size
    distance = needed / (size * rate).sum(1).clamp_min(1e-30)
    for _ in range(ROUNDS):
        reach = distance[:, None] * rate
        step = torch.minimum(reach, room)
        missing = needed - (size * step).sum(1)
        slope = (size * rate * (reach < room)).sum(1)
        distance = distance + torch.where(slope > 0, missing / slope.clamp_min(1e-30), 0.0)
    step = torch.minimum(distance[:, None] * rate, room) * weight.sign()
    return step.view(shape)
