"""Run a suite: one model at a time, one record at a time. A run can resume at any moment."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from mmtard_bench.attacks.base import Engine
from mmtard_bench.errors import InputError
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.evaluate import execute
from mmtard_bench.evaluation.headway import Progress
from mmtard_bench.evaluation.job import FAST, Job, prepare
from mmtard_bench.evaluation.loop import Batch, in_manifest_order
from mmtard_bench.evaluation.processes import Processes
from mmtard_bench.evaluation.progress import RunProgress
from mmtard_bench.evaluation.resume import Partial
from mmtard_bench.files import _unwritable, only_process
from mmtard_bench.models.clip import Clip
from mmtard_bench.records.curves import follows, known_from_above
from mmtard_bench.records.files import read_record
from mmtard_bench.records.schema import Record, Sample
from mmtard_bench.records.tables import percent
from mmtard_bench.tasks.samples import load_task
from mmtard_bench.text import slug
from mmtard_bench.types import Suite, ThreatModel


def run_folder(out: Path, suite: Suite, clip: Clip) -> Path:
    """The directory of a run's records: one per suite, and in it one per model and weights."""
    return out / suite.name / f"{slug(clip.name)}-{slug(clip.digest[:8])}"


def run_model(
    clip: Clip,
    suite: Suite,
    resources: Resources,
    *,
    out: Path,
    progress: RunProgress,
    engine: Engine = FAST,
) -> Iterator[Record]:
    """Evaluate one model on a suite; yields every record as soon as it is on disk.

    Each of several processes attacks its share of a record's samples. The first process holds the
    lock of the directory and writes the records; all processes yield them.

    Finished records of the same identity are read, not computed again; failed records are computed
    again. Raises InputError if another run uses the same directory, if a record there was edited,
    or if a record cannot be written. If the data of a task is missing, or a threat model does not
    suit it, the InputError comes after all other tasks have run.
    """
    folder = run_folder(out, suite, clip)
    processes = resources.processes
    missing: list[InputError] = []
    with ExitStack() as stack:
        processes.agree(lambda: stack.enter_context(_claimed(folder, processes)))
        for task, threats in suite.plan:
            try:
                data = processes.agree(
                    partial(
                        load_task,
                        task,
                        n=suite.n,
                        seed=suite.seed,
                        skip_damaged=suite.skip_damaged,
                    )
                )
            except InputError as error:
                missing.append(error)
                progress.say(f"{clip.name} {task.name}: FAILED, see below")
                continue
            above: list[Record] = []
            for threat in threats:
                try:
                    job = processes.agree(
                        partial(
                            prepare,
                            clip,
                            data,
                            threat,
                            seed=suite.seed,
                            suite=suite,
                            engine=engine,
                        )
                    )
                except InputError as error:
                    missing.append(error)
                    progress.say(f"{clip.name} {task.name} {threat.name}: FAILED, see below")
                    continue
                record = _run_record(job, resources, folder, progress, above)
                if suite.curve:
                    above.append(record)
                yield record
    if missing:
        raise InputError("\n".join(dict.fromkeys(map(str, missing))))


def _run_record(
    job: Job,
    resources: Resources,
    folder: Path,
    progress: RunProgress,
    above: Sequence[Record],
) -> Record:
    """Compute or read one record. Samples that are robust in ``above`` keep that verdict."""
    processes = resources.processes
    identity = processes.agree(lambda: job.identity)
    if len(set(processes.gather(identity, str))) > 1:
        raise InputError(
            f"The processes of this run do not see the same model, or not the same data, for "
            f"{job.clip.name} on {job.data.task.name}; all machines need the same files."
        )
    path = folder / file_name(job.data.task.name, job.threat, identity)
    name = f"{job.clip.name} {job.data.task.name} {job.threat.name}"
    known, notes = known_from_above(job.threat, above)
    finished = processes.lead(lambda: _finished(path, identity, known), Record)
    if finished is not None:
        _say(progress, name, finished, "already there")
        return finished
    kept = Partial(
        path.with_suffix(".partial"),
        identity,
        processes,
        suits=_suits(job),
        say=progress.say,
    )
    done = _settled(job, processes.gather(processes.agree(kept.read), list[Batch]))
    settled = {sample.id for batch in done for sample in batch.samples} | known.keys()
    progress.start(name, job.threat.name, total=len(job.data.labels), settled=len(settled))

    def report(here: Progress) -> None:
        count, robust = processes.elsewhere()
        progress.update(
            replace(
                here,
                settled=here.settled + count,
                robust=here.robust + robust,
                seen=here.seen + count,
            )
        )

    record = execute(
        job,
        resources,
        earlier=done,
        known=known,
        notes=notes,
        keep=kept.append,
        report=report,
    )
    progress.stop()
    record = processes.lead(lambda: _written(path, record), Record)
    if record.status == "ok":
        kept.remove()
    _say(progress, name, record, f"{record.seconds:.1f} s")
    return record


def _finished(path: Path, identity: str, known: Mapping[str, Sample]) -> Record | None:
    record = read_record(path) if path.exists() else None
    if record is None or record.identity != identity or record.status != "ok":
        return None
    return record if follows(record, known) else None


def _written(path: Path, record: Record) -> Record:
    record.save(path)
    return record


def _suits(job: Job) -> Callable[[Batch], bool]:
    """Whether a batch has samples of this job only, each once, with their labels and classes."""
    data = job.data
    labels = dict(zip(data.manifest.ids, data.labels, strict=True))

    def suits(batch: Batch) -> bool:
        embeddings = len(batch.samples) if data.task.metric == "retrieval" else 0
        return (
            len({sample.id for sample in batch.samples}) == len(batch.samples)
            and all(labels.get(sample.id) == sample.label for sample in batch.samples)
            and all(sample.prediction < len(data.classes) for sample in batch.samples)
            and len(batch.embeddings) == embeddings
        )

    return suits


def _settled(job: Job, found: Sequence[Sequence[Batch]]) -> list[Batch]:
    """The batches that the processes found on their disks, each once, in manifest order."""
    batches: dict[tuple[str, ...], Batch] = {}
    for batch in (batch for several in found for batch in several):
        batches.setdefault(tuple(sample.id for sample in batch.samples), batch)
    return in_manifest_order(job, batches.values())


def _say(progress: RunProgress, name: str, record: Record, how: str) -> None:
    if record.results is None:
        text = f"{name}: FAILED: {record.error}"
    else:
        results = record.results
        text = (
            f"{name}: clean {percent(results.clean_accuracy)}%, "
            f"robust {percent(results.robust_accuracy)}% ({how})"
            + "".join(f" [{flag.code}]" for flag in record.flags)
        )
    progress.say(text)


@contextmanager
def _claimed(folder: Path, processes: Processes) -> Iterator[None]:
    """Create the run's directory. The first process locks it; others may have other disks."""
    if processes.first:
        with only_process(folder):
            yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    yield


def file_name(task: str, threat: ThreatModel, identity: str) -> str:
    """The name of a record's file: task, threat model and the start of the identity."""
    return f"{slug(task)}--{slug(threat.name)}--{identity[:8]}.json"
