"""Score one (model, task, threat model): from facts to a record, without touching files."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import Tensor, nn

from mmtard_bench.attacks.base import AttackResult, norm_of
from mmtard_bench.attacks.checks import (
    Doubt,
    ModelError,
    check_square,
    inspect_model,
    require_logits,
)
from mmtard_bench.data.workers import in_chunks, worker_count
from mmtard_bench.environment import describe
from mmtard_bench.errors import InputError, StorageError
from mmtard_bench.job import Job, prepare
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.loading import load_model, require_clip
from mmtard_bench.records import Flag, Record, Sample, aggregate
from mmtard_bench.tasks.resolve import find_task, load_task
from mmtard_bench.tasks.zero_shot import ZeroShotClassifier
from mmtard_bench.types import Eps, Norm, Surface, Task, ThreatModel

PROBES = 32
"""Samples that the checks of the model look at."""


@dataclass(frozen=True)
class Batch:
    """Samples that are settled: what a run keeps so that it can go on from there."""

    samples: list[Sample]
    notes: list[str]
    seconds: float


@dataclass(frozen=True)
class Progress:
    """How far a record is: samples settled, of ``total``; those that stand, of the ``seen``."""

    settled: int
    standing: int
    seen: int
    total: int


def execute(
    job: Job,
    *,
    batch_size: int,
    device: torch.device,
    workers: int | None = None,
    done: Mapping[str, Sample] | None = None,
    spent: float = 0.0,
    notes: Sequence[str] = (),
    keep: Callable[[Batch], None] = lambda _: None,
    report: Callable[[Progress], None] = lambda _: None,
) -> Record:
    """Attack every correctly classified sample and confirm what was found.

    ``done`` holds samples settled by an interrupted evaluation of the same identity, ``spent``
    its seconds and ``notes`` its notes; ``keep`` is called with every batch that is settled.
    ``workers`` threads decode images while the attack runs (as many as fit if None, none for 0).
    Whatever the model or the attack does wrong, and images that cannot be used, become a record
    with status "error": a failure never counts as robust. Raises what ``keep`` raises if that is
    a StorageError.
    """
    started = time.monotonic()
    try:
        job.data.require_images(job.threat.surface, workers=workers)
        with _full_float32():
            evaluation = _Evaluation(job, batch_size, device, worker_count(workers))
            doubts = evaluation.inspect()
            samples, said = evaluation.run(
                dict(done or {}), [*job.data.notes, *notes], keep, report
            )
    except StorageError:
        raise
    except Exception as error:  # whatever a model or an attack raises, it must not look robust
        reason = str(error) if isinstance(error, InputError) else _describe(error)
        return _record(job, batch_size, device, error=reason, seconds=_since(started, spent))
    square = check_square([sample.broken_by for sample in samples])
    doubts += [square] if square else []
    unconfirmed = sum(sample.unconfirmed for sample in samples)
    if unconfirmed:
        detail = (
            f"{unconfirmed} adversarial images were not misclassified by a fresh pass; they count "
            "as broken. A few come from rounding, many from a randomised model"
        )
        doubts.append(Doubt("unconfirmed-adversarials", detail))
    return _record(
        job,
        batch_size,
        device,
        samples=samples,
        doubts=doubts,
        notes=said,
        seconds=_since(started, spent),
    )


def evaluate(
    model: str | Clip,
    *,
    task: str | Task,
    threat: str,
    eps: str,
    norm: Norm | None = None,
    surface: Surface = "native",
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
) -> Record:
    """Score a model on a task under a threat model.

    ``model`` is a ``Clip`` or anything ``load_model`` takes; ``task`` a registered task, a data
    spec (``parquet:``, ``imagefolder:``, ``hub:``) or a ``Task``; ``eps`` an exact fraction such
    as "8/255"; ``norm`` is "linf" unless given ("l2" for cw-l2); ``n`` samples are drawn with
    ``seed``, all if None. Raises InputError for bad input; a model that fails under evaluation
    gives a record with ``status == "error"``.
    """
    clip = load_model(model) if isinstance(model, str) else require_clip(model, "the model")
    chosen = find_task(task) if isinstance(task, str) else task
    if not 0 <= seed < 2**32:
        raise InputError(f"The seed {seed} is out of range; expected 0 to 2^32 - 1.")
    norm = norm or ("l2" if threat == "cw-l2" else "linf")
    attacker = ThreatModel(threat, norm, Eps.parse(eps), surface)
    job = prepare(clip, load_task(chosen, n=n, seed=seed), attacker, seed=seed)
    return execute(job, batch_size=batch_size, device=find_device(device))


def find_device(name: str) -> torch.device:
    """A device by name; "auto" is a CUDA device if there is one. Raises InputError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:  # unknown names and absent devices raise various errors
        raise InputError(
            f"The device '{name}' cannot be used: {_describe(error)}; expected auto, cpu or cuda."
        ) from error
    return device


@contextmanager
def _full_float32() -> Iterator[None]:
    """Keep GPUs from rounding convolutions and products to TF32 behind a float32 record."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = False
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


class _Watched(nn.Module):
    """The classifier as an attack sees it: remembers whether logits and gradients were finite.

    An attack that compares NaN with a label could take it for a right answer, and one that
    follows the sign of NaN stands still; both would look robust. The verdict is read once a
    batch, so that no step waits for the device.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def forward(self, images: Tensor) -> Tensor:
        if images.requires_grad:
            images = images.clone()
            images.register_hook(self._look)  # type: ignore[no-untyped-call]
        logits: Tensor = self.model(images)
        self._look(logits.detach())
        return logits

    def _look(self, values: Tensor) -> None:
        self.finite = self.finite & torch.isfinite(values).all()


class _Evaluation:
    """One job on one device: the classifier with its head, and the loop over batches."""

    def __init__(self, job: Job, batch_size: int, device: torch.device, workers: int) -> None:
        self.job = job
        self.batch_size = batch_size
        self.workers = workers
        self.device = device
        job.clip.to(device)
        self.classifier = ZeroShotClassifier(job.clip, job.data.classes, job.data.templates, device)
        self.labels = torch.tensor(job.data.labels, device=device)

    def _image(self, row: int) -> Tensor:
        job = self.job
        return job.data.image(row, surface=job.threat.surface, preprocess=job.clip.preprocess)

    def _predict(self, images: Tensor, size: int) -> Tensor:
        """Predicted labels (N,) by a fresh float32 pass, ``size`` images at a time."""
        with torch.no_grad():
            parts = torch.split(images, size)
            logits = torch.cat([self.classifier(part) for part in parts])
        require_logits(logits, rows=len(images), classes=len(self.job.data.classes))
        return logits.argmax(1)

    def inspect(self) -> list[Doubt]:
        """Check the model on the first samples of the manifest."""
        rows = range(min(PROBES, len(self.labels)))
        return inspect_model(
            self.classifier,
            torch.stack([self._image(row) for row in rows]).to(self.device),
            self.labels[: len(rows)],
            classes=len(self.job.data.classes),
            scale=float(self.job.clip.scale()),
        )

    def run(
        self,
        done: dict[str, Sample],
        notes: list[str],
        keep: Callable[[Batch], None],
        report: Callable[[Progress], None],
    ) -> tuple[list[Sample], list[str]]:
        """Settle every sample that ``done`` lacks. Returns all of them, in order, and notes."""
        started = time.monotonic()
        notes = list(dict.fromkeys(notes))
        with closing(in_chunks(self._chunks(done), self._image, workers=self.workers)) as chunks:
            for rows, images in chunks:
                batch = torch.stack(images).to(self.device)
                samples, said = self._settle(rows, batch, done, report)
                done.update((sample.id, sample) for sample in samples)
                notes = list(dict.fromkeys([*notes, *said]))
                keep(Batch(samples, said, time.monotonic() - started))
                started = time.monotonic()
        return [done[sample] for sample in self.job.data.manifest.ids], notes

    def _settle(
        self,
        rows: Sequence[int],
        images: Tensor,
        done: Mapping[str, Sample],
        report: Callable[[Progress], None],
    ) -> tuple[list[Sample], list[str]]:
        """Verdicts of the samples of a chunk, and notes."""
        ids = self.job.data.manifest.ids
        # In one piece for a block: who is attacked together must not follow the batch size.
        predictions = self._predict(images, self.job.attack.block or self.batch_size)
        right = (predictions == self.labels[rows]).tolist()
        # Of a block that was cut short and is done again, some samples are in ``done``.
        here = {ids[row] for row in rows}
        others = [sample for name, sample in done.items() if name not in here]
        settled = len(others) + right.count(False)
        standing = sum(sample.robust for sample in others) + right.count(True)
        seen = len(others) + len(rows)

        def decided(count: int, broken: int) -> None:
            report(Progress(settled + count, standing - broken, seen, len(ids)))

        decided(0, 0)
        attacked = [row for row, ok in zip(rows, right, strict=True) if ok]
        clean = images[torch.tensor(right, device=images.device)]
        result = self._attack(clean, attacked, decided)
        samples = self._samples(rows, attacked, clean, predictions.tolist(), result)
        return samples, result.notes

    def _chunks(self, done: Mapping[str, Sample]) -> list[list[int]]:
        """Rows of the manifest that go to the attack together.

        Blocks of reference attacks are fixed by the manifest; other attacks treat samples alone.
        """
        ids = self.job.data.manifest.ids
        block = self.job.attack.block
        size = block or self.batch_size
        rows = list(range(len(ids)))
        if block is None:
            rows = [row for row in rows if ids[row] not in done]
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [chunk for chunk in chunks if any(ids[row] not in done for row in chunk)]

    def _attack(
        self, images: Tensor, rows: list[int], decided: Callable[[int, int], None]
    ) -> AttackResult:
        if not rows:
            return AttackResult(images, [], [], [])
        watched = _Watched(self.classifier, self.device)
        result = self.job.attack.run(
            watched,
            images,
            self.labels[rows],
            ids=[self.job.data.manifest.ids[row] for row in rows],
            seed=self.job.seed,
            decided=decided,
        )
        if not watched.finite:
            raise ModelError(
                "The model returned NaN or infinite logits or gradients while it was attacked."
            )
        return result

    def _samples(
        self,
        rows: Sequence[int],
        attacked: Sequence[int],
        images: Tensor,
        predictions: list[int],
        result: AttackResult,
    ) -> list[Sample]:
        """Verdicts of a batch; ``images`` and ``result`` cover the rows that were attacked."""
        data = self.job.data
        place = {row: i for i, row in enumerate(attacked)}
        fooled = self._confirm(attacked, images, result)
        samples = []
        for row, prediction in zip(rows, predictions, strict=True):
            i = place.get(row)
            claim = result.broken_by[i] if i is not None else None
            # An unconfirmed claim counts: the attack gave the sample up as broken, so nobody can
            # say that it would have stood against the rest.
            broken = claim is not None
            samples.append(
                Sample(
                    id=data.manifest.ids[row],
                    label=data.labels[row],
                    prediction=prediction,
                    clean_correct=i is not None,
                    robust=i is not None and not broken,
                    broken_by=claim,
                    unconfirmed=broken and row not in fooled,
                    forward=0 if i is None else result.forward[i],
                    backward=0 if i is None else result.backward[i],
                )
            )
        return samples

    def _confirm(self, attacked: Sequence[int], images: Tensor, result: AttackResult) -> set[int]:
        """The rows whose adversarial image is in ball and box and fools a fresh pass."""
        claimed = [i for i, name in enumerate(result.broken_by) if name is not None]
        if not claimed:
            return set()
        found = result.adversarial[claimed].float()
        self._require_in_ball(found, images[claimed])
        rows = [attacked[i] for i in claimed]
        fooled = (self._predict(found, self.batch_size) != self.labels[rows]).tolist()
        return {row for row, was_fooled in zip(rows, fooled, strict=True) if was_fooled}

    def _require_in_ball(self, found: Tensor, images: Tensor) -> None:
        threat = self.job.threat
        if not torch.isfinite(found).all():
            raise ModelError(f"The attack {threat.attack} returned NaN or infinite pixels.")
        if float(found.min()) < 0 or float(found.max()) > 1:
            raise ModelError(f"The attack {threat.attack} left the box [0, 1].")
        distance = norm_of(found - images, threat.norm)
        # Pixels near 1 are known to 6e-8; an L2 norm adds up many such errors.
        if float(distance.max()) > float(threat.eps) * (1 + 1e-5) + 1e-6:
            raise ModelError(
                f"The attack {threat.attack} left the {threat.norm} ball: distance "
                f"{float(distance.max()):.6f}, eps {float(threat.eps):.6f}."
            )


def _since(started: float, spent: float) -> float:
    return round(spent + time.monotonic() - started, 3)


def _describe(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _record(
    job: Job,
    batch_size: int,
    device: torch.device,
    *,
    seconds: float,
    samples: list[Sample] | None = None,
    error: str | None = None,
    doubts: Sequence[Doubt] = (),
    notes: Sequence[str] = (),
) -> Record:
    model, task, threat = job.facts
    return Record(
        schema_version=1,
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
        flags=[Flag(code=doubt.code, detail=doubt.detail) for doubt in doubts],
        notes=list(notes),
        environment=describe(device, batch_size),
        seconds=seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        samples=samples or [],
    )
