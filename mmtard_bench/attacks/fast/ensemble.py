"""The attacks of the fast engine: stages in order of cost, each on the samples still robust."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypedDict

import torch

from mmtard_bench.attacks import losses
from mmtard_bench.attacks.base import Attack, AttackResult, Part, Precision, Pulse, Work
from mmtard_bench.attacks.fast.apgd import Apgd
from mmtard_bench.attacks.fast.fab import Fab
from mmtard_bench.attacks.fast.passes import Passes
from mmtard_bench.attacks.fast.pgd import Pgd
from mmtard_bench.attacks.fast.rows import Found, Samples, Search, search_all
from mmtard_bench.attacks.fast.square import Square
from mmtard_bench.attacks.pgd import budget_of, number_of, require_linf
from mmtard_bench.attacks.reference import class_notes, target_count
from mmtard_bench.registry import register_attack
from mmtard_bench.types import FAST_CODE, Norm, ThreatModel

VERSION = f"{FAST_CODE} 1"
"""Goes into the identity of records: a change of any verdict is a new number."""


class _Samples:
    """The samples of one call through all stages; ``result`` has the results so far."""

    def __init__(self, passes: Passes, samples: Samples, work: Work) -> None:
        self.passes, self.samples, self.work = passes, samples, work
        count = len(samples.ids)
        self.result = AttackResult(samples.images.clone(), [None] * count, [0] * count, [0] * count)
        self.settled = self.broken = self.spent = 0

    def stage(self, search: Search, left: Sequence[int]) -> list[int]:
        """Search for adversarial images of the samples ``left``; returns those that are robust."""
        if not left:
            return []
        found = Found()
        self.work.watch(lambda: self._pulse(search, found))
        if search.targeted:
            self._find_targets(left, search.variants)
        search_all(
            search,
            self.samples,
            left,
            self.passes,
            seed=self.work.seed,
            batch_size=self.work.batch_size,
            found=found,
        )
        result = self.result
        for place in left:
            result.forward[place] += found.forward[place]
            result.backward[place] += found.backward[place]
        for place, image in found.adversarial.items():
            result.adversarial[place] = image
            result.broken_by[place] = search.name
        self.broken += len(found.adversarial)
        self.settle(list(found.adversarial))
        return [place for place in left if place not in found.adversarial]

    def settle(self, places: Sequence[int]) -> None:
        """These samples are broken, or through all stages."""
        self.settled += len(places)
        self.spent += sum(self.result.forward[p] + self.result.backward[p] for p in places)

    def _pulse(self, search: Search, found: Found) -> Pulse:
        broken = [*found.adversarial]
        forward, backward = self.result.forward, self.result.backward
        before = sum(forward[place] + backward[place] for place in broken)
        now = sum(found.forward[place] + found.backward[place] for place in broken)
        return Pulse(
            settled=self.settled + len(broken),
            broken=self.broken + len(broken),
            spent=self.spent + before + now,
            stage=search.name,
            rows=len(found.steps),
            step=int(found.steps.max()) if len(found.steps) else 0,
        )

    def part(self, places: Sequence[int]) -> Part:
        """Samples that are settled, with the seconds in the model since the last part."""
        part = self.result.of(places)
        part.model_seconds = self.passes.take_seconds()
        return places, part

    def _find_targets(self, left: Sequence[int], count: int) -> None:
        """The likeliest other classes of samples, from one look at the clean images."""
        targets = self.samples.targets
        places = torch.tensor(left, device=targets.device)
        for part in torch.split(places, self.work.batch_size):
            new = part[targets[part, 0] < 0]
            if not len(new):
                continue
            logits = self.passes.logits(self.samples.images[new])
            # A prediction that flickers must not make a sample's own class its target.
            logits = logits.scatter(1, self.samples.labels[new, None], float("-inf"))
            targets[new, :count] = logits.topk(count, dim=1).indices
            for place in new.tolist():
                self.result.forward[place] += 1


def staged(
    threat: ThreatModel,
    stages: Sequence[Search],
    parameters: Mapping[str, str | int | float],
    precision: Precision = "float32",
    notes: Sequence[str] = (),
) -> Attack:
    """An attack of the fast engine: searches in order, each on the samples that are still robust.

    ``parameters`` hold everything that changes a verdict, including a version of the code; they are
    part of a record's identity. ``notes`` go into the record.

    All samples go through the first stage together, which breaks most samples of a weak model. The
    rest continue in groups of one batch, so that samples of a strong model are settled early.
    """
    targets = max((search.variants for search in stages if search.targeted), default=1)

    def run(work: Work) -> Iterator[Part]:
        labels, count, batch_size = work.labels, len(work.ids), work.batch_size
        unknown = labels.new_full((count, targets), -1)
        samples = _Samples(
            Passes(work.model, labels.device, precision),
            Samples(work.images, labels, unknown, work.ids),
            work,
        )
        samples.result.notes.extend(notes)
        first, *others = stages
        robust = samples.stage(first, range(count))
        groups = [robust[i : i + batch_size] for i in range(0, len(robust), batch_size)]
        if not others:
            samples.settle(robust)
            groups = []
        through = {place for group in groups for place in group}
        # Where nothing broke yet, the first part is the first group.
        if settled := [place for place in range(count) if place not in through]:
            yield samples.part(settled)
        for group in groups:
            left = group
            for search in others:
                left = samples.stage(search, left)
            samples.settle(left)
            yield samples.part(group)

    lower = {} if precision == "float32" else {"attack_precision": precision}
    looks = any(search.targeted for search in stages)
    return Attack(
        threat.attack,
        {**parameters, **lower},
        run,
        refills=True,
        passes=sum(search.passes for search in stages) + looks,
    )


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
    return staged(threat, stages, parameters, precision, class_notes(names, n_classes))


def _pgd(threat: ThreatModel, family: str, loss: losses.Loss, precision: Precision) -> Attack:
    """PGD with the parameters of ``attacks.pgd``: an early stop changes no verdict."""
    steps = number_of(threat)
    search = Pgd(name=threat.attack, loss=loss, steps=steps, **_ball(threat))
    return staged(threat, [search], {"loss": family, **budget_of(steps)}, precision)


@register_attack("pgd-{steps}", engine="fast")
def build_pgd(threat: ThreatModel, n_classes: int, precision: Precision) -> Attack:
    """PGD on the cross-entropy."""
    return _pgd(threat, "cross-entropy", losses.cross_entropy, precision)


@register_attack("cw-linf-{steps}", engine="fast")
def build_cw_linf(threat: ThreatModel, n_classes: int, precision: Precision) -> Attack:
    """PGD on the margin."""
    require_linf(threat)
    return _pgd(threat, "margin", losses.negative_margin, precision)


def _pair(threat: ThreatModel, n_classes: int, precision: Precision, restarts: int) -> Attack:
    """APGD-CE and targeted APGD; CE alone for two classes."""
    stages = [_apgd_ce(threat, restarts)]
    if n_classes > 2:
        stages.append(_apgd_targeted(threat, n_classes))
    return _ensemble(threat, n_classes, precision, stages, iterations=100, restarts=restarts)


@register_attack("apgd-pair", engine="fast")
def build_pair(threat: ThreatModel, n_classes: int, precision: Precision) -> Attack:
    """APGD-CE and targeted APGD-DLR, 100 iterations."""
    return _pair(threat, n_classes, precision, restarts=1)


@register_attack("apgd-pair-5r", engine="fast")
def build_pair_restarts(threat: ThreatModel, n_classes: int, precision: Precision) -> Attack:
    """The same with 5 restarts of APGD-CE."""
    return _pair(threat, n_classes, precision, restarts=5)


@register_attack("autoattack-standard", engine="fast")
def build_standard(threat: ThreatModel, n_classes: int, precision: Precision) -> Attack:
    """APGD-CE, targeted APGD-DLR, targeted FAB, Square."""
    stages: list[Search] = [
        _apgd_ce(threat, 1),
        _apgd_targeted(threat, n_classes),
        Fab(variants=target_count(n_classes), **_ball(threat)),
        Square(**_ball(threat)),
    ]
    return _ensemble(threat, n_classes, precision, stages, iterations=100, queries=5000)


@register_attack("square-{queries}", engine="fast")
def build_square(threat: ThreatModel, n_classes: int, precision: Precision) -> Attack:
    """Square alone, with so many queries per sample: an attack without gradients."""
    queries = number_of(threat)
    search = Square(steps=queries, **_ball(threat))
    return staged(
        threat,
        [search],
        {"code": VERSION, "stages": search.name, "queries": queries},
        precision,
    )
