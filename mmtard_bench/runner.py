"""Walk a suite: one model at a time, one record at a time, resumable at any moment."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from mmtard_bench.attacks.base import Engine
from mmtard_bench.batches import Batch, Embeddings
from mmtard_bench.curve import follows, known_from_above
from mmtard_bench.errors import InputError, StorageError
from mmtard_bench.evaluation import execute
from mmtard_bench.job import FAST, Job, prepare
from mmtard_bench.markdown import slug
from mmtard_bench.models.clip import Clip
from mmtard_bench.progress import RunProgress
from mmtard_bench.records import (
    Record,
    Sample,
    digest_of,
    read_record,
    write_atomically,
    write_record,
)
from mmtard_bench.summary import percent
from mmtard_bench.tasks.resolve import load_task
from mmtard_bench.types import Suite, ThreatModel


def with_overrides(suite: Suite, *, n: int | None, seed: int | None) -> Suite:
    """A suite with another sample count or seed: another suite, with a name that says so."""
    name, digest = suite.name, suite.digest
    for letter, value, own in (("n", n, suite.n), ("seed", seed, suite.seed)):
        if value is not None and value != own:
            name += f"+{letter}{value}"
            digest = digest_of([digest, letter, value])
    return replace(
        suite,
        name=name,
        digest=digest,
        n=suite.n if n is None else n,
        seed=suite.seed if seed is None else seed,
    )


def run_folder(out: Path, suite: Suite, clip: Clip) -> Path:
    """Where a run's records go: a directory a suite, in it one a model and its weights."""
    return out / suite.name / f"{slug(clip.name)}-{slug(clip.digest[:8])}"


def run_model(
    clip: Clip,
    suite: Suite,
    *,
    out: Path,
    batch_size: int | None,
    device: torch.device,
    progress: RunProgress,
    workers: int | None = None,
    engine: Engine = FAST,
) -> Iterator[Record]:
    """Evaluate one model on a suite; yields every record as soon as it is on disk.

    Records of this very configuration that are finished are read, not made again; failed ones
    are tried again. Raises InputError if another process works in the same run directory, if a
    record there was edited, or if one cannot be written; and, after all other tasks had their
    turn, if the data of one could not be had or a threat model does not suit it.
    """
    folder = run_folder(out, suite, clip)
    missing: list[InputError] = []
    with only_process(folder):
        for task, threats in suite.plan:
            try:
                data = load_task(task, n=suite.n, seed=suite.seed, skip_damaged=suite.skip_damaged)
            except InputError as error:
                missing.append(error)
                progress.say(f"{clip.name} {task.name}: FAILED, see below")
                continue
            above: list[Record] = []
            for threat in threats:
                try:
                    job = prepare(clip, data, threat, seed=suite.seed, suite=suite, engine=engine)
                except InputError as error:
                    missing.append(error)
                    progress.say(f"{clip.name} {task.name} {threat.name}: FAILED, see below")
                    continue
                record = _run_record(job, folder, batch_size, device, progress, workers, above)
                if suite.curve:
                    above.append(record)
                yield record
    if missing:
        raise InputError("\n".join(dict.fromkeys(map(str, missing))))


def _run_record(
    job: Job,
    folder: Path,
    batch_size: int | None,
    device: torch.device,
    progress: RunProgress,
    workers: int | None,
    above: Sequence[Record],
) -> Record:
    """Make or read one record; samples that stood in ``above`` are taken over from there."""
    identity = job.identity
    path = folder / _file_name(job.data.task.name, job.threat, identity)
    name = f"{job.clip.name} {job.data.task.name} {job.threat.name}"
    known, notes = known_from_above(job.threat, above)
    if path.exists():
        record = read_record(path)
        if record.identity == identity and record.status == "ok" and follows(record, known):
            _say(progress, name, record, "already there")
            return record
    partial = Partial(path.with_suffix(".partial"), identity)
    done = partial.read()
    settled = {sample.id: sample for batch in done for sample in batch.samples}
    embeddings = {
        sample.id: pair
        for batch in done
        for sample, pair in zip(batch.samples, batch.embeddings, strict=False)
    }
    progress.start(name, job.threat.name, total=len(job.data.labels), settled=len(settled | known))
    record = execute(
        job,
        batch_size=batch_size,
        device=device,
        workers=workers,
        done=settled,
        known=known,
        spent=sum(batch.seconds for batch in done),
        notes=[*notes, *(note for batch in done for note in batch.notes)],
        embeddings=embeddings,
        keep=partial.append,
        report=progress.update,
    )
    progress.stop()
    write_record(path, record)
    if record.status == "ok":
        partial.remove()
    _say(progress, name, record, f"{record.seconds:.1f} s")
    return record


def _say(progress: RunProgress, name: str, record: Record, how: str) -> None:
    if record.results is None:
        text = f"{name}: FAILED: {record.error}"
    else:
        results = record.results
        text = (
            f"{name}: clean {percent(results.clean_accuracy)}%, "
            f"robust {percent(results.robust_accuracy)}% ({how})"
        )
    progress.say(text)


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold a directory's lock; the system releases it however the process ends.

    Raises InputError if another process holds it, or if the directory cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(
            f"Another process is working in {folder}; wait for it, or give another --out."
        ) from error
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written: {error.strerror or error}. Choose another --out."
        ) from error
    try:
        yield
    finally:
        lock.release()


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    identity: str
    seconds: float
    notes: list[str]
    samples: list[Sample]
    embeddings: list[Embeddings] = []


class Partial:
    """Batches of an unfinished record, one JSON line each, so that little is lost."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.identity = identity

    def read(self) -> list[Batch]:
        """The batches that are whole and of this identity; a line cut short ends them."""
        if not self.path.exists():
            return []
        batches = []
        lines = self.path.read_bytes().decode("utf-8", errors="replace").split("\n")
        for text in lines[:-1]:
            try:
                line = _Line.model_validate_json(text)
            except ValidationError:
                break
            if line.identity == self.identity:
                batches.append(Batch(line.samples, line.notes, line.seconds, line.embeddings))
        if len(batches) != len(lines) - 1 or lines[-1]:
            # A line cut short by a crash must not run into the next one.
            write_atomically(self.path, "".join(map(self._line, batches)))
        return batches

    def append(self, batch: Batch) -> None:
        """Add a batch. Raises StorageError if the disk does not take it."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._line(batch))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"{self.path} could not be written: {error.strerror or error}. Finished records "
                "are kept; free space or choose another --out, and run the same command again."
            ) from error

    def remove(self) -> None:
        """Forget the batches, once the whole record is on disk."""
        self.path.unlink(missing_ok=True)

    def _line(self, batch: Batch) -> str:
        line = _Line(
            identity=self.identity,
            seconds=batch.seconds,
            notes=batch.notes,
            samples=batch.samples,
            embeddings=batch.embeddings,
        )
        return line.model_dump_json() + "\n"


def _file_name(task: str, threat: ThreatModel, identity: str) -> str:
    return f"{slug(task)}--{slug(threat.name)}--{identity[:8]}.json"
