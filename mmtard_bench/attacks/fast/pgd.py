"""PGD (Madry et al., 2018) on the cross-entropy or the margin, until a sample is broken."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtard_bench.attacks.base import projector, random_start
from mmtard_bench.attacks.fast.losses import Loss
from mmtard_bench.attacks.fast.passes import Passes
from mmtard_bench.attacks.fast.rows import Samples, State
from mmtard_bench.attacks.pgd import step_size_of, unit
from mmtard_bench.types import Norm


@dataclass(frozen=True)
class Pgd:
    """The same start and steps as ``attacks.pgd``, which takes all of them."""

    name: str
    loss: Loss
    norm: Norm
    eps: float
    steps: int
    forward: int = 1
    backward: int = 1
    variants: int = 1

    def start(self, samples: Samples, rows: Sequence[tuple[int, int]], seed: int) -> State:
        """See ``Search``."""
        places = [sample for sample, _ in rows]
        images = samples.images[places]
        start = random_start(
            images,
            norm=self.norm,
            eps=self.eps,
            ids=[samples.ids[place] for place in places],
            key=(seed, self.name, 0),
        )
        labels = samples.labels[places]
        project = projector(images, norm=self.norm, eps=self.eps)
        return {
            "images": images,
            "labels": labels,
            "points": project(images + start),
            "at": torch.zeros_like(labels),
        }

    def step(self, state: State, passes: Passes) -> tuple[Tensor, Tensor]:
        """See ``Search``."""
        points, labels = state["points"], state["labels"]
        logits, _, gradient = passes.gradient(
            points, lambda logits: self.loss(logits, labels, labels)
        )
        project = projector(state["images"], norm=self.norm, eps=self.eps)
        length = step_size_of(self.eps, self.steps)
        state["points"] = project(points.add(unit(gradient, self.norm), alpha=length))
        state["at"] = state["at"] + 1
        return points, self.found(state, logits)

    def found(self, state: State, logits: Tensor) -> Tensor:
        """See ``Search``: every point is inside the ball."""
        return logits.argmax(1) != state["labels"]
