"""The samples of one job, batch by batch: judge, attack, confirm, settle."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from mmtard_bench.attacks.base import AttackResult, Part, Work, in_parts, joined
from mmtard_bench.attacks.checks import Doubt, ModelError, inspect_model, require_in_ball
from mmtard_bench.attacks.fast.batch_size import find_batch_size
from mmtard_bench.data.workers import in_chunks, worker_count
from mmtard_bench.edits import NameEdit, names_another_class
from mmtard_bench.job import Job
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.folding import folded, using
from mmtard_bench.recall import Ranks
from mmtard_bench.records import Sample
from mmtard_bench.resources import Resources
from mmtard_bench.tasks.retrieval import RetrievalScorer
from mmtard_bench.tasks.scoring import Verdict, ZeroShotScorer

PROBES = 32
"""Samples that the checks of the model look at."""

REFILLS = 4
"""Batches of samples that an attack gets at once if it streams."""

Embeddings = tuple[str, str]
"""A sample's image embeddings, clean and adversarial; see ``Verdict``."""


@dataclass(frozen=True)
class Batch:
    """Samples that are settled: what a run keeps so that it can go on from there.

    ``seconds`` is its part of the time that passed: with two processes at work, half of what it
    took. In retrieval ``embeddings`` has each sample's, clean and adversarial: captions are ranked
    once all images are there.
    """

    samples: list[Sample]
    notes: list[str]
    seconds: float
    embeddings: list[Embeddings] = field(default_factory=list)
    model_seconds: float = 0.0


def in_manifest_order(job: Job, batches: Iterable[Batch]) -> list[Batch]:
    """Batches by the place of their first sample in the manifest."""
    places = {sample: place for place, sample in enumerate(job.data.manifest.ids)}
    return sorted(batches, key=lambda batch: places[batch.samples[0].id])


@dataclass(frozen=True)
class Progress:
    """How far a record is: samples settled, of ``total``; those that stand, of the ``seen``."""

    settled: int
    standing: int
    seen: int
    total: int


class Evaluation:
    """One job on one device: the classifier with its head, and the loop over batches.

    ``known`` holds samples whose verdicts follow from other records.
    """

    def __init__(self, job: Job, resources: Resources, known: Mapping[str, Sample]) -> None:
        self.job = job
        self.processes = resources.processes
        self.known = known
        self.workers = worker_count(resources.workers)
        self.device = resources.device
        job.clip.to(self.device)
        scorer = RetrievalScorer if job.data.task.metric == "retrieval" else ZeroShotScorer
        self.scorer = scorer(job.clip, job.data, self.device)
        rows = range(min(PROBES, len(self.scorer.labels)))
        self.probes = torch.stack([self.image(row) for row in rows]).to(self.device)
        self.batch_size = resources.batch_size or self._find_batch_size()
        self.tower = folded(job.clip, self.probes) if job.attack.stream else None

    def _find_batch_size(self) -> int:
        """Once a model and size of images: looking costs some passes."""
        key = (self.probes.shape[1:], self.device)
        found = self.job.clip.cache.batch_sizes
        if key not in found:
            found[key] = find_batch_size(self.scorer.classifier, self.probes[0])
        return found[key]

    def image(self, row: int) -> Tensor:
        """The clean image of a row of the manifest, (3, H, W)."""
        job = self.job
        return job.data.image(row, surface=job.threat.surface, preprocess=job.clip.preprocess)

    def inspect(self) -> list[Doubt]:
        """Check the model on the first samples of the manifest."""
        found = inspect_model(
            self.scorer.classifier,
            self.probes,
            self.scorer.labels[: len(self.probes)],
            classes=self.scorer.columns,
            scale=float(self.job.clip.scale()),
        )
        return [*found, *self.scorer.doubts()]

    def run(
        self,
        earlier: Sequence[Batch],
        keep: Callable[[Batch], None],
        report: Callable[[Progress], None],
    ) -> list[Batch]:
        """Settle this process's share of the samples that earlier batches lack, batch by batch.

        It may be cut short where another process failed.
        """
        started = time.monotonic()
        settled = {sample.id: sample for batch in earlier for sample in batch.samples}
        done = {**settled, **self.known}
        here = dict(done)
        batches: list[Batch] = []
        with closing(in_chunks(self._chunks(done), self.image, workers=self.workers)) as chunks:
            for rows, images in chunks:
                batch = torch.stack(images).to(self.device)
                for new in self._settle(rows, batch, here, report):
                    now = time.monotonic()
                    kept = replace(new, seconds=(now - started) / self.processes.world)
                    started = now
                    here.update((sample.id, sample) for sample in kept.samples)
                    batches.append(kept)
                    keep(kept)
                    self._tell(done, here)
                if self.processes.stopping:
                    break
        return batches

    def _tell(self, done: Mapping[str, Sample], here: Mapping[str, Sample]) -> None:
        new = [sample.robust for name, sample in here.items() if name not in done]
        self.processes.tell(len(new), sum(new))

    def collect(self, own: list[Batch]) -> list[Batch]:
        """The batches of all processes, once every one has settled its share, in order."""
        parts = self.processes.gather(own, list[Batch])
        return in_manifest_order(self.job, (batch for part in parts for batch in part))

    def in_order(self, batches: Sequence[Batch]) -> list[Sample]:
        """All samples, those of later batches before earlier ones; in retrieval with all ranks."""
        found = dict(self.known)
        embeddings: dict[str, Embeddings] = {}
        for batch in batches:
            names = [sample.id for sample in batch.samples]
            found.update(zip(names, batch.samples, strict=True))
            embeddings.update(zip(names, batch.embeddings, strict=False))
        samples = [found[name] for name in self.job.data.manifest.ids]
        if not isinstance(self.scorer, RetrievalScorer):
            return samples
        captions = self.scorer.caption_ranks(embeddings)
        return [
            sample.model_copy(
                update={"ranks": Ranks(image=sample.ranks.image, captions=captions[sample.id])}
            )
            for sample in samples
            if sample.ranks is not None
        ]

    def _settle(
        self,
        rows: Sequence[int],
        images: Tensor,
        done: Mapping[str, Sample],
        report: Callable[[Progress], None],
    ) -> Iterator[Batch]:
        """Attack the samples of a chunk; they come in one batch, or as the attack settles them."""
        ids = self.job.data.manifest.ids
        # In one piece for a block: who is attacked together must not follow the batch size.
        size = self.job.attack.block or self.batch_size
        verdicts = dict(zip(rows, self.scorer.judge(images, rows, size=size), strict=True))
        wrong = [row for row, verdict in verdicts.items() if not verdict.right]
        # Of a block that was cut short and is done again, some samples are in ``done``.
        here = {ids[row] for row in rows}
        others = [sample for name, sample in done.items() if name not in here]
        settled = len(others) + len(wrong)
        standing = sum(sample.robust for sample in others) + len(rows) - len(wrong)
        seen = len(others) + len(rows)

        def decided(count: int, broken: int) -> None:
            report(Progress(settled + count, standing - broken, seen, len(ids)))

        decided(0, 0)
        attacked = [row for row, verdict in verdicts.items() if verdict.right]
        clean = images[[verdict.right for verdict in verdicts.values()]]
        for places, result in self.attack(clean, attacked, decided):
            now = [attacked[place] for place in places]
            after = self.confirm(now, clean[places], result)
            yield self._batch({row: verdicts[row] for row in (*wrong, *now)}, now, after, result)
            wrong = []
        if wrong:
            nothing = AttackResult(images[:0], [], [], [])
            yield self._batch({row: verdicts[row] for row in wrong}, [], {}, nothing)

    def _batch(
        self,
        before: Mapping[int, Verdict],
        attacked: Sequence[int],
        after: Mapping[int, Verdict],
        result: AttackResult,
    ) -> Batch:
        samples = self._samples(before, attacked, after, result)
        found = [
            (verdict.embedding, after.get(row, verdict).embedding)
            for row, verdict in before.items()
            if verdict.embedding
        ]
        return Batch(samples, result.notes, 0.0, found, result.model_seconds)

    def _chunks(self, done: Mapping[str, Sample]) -> list[list[int]]:
        """Rows of the manifest that go to the attack together.

        Blocks of reference attacks are fixed by the manifest and what is known from other records;
        other attacks treat samples alone. Of several processes each has its share, of whole blocks
        or of samples.
        """
        ids = self.job.data.manifest.ids
        block = self.job.attack.block
        size = block or self.batch_size * (REFILLS if self.job.attack.stream else 1)
        rows = [row for row in range(len(ids)) if ids[row] not in self.known]
        if block is None:
            rows = [*self.processes.share([row for row in rows if ids[row] not in done])]
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        chunks = [chunk for chunk in chunks if any(ids[row] not in done for row in chunk)]
        return chunks if block is None else [*self.processes.share(chunks)]

    def attack(
        self, images: Tensor, rows: list[int], decided: Callable[[int, int], None]
    ) -> Iterator[Part]:
        """What the attack finds on images of some rows, by their places there."""
        ids = self.job.data.manifest.ids
        attack = self.job.attack

        def behind(settled: int, broken: int, count: int, lost: int) -> None:
            decided(settled + count, broken + lost)

        found: list[Part] = []
        for aim in self.scorer.aims(rows) if rows else []:
            before = [claim for _, result in found for claim in result.broken_by]
            settled, broken = len(before), len(before) - before.count(None)
            work = Work(
                model=aim.classifier,
                images=images[aim.places],
                labels=aim.labels,
                ids=[ids[rows[place]] for place in aim.places],
                seed=self.job.seed,
                batch_size=self.batch_size,
                decided=partial(behind, settled, broken),
            )
            parts = (attack.stream or in_parts(attack.run))(work)
            # Only the attack sees the folded tower: what it found is judged by the model's own.
            while part := _next(parts, self.job.clip, self.tower):
                aim.classifier.require_finite()
                places, result = part
                found.append(([aim.places[place] for place in places], result))
                if attack.stream:
                    yield found.pop()
        if found:
            whole = joined(found)
            yield range(len(whole.broken_by)), whole

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

    def confirm(
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
        require_in_ball(found, images[chosen], self.job.threat)
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


def _next(parts: Iterator[Part], clip: Clip, tower: nn.Module | None) -> Part | None:
    with using(clip, tower):
        return next(parts, None)


def _image_ranks(clean: Verdict, last: Verdict) -> Ranks | None:
    if clean.rank is None or last.rank is None:
        return None
    return Ranks(image=(clean.rank, last.rank), captions=())
