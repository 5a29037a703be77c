"""Everything that decides the verdicts of one record, and the identity that follows from it."""

from dataclasses import dataclass, replace
from functools import cached_property

from mmtard_bench.attacks.base import Attack, Engine
from mmtard_bench.attacks.catalogue import build_attack
from mmtard_bench.errors import DamagedImageError, InputError
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.text_table import TextTable
from mmtard_bench.records.schema import (
    ModelFacts,
    SuiteFacts,
    TaskFacts,
    ThreatFacts,
    digest_of,
    identity,
)
from mmtard_bench.tasks.prompts import prompts_of, understood
from mmtard_bench.tasks.retrieval import fewest_columns
from mmtard_bench.tasks.samples import TaskData
from mmtard_bench.types import Suite, ThreatModel

FAST, REFERENCE = Engine(), Engine("reference")


@dataclass(frozen=True)
class Job:
    """Everything that decides a record's verdicts, and nothing else.

    ``digest`` is that of the model when the job was prepared.
    """

    clip: Clip
    digest: str
    data: TaskData
    threat: ThreatModel
    attack: Attack
    seed: int
    suite: SuiteFacts | None

    @cached_property
    def facts(self) -> tuple[ModelFacts, TaskFacts, ThreatFacts]:
        """What the record states about its model, task and threat model."""
        model = ModelFacts(
            name=self.clip.name,
            source=self.clip.source,
            digest=self.digest,
            parameters=self.clip.parameters,
            preprocessing=self.clip.preprocessing(),
        )
        prompts = prompts_of(self.clip, self.data.classes, self.data.templates).digest
        return model, task_facts(self.data, prompts), threat_facts(self.threat, self.attack)

    @cached_property
    def sample_ids_digest(self) -> str:
        """Hash of the ids of the samples, in order."""
        return digest_of(list(self.data.manifest.ids))

    @cached_property
    def identity(self) -> str:
        """The identity of the record that this job will become."""
        model, task, threat = self.facts
        return identity(
            suite=self.suite,
            model=model,
            task=task,
            threat=threat,
            seed=self.seed,
            precision="float32",
            sample_ids_digest=self.sample_ids_digest,
        )


def prepare(
    clip: Clip,
    data: TaskData,
    threat: ThreatModel,
    *,
    seed: int,
    suite: Suite | None = None,
    engine: Engine = FAST,
) -> Job:
    """Fix everything that decides the verdicts of a record.

    Retrieval always uses the reference engine, whatever ``engine`` is: ranks need an attack that
    runs to its end, and the fast engine stops at the first success. Raises InputError for a
    combination that cannot work.
    """
    digest = clip.digest  # before all else: it empties the caches of a model that changed
    _require_reach(clip, data, threat)
    data = understood(clip, data)
    attack = attack_on(data, threat, suite=suite, engine=engine)
    if attack.edits is not None:
        _require_text_side(clip, data, threat)
    return Job(clip, digest, data, threat, attack, seed, suite_facts(suite) if suite else None)


def attack_on(
    data: TaskData, threat: ThreatModel, *, suite: Suite | None, engine: Engine
) -> Attack:
    """The attack that ``prepare`` chooses for a threat model and a task."""
    retrieval = data.task.metric == "retrieval"
    engine = REFERENCE if retrieval else engine
    # Classes with equal names share a column.
    captions, names = len(data.classes), len(set(data.classes))
    columns = fewest_columns(data.matches, captions) if retrieval else names
    attack = build_attack(threat, n_classes=columns, engine=engine)
    if suite is None or attack.block is None:
        return attack
    return replace(attack, block=suite.block)


def suite_facts(suite: Suite) -> SuiteFacts:
    """What records state about their suite."""
    return SuiteFacts(
        name=suite.name,
        protocol=suite.protocol,
        digest=suite.digest,
        records=suite.records,
    )


def task_facts(data: TaskData, prompts_digest: str) -> TaskFacts:
    """What records state about their task."""
    task = data.task
    return TaskFacts(
        name=task.name,
        data=task.data,
        revision=data.revision,
        split=task.split,
        convert_rgb=task.convert_rgb,
        n_classes=len(data.classes),
        templates=list(data.templates),
        prompts_digest=prompts_digest,
        metric=task.metric,
    )


def threat_facts(threat: ThreatModel, attack: Attack) -> ThreatFacts:
    """What records state about their threat model."""
    return ThreatFacts(
        attack=threat.attack,
        norm=threat.norm,
        eps=str(threat.eps),
        surface=threat.surface,
        parameters=attack.described,
        block=attack.block,
    )


def _require_reach(clip: Clip, data: TaskData, threat: ThreatModel) -> None:
    if threat.norm != "l2":
        return
    try:
        native = threat.surface == "native"
        height, width = data.pixels(0).shape[:2] if native else clip.preprocess.size
    except DamagedImageError:  # the evaluation says so, with the others
        return
    threat.require_reach(height, width)


def _require_text_side(clip: Clip, data: TaskData, threat: ThreatModel) -> None:
    if data.task.metric == "retrieval":
        raise InputError(
            f"{threat.attack} edits class names, of which the task '{data.task.name}' has none: it "
            "is retrieval. Use an attack on images there."
        )
    if isinstance(clip.tokenizer, TextTable):
        raise InputError(
            f"The text tower of '{clip.name}' is locked and knows a fixed list of prompts, so "
            f"{threat.attack} cannot edit one; use a model with a whole text tower."
        )
