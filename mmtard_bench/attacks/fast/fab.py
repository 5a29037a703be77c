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
from mmtard_bench.attacks.fast.rows import Search, State, choose
from mmtard_bench.types import Norm

OVERSHOOT = 1.05
TOWARDS_START = 0.1
BACK = 0.9
ROUNDS = 3
"""Of Newton's method: on gradients of CLIP models two were enough. It ends short of the plane."""
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
        here = to_plane(points, gradient, -gap, norm=self.norm)
        ahead = (gradient * (points - images)).flatten(1).sum(1)
        there = to_plane(images, gradient, ahead - gap, norm=self.norm)
        near = norm_of(here, self.norm).clamp_min(1e-8)
        far = norm_of(there, self.norm).clamp_min(1e-8)
        share = (near / (near + far)).clamp_max(TOWARDS_START).view(-1, 1, 1, 1)
        here.mul_(OVERSHOOT).add_(points)
        there.mul_(OVERSHOOT).add_(images)
        state["points"] = here.add_((there - here).mul_(share)).clamp_(0, 1)
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
    weight, points = normal.flatten(1), points.flatten(1)
    # CLIP's gradients can be so small that their squares vanish.
    scale = weight.abs().amax(1)
    scale = torch.where(scale > 0, scale, 1.0)
    direction = weight.sign() * offset.sign()[:, None]
    needed = offset.abs() / scale
    room = torch.addcmul(direction.clamp_min(0), direction, points, value=-1)
    size = weight.abs().div_(scale[:, None])
    # Short of its corner a pixel gives the distance times its gain, past it what room it has.
    gain, corner = (size, room) if norm == "linf" else (size * size, room / size)
    gives = size * room
    total = gives.sum(1)
    distance = needed / gain.sum(1).clamp_min(TINY)
    moving = torch.empty_like(size)
    for _ in range(ROUNDS):
        torch.gt(corner, distance[:, None], out=moving)
        slope = (moving * gain).sum(1)
        missing = needed - total + (moving * gives).sum(1)
        distance = torch.where(slope > 0, missing / slope.clamp_min(TINY), distance)
    reach = distance[:, None] if norm == "linf" else distance[:, None] * size
    return torch.minimum(reach, room).mul_(direction).view(shape)
