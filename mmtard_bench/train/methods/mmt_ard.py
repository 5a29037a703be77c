"""``mmt-ard``: MMT-ARD (arXiv 2511.17448) as we read its abstract.

The paper's formulas were not available to us. It names a clean and a robust teacher, weights from
teacher confidence that focus on hard samples, a sigmoid that balances the teachers, and
consistency across modalities; every formula below is our reading, has a switch, and is ablated.
"""

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mmtard_bench.train.losses import kl, probability
from mmtard_bench.train.methods.base import (
    Batch,
    Guide,
    Loss,
    Method,
    Softened,
    away_from,
    global_term,
    rows_of_mean_one,
)
from mmtard_bench.train.towers import Role, View

LEARNS_ON: dict[Role, View] = {"robust": "adv", "clean": "clean"}
"""The student's images that each teacher, looking at clean ones, guides."""


class Switches(Softened):
    """Each term on or off; ``alignment`` is the consistency's factor."""

    robust_teacher: bool = True
    clean_teacher: bool = True
    weights: bool = True
    gate: bool = True
    consistency: bool = True
    alignment: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _somebody_teaches(self) -> "Switches":
        if not (self.robust_teacher or self.clean_teacher):
            raise ValueError("robust_teacher and clean_teacher are both off; switch one on")
        return self


def confidence_weights(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """p_T[y] * (2 - p_S[y]), (N,), from logits (N, C), before the batch mean is scaled to one.

    A teacher is followed as far as it is confident in the truth, and up to twice as closely where
    the student is not there yet: hard samples count more, unless they are hard for the teacher.
    """
    return probability(teacher, labels) * (2 - probability(student, labels))


def sigmoid_gate(robust: Tensor, clean: Tensor) -> Tensor:
    """The robust teacher's share of each sample, (N,), from both divergences (N,).

    sigmoid(2 (d_R - d_C) / (d_R + d_C)): the teacher that the student is further from gets more,
    at most 88%, so that neither dominates. No gradient passes.
    """
    robust, clean = robust.detach(), clean.detach()
    return torch.sigmoid(2 * (robust - clean) / (robust + clean).clamp_min(1e-12))


def text_to_image(teacher: Tensor, student: Tensor, batch: Batch) -> Tensor:
    """Cross-modal consistency, a scalar: ARD in the other direction of CLIP's similarity matrix.

    Image-to-text is a softmax over C classes for each image; this is the mean over classes of
    KL(z_T[:, c] || z_S[:, c]) with softmax over the images of the global batch, so that a text
    ranks images for the student as it does for the teacher.
    """
    target, logits = batch.gather(teacher), batch.gather(student)
    return global_term(kl(target.T, logits.T).mean(), batch.processes)


def loss(batch: Batch, switches: Switches) -> Loss:
    """T^2 (2 g w_R KL(z_R(x) || z_S(x')) + 2 (1 - g) w_C KL(z_C(x) || z_S(x)) + consistency).

    Means over the batch; z are logits (N, C) over the temperature T. Without gate g = 1/2, without
    weights w = 1; with the robust teacher alone and no other term this is ``ard``.
    """
    heat = switches.temperature
    on = {role for role, _ in targets(switches)}
    sides = {
        role: (batch.teacher(role, "clean").logits / heat, batch.student[view].logits / heat)
        for role, view in LEARNS_ON.items()
        if role in on
    }
    apart = {role: kl(target, logits) for role, (target, logits) in sides.items()}
    weights = {role: torch.ones_like(values) for role, values in apart.items()}
    if switches.gate and len(sides) == 2:
        share = sigmoid_gate(apart["robust"], apart["clean"])
        weights = {"robust": 2 * share, "clean": 2 * (1 - share)}
    if switches.weights:
        for role, (target, logits) in sides.items():
            raw = confidence_weights(target, logits, batch.labels)
            weights[role] = weights[role] * rows_of_mean_one(raw, batch)
    terms = {f"kl_{role}": (weights[role] * values).mean() for role, values in apart.items()}
    if switches.consistency:
        target = next(iter(sides.values()))[0]
        aligned = text_to_image(target, batch.student["adv"].logits / heat, batch)
        terms["consistency"] = switches.alignment * aligned
    scaled = {name: heat**2 * term for name, term in terms.items()}
    return Loss(scaled, {str(role): values for role, values in weights.items()})


def targets(switches: Switches) -> tuple[tuple[Role, View], ...]:
    """The teachers that are switched on, on clean images."""
    on: list[tuple[Role, View]] = []
    if switches.clean_teacher:
        on.append(("clean", "clean"))
    if switches.robust_teacher:
        on.append(("robust", "clean"))
    return tuple(on)


def guide(switches: Switches) -> Guide:
    """The attack leads away from the clean teacher, or from the robust one if that is alone."""
    return away_from("clean" if switches.clean_teacher else "robust")


METHOD = Method(
    name="mmt-ard",
    summary="two teachers, confidence weights, sigmoid gate, consistency: our reading of the paper",
    views=("clean", "adv"),
    loss=loss,
    targets=targets,
    guide=guide,
    options=Switches,
)
