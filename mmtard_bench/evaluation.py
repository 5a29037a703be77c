"""Score one (model, task, threat model): from facts to a record, without touching files."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch
from torch import Tensor

from mmtard_bench.attacks.base import AttackResult, norm_of
from mmtard_bench.attacks.checks import (
    Doubt,
    ModelError,
    check_square,
    inspect_model,
)
from mmtard_bench.data.workers import in_chunks, worker_count
from mmtard_bench.edits import NameEdit, names_another_class
from mmtard_bench.environment import describe
from mmtard_bench.errors import InputError, StorageError
from mmtard_bench.job import Job, prepare
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.loading import load_model, require_clip
from mmtard_bench.recall import Ranks
from mmtard_bench.records import Flag, Record, Sample, aggregate
from mmtard_bench.tasks.resolve import find_task, load_task
from mmtard_bench.tasks.retrieval import RetrievalScorer, notes_on
from mmtard_bench.tasks.scoring import Verdict, ZeroShotScorer
from mmtard_bench.types import Eps, Surface, Task, ThreatModel, ThreatNorm

PROBES = 32
"""Samples that the checks of the model look at."""

Embeddings = tuple[str, str]
"""A sample's image embeddings, clean and adversarial; see ``Verdict``."""


@dataclass(frozen=True)
class Batch:
    """Samples that are settled: what a run keeps so that it can go on from there.

    In retrieval ``embeddings`` has each sample's, clean and adversarial: captions are ranked once
    all images are there.
    """

    samples: list[Sample]
    notes: list[str]
    seconds: float
    embeddings: list[Embeddings] = field(default_factory=list)


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
    embeddings: Mapping[str, Embeddings] | None = None,
    keep: Callable[[Batch], None] = lambda _: None,
    report: Callable[[Progress], None] = lambda _: None,
) -> Record:
    """Attack every correctly classified sample and confirm what was found.

    ``done`` holds samples settled by an interrupted evaluation of the same identity, ``spent``
    its seconds, ``notes`` its notes and ``embeddings`` those of its batches; ``keep`` is called
    with every batch that is settled. ``workers`` threads decode images while the attack runs (as
    many as fit if None, none for 0). Whatever the model or the attack does wrong, and images that
    cannot be used, become a record with status "error": a failure never counts as robust. Raises
    what ``keep`` raises if that is a StorageError.
    """
    started = time.monotonic()
    try:
        job.data.require_images(job.threat.surface, workers=workers)
        with _full_float32():
            evaluation = _Evaluation(
                job, batch_size, device, worker_count(workers), dict(embeddings or {})
            )
            doubts = evaluation.inspect()
            samples, said = evaluation.run(
                dict(done or {}), [*job.data.notes, *notes], keep, report
            )
            samples = evaluation.rank_captions(samples)
    except StorageError:
        raise
    except Exception as error:  # whatever a model or an attack raises, it must not look robust
        reason = str(error) if isinstance(error, InputError) else _describe(error)
        return _record(job, batch_size, device, error=reason, seconds=_since(started, spent))
    if job.data.task.metric == "retrieval":
        said += notes_on(job.data.matches, len(job.data.classes))
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
    norm: ThreatNorm | None = None,
    surface: Surface = "native",
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
) -> Record:
    """Score a model on a task under a threat model.

    ``model`` is a ``Clip`` or anything ``load_model`` takes; ``task`` a registered task, a data
    spec (``parquet:``, ``imagefolder:``, ``wds:``, ``hub:``) or a ``Task``; ``eps`` an exact
    fraction such as "8/255"; ``norm`` is "linf" unless given ("l2" for cw-l2, "levenshtein" for
    attacks on text alone, whose eps is "1/1" for one edit); ``n`` samples are drawn with ``seed``,
    all if None.
    Raises InputError for bad input; a model that fails under evaluation, and images that cannot be
    used, give a record with ``status == "error"``.
    """
    clip = load_model(model) if isinstance(model, str) else require_clip(model, "the model")
    chosen = find_task(task) if isinstance(task, str) else task
    if not 0 <= seed < 2**32:
        raise InputError(f"The seed {seed} is out of range; expected 0 to 2^32 - 1.")
    if norm is None:
        text = threat.startswith("text-")
        norm = "levenshtein" if text else "l2" if threat == "cw-l2" else "linf"
    attacker = ThreatModel(threat, norm, Eps.parse(eps, norm=norm), surface)
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


class _Evaluation:
    """One job on one device: the classifier with its head, and the loop over batches."""

    def __init__(
        self,
        job: Job,
        batch_size: int,
        device: torch.device,
        workers: int,
        embeddings: dict[str, Embeddings],
    ) -> None:
        self.job = job
        self.embeddings = embeddings
        self.batch_size = batch_size
        self.workers = workers
        self.device = device
        job.clip.to(device)
        scorer = RetrievalScorer if job.data.task.metric == "retrieval" else ZeroShotScorer
        self.scorer = scorer(job.clip, job.data, device)

    def _image(self, row: int) -> Tensor:
        job = self.job
        return job.data.image(row, surface=job.threat.surface, preprocess=job.clip.preprocess)

    def inspect(self) -> list[Doubt]:
        """Check the model on the first samples of the manifest."""
        rows = range(min(PROBES, len(self.scorer.labels)))
        return inspect_model(
            self.scorer.classifier,
            torch.stack([self._image(row) for row in rows]).to(self.device),
            self.scorer.labels[: len(rows)],
            classes=self.scorer.columns,
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
                settled = self._settle(rows, batch, done, report, started=started)
                done.update((sample.id, sample) for sample in settled.samples)
                notes = list(dict.fromkeys([*notes, *settled.notes]))
                keep(settled)
                started = time.monotonic()
        return [done[sample] for sample in self.job.data.manifest.ids], notes

    def _settle(
        self,
        rows: Sequence[int],
        images: Tensor,
        done: Mapping[str, Sample],
        report: Callable[[Progress], None],
        *,
        started: float,
    ) -> Batch:
        """Attack the samples of a chunk; its seconds count from ``started``."""
        ids = self.job.data.manifest.ids
        # In one piece for a block: who is attacked together must not follow the batch size.
        size = self.job.attack.block or self.batch_size
        verdicts = self.scorer.judge(images, rows, size=size)
        right = [verdict.right for verdict in verdicts]
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
        after = self._confirm(attacked, clean, result)
        samples = self._samples(dict(zip(rows, verdicts, strict=True)), attacked, after, result)
        found = [
            (v.embedding, after.get(row, v).embedding)
            for row, v in zip(rows, verdicts, strict=True)
            if v.embedding
        ]
        self.embeddings.update(zip((s.id for s in samples), found, strict=False))
        return Batch(samples, result.notes, time.monotonic() - started, found)

    def rank_captions(self, samples: list[Sample]) -> list[Sample]:
        """In retrieval, the samples with the ranks of their captions among all images."""
        if not isinstance(self.scorer, RetrievalScorer):
            return samples
        captions = self.scorer.caption_ranks(self.embeddings)
        return [
            sample.model_copy(
                update={"ranks": Ranks(image=sample.ranks.image, captions=captions[sample.id])}
            )
            for sample in samples
            if sample.ranks is not None
        ]

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
        watched = self.scorer.watched()
        result = self.job.attack.run(
            watched,
            images,
            self.scorer.labels[rows],
            ids=[self.job.data.manifest.ids[row] for row in rows],
            seed=self.job.seed,
            decided=decided,
        )
        watched.require_finite()
        return result

    def _samples(
        self,
        before: Mapping[int, Verdict],
        attacked: Sequence[int],
        after: Mapping[int, Verdict],
        result: AttackResult,
    ) -> list[Sample]:
        """Samples of a batch, from verdicts by row; ``result`` covers the rows attacked."""
        data = self.job.data
        place = {row: i for i, row in enumerate(attacked)}
        samples = []
        for row, clean in before.items():
            i = place.get(row)
            last = after.get(row, clean)
            claim = result.broken_by[i] if i is not None else None
            if i is not None and not last.right:
                claim = claim or self.job.threat.attack
            # An unconfirmed claim counts: the attack gave the sample up as broken, so nobody can
            # say that it would have stood against the rest.
            broken = claim is not None
            name = result.names[i] if broken and i is not None and result.names else None
            samples.append(
                Sample(
                    id=data.manifest.ids[row],
                    label=data.labels[row],
                    prediction=clean.prediction,
                    clean_correct=i is not None,
                    robust=i is not None and not broken,
                    broken_by=claim,
                    unconfirmed=broken and last.right,
                    forward=0 if i is None else result.forward[i],
                    backward=0 if i is None else result.backward[i],
                    ranks=_image_ranks(clean, last),
                    edit=None if name is None else self._edit(row, name),
                )
            )
        return samples

    def _confirm(
        self, attacked: Sequence[int], images: Tensor, result: AttackResult
    ) -> dict[int, Verdict]:
        """What a fresh pass says about adversarial images, in ball and box, of the rows attacked.

        In classification those that an attack claims; in retrieval all, since ranks are read off
        the last image of each.
        """
        every = self.scorer.ranked
        chosen = [i for i, name in enumerate(result.broken_by) if every or name is not None]
        if not chosen:
            return {}
        found = result.adversarial[chosen].float()
        self._require_in_ball(found, images[chosen])
        rows = [attacked[i] for i in chosen]
        names = [result.names[i] for i in chosen] if result.names else []
        self._require_edits(rows, names)
        verdicts = self.scorer.judge(found, rows, size=self.batch_size, names=names)
        return dict(zip(rows, verdicts, strict=True))

    def _require_edits(self, rows: Sequence[int], names: Sequence[str | None]) -> None:
        data, most = self.job.data, self.job.attack.edits or 0
        for row, name in zip(rows, names, strict=False):
            if name is None:
                continue
            edit = self._edit(row, name)
            if name == edit.original:  # two classes may share it
                continue
            if edit.distance > most or names_another_class(data.classes, data.labels[row], name):
                raise ModelError(
                    f"The attack {self.job.threat.attack} made {name!r} of {edit.original!r}: "
                    f"{edit.distance} edits, where {most} are allowed, and never another class."
                )

    def _edit(self, row: int, name: str) -> NameEdit:
        data = self.job.data
        return NameEdit(original=data.classes[data.labels[row]], adversarial=name)

    def _require_in_ball(self, found: Tensor, images: Tensor) -> None:
        threat = self.job.threat
        if not torch.isfinite(found).all():
            raise ModelError(f"The attack {threat.attack} returned NaN or infinite pixels.")
        if float(found.min()) < 0 or float(found.max()) > 1:
            raise ModelError(f"The attack {threat.attack} left the box [0, 1].")
        norm, eps = threat.norm, float(threat.eps)
        if norm == "levenshtein":
            norm, eps = "linf", 0.0
        distance = norm_of(found - images, norm)
        # Pixels near 1 are known to 6e-8; an L2 norm adds up many such errors.
        if float(distance.max()) > eps * (1 + 1e-5) + 1e-6:
            raise ModelError(
                f"The attack {threat.attack} left the {norm} ball: distance "
                f"{float(distance.max()):.6f}, eps {eps:.6f}."
            )


def _image_ranks(clean: Verdict, last: Verdict) -> Ranks | None:
    if clean.rank is None or last.rank is None:
        return None
    return Ranks(image=(clean.rank, last.rank), captions=())


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
