"""Re-attack chosen samples of a record, and keep the adversarial images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmtard_bench.attacks.base import Engine
from mmtard_bench.evaluation.attacker import Attacker
from mmtard_bench.evaluation.device import Resources, full_float32
from mmtard_bench.evaluation.headway import Headway
from mmtard_bench.evaluation.job import FAST, prepare
from mmtard_bench.models.clip import Clip
from mmtard_bench.tasks.samples import TaskData
from mmtard_bench.tasks.scoring import Verdict
from mmtard_bench.types import ThreatModel


@dataclass(frozen=True)
class Outcome:
    """The result of a re-attack for one sample.

    ``image`` and ``adversarial`` are (3, H, W) in [0, 1]; ``adversarial`` is None if the sample is
    robust or its clean image is misclassified. ``before`` and ``after`` are the predicted class
    indices for the two images. ``broken`` is true if a new float32 pass confirms the attack.
    ``name`` is the edited class name of an attack on text. ``verdict`` is that of the last image.
    """

    id: str
    label: int
    image: Tensor
    before: int
    after: int
    broken: bool
    verdict: Verdict
    adversarial: Tensor | None = None
    broken_by: str | None = None
    name: str | None = None


def attack_again(
    clip: Clip,
    data: TaskData,
    threat: ThreatModel,
    resources: Resources,
    *,
    seed: int,
    engine: Engine = FAST,
    headway: Headway | None = None,
) -> Iterator[Outcome]:
    """Attack the samples of ``data``; outcomes come in no particular order.

    With the engine and seed of a record, the fast engine gives the verdicts of the record again. A
    reference attack may not: its random numbers depend on the block that a sample is in.
    ``headway`` counts the progress. Raises ModelError for a model that fails.
    """
    with full_float32():
        attacker = Attacker(prepare(clip, data, threat, seed=seed, engine=engine), resources)
    size = attacker.chunk_size
    for first in range(0, len(data.labels), size):
        rows = range(first, min(first + size, len(data.labels)))
        with full_float32():
            found = list(_outcomes(attacker, rows, headway))
        yield from found


def _outcomes(
    attacker: Attacker, rows: Sequence[int], headway: Headway | None
) -> Iterator[Outcome]:
    data = attacker.data
    images = attacker.images(rows)
    before = attacker.judge(images, rows)

    def outcome(place: int, verdict: Verdict, **found: Any) -> Outcome:
        row = rows[place]
        return Outcome(
            id=data.manifest.ids[row],
            label=data.labels[row],
            image=images[place].cpu(),
            before=before[place].prediction,
            after=verdict.prediction,
            broken=before[place].right and not verdict.right,
            verdict=verdict,
            **found,
        )

    places = [place for place, verdict in enumerate(before) if verdict.right]
    yield from (outcome(place, clean) for place, clean in enumerate(before) if not clean.right)
    if headway:
        headway.judged(wrong=len(rows) - len(places), right=len(places))
    right = images[places]
    for some, result in attacker.attack(right, [rows[i] for i in places], headway):
        now = [places[i] for i in some]
        after = attacker.confirm([rows[place] for place in now], right[some], result)
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
                broken_by=claim or attacker.job.threat.attack,
                name=result.names[i] if result.names else None,
            )
