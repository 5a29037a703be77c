"""Load what a record was made with: its suite, data, threat model and model."""

import re
from collections.abc import Sequence
from pathlib import Path

from mmtard_bench.errors import InputError
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.loading import load_known
from mmtard_bench.models.specs import is_data
from mmtard_bench.records.schema import Record, digest_of
from mmtard_bench.tasks.samples import TaskData, load_task
from mmtard_bench.tasks.suites import load_suite, shipped_suites, with_overrides
from mmtard_bench.types import Eps, Suite, ThreatModel


def suite_of(record: Record, file: Path | None = None) -> Suite:
    """The suite of a record: one that ships, or one from a TOML file.

    If the run had --n or --seed, the suite has them too. Raises InputError if the digest of the
    record's suite differs.
    """
    if record.suite is None:
        raise InputError("A record is of no suite, so its samples are not known.")
    base, *changes = record.suite.name.split("+")
    if file is None and base not in shipped_suites():
        raise InputError(
            f"A record is of the suite '{base}', which does not ship; expected one of "
            f"{', '.join(shipped_suites())}."
        )
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
    """Load the samples of a record from their data set.

    Raises InputError if the suite does not have the task, or draws other samples.
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


def chosen(data: TaskData, ids: Sequence[str]) -> TaskData:
    """The samples with these ids. Raises InputError if one does not exist."""
    rows = {name: row for row, name in enumerate(data.manifest.ids)}
    unknown = [name for name in ids if name not in rows]
    if unknown:
        raise InputError(f"'{unknown[0]}' is no sample of {data.task.name} here.")
    return data.at([rows[name] for name in ids])


def threat_of(record: Record) -> ThreatModel:
    """The threat model of a record."""
    threat = record.threat
    eps = Eps.parse(threat.eps, norm=threat.norm)
    return ThreatModel(threat.attack, threat.norm, eps, threat.surface)


def load_model_of(record: Record, spec: str | None = None) -> Clip:
    """Load the model of a record, from ``spec`` or, by default, from the record's source.

    Raises InputError if it cannot be loaded, if the record's source would execute code, or if the
    weights differ from the record's.
    """
    where = spec or record.model.source
    if spec is None and not is_data(where):
        raise InputError(
            f"The record's model is '{where}', which no record can have loaded as data; if you "
            "know where it is, and trust it, say so: --weights SPEC."
        )
    return load_known(where, record.model.digest, "the record")
