"""Robustness curves over eps: their points, and what a larger radius says about a smaller one."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from mmtard_bench.records.schema import Record, Sample
from mmtard_bench.types import ThreatModel


def known_from_above(
    threat: ThreatModel, records: Sequence[Record]
) -> tuple[dict[str, Sample], list[str]]:
    """The samples whose verdict under a threat model follows from records at larger radii.

    ``records`` are those of one model and task so far, the largest radius first; those of the
    same attack, norm and surface count, failed ones say nothing. A sample that stood in a ball
    counts as standing in each ball inside it, and one that was wrong without an attack stays
    wrong: neither costs passes again. Returns samples by id, and a note that counts them.
    """
    known: dict[str, Sample] = {}
    stood = []
    for record in records:
        facts = record.threat
        if (facts.attack, facts.norm, facts.surface) != (
            threat.attack,
            threat.norm,
            threat.surface,
        ):
            continue
        fresh = [
            sample.model_copy(update={"forward": 0, "backward": 0})
            for sample in record.samples
            if sample.id not in known and (sample.robust or not sample.clean_correct)
        ]
        known.update((sample.id, sample) for sample in fresh)
        if count := sum(sample.robust for sample in fresh):
            stood.append(f"{count} stood at {facts.eps}")
    notes = [f"Samples that were not attacked again: {', '.join(stood)}."] if stood else []
    return known, notes


def contradictions(known: Mapping[str, Sample], samples: Iterable[Sample]) -> list[str]:
    """A note that counts samples which were broken before, but are ``known`` to be robust.

    An adversarial image lies in each larger ball, so the attack there missed it. The records of a
    curve follow from the larger radius all the same: it must not rise, and must not depend on
    where a run was interrupted.
    """
    broken = {s.id for s in samples if s.broken_by is not None and s.id in known}
    count = sum(known[name].robust for name in broken)
    if not count:
        return []
    return [
        "Samples that an interrupted evaluation broke at this radius, but that count as robust "
        f"because they are so at a larger radius that was scored since: {count}."
    ]


def follows(record: Record, known: Mapping[str, Sample]) -> bool:
    """Whether a finished record took over just what is ``known`` from larger radii.

    It did not if one of those was made again since, with a verdict that rounding changed.
    """
    if not known:
        return True
    samples = {sample.id: sample for sample in record.samples}
    taken = {sample.id for sample in record.samples if sample.robust and not sample.forward}
    return taken <= known.keys() and known.items() <= samples.items()


class Point(NamedTuple):
    """Robust accuracy at a radius, with Wilson's 95% interval; at "0" it is the clean accuracy."""

    eps: str
    accuracy: float
    interval: tuple[float, float]


def eps_curves(records: Iterable[Record]) -> dict[str, dict[str, list[Point]]]:
    """Accuracy against eps, radii ascending, of one task: points by threat model and model.

    Threat models go by attack, norm and surface; only models with two finished radii count. Each
    curve begins with the clean accuracy.
    """
    groups: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.results is not None:
            threat = record.threat
            where = f"{threat.attack} {threat.norm}{' model' * (threat.surface == 'model')}"
            groups[where][record.model.name].append(record)
    curves = {
        where: {
            model: _points(group)
            for model, group in models.items()
            if len({Fraction(record.threat.eps) for record in group}) > 1
        }
        for where, models in groups.items()
    }
    return {where: models for where, models in curves.items() if models}


def _points(records: Iterable[Record]) -> list[Point]:
    ordered = sorted(records, key=lambda record: Fraction(record.threat.eps))
    results = [(record.threat.eps, record.results) for record in ordered if record.results]
    clean = results[0][1]
    return [
        Point("0", clean.clean_accuracy, clean.clean_interval),
        *(Point(eps, r.robust_accuracy, r.robust_interval) for eps, r in results),
    ]
