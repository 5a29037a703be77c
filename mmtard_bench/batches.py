"""The samples of one job, batch by batch: judge, attack, confirm, settle."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mmtard_bench.attacks.base import AttackResult, Part, Work, joined
from mmtard_bench.attacks.checks import Doubt, ModelError, inspect_model, require_in_ball
from mmtard_bench.attacks.fast.batch_size import (
    available_memory,
    halving,
    is_out_of_memory,
    rows_that_fit,
    smaller,
)
from mmtard_bench.data.workers import in_chunks, worker_count
from mmtard_bench.edits import NameEdit, names_another_class
from mmtard_bench.headway import Headway, Progress
from mmtard_bench.job import Job
from mmtard_bench.models.clip import Clip
from mmtard_bench.models.folding import folded, using
from mmtard_bench.recall import Ranks
from mmtard_bench.records import Sample
from mmtard_bench.resources import Resources
from mmtard_bench.tasks.retrieval import RetrievalScorer
from mmtard_bench.tasks.scoring import Aim, Verdict, ZeroShotScorer

PROBES = 32
"""Samples that the checks of the model look at."""

REFILLS = 4
"""Batches of samples that an attack gets at once if it streams."""

CHUNK_BYTES = 2**30
"""Of images that an attack gets at once, where that is more than one image."""

COPIES = 4
"""Of the images that go to an attack together: the least that it keeps."""

Embeddings = tuple[str, str]
"""A sample's image embeddings, clean and adversarial; see ``Verdict``."""


@dataclass(frozen=True)
class Batch:
    """Samples that are settled, one at least: what a run keeps so that it can go on from there.

    ``seconds`` is its part of the time that passed: with two processes at work, half of what it
    took. In retrieval ``embeddings`` has each sample's, clean and adversarial: captions are ranked
    once all images are there.
    """

    samples: list[Sample]
    notes: list[str]
    seconds: float
    embeddings: list[Embeddings] = field(default_factory=list)
    model_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("a batch without samples")


def in_manifest_order(job: Job, batches: Iterable[Batch]) -> list[Batch]:
    """Batches by the place of their first sample in the manifest."""
    places = {sample: place for place, sample in enumerate(job.data.manifest.ids)}
    return sorted(batches, key=lambda batch: places[batch.samples[0].id])


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
        first = self.image(0).to(self.device)
        fit = self._rows_that_fit(first)
        self.batch_size = resources.batch_size or fit
        self.most_images = max(CHUNK_BYTES // first.nbytes, 1)
        # Two, as the checks compare images with each other.
        count = min(PROBES, len(self.scorer.labels), max(fit, 2))
        others = [self.image(row).to(self.device) for row in range(1, count)]
        self.probes = torch.stack([first, *others])
        self.tower = folded(job.clip, self.probes) if job.attack.stream else None

    def _rows_that_fit(self, image: Tensor) -> int:
        """The batch size, once a model and size of images.

        Raises ModelError where memory does not suffice for the images alone.
        """
        available = available_memory(self.device)
        if self.device.type == "cpu":
            available /= self.processes.world
        count = min(self.job.attack.block or 1, len(self.scorer.labels))
        needed = COPIES * image.nbytes * count
        if needed > available:
            raise ModelError(
                f"{self.job.threat.attack} attacks {count} images of {image.shape[2]} x "
                f"{image.shape[1]} pixels at once, for which it needs at least "
                f"{needed / 2**30:.1f} GiB; {available / 2**30:.1f} GiB are available. Use the "
                "surface 'model', the engine fast, or a suite with a smaller block."
            )
        key = (image.shape, self.device)
        found = self.job.clip.cache.batch_sizes
        if key not in found:
            found[key] = rows_that_fit(self.scorer.classifier, image, available)
        return found[key]

    @property
    def chunk_size(self) -> int:
        """How many samples go to the attack together."""
        attack = self.job.attack
        if attack.block is not None:
            return attack.block
        return min(self.batch_size * (REFILLS if attack.stream else 1), self.most_images)

    def image(self, row: int) -> Tensor:
        """The clean image of a row of the manifest, (3, H, W)."""
        job = self.job
        return job.data.image(row, surface=job.threat.surface, preprocess=job.clip.preprocess)

    def inspect(self) -> list[Doubt]:
        """Check the model on the first samples of the manifest."""

        def inspect(count: int) -> list[Doubt]:
            return inspect_model(
                self.scorer.classifier,
                self.probes[:count],
                self.scorer.labels[:count],
                classes=self.scorer.columns,
                scale=float(self.job.clip.scale()),
            )

        found, _ = halving(inspect, len(self.probes), least=min(2, len(self.probes)))
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
        own = self._chunks(done)
        ids = self.job.data.manifest.ids
        # Of a block that was cut short and is done again, some samples are in ``done``.
        again = {ids[row] for chunk in own for row in chunk}
        headway = Headway(
            (sample for name, sample in done.items() if name not in again),
            todo=len(again),
            total=len(ids),
            budget=self.job.attack.passes,
            report=report,
        )
        with closing(in_chunks(own, self.image, workers=self.workers)) as chunks:
            for rows, images in chunks:
                batch = torch.stack(images).to(self.device)
                for new in self._settle(rows, batch, headway):
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
        """All samples, in retrieval with all ranks.

        Of a sample's verdicts that of a later batch counts, and before all of them the one that
        follows from a larger radius: a curve must not rise.
        """
        found: dict[str, Sample] = {}
        embeddings: dict[str, Embeddings] = {}
        for batch in batches:
            names = [sample.id for sample in batch.samples]
            found.update(zip(names, batch.samples, strict=True))
            embeddings.update(zip(names, batch.embeddings, strict=False))
        found.update(self.known)
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
        headway: Headway,
    ) -> Iterator[Batch]:
        """Attack the samples of a chunk; they come in one batch, or as the attack settles them."""
        # In one piece for a block: who is attacked together must not follow the batch size.
        verdicts = dict(
            zip(rows, self.judge(images, rows, size=self.job.attack.block), strict=True)
        )
        wrong = [row for row, verdict in verdicts.items() if not verdict.right]
        attacked = [row for row, verdict in verdicts.items() if verdict.right]
        headway.judged(wrong=len(wrong), right=len(attacked))
        # A chunk of large images is in memory once, not twice.
        clean = images[[verdict.right for verdict in verdicts.values()]] if wrong else images
        for places, result in self.attack(clean, attacked, headway):
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
        block, size = self.job.attack.block, self.chunk_size
        rows = [row for row in range(len(ids)) if ids[row] not in self.known]
        if block is None:
            rows = [*self.processes.share([row for row in rows if ids[row] not in done])]
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        chunks = [chunk for chunk in chunks if any(ids[row] not in done for row in chunk)]
        return chunks if block is None else [*self.processes.share(chunks)]

    def attack(
        self, images: Tensor, rows: list[int], headway: Headway | None = None
    ) -> Iterator[Part]:
        """What the attack finds on images of some rows, by their places there."""
        found: list[Part] = []
        for aim in self.scorer.aims(rows) if rows else []:
            for part in self._attack_at(aim, images, rows, headway):
                found.append(part)
                if self.job.attack.stream:
                    yield found.pop()
        if found:
            whole = joined(found)
            yield range(len(whole.broken_by)), whole

    def _attack_at(
        self, aim: Aim, images: Tensor, rows: Sequence[int], headway: Headway | None
    ) -> Iterator[Part]:
        """What the attack finds on the samples of an aim, by their places among the rows.

        Samples of a batch that does not fit in memory are attacked again in smaller ones, which
        changes no verdict; only a block must stay whole.
        """
        ids = self.job.data.manifest.ids
        attack = self.job.attack
        left = list(range(len(aim.places)))
        while left:
            some = left if attack.stream or attack.block else left[: self.batch_size]
            places = [aim.places[i] for i in some]
            work = Work(
                model=aim.classifier,
                images=images if len(places) == len(images) else images[places],
                labels=aim.labels[some],
                ids=[ids[rows[place]] for place in places],
                seed=self.job.seed,
                batch_size=self.batch_size,
                watch=headway.watch if headway else lambda _: None,
            )
            if headway:
                headway.begin(aim.classifier)
            parts, done, fits = attack.parts(work), list[AttackResult](), True
            try:
                # Only the attack sees the folded tower: what it found is judged by the model's own.
                while part := _next(parts, self.job.clip, self.tower):
                    aim.classifier.require_finite()
                    found = {some[place]: None for place in part[0]}
                    done.append(part[1])
                    left = [i for i in left if i not in found]
                    yield [aim.places[i] for i in found], part[1]
            except Exception as error:  # several kinds say that memory did not suffice
                fits = not is_out_of_memory(error)
                if fits:
                    raise
            if headway:
                headway.end(done)
            if not fits:
                del work, parts
                tried = len(some) if attack.block else min(self.batch_size, len(some))
                self.batch_size = smaller(tried, least=attack.block or 1)

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
        return dict(zip(rows, self.judge(found, rows, names=names), strict=True))

    def judge(
        self,
        images: Tensor,
        rows: Sequence[int],
        *,
        size: int | None = None,
        names: Sequence[str | None] = (),
    ) -> list[Verdict]:
        """What the model makes of images in the places of some rows, ``size`` at a time.

        Without ``size`` that is the batch size, which halves where it does not fit in memory.
        """
        verdicts, fit = halving(
            lambda size: self.scorer.judge(images, rows, size=size, names=names),
            size or min(self.batch_size, len(rows)),
        )
        if size is None and fit < min(self.batch_size, len(rows)):
            self.batch_size = fit
        return verdicts

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
