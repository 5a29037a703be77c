"""AutoAttack (Croce and Hein, 2020) by its reference code, ``pyautoattack``.

The reference code draws its random numbers per batch, so these attacks run on fixed blocks of the
manifest. As ``AutoAttack.run_standard_evaluation`` does on one batch, the attacks of the ensemble
run one after the other, each on the samples that the earlier ones did not break; separate calls
show which attack broke a sample. The DLR loss needs four classes; with fewer, the margin is used.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor

from mmtard_bench.attacks.base import (
    Attack,
    AttackResult,
    Classifier,
    CountPasses,
    Pulse,
    Run,
    Work,
    margin,
)
from mmtard_bench.attacks.pgd import number_of
from mmtard_bench.registry import register_attack
from mmtard_bench.types import ThreatModel

BLOCK = 64
"""The default number of samples per block; a block must fit in memory with a large model."""

_LOG = logging.getLogger("mmtard_bench.pyautoattack")
_LOG.addHandler(logging.NullHandler())
_LOG.propagate = False

Perturb = Callable[[Tensor, Tensor], Tensor]
Stage = tuple[str, Callable[[Classifier, torch.device, int], Perturb], int]
"""A part of an ensemble: its name, (model, device, seed) -> perturb(images, labels), and the most
forward and backward passes that a sample costs."""


class _MarginAPGD(APGDAttack):  # type: ignore[misc]  # untyped third party
    """APGD on the plain margin, for fewer classes than DLR needs."""

    def dlr_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return -margin(x, y)


class _MarginTargetedAPGD(APGDAttack_targeted):  # type: ignore[misc]  # untyped third party
    """Targeted APGD on the plain margin to the target class."""

    def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        return x[rows, self.y_target] - x[rows, y]


def _stage(name: str, cls: type, threat: ThreatModel, passes: int, **fixed: object) -> Stage:
    """An attack of the reference code with a fixed budget; it tests first and last images too."""
    norm = {"linf": "Linf", "l2": "L2"}[threat.pixel_norm]

    def start(model: Classifier, device: torch.device, seed: int) -> Perturb:
        part = cls(model, norm=norm, eps=float(threat.eps), seed=seed, device=device, **fixed)
        return cast("Perturb", part.perturb)

    return name, start, passes + 2


def _apgd(threat: ThreatModel, loss: str, n_classes: int, *, restarts: int, eot: int) -> Stage:
    cls = _MarginAPGD if loss == "dlr" and n_classes < 4 else APGDAttack
    budget = {"n_iter": 100, "n_restarts": restarts, "eot_iter": eot, "rho": 0.75}
    passes = restarts * 2 * 101 * eot
    return _stage(f"apgd-{loss}", cls, threat, passes, loss=loss, logger=_LOG, **budget)


def _repeats(model: Classifier, images: Tensor, passes: int) -> bool:
    """Whether ``count`` passes all give the same logits and the same gradient, bit by bit."""

    def look() -> tuple[Tensor, Tensor]:
        points = images.clone().requires_grad_()
        logits = model(points)
        return logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum(), points)[0]

    logits, gradient = look()
    others = (look() for _ in range(passes - 1))
    return all(torch.equal(logits, z) and torch.equal(gradient, g) for z, g in others)


def _apgd_averaged(threat: ThreatModel, loss: str, n_classes: int, *, draws: int) -> Stage:
    """APGD on the mean gradient of several passes (EOT); one pass for a deterministic model.

    The mean of equal gradients is the gradient itself, so a deterministic model gets the same
    attack with fewer passes. A model counts as deterministic if as many passes as the mean needs
    agree: a model with two random states may repeat itself in two passes, but not in twenty.
    """
    name, averaged, passes = _apgd(threat, loss, n_classes, restarts=1, eot=draws)
    _, single, _ = _apgd(threat, loss, n_classes, restarts=1, eot=1)

    def start(model: Classifier, device: torch.device, seed: int) -> Perturb:
        def perturb(images: Tensor, labels: Tensor) -> Tensor:
            chosen = single if _repeats(model, images, draws) else averaged
            return chosen(model, device, seed)(images, labels)

        return perturb

    return name, start, passes + 2 * draws


def _apgd_targeted(threat: ThreatModel, n_classes: int) -> Stage:
    cls = _MarginTargetedAPGD if n_classes < 4 else APGDAttack_targeted
    budget = {"n_iter": 100, "n_restarts": 1, "eot_iter": 1, "rho": 0.75}
    targets = target_count(n_classes)
    passes = targets * (1 + 2 * 101)
    return _stage("apgd-t", cls, threat, passes, n_target_classes=targets, logger=_LOG, **budget)


def _fab_targeted(threat: ThreatModel, n_classes: int) -> Stage:
    targets = target_count(n_classes)
    budget = {"n_iter": 100, "n_restarts": 1, "n_target_classes": targets}
    passes = targets * (3 + 3 * 100)
    return _stage("fab-t", FABAttack_PT, threat, passes, targeted=True, **budget)


def _square(threat: ThreatModel, queries: int) -> Stage:
    budget = {"n_queries": queries, "n_restarts": 1, "p_init": 0.8, "resc_schedule": False}
    return _stage("square", SquareAttack, threat, queries + 1, **budget)


def target_count(n_classes: int) -> int:
    """The number of target classes of targeted attacks."""
    return min(9, n_classes - 1)


def class_notes(stages: Sequence[str], n_classes: int) -> list[str]:
    """The notes of a record about these stages, for a task with few classes."""
    notes = []
    if n_classes < 4 and any(name in ("apgd-dlr", "apgd-t") for name in stages):
        notes.append(
            f"{n_classes} classes: the DLR loss needs four, so APGD used the margin instead."
        )
    if n_classes < 10 and any(name in ("apgd-t", "fab-t") for name in stages):
        count = target_count(n_classes)
        notes.append(f"{n_classes} classes: targeted attacks used {count} targets.")
    return notes


def share(total: int, parts: int) -> list[int]:
    """Split a count into nearly equal whole parts that add up to it."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def _pulse(result: AttackResult, stage: str) -> Pulse:
    settled = [place for place, name in enumerate(result.broken_by) if name is not None]
    spent = sum(result.forward[place] + result.backward[place] for place in settled)
    return Pulse(len(settled), len(settled), spent, stage)


def _ensemble(stages: Sequence[Stage], notes: list[str]) -> Run:
    """Run stages in order, each on the samples that the earlier ones left.

    The passes of a stage are divided equally among its samples, because the reference code does
    not report the passes of each sample.
    """

    def run(work: Work) -> AttackResult:
        images, labels, count = work.images, work.labels, len(work.ids)
        counter = CountPasses(work.model)
        adversarial = images.clone()
        result = AttackResult(adversarial, [None] * count, [0] * count, [0] * count, list(notes))
        left = torch.arange(count, device=images.device)
        for name, start, _ in stages:
            if not len(left):
                break
            work.watch(partial(_pulse, result, name))
            counter.forward_rows = counter.backward_rows = 0
            # The reference code seeds torch's global generators; ours are left as they were.
            devices = [images.device] if images.is_cuda else []
            with torch.random.fork_rng(devices):
                found = start(counter, images.device, work.seed)(
                    images[left], labels[left]
                ).detach()
            with torch.no_grad():
                broken = counter(found).argmax(1) != labels[left]
            for i, forward, backward in zip(
                left.tolist(),
                share(counter.forward_rows, len(left)),
                share(counter.backward_rows, len(left)),
                strict=True,
            ):
                result.forward[i] += forward
                result.backward[i] += backward
            adversarial[left[broken]] = found[broken]
            for i in left[broken].tolist():
                result.broken_by[i] = name
            left = left[~broken]
        return result

    return run


def _attack(
    threat: ThreatModel,
    n_classes: int,
    stages: Sequence[Stage],
    parameters: dict[str, str | int | float],
) -> Attack:
    names = [name for name, _, _ in stages]
    notes = class_notes(names, n_classes)
    described: dict[str, str | int | float] = {
        "code": "pyautoattack",
        "stages": " ".join(names),
        "targets": target_count(n_classes),
        **parameters,
    }
    passes = sum(most for _, _, most in stages)
    run = _ensemble(stages, notes)
    return Attack(threat.attack, described, run, block=BLOCK, passes=passes)


@register_attack("autoattack-standard")
def build_standard(threat: ThreatModel, n_classes: int) -> Attack:
    """APGD-CE, targeted APGD-DLR, targeted FAB, Square: AutoAttack's standard version."""
    stages = [
        _apgd(threat, "ce", n_classes, restarts=1, eot=1),
        _apgd_targeted(threat, n_classes),
        _fab_targeted(threat, n_classes),
        _square(threat, 5000),
    ]
    return _attack(threat, n_classes, stages, {"iterations": 100, "queries": 5000})


@register_attack("autoattack-rand")
def build_rand(threat: ThreatModel, n_classes: int) -> Attack:
    """APGD-CE and APGD-DLR over 20 draws a step: AutoAttack's version for random models."""
    stages = [
        _apgd_averaged(threat, "ce", n_classes, draws=20),
        _apgd_averaged(threat, "dlr", n_classes, draws=20),
    ]
    budget: dict[str, str | int | float] = {"iterations": 100, "eot": 20, "eot_deterministic": 1}
    return _attack(threat, n_classes, stages, budget)


def _pair(threat: ThreatModel, n_classes: int, restarts: int) -> Attack:
    stages = [_apgd(threat, "ce", n_classes, restarts=restarts, eot=1)]
    if n_classes > 2:
        stages.append(_apgd_targeted(threat, n_classes))
    return _attack(threat, n_classes, stages, {"iterations": 100, "restarts": restarts})


@register_attack("apgd-pair")
def build_pair(threat: ThreatModel, n_classes: int) -> Attack:
    """APGD-CE and targeted APGD-DLR, 100 iterations: the "AA" of RobustVLM and MMT-ARD."""
    return _pair(threat, n_classes, restarts=1)


@register_attack("apgd-pair-5r")
def build_pair_restarts(threat: ThreatModel, n_classes: int) -> Attack:
    """The same with 5 restarts of APGD-CE, as in the CLIP_eval scripts of both projects."""
    return _pair(threat, n_classes, restarts=5)


@register_attack("square-{queries}")
def build_square(threat: ThreatModel, n_classes: int) -> Attack:
    """Square alone (Andriushchenko et al., 2020): an attack that uses no gradients."""
    queries = number_of(threat)
    parameters: dict[str, str | int | float]
    parameters = {"code": "pyautoattack", "stages": "square", "queries": queries}
    stage = _square(threat, queries)
    _, _, passes = stage
    return Attack(threat.attack, parameters, _ensemble([stage], []), block=BLOCK, passes=passes)
