"""The attacks of the fast engine: stages in order of cost, each on the samples that are left."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor

from mmtard_bench.attacks.base import Attack, AttackResult, Classifier, Precision
from mmtard_bench.attacks.fast import losses
from mmtard_bench.attacks.fast.apgd import Apgd
from mmtard_bench.attacks.fast.fab import Fab
from mmtard_bench.attacks.fast.passes import Passes
from mmtard_bench.attacks.fast.pgd import Pgd
from mmtard_bench.attacks.fast.rows import Samples, Search, search_all
from mmtard_bench.attacks.fast.square import Square
from mmtard_bench.attacks.pgd import budget_of, require_linf, steps_of
from mmtard_bench.attacks.reference import class_notes, target_count
from mmtard_bench.types import Norm, ThreatModel

VERSION = "mmtard_bench fast 1"
"""Goes into the identity of records: a change of any verdict is a new number."""

Build = Callable[[ThreatModel, int, Precision], Attack]


def _attack(
    threat: ThreatModel,
    stages: Sequence[Search],
    parameters: Mapping[str, str | int | float],
    precision: Precision,
    notes: Sequence[str] = (),
) -> Attack:
    """Stages one after the other, each on the samples that the earlier ones left."""
    targets = max((search.variants for search in stages if search.targeted), default=0)

    def run(
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        /,
        *,
        ids: Sequence[str],
        seed: int,
        batch_size: int,
        decided: Callable[[int, int], None],
    ) -> AttackResult:
        passes = Passes(model, images.device, precision)
        samples = Samples(images, labels, labels[:, None], ids)
        result = AttackResult(
            images.clone(), [None] * len(ids), [0] * len(ids), [0] * len(ids), list(notes)
        )
        left = list(range(len(ids)))
        for search in stages:
            if not left:
                break
            if search.targeted and samples.targets.shape[1] != targets:
                samples = _with_targets(samples, left, passes, targets, batch_size)
                for place in left:
                    result.forward[place] += 1
            found = search_all(
                search,
                samples,
                left,
                passes,
                seed=seed,
                batch_size=batch_size,
                broke=partial(_say, decided, len(ids) - len(left)),
            )
            for place in left:
                result.forward[place] += found.forward[place]
                result.backward[place] += found.backward[place]
            for place, image in found.adversarial.items():
                result.adversarial[place] = image
                result.broken_by[place] = search.name
            left = [place for place in left if place not in found.adversarial]
        decided(len(ids), len(ids) - len(left))
        result.model_seconds = passes.total_seconds()
        return result

    lower = {} if precision == "float32" else {"attack_precision": precision}
    return Attack(threat.attack, {**parameters, **lower}, run, refills=True)


def _say(decided: Callable[[int, int], None], before: int, count: int) -> None:
    decided(before + count, before + count)


def _with_targets(
    samples: Samples, left: Sequence[int], passes: Passes, count: int, batch_size: int
) -> Samples:
    """The samples with their likeliest other classes, from a look at the clean images."""
    places = torch.tensor(left, device=samples.labels.device)
    targets = samples.labels[:, None].repeat(1, count)
    for part in torch.split(places, batch_size):
        logits = passes.logits(samples.images[part])
        # A prediction that flickers must not make a sample's own class its target.
        logits = logits.scatter(1, samples.labels[part, None], float("-inf"))
        targets[part] = logits.topk(count, dim=1).indices
    return Samples(samples.images, samples.labels, targets, samples.ids)


def _ensemble(
    threat: ThreatModel,
    n_classes: int,
    precision: Precision,
    stages: Sequence[Search],
    **budget: str | int | float,
) -> Attack:
    names = [search.name for search in stages]
    parameters = {
        "code": VERSION,
        "stages": " ".join(names),
        "targets": target_count(n_classes),
        **budget,
    }
    return _attack(threat, stages, parameters, precision, class_notes(names, n_classes))


class _Ball(TypedDict):
    norm: Norm
    eps: float


def _ball(threat: ThreatModel) -> _Ball:
    return {"norm": threat.pixel_norm, "eps": float(threat.eps)}


def _apgd_ce(threat: ThreatModel, restarts: int) -> Apgd:
    return Apgd(name="apgd-ce", loss=losses.cross_entropy, variants=restarts, **_ball(threat))


def _apgd_targeted(threat: ThreatModel, n_classes: int) -> Apgd:
    loss = losses.dlr_targeted if n_classes >= 4 else losses.target_gap
    variants = target_count(n_classes)
    return Apgd(name="apgd-t", loss=loss, variants=variants, targeted=True, **_ball(threat))


def _pgd(threat: ThreatModel, family: str, loss: losses.Loss, precision: Precision) -> Attack:
    """The parameters are those of ``attacks.pgd``: stopping early changes no verdict."""
    steps = steps_of(threat)
    search = Pgd(name=threat.attack, loss=loss, steps=steps, **_ball(threat))
    return _attack(threat, [search], {"loss": family, **budget_of(steps)}, precision)


def build_pgd(threat: ThreatModel, n_classes: int, precision: Precision) -> Attack:
    """PGD on the cross-entropy."""
    return _pgd(threat, "cross-entropy", losses.cross_entropy, precision)


def build_cw_linf(threat: ThreatModel, n_classes: int, precision: Precision) -> Attack:
    """PGD on the margin."""
    require_linf(threat)
    return _pgd(threat, "margin", losses.negative_margin, precision)


def build_pair(
    threat: ThreatModel, n_classes: int, precision: Precision, restarts: int = 1
) -> Attack:
    """APGD-CE and targeted APGD; CE alone for two classes."""
    stages = [_apgd_ce(threat, restarts)]
    if n_classes > 2:
        stages.append(_apgd_targeted(threat, n_classes))
    return _ensemble(threat, n_classes, precision, stages, iterations=100, restarts=restarts)


def build_pair_restarts(threat: ThreatModel, n_classes: int, precision: Precision) -> Attack:
    """The same with 5 restarts of APGD-CE."""
    return build_pair(threat, n_classes, precision, restarts=5)


def build_standard(threat: ThreatModel, n_classes: int, precision: Precision) -> Attack:
    """APGD-CE, targeted APGD-DLR, targeted FAB, Square."""
    stages: list[Search] = [
        _apgd_ce(threat, 1),
        _apgd_targeted(threat, n_classes),
        Fab(variants=target_count(n_classes), **_ball(threat)),
        Square(**_ball(threat)),
    ]
    return _ensemble(threat, n_classes, precision, stages, iterations=100, queries=5000)


FAST: dict[str, Build] = {
    "pgd-{steps}": build_pgd,
    "cw-linf-{steps}": build_cw_linf,
    "apgd-pair": build_pair,
    "apgd-pair-5r": build_pair_restarts,
    "autoattack-standard": build_standard,
}
"""The attacks that this engine has, by their registered names."""
