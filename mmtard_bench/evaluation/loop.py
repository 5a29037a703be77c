"""The samples of one job, batch by batch: judge, attack, confirm, settle."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmtard_bench.attacks.base import AttackResult
from mmtard_bench.data.threads import in_chunks
from mmtard_bench.evaluation.attacker import Attacker
from mmtard_bench.evaluation.device import Resources
from mmtard_bench.evaluation.headway import Headway, Progress
from mmtard_bench.evaluation.job import Job
from mmtard_bench.records.recall import Ranks
from mmtard_bench.records.schema import Sample
from mmtard_bench.tasks.retrieval import RetrievalScorer
from mmtard_bench.tasks.scoring import Verdict

Embeddings = tuple[str, str]
"""The clean and the adversarial image embedding of a sample; see ``Verdict``."""


@dataclass(frozen=True)
class Batch:
    """One or more settled samples, which a run writes to disk so that it can resume.

    ``seconds`` is the batch's share of the elapsed time: with two processes, half of its duration.
    In retrieval ``embeddings`` has the clean and the adversarial embedding of each sample: captions
    are ranked when all images are settled.
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
    """Batches, ordered by the position of their first sample in the manifest."""
    places = {sample: place for place, sample in enumerate(job.data.manifest.ids)}
    return sorted(batches, key=lambda batch: places[batch.samples[0].id])


class Evaluation(Attacker):
    """The loop over the samples of a job, batch by batch.

    ``known`` holds samples whose verdicts follow from other records.
    """

    def __init__(self, job: Job, resources: Resources, known: Mapping[str, Sample]) -> None:
        super().__init__(job, resources)
        self.known = known

    def run(
        self,
        earlier: Sequence[Batch],
        keep: Callable[[Batch], None],
        report: Callable[[Progress], None],
    ) -> list[Batch]:
        """Settle this process's share of the samples that are not in ``earlier``.

        It stops early if another process failed.
        """
        started = time.monotonic()
        settled = {sample.id: sample for batch in earlier for sample in batch.samples}
        done = {**settled, **self.known}
        here = dict(done)
        batches: list[Batch] = []
        own = self._chunks(done)
        ids = self.job.data.manifest.ids
        # If a block was interrupted, it is attacked again, although some samples are in ``done``.
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
        """The batches of all processes in manifest order, once every process has finished."""
        parts = self.processes.gather(own, list[Batch])
        return in_manifest_order(self.job, (batch for part in parts for batch in part))

    def in_order(self, batches: Sequence[Batch]) -> list[Sample]:
        """All samples in manifest order; in retrieval, with all ranks.

        If a sample has several verdicts, the latest batch counts. A verdict that follows from a
        larger radius (``known``) counts before all others: a curve must not rise.
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
        """Attack the samples of a chunk; yield them in one batch, or as the attack settles them."""
        # A block is judged in one pass: its samples must not depend on the batch size.
        verdicts = dict(
            zip(rows, self.judge(images, rows, size=self.job.attack.block), strict=True)
        )
        wrong = [row for row, verdict in verdicts.items() if not verdict.right]
        attacked = [row for row, verdict in verdicts.items() if verdict.right]
        headway.judged(wrong=len(wrong), right=len(attacked))
        # Without a selection there is no second copy of a chunk of large images.
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
        """This process's rows of the manifest, in chunks that go to the attack together.

        A reference attack works on blocks, which follow from the manifest and ``known`` alone, and
        processes share whole blocks. Other attacks treat each sample alone.
        """
        ids = self.job.data.manifest.ids
        block, size = self.job.attack.block, self.chunk_size
        rows = [row for row in range(len(ids)) if ids[row] not in self.known]
        if block is None:
            rows = [*self.processes.share([row for row in rows if ids[row] not in done])]
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        chunks = [chunk for chunk in chunks if any(ids[row] not in done for row in chunk)]
        return chunks if block is None else [*self.processes.share(chunks)]

    def _samples(
        self,
        before: Mapping[int, Verdict],
        attacked: Sequence[int],
        after: Mapping[int, Verdict],
        result: AttackResult,
    ) -> list[Sample]:
        """The samples of a batch from verdicts by row; ``result`` covers the attacked rows."""
        data = self.job.data
        place = {row: i for i, row in enumerate(attacked)}
        samples = []
        for row, clean in before.items():
            i = place.get(row)
            last = after.get(row, clean)
            claim = result.broken_by[i] if i is not None else None
            if i is not None and not last.right:
                claim = claim or self.job.threat.attack
            # An unconfirmed claim counts as broken: the attack stopped there, so nobody knows
            # whether the sample would be robust to its remaining steps.
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


def _image_ranks(clean: Verdict, last: Verdict) -> Ranks | None:
    if clean.rank is None or last.rank is None:
        return None
    return Ranks(image=(clean.rank, last.rank), captions=())
