"""Small entries, and a forger who makes every hash and figure follow again."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import mmtard_bench as mb
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.evaluate import execute
from mmtard_bench.evaluation.job import prepare
from mmtard_bench.leaderboard.entries.card import Card, card_to_text
from mmtard_bench.leaderboard.entries.folder import read_entry
from mmtard_bench.leaderboard.entries.pack import pack
from mmtard_bench.leaderboard.entries.submit import submit
from mmtard_bench.records.curves import known_from_above
from mmtard_bench.records.schema import Record, Sample, aggregate, digest_of, identity_of
from mmtard_bench.tasks.samples import load_task
from mmtard_bench.tasks.suites import load_suite

CPU = Resources(torch.device("cpu"), batch_size=40)

SUITES = {
    "small-v1": """
name = "small-v1"
description = "a test"
n = 40
seed = 0
tasks = ["digits/digit"]
threats = [
  { attack = "pgd-5", norm = "linf", eps = "8/255" },
  { attack = "cw-linf-5", norm = "linf", eps = "8/255" },
]
""",
    "bent-v1": """
name = "bent-v1"
description = "a test of curves"
curve = true
n = 30
seed = 0
tasks = ["digits/digit"]
threats = [
  { attack = "pgd-3", norm = "linf", eps = "2/255" },
  { attack = "pgd-3", norm = "linf", eps = "6/255" },
]
""",
    "seen-v1": """
name = "seen-v1"
description = "a test of retrieval"
n = 16
seed = 0
tasks = ["digits/retrieval"]
threats = [{ attack = "pgd-2", norm = "linf", eps = "4/255" }]
""",
}


def run(model: str, suite_name: str) -> list[Record]:
    """The records of a model on a suite."""
    clip, suite = mb.load_model(model), load_suite(suite_name)
    found: list[Record] = []
    for task, threats in suite.plan:
        data = load_task(task, n=suite.n, seed=suite.seed)
        for threat in threats:
            job = prepare(clip, data, threat, seed=suite.seed, suite=suite)
            known, notes = known_from_above(threat, found) if suite.curve else ({}, [])
            found.append(execute(job, CPU, known=known, notes=notes))
    return found


def entry(root: Path, records: Sequence[Record], name: str, **facts: str) -> Path:
    """An honest entry of records."""
    submit(records, name=name, facts=facts, root=root)
    return root / name


def forged(record: Record, **changes: object) -> Record:
    """The record with other facts, and all that follows from them made to follow."""
    record = record.model_copy(update=changes)
    ids = digest_of([sample.id for sample in record.samples])
    changes = {"sample_ids_digest": ids, "results": aggregate(record.samples)}
    record = record.model_copy(update=changes)
    return record.model_copy(update={"identity": identity_of(record)})


def rewrite(
    folder: Path, change: Callable[[list[Record]], list[Record]], suite: str = "small-v1"
) -> None:
    """Change the records of an entry; the file's own hash is made anew."""
    (run,) = [run for run in read_entry(folder).runs if run.suite == suite]
    (folder / f"{suite}.json").write_text(pack(change(list(run.records))), "utf-8")


def each(**changes: object) -> Callable[[list[Record]], list[Record]]:
    """Change every record alike."""
    return lambda records: [forged(record, **changes) for record in records]


def first(**changes: object) -> Callable[[list[Record]], list[Record]]:
    """Change the first record."""
    return lambda records: [forged(records[0], **changes), *records[1:]]


def samples(
    change: Callable[[list[Sample]], list[Sample]],
) -> Callable[[list[Record]], list[Record]]:
    """Change the samples of every record alike."""
    return lambda records: [forged(r, samples=change(list(r.samples))) for r in records]


def robust(sample: Sample) -> Sample:
    """The sample as if nothing had broken it."""
    return sample.model_copy(update={"robust": True, "broken_by": None, "unconfirmed": False})


def overstated(some: Sequence[Sample], count: int) -> list[Sample]:
    """So many of the broken samples called robust."""
    broken = [sample.id for sample in some if sample.broken_by is not None][:count]
    assert len(broken) == count
    return [robust(sample) if sample.id in broken else sample for sample in some]


def recard(folder: Path, **changes: object) -> None:
    """Write other facts into a card, valid or not."""
    card = read_entry(folder).card
    body = card.model_dump() | changes
    (folder / "card.json").write_text(card_to_text(Card.model_construct(**body)), "utf-8")
