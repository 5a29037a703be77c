"""``mmt-ard``: MMT-ARD (arXiv 2511.17448) as we read its abstract.

We had no access to the paper's formulas. Its abstract names a clean and a robust teacher, weights
from teacher confidence that focus on hard samples, a sigmoid that balances the teachers, and
consistency across modalities. Every formula below is our interpretation. Each has a switch, and
the study of the digits recipes ablates it.
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
"""The student's view of the images that each teacher guides. Teachers see clean images."""


class Switches(Softened):
    """Switches for each term; ``alignment`` is the factor of the consistency term.

    ``share`` is the robust teacher's share of every sample without the gate.
    """

    robust_teacher: bool = True
    clean_teacher: bool = True
    weights: bool = True
    gate: bool = True
    share: float = Field(default=0.5, gt=0, lt=1)
    consistency: bool = True
    alignment: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _somebody_teaches(self) -> "Switches":
        if not (self.robust_teacher or self.clean_teacher):
            raise ValueError("robust_teacher and clean_teacher are both off; switch one on")
        return self


def confidence_weights(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """Weights p_T[y] * (2 - p_S[y]), (N,), from logits (N, C), before scaling to a mean of one.

    A sample counts in proportion to the teacher's confidence in the true class, and up to twice as
    much if the student is not confident: hard samples count more, unless the teacher finds them
    hard as well.
    """
    return probability(teacher, labels) * (2 - probability(student, labels))


def sigmoid_gate(robust: Tensor, clean: Tensor) -> Tensor:
    """The robust teacher's share of each sample, (N,), from both divergences (N,).

    The share is sigmoid(2 (d_R - d_C) / (d_R + d_C)). The teacher with the larger divergence from
    the student gets more, at most 88%, so that no teacher dominates. No gradient flows through it.
    """
    robust, clean = robust.detach(), clean.detach()
    return torch.sigmoid(2 * (robust - clean) / (robust + clean).clamp_min(1e-12))


def text_to_image(teacher: Tensor, student: Tensor, batch: Batch) -> Tensor:
    """Cross-modal consistency, a scalar: distillation along the other axis of CLIP's similarities.

    ARD compares softmax distributions over the C classes, per image. This term compares softmax
    distributions over the images of the global batch, per class: the mean over classes of
    KL(z_T[:, c] || z_S[:, c]). A text then ranks images for the student as for the teacher.
    """
    target, logits = batch.gather(teacher), batch.gather(student)
    return global_term(kl(target.T, logits.T).mean(), batch.processes)


def loss(batch: Batch, switches: Switches) -> Loss:
    """T^2 (2 g w_R KL(z_R(x) || z_S(x')) + 2 (1 - g) w_C KL(z_C(x) || z_S(x)) + consistency).

    All terms are means over the batch. z are logits (N, C) divided by the temperature T. Without
    the gate, g is ``share``; without the weights, w = 1. With the robust teacher alone and no other
    term, this is the loss of ``ard``.
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
    if len(sides) == 2:
        share = torch.full_like(apart["robust"], switches.share)
        if switches.gate:
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
    """The teachers that are switched on. Each sees clean images."""
    on: list[tuple[Role, View]] = []
    if switches.clean_teacher:
        on.append(("clean", "clean"))
    if switches.robust_teacher:
        on.append(("robust", "clean"))
    return tuple(on)


def guide(switches: Switches) -> Guide:
    """The attack maximises the divergence from the clean teacher, or from the robust one alone."""
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
