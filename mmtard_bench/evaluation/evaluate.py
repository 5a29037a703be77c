"""Score one model on one task under one threat model; no file is written."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, InstanceOf, SkipValidation

from mmtard_bench.attacks.base import Engine, EngineName, Precision
from mmtard_bench.errors import InputError, StorageError, reason
from mmtard_bench.evaluation.black_box import check_by_square
from mmtard_bench.evaluation.checks import check_samples
from mmtard_bench.evaluation.device import Resources, describe, find_device, full_float32
from mmtard_bench.evaluation.headway import Progress
from mmtard_bench.evaluation.job import Job, prepare
from mmtard_bench.evaluation.loop import Batch, Evaluation
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.loading import load_model, require_clip
from mmtard_bench.records.black_box import BlackBox
from mmtard_bench.records.curves import contradictions
from mmtard_bench.records.schema import SCHEMA_VERSION, Flag, Record, Sample, aggregate
from mmtard_bench.schema import Text, Whole, checked
from mmtard_bench.tasks.retrieval import NOTE
from mmtard_bench.tasks.samples import find_task, load_task
from mmtard_bench.types import Eps, Several, Surface, Task, ThreatModel, ThreatNorm


class _ReportFailed(BaseException):
    """The caller's own function of progress raised: no failure of the model or the attack."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def execute(
    job: Job,
    resources: Resources,
    *,
    earlier: Sequence[Batch] = (),
    known: Mapping[str, Sample] | None = None,
    notes: Sequence[str] = (),
    keep: Callable[[Batch], None] = lambda _: None,
    report: Callable[[Progress], None] = lambda _: None,
) -> Record:
    """Attack every correctly classified sample and confirm what was found.

    ``earlier`` holds the batches of an interrupted evaluation of the same identity; ``keep`` is
    called with every batch that is settled. ``known`` holds samples whose verdicts follow from
    records at larger radii, and ``notes`` say so; where a batch says otherwise, ``known`` counts,
    and a note says so. Of several processes each settles its share, and all return the record.
    Whatever the model or the attack does wrong, and images that cannot be used, become a record
    with status "error": a failure never counts as robust. Raises what ``keep`` raises if that is a
    StorageError, and what ``report`` raises.
    """
    started = time.monotonic()
    spent = sum(batch.seconds for batch in earlier)
    used = resources.batch_size or 0
    processes = resources.processes

    def tell(progress: Progress) -> None:
        try:
            report(progress)
        except Exception as error:
            raise _ReportFailed(error) from error

    def settle() -> tuple[Evaluation, list[Flag], list[Batch]]:
        nonlocal used
        evaluation = Evaluation(job, resources, known or {})
        doubts, own = evaluation.inspect(), evaluation.run(earlier, keep, tell)
        used = evaluation.batch_size
        return evaluation, doubts, own

    try:
        with full_float32():
            evaluation, doubts, own = processes.agree(settle)
            every = [*earlier, *evaluation.collect(own)]
            samples = evaluation.in_order(every)
            check = check_by_square(job, resources, samples, tell)
        found = (note for batch in every for note in batch.notes)
        against = contradictions(known or {}, (s for batch in earlier for s in batch.samples))
        said = [*job.clip.notes, *job.data.notes, *notes, *against, *found]
        said = list(dict.fromkeys(said))
    except StorageError:
        raise
    except _ReportFailed as failed:
        raise failed.error from None
    except Exception as error:  # whatever a model or an attack raises, it must not look robust
        seconds = _since(started, spent)
        return _record(job, resources, used, error=reason(error), seconds=seconds)
    if job.data.task.metric == "retrieval":
        said.append(NOTE)
    doubts += check_samples(samples, job.threat.attack, check)
    return _record(
        job,
        resources,
        used,
        samples=samples,
        doubts=doubts,
        notes=said,
        seconds=_since(started, spent),
        model_seconds=sum(batch.model_seconds for batch in every),
        black_box=check,
    )


@checked
@full_float32()
def evaluate(
    model: SkipValidation[str | Path | Clip],
    *,
    task: str | InstanceOf[Task],
    threat: Text | InstanceOf[ThreatModel],
    eps: SkipValidation[str | None] = None,
    norm: ThreatNorm | None = None,
    surface: Surface | None = None,
    n: Several | None = None,
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0,
    batch_size: Several | None = None,
    device: str | InstanceOf[torch.device] = "auto",
    engine: EngineName = "fast",
    precision: Precision = "float32",
    black_box: bool = True,
    progress: SkipValidation[Callable[[Progress], None]] = lambda _: None,
) -> Record:
    """Score a model on a task under a threat model.

    Args:
        model: A ``Clip`` or anything that ``load_model`` takes.
        task: A registered task, a data spec (``parquet:``, ``imagefolder:``, ``saved:``, ``wds:``,
            ``hub:``) or a ``Task``, such as ``task_of`` makes.
        threat: The name of an attack, or a ``ThreatModel``, which has the next three arguments.
        eps: The radius as an exact fraction such as "8/255"; "1/1" is one edit of a class name.
        norm: "linf", "l2" or "levenshtein"; default: "l2" for cw-l2, "levenshtein" for attacks on
            text, otherwise "linf".
        surface: "native" (default): the pixels of the data set; "model": those of the model's
            input size.
        n: The number of samples, drawn with ``seed``; default: all.
        seed: The seed of the samples and of random starts.
        batch_size: The most images per pass; default: what fits in memory. It changes no verdict.
        device: "auto" (a GPU if there is one), or a device of torch.
        engine: "fast" (our attacks) or "reference" (the reference libraries).
        precision: The precision of the fast attacks' passes, "float32" or "bfloat16".
        black_box: Attack some of the robust samples by Square, to see whether gradients mislead
            the attack; about 5% more passes. It changes no verdict.
        progress: Is called with a ``Progress`` several times per second.

    Returns:
        The record. A model that fails under evaluation, and images that cannot be used, give a
        record with the status "error".

    Raises:
        InputError: For bad input.

    Examples:
        >>> record = mb.evaluate(
        ...     "tiny-clip", task="digits/digit", threat="pgd-5", eps="2/255", n=8
        ... )
        >>> record.results.n
        8
    """
    attacker = threat_model(threat, eps, norm, surface)
    on = find_device(device)
    clip = load_model(model) if isinstance(model, str | Path) else require_clip(model, "the model")
    chosen = find_task(task) if isinstance(task, str) else task
    data = load_task(chosen, n=n, seed=seed)
    job = prepare(clip, data, attacker, seed=seed, engine=Engine(engine, precision))
    return execute(job, Resources(on, batch_size, black_box=black_box), report=progress)


def threat_model(
    threat: str | ThreatModel, eps: str | None, norm: ThreatNorm | None, surface: Surface | None
) -> ThreatModel:
    """The threat model that such arguments of ``evaluate`` describe. Raises InputError."""
    if isinstance(threat, ThreatModel):
        own = (str(threat.eps), threat.norm, threat.surface)
        for given, has in zip((eps, norm, surface), own, strict=True):
            if given is not None and str(given) != has:
                raise InputError(
                    f"The threat model {threat.name} has {has}, but {given} was given beside it; "
                    "leave eps, norm and surface out, or write the threat as the attack's name."
                )
        return threat
    if norm is None:
        text = threat.startswith("text-")
        norm = "levenshtein" if text else "l2" if threat == "cw-l2" else "linf"
    return ThreatModel(threat, norm, Eps.parse(eps, norm=norm), surface or "native")


def _since(started: float, spent: float) -> float:
    return round(spent + time.monotonic() - started, 3)


def _record(
    job: Job,
    resources: Resources,
    batch_size: int,
    *,
    seconds: float,
    model_seconds: float = 0.0,
    samples: list[Sample] | None = None,
    error: str | None = None,
    doubts: Sequence[Flag] = (),
    notes: Sequence[str] = (),
    black_box: BlackBox | None = None,
) -> Record:
    model, task, threat = job.facts
    return Record(
        schema_version=SCHEMA_VERSION,
        identity=job.identity,
        status="ok" if error is None else "error",
        error=error,
        suite=job.suite,
        model=model,
        task=task,
        threat=threat,
        seed=job.seed,
        precision="float32",
        sample_ids_digest=job.sample_ids_digest,
        results=aggregate(samples) if samples else None,
        black_box=black_box,
        flags=list(doubts),
        notes=list(notes),
        environment=describe(resources.device, batch_size, resources.processes.world),
        seconds=seconds,
        model_seconds=round(model_seconds, 3) if job.attack.refills else None,
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        samples=samples or [],
    )
