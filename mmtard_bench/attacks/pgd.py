"""Projected gradient descent (Madry et al., 2018), on cross-entropy or on the CW margin."""

from collections.abc import Callable

import torch
from torch import Tensor

from mmtard_bench.attacks import losses
from mmtard_bench.attacks.base import (
    Attack,
    AttackResult,
    Classifier,
    Work,
    norm_of,
    projector,
    random_start,
)
from mmtard_bench.errors import InputError
from mmtard_bench.registry import register_attack
from mmtard_bench.types import Norm, ThreatModel

Loss = Callable[[Tensor], Tensor]
"""Logits (N, C) -> the loss that the attack maximises, (N,)."""


def pgd(
    model: Classifier,
    images: Tensor,
    *,
    loss: Loss,
    norm: Norm,
    eps: float,
    steps: int,
    step_size: float,
    start: Tensor,
    done: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Raise a loss inside a ball around each image by projected gradient steps.

    ``images`` and ``start`` are (N, 3, H, W), images in [0, 1]. A step has length ``step_size``
    in the norm: along the sign of the gradient for linf, along the gradient for l2. With
    ``done`` (logits -> (N,) bool), the result of a sample is the latest iterate for which it is
    true, otherwise the last one: steps continue after a success, because retrieval needs ranks.
    A sample costs ``steps`` forward and backward passes. Returns the points (N, 3, H, W) and, (N,),
    for which samples ``done`` was true.
    """
    project = projector(images, norm=norm, eps=eps)
    points = project(images + start)
    kept = points if done is None else points.clone()
    finished = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for _ in range(steps):
        points = points.detach().requires_grad_()
        logits = model(points)
        (gradient,) = torch.autograd.grad(loss(logits).sum(), points)
        with torch.no_grad():
            if done is not None:
                now = done(logits)
                kept[now] = points[now]
                finished |= now
            points = project(points.add(unit(gradient, norm), alpha=step_size))
    if done is None:
        return points, finished
    kept[~finished] = points[~finished]
    return kept, finished


def unit(gradient: Tensor, norm: Norm) -> Tensor:
    """The steepest ascent direction of norm one; zero where the gradient is zero."""
    if norm == "linf":
        return gradient.sign()
    # CLIP's gradients can be far below float32's normal range in square; scale before the norm.
    shape = (-1, *[1] * (gradient.ndim - 1))
    largest = gradient.flatten(1).abs().amax(1).view(shape)
    scaled = gradient / torch.where(largest > 0, largest, 1.0)
    return scaled / norm_of(scaled, norm).clamp_min(1e-12).view(shape)


def number_of(threat: ThreatModel) -> int:
    """The number at the end of an attack's name."""
    return int(threat.attack.rsplit("-", 1)[1])


def step_size_of(eps: float, steps: int) -> float:
    """Madry et al.'s rule: 2.5 * eps / steps."""
    return 2.5 * eps / steps


def budget_of(steps: int) -> dict[str, str | int | float]:
    """The budget of ``pgd`` with that rule, for a record."""
    return {"steps": steps, "step_size": "2.5 eps / steps", "restarts": 1}


def require_linf(threat: ThreatModel) -> None:
    """Raise InputError unless the norm is linf."""
    if threat.norm != "linf":
        raise InputError(f"{threat.attack} works in the norm linf; '{threat.norm}' was given.")


def _build(threat: ThreatModel, family: str, loss: losses.Loss) -> Attack:
    steps = number_of(threat)
    norm, eps = threat.pixel_norm, float(threat.eps)

    def run(work: Work) -> AttackResult:
        images, labels = work.images, work.labels
        keys = [(work.seed, threat.attack, 0, sample) for sample in work.ids]
        start = random_start(images, norm=norm, eps=eps, keys=keys)
        adversarial, found = pgd(
            work.model,
            images,
            loss=lambda logits: loss(logits, labels, labels),
            norm=norm,
            eps=eps,
            steps=steps,
            step_size=step_size_of(eps, steps),
            start=start,
            done=lambda logits: logits.argmax(1) != labels,
        )
        with torch.no_grad():
            broken = (found | (work.model(adversarial).argmax(1) != labels)).tolist()
        return AttackResult(
            adversarial=adversarial,
            broken_by=[threat.attack if b else None for b in broken],
            forward=[steps + 1] * len(broken),
            backward=[steps] * len(broken),
        )

    return Attack(
        name=threat.attack,
        parameters={"loss": family, **budget_of(steps)},
        run=run,
        passes=2 * steps + 1,
    )


@register_attack("pgd-{steps}")
def build_pgd(threat: ThreatModel, n_classes: int) -> Attack:
    """PGD on the cross-entropy from a uniform random start (Madry et al., 2018)."""
    return _build(threat, "cross-entropy", losses.cross_entropy)


@register_attack("cw-linf-{steps}")
def build_cw_linf(threat: ThreatModel, n_classes: int) -> Attack:
    """PGD on Carlini and Wagner's (2017) margin, the "CW" of zero-shot robustness papers."""
    require_linf(threat)
    return _build(threat, "margin", losses.negative_margin)
