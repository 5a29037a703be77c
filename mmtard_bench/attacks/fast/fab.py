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
from mmtard_bench.attacks.fast.passes import Passes
from mmtard_bench.attacks.fast.rows import Search, State, choose
from mmtard_bench.attacks.losses import target_gap
from mmtard_bench.types import Norm

OVERSHOOT = 1.05
TOWARDS_START = 0.1
BACK = 0.9
ROUNDS: dict[Norm, int] = {"linf": 2, "l2": 3}
"""Of Newton's method, which ends short of the plane: on gradients of CLIP models by less than a
thousandth of the way in L-inf and a hundredth in L2, where OVERSHOOT adds a twentieth."""
TINY = 1e-30


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
        points = choose(outside, torch.lerp(images, looked, BACK), looked)
        _, gap, gradient = passes.gradient(
            points, lambda logits: target_gap(logits, labels, state["targets"])
        )
        ahead = (gradient * (points - images)).flatten(1).sum(1)
        plane = Plane(gradient, self.norm)
        here = plane.reach(points, -gap)
        there = plane.reach(images, ahead - gap)
        near = norm_of(here, self.norm).clamp_min(1e-8)
        far = norm_of(there, self.norm).clamp_min(1e-8)
        share = (near / (near + far)).clamp_max(TOWARDS_START).view(-1, 1, 1, 1)
        here = torch.add(points, here, alpha=OVERSHOOT)
        there = torch.add(images, there, alpha=OVERSHOOT)
        state["points"] = torch.lerp(here, there, share).clamp_(0, 1)
        state["at"] = state["at"] + 1
        return looked, found

    def found(self, state: State, logits: Tensor) -> Tensor:
        """See ``Search``."""
        distance = norm_of(state["points"] - state["images"], self.norm)
        return (logits.argmax(1) != state["labels"]) & (distance <= self.eps)


class Plane:
    """Where <normal, step> has a given value, for normals (N, ...).

    What follows from the normal alone is made once: two searches for the same plane are a step.
    """

    def __init__(self, normal: Tensor, norm: Norm) -> None:
        weight = normal.flatten(1)
        self.norm = norm
        self.signs = weight.sign()
        size = weight.abs()
        # CLIP's gradients can be so small that their squares vanish.
        scale = size.amax(1)
        self.scale = torch.where(scale > 0, scale, 1.0)
        self.size = size.div_(self.scale[:, None])
        # Short of its corner a pixel gives the distance times its gain, past it what room it has.
        self.gain = self.size if norm == "linf" else self.size.square()
        self.gains = self.gain.sum(1).clamp_min(TINY)

    def reach(self, points: Tensor, offset: Tensor) -> Tensor:
        """The least steps (N, ...) from ``points`` to <normal, step> = offset (N,), in the box.

        In either norm a pixel moves with the sign of its part of the normal, in L-inf all equally
        far and in L2 in proportion, until it meets the box [0, 1]; the distance is where the sum of
        what they contribute, concave in it, reaches the offset. Where the box is too small for
        that, every pixel goes as far as it can.
        """
        direction = self.signs * offset.sign()[:, None]
        needed = offset.abs() / self.scale
        room = torch.addcmul(direction.clamp_min(0), direction, points.flatten(1), value=-1)
        corner = room if self.norm == "linf" else room / self.size
        gives = self.size * room
        short = needed - gives.sum(1)
        distance = needed / self.gains
        moving = torch.empty_like(gives)
        for _ in range(ROUNDS[self.norm]):
            torch.gt(corner, distance[:, None], out=moving)
            slope = (moving * self.gain).sum(1)
            missing = short + moving.mul_(gives).sum(1)
            distance = torch.where(slope > 0, missing / slope.clamp_min(TINY), distance)
        reach = distance[:, None] if self.norm == "linf" else distance[:, None] * self.size
        return torch.minimum(reach, room).mul_(direction).view_as(points)
