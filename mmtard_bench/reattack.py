"""Attack chosen samples of a record once more, and keep the images that records do not have."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtard_bench.attacks.base import Engine
from mmtard_bench.batches import Evaluation
from mmtard_bench.errors import InputError
from mmtard_bench.job import FAST, prepare
from mmtard_bench.models.clip import Clip
from mmtard_bench.records import Record, digest_of
from mmtard_bench.resources import Resources
from mmtard_bench.suites import load_suite, with_overrides
from mmtard_bench.tasks.resolve import TaskData, load_task
from mmtard_bench.tasks.scoring import Verdict
from mmtard_bench.types import Eps, Suite, ThreatModel


@dataclass(frozen=True)
class Outcome:
    """What became of one sample.

    ``image`` and ``adversarial`` are (3, H, W) in [0, 1]; the latter is None for a sample that
    stands or was wrong to begin with. ``before`` and ``after`` are the model's predictions, places
    of classes; ``broken`` is true where a fresh float32 pass confirmed what the attack claims.
    ``name`` is what an attack on the text made of the class's.
    """

    id: str
    label: int
    image: Tensor
    before: int
    after: int
    broken: bool
    adversarial: Tensor | None = None
    broken_by: str | None = None
    name: str | None = None


def suite_of(record: Record, file: Path | None = None) -> Suite:
    """The suite that a record is of, as it ships, or as a TOML file has it.

    That of a run with --limit or --seed is the suite with them. Raises InputError if the record is
    of another one.
    """
    if record.suite is None:
        raise InputError("A record is of no suite, so its samples are not known.")
    base, *changes = record.suite.name.split("+")
    given = dict(re.findall(r"(n|seed)([0-9]{1,10})", "+".join(changes)))
    n, seed = (int(given[key]) if key in given else None for key in ("n", "seed"))
    suite = with_overrides(load_suite(str(file or base)), n=n, seed=seed)
    if suite.digest != record.suite.digest:
        where = file or "the one that ships"
        raise InputError(
            f"The record is of another suite '{record.suite.name}' than {where}: digest "
            f"{record.suite.digest[:8]}, expected {suite.digest[:8]}."
        )
    return suite


def data_of(record: Record, suite: Suite) -> TaskData:
    """The samples of a record, from the data themselves.

    Raises InputError if the suite has no such task, or draws other samples.
    """
    tasks = {task.name: task for task, _ in suite.plan}
    if record.task.name not in tasks:
        raise InputError(f"The suite {suite.name} has no task '{record.task.name}'.")
    data = load_task(
        tasks[record.task.name], n=suite.n, seed=suite.seed, skip_damaged=suite.skip_damaged
    )
    if digest_of(list(data.manifest.ids)) != record.sample_ids_digest:
        raise InputError(
            f"The record's samples of {record.task.name} are not those that {suite.name} draws."
        )
    return data


def threat_of(record: Record) -> ThreatModel:
    """The threat model of a record."""
    threat = record.threat
    eps = Eps.parse(threat.eps, norm=threat.norm)
    return ThreatModel(threat.attack, threat.norm, eps, threat.surface)


def attack_again(
    clip: Clip,
    data: TaskData,
    threat: ThreatModel,
    resources: Resources,
    *,
    seed: int,
    engine: Engine = FAST,
) -> Iterator[Outcome]:
    """Attack the samples of ``data`` (``TaskData.at`` chooses some), in no particular order.

    With the engine and seed of a record its verdicts come again, where randomness is a sample's
    own; reference attacks draw theirs by blocks. Raises ModelError for a model that fails.
    """
    evaluation = Evaluation(prepare(clip, data, threat, seed=seed, engine=engine), resources, {})
    size = evaluation.job.attack.block or evaluation.batch_size
    for first in range(0, len(data.labels), size):
        rows = range(first, min(first + size, len(data.labels)))
        yield from _outcomes(evaluation, rows)


def _outcomes(evaluation: Evaluation, rows: Sequence[int]) -> Iterator[Outcome]:
    data = evaluation.job.data
    images = torch.stack([evaluation.image(row) for row in rows]).to(evaluation.device)
    before = evaluation.scorer.judge(images, rows, size=evaluation.batch_size)

    def outcome(place: int, verdict: Verdict, **found: Any) -> Outcome:
        row = rows[place]
        return Outcome(
            id=data.manifest.ids[row],
            label=data.labels[row],
            image=images[place].cpu(),
            before=before[place].prediction,
            after=verdict.prediction,
            broken=before[place].right and not verdict.right,
            **found,
        )

    places = [place for place, verdict in enumerate(before) if verdict.right]
    yield from (outcome(place, clean) for place, clean in enumerate(before) if not clean.right)
    right = images[places]
    for some, result in evaluation.attack(right, [rows[i] for i in places], lambda *_: None):
        now = [places[i] for i in some]
        after = evaluation.confirm([rows[place] for place in now], right[some], result)
        for i, place in enumerate(now):
            last = after.get(rows[place], before[place])
            claim = result.broken_by[i]
            if claim is None and last.right:
                yield outcome(place, last)
                continue
            yield outcome(
                place,
                last,
                adversarial=result.adversarial[i].float().cpu(),
                broken_by=claim or evaluation.job.threat.attack,
                name=result.names[i] if result.names else None,
            )
