"""Level "well-formed": the records agree with this version. No model is needed."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import get_args

from mmtard_bench.attacks.base import Attack, Engine
from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.black_box import FEWEST_DRAWN
from mmtard_bench.evaluation.checks import ModelCode, SampleCode, check_samples
from mmtard_bench.evaluation.job import (
    REFERENCE,
    attack_on,
    suite_facts,
    task_facts,
    threat_facts,
)
from mmtard_bench.evaluation.sources import data_of, suite_of
from mmtard_bench.leaderboard.entries.folder import Run
from mmtard_bench.leaderboard.entries.text import require_plain
from mmtard_bench.records.curves import follows, known_from_above
from mmtard_bench.records.edits import names_another_class
from mmtard_bench.records.schema import Record
from mmtard_bench.tasks.retrieval import NOTE
from mmtard_bench.tasks.samples import TaskData
from mmtard_bench.types import Suite, ThreatModel

ENGINES = (Engine("fast"), Engine("reference"), Engine("fast", "bfloat16"))
"""The engines that a record may name. Of two that write the same, the cheaper one comes first."""


@dataclass(frozen=True)
class Place:
    """A record, with the data, threat model and engine that this version has for it."""

    record: Record
    data: TaskData
    threat: ThreatModel
    engine: Engine

    @property
    def name(self) -> str:
        """The record's task and threat model."""
        return f"{self.data.task.name} {self.threat.name}"


@dataclass(frozen=True)
class Formed:
    """A run of an entry that is well-formed: its records in the order of the suite."""

    run: Run
    suite: Suite
    places: tuple[Place, ...]


def require_formed(run: Run) -> Formed:
    """Check a run of an entry without its model.

    The suite ships with this version, and the run has all of its records and no others. The task,
    data, samples, labels and attack of each record equal those of this version. The flags follow
    from the samples. No text contains markup. Robust accuracy does not rise with eps on a curve.

    Raises:
        InputError: If a check fails.
    """
    suite = suite_of(run.records[0])
    records = {(record.task.name, record.threat.name): record for record in run.records}
    plan = [(task.name, threat) for task, threats in suite.plan for threat in threats]
    _require_whole(suite, records, {(task, threat.name) for task, threat in plan})
    loaded: dict[str, TaskData] = {}
    places = []
    for task, threat in plan:
        record = records[task, threat.name]
        if task not in loaded:
            loaded[task] = data_of(record, suite)
        places.append(_place(record, loaded[task], threat, suite))
    for place in places:
        _require_said(place)
    if suite.curve:
        _require_curve(places)
    return Formed(run, suite, tuple(places))


def _require_whole(
    suite: Suite, records: Mapping[tuple[str, str], Record], expected: set[tuple[str, str]]
) -> None:
    for what, some in (("lacks", expected - records.keys()), ("adds", records.keys() - expected)):
        if some:
            task, threat = min(some)
            raise InputError(
                f"The run {what} {len(some)} of the {len(expected)} records of {suite.name}: "
                f"{threat} on {task}, for example. An entry has all records of its suite "
                "and no others."
            )


def _place(record: Record, data: TaskData, threat: ThreatModel, suite: Suite) -> Place:
    """The record with its engine, after its configuration was compared with this version's."""
    where = f"{data.task.name} {threat.name}"
    if record.status != "ok":
        raise InputError(f"{where}: the evaluation failed. An entry has finished records only.")
    engines = [
        engine
        for engine in ENGINES
        if record.threat == threat_facts(threat, _attack(data, threat, suite, engine))
    ]
    expected: dict[str, tuple[object, object]] = {
        "suite": (record.suite, suite_facts(suite)),
        "seed": (record.seed, suite.seed),
        "task": (record.task, task_facts(data, record.task.prompts_digest)),
        "samples": ([sample.id for sample in record.samples], list(data.manifest.ids)),
        "labels": ([sample.label for sample in record.samples], list(data.labels)),
        "attack": (bool(engines), True),
    }
    for what, (given, right) in expected.items():
        if given != right:
            raise InputError(
                f"{where}: the record and this version of mmtard-bench disagree on the {what} "
                f"of {suite.name}. Run the suite again with this version."
            )
    return Place(record, data, threat, engines[0])


def _attack(data: TaskData, threat: ThreatModel, suite: Suite, engine: Engine) -> Attack:
    try:
        return attack_on(data, threat, suite=suite, engine=engine)
    except InputError:  # the attack does not exist in this precision
        return attack_on(data, threat, suite=suite, engine=REFERENCE)


def _require_said(place: Place) -> None:
    """Check what a record states besides its verdicts: flags, notes, edits, text and date."""
    record, data = place.record, place.data
    codes = {*get_args(ModelCode), *get_args(SampleCode)}
    unknown = {flag.code for flag in record.flags} - codes
    if unknown:
        raise InputError(f"{place.name}: the flag '{min(unknown)}' does not exist; remove it.")
    derived = [flag for flag in record.flags if flag.code in get_args(SampleCode)]
    if derived != check_samples(record.samples, record.threat.attack, record.black_box):
        raise InputError(f"{place.name}: its flags do not follow from its samples.")
    check = record.black_box
    if check and check.drawn < min(FEWEST_DRAWN, sum(s.robust for s in record.samples)):
        raise InputError(
            f"{place.name}: the check without gradients drew {check.drawn} samples; expected at "
            f"least {FEWEST_DRAWN}, or all robust ones."
        )
    due = [*data.notes, *([NOTE] if data.task.metric == "retrieval" else [])]
    if not set(due) <= set(record.notes):
        raise InputError(f"{place.name}: a note is missing: {next(iter(set(due)))[:200]}")
    texts = record.model_copy(update={"notes": [n for n in record.notes if n not in data.notes]})
    body = texts.model_dump(mode="json", exclude={"samples", "task", "threat"})
    for text in [*_strings(body), *(s.broken_by for s in record.samples if s.broken_by)]:
        require_plain(text, f"{place.name}: the record's text")
    for sample in record.samples:
        edit, names = sample.edit, data.classes
        if edit is None:
            continue
        own = names[sample.label]
        another = names_another_class(names, sample.label, edit.adversarial)
        if edit.original != own or (edit.adversarial != own and another):
            raise InputError(
                f"{place.name}: the edit of sample '{sample.id}' does not belong to its class."
            )
    _require_date(place)


def _strings(value: object) -> Iterator[str]:
    """Every text in a JSON value that is not empty."""
    if isinstance(value, str):
        yield from [value] if value else []
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *_strings(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _require_date(place: Place) -> None:
    text = place.record.created
    try:
        made = datetime.fromisoformat(text)
        good = text in [made.isoformat(timespec=unit) for unit in ("seconds", "microseconds")]
        good = good and made < datetime.now(UTC) + timedelta(days=1)
    except (ValueError, TypeError):  # TypeError: a time without its zone
        good = False
    if not good:
        raise InputError(
            f"{place.name}: it was created at {text[:40]!r}; expected a time in the past, such as "
            "2026-11-24T09:30:00+00:00."
        )


def _require_curve(places: list[Place]) -> None:
    """Raise InputError if a sample is broken in a ball and robust in a larger ball around it."""
    by_task: dict[str, list[Place]] = defaultdict(list)
    for place in places:
        by_task[place.data.task.name].append(place)
    for group in by_task.values():
        for i, place in enumerate(group):
            known, _ = known_from_above(place.threat, [other.record for other in group[:i]])
            if not follows(place.record, known):
                raise InputError(
                    f"{place.name}: its verdicts contradict those at larger radii: a sample that "
                    "is robust in a ball is robust in every smaller ball."
                )
