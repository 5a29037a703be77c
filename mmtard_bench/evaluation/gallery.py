"""A gallery shows what an attack did to samples: clean image, perturbation, adversarial image."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmtard_bench.attacks.base import norm_of
from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.again import Outcome, attack_again
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.sources import chosen, data_of, suite_of, threat_of
from mmtard_bench.models.clip import Clip
from mmtard_bench.records.edits import levenshtein
from mmtard_bench.records.schema import Record, Sample
from mmtard_bench.registry import near_matches
from mmtard_bench.types import ThreatModel

Pixels = NDArray[np.uint8]
"""(H, W, 3)."""

MOST = 100
"""The most samples of a gallery; a larger page is slow to open."""


@dataclass(frozen=True)
class Shown:
    """A sample as its record has it, and the outcome of a re-attack."""

    sample: Sample
    outcome: Outcome


@dataclass(frozen=True)
class Gallery:
    """Samples of a record. A prediction is an index of ``classes``: class names, or captions."""

    record: Record
    threat: ThreatModel
    classes: tuple[str, ...]
    shown: tuple[Shown, ...]


def choose_record(
    records: Sequence[Record], *, task: str | None = None, threat: str | None = None
) -> Record:
    """Choose the first finished record of a task and threat model that has broken samples.

    Without broken samples, the first finished record is chosen. Raises InputError if no finished
    record has the task and the threat model.
    """
    left = [record for record in records if record.results is not None]
    if not left:
        raise InputError("No record is finished, so there is nothing to show.")
    left = _named(left, "task", task, lambda record: record.task.name)
    left = _named(left, "threat model", threat, lambda record: record.threat.name)
    broken = (r for r in left if any(sample.broken_by for sample in r.samples))
    return next(broken, left[0])


def _named(
    records: list[Record], what: str, name: str | None, of: Callable[[Record], str]
) -> list[Record]:
    found = [record for record in records if name in (None, of(record))]
    if not found:
        near = near_matches(name or "", {of(record) for record in records})
        raise InputError(f"There is no record of the {what} '{name}'. {near}")
    return found


def choose_samples(
    record: Record, *, ids: Sequence[str] = (), count: int = 8, seed: int = 0
) -> list[str]:
    """The given ids, or ``count`` of the attacked samples, drawn with ``seed``.

    Raises InputError if the record does not have an id, if no sample was attacked, or if there are
    more than ``MOST``.
    """
    known = {sample.id for sample in record.samples}
    for name in ids:
        if name not in known:
            raise InputError(f"The record has no sample '{name}'. {near_matches(name, known)}")
    attacked = [sample.id for sample in record.samples if sample.clean_correct]
    if not ids and not attacked:
        raise InputError(
            "The model is wrong on every clean image, so no sample was attacked. Choose samples "
            "with --samples."
        )
    names = list(dict.fromkeys(ids)) or random.Random(seed).sample(
        attacked, min(count, len(attacked))
    )
    if len(names) > MOST:
        raise InputError(f"{len(names)} samples are too many; a gallery has at most {MOST}.")
    return names


def look(
    record: Record,
    ids: Sequence[str],
    clip: Clip,
    device: torch.device,
    *,
    suite_file: Path | None = None,
) -> Gallery:
    """Re-attack samples of a record with its own seed. Raises InputError if the data is missing."""
    data = data_of(record, suite_of(record, suite_file))
    threat = threat_of(record)
    resources = Resources(device, workers=0)
    found = {
        o.id: o for o in attack_again(clip, chosen(data, ids), threat, resources, seed=record.seed)
    }
    samples = {sample.id: sample for sample in record.samples}
    shown = tuple(Shown(samples[name], found[name]) for name in ids)
    return Gallery(record, threat, data.classes, shown)


def panels(shown: Shown) -> list[tuple[str, Pixels]]:
    """The images of a sample with their titles: one if no pixel changed, else three."""
    image, adversarial = shown.outcome.image, shown.outcome.adversarial
    if adversarial is None:
        return [("clean", _pixels(image))]
    change = adversarial - image
    most = float(change.abs().max())
    if not most:
        return [("clean (no pixel changed)", _pixels(image))]
    factor = 0.5 / most
    return [
        ("clean", _pixels(image)),
        (f"perturbation x {factor:.3g}", _pixels(0.5 + factor * change)),
        ("adversarial", _pixels(adversarial)),
    ]


def facts(gallery: Gallery, shown: Shown) -> list[tuple[str, str]]:
    """The facts about a sample, as (name, text)."""
    outcome, sample = shown.outcome, shown.sample
    retrieval = gallery.record.task.metric == "retrieval"

    def named(index: int) -> str:
        return f"{index}: {gallery.classes[index]}"

    said = [
        ("true caption" if retrieval else "true class", named(outcome.label)),
        ("prediction before", named(outcome.before)),
    ]
    if outcome.adversarial is not None:
        said.append(("prediction after", named(outcome.after)))
    found = _verdict(outcome.before == outcome.label, outcome.broken_by)
    unconfirmed = outcome.broken_by is not None and not outcome.broken
    said.append(("re-attack", found + ", but a second pass does not confirm it" * unconfirmed))
    if outcome.adversarial is not None:
        said += _changes(gallery, outcome, outcome.adversarial)
    recorded = _verdict(sample.clean_correct, sample.broken_by)
    if recorded.split()[0] != found.split()[0]:
        recorded += "; the re-attack differs (other block or device, so other random numbers)"
    return [*said, ("record", recorded)]


def _verdict(right: bool, broken_by: str | None) -> str:
    if not right:
        return "wrong on the clean image, so not attacked"
    return f"broken by {broken_by}" if broken_by else "robust: the attack found nothing"


def _changes(gallery: Gallery, outcome: Outcome, adversarial: Tensor) -> list[tuple[str, str]]:
    """The distance of the attack, in what it changes: pixels, the name of the class, or both."""
    norm, eps = gallery.threat.norm, gallery.threat.eps
    original = gallery.classes[outcome.label]
    name = original if outcome.name is None else outcome.name
    edits = levenshtein(original, name)
    length: float = edits
    if norm != "levenshtein":
        length = float(norm_of((adversarial - outcome.image)[None], norm)) * eps.denominator
    said = [("distance", f"{norm} {length:.3g}/{eps.denominator}, eps {eps}")]
    if outcome.name is not None:
        said.append(("edited name", f"{original} → {name} ({edits} edit{'s' * (edits != 1)})"))
    return said


def _pixels(image: Tensor) -> Pixels:
    scaled: Pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return scaled


def title_of(gallery: Gallery) -> str:
    """Model, task and threat model in one line."""
    record = gallery.record
    return f"{record.model.name} on {record.task.name}: {record.threat.name}"


def summary_of(gallery: Gallery) -> str:
    """A summary: the source of the samples, the accuracies, and the seed of the re-attack."""
    record = gallery.record
    suite = record.suite.name if record.suite else "no suite"
    return (
        f"{len(gallery.shown)} of {len(record.samples)} samples of {suite}; weights "
        f"{record.model.digest[:8]}, clean accuracy {100 * record.clean_accuracy:.1f}%, robust "
        f"accuracy {100 * record.robust_accuracy:.1f}%. Re-attacked with the record's seed, "
        f"{record.seed}; images are rounded to 8 bits."
    )
