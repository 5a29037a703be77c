"""Everything that decides the verdicts of one record, and the identity that follows from it."""

from dataclasses import dataclass, replace
from functools import cached_property

from mmtard_bench.attacks.base import Attack, Engine
from mmtard_bench.attacks.catalogue import build_attack
from mmtard_bench.errors import InputError
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.text_table import TextTable
from mmtard_bench.records import (
    ModelFacts,
    SuiteFacts,
    TaskFacts,
    ThreatFacts,
    digest_of,
    identity,
)
from mmtard_bench.tasks.resolve import TaskData
from mmtard_bench.tasks.retrieval import fewest_columns
from mmtard_bench.types import Suite, ThreatModel

FAST, REFERENCE = Engine(), Engine("reference")


@dataclass(frozen=True)
class Job:
    """Everything that decides a record's verdicts, and nothing else."""

    clip: Clip
    data: TaskData
    threat: ThreatModel
    attack: Attack
    seed: int
    suite: SuiteFacts | None

    @cached_property
    def facts(self) -> tuple[ModelFacts, TaskFacts, ThreatFacts]:
        """The configuration as the record states it."""
        model = ModelFacts(
            name=self.clip.name,
            source=self.clip.source,
            digest=self.clip.digest,
            parameters=self.clip.parameters,
            preprocessing=self.clip.preprocessing(),
        )
        task = self.data.task
        classes, templates = list(self.data.classes), list(self.data.templates)
        # Another tokenizer makes other prompts: the tokens of one template tell them apart.
        tokens = self.clip.tokenizer([templates[0].replace("{}", name) for name in classes])
        prompts = [classes, templates, tokens.tolist()]
        task_facts = TaskFacts(
            name=task.name,
            data=task.data,
            revision=self.data.revision,
            split=task.split,
            convert_rgb=task.convert_rgb,
            n_classes=len(self.data.classes),
            templates=templates,
            prompts_digest=digest_of(prompts),
            metric=task.metric,
        )
        threat = ThreatFacts(
            attack=self.threat.attack,
            norm=self.threat.norm,
            eps=str(self.threat.eps),
            surface=self.threat.surface,
            parameters=dict(self.attack.parameters),
            block=self.attack.block,
        )
        return model, task_facts, threat

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
    """Fix everything that decides the verdicts. Raises InputError for what cannot work.

    Retrieval asks how far down a broken image falls, so there attacks go on to their end, which
    the fast engine's do not: they are the reference's, whatever the ``engine``.
    """
    retrieval = data.task.metric == "retrieval"
    engine = REFERENCE if retrieval else engine
    count = len(data.classes)
    columns = fewest_columns(data.matches, count) if retrieval else count
    attack = build_attack(threat, n_classes=columns, engine=engine)
    if attack.edits is not None:
        _require_text_side(clip, data, threat)
    if suite is None:
        return Job(clip, data, threat, attack, seed, None)
    if attack.block is not None:
        attack = replace(attack, block=suite.block)
    facts = SuiteFacts(
        name=suite.name,
        protocol=suite.protocol,
        digest=suite.digest,
        records=suite.records,
    )
    return Job(clip, data, threat, attack, seed, facts)


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
