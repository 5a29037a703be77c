"""A model beside the samples of a task on one device: clean images, and its answers to images."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtard_bench.data.threads import worker_count
from mmtard_bench.errors import ModelError
from mmtard_bench.evaluation.checks import inspect_model
from mmtard_bench.evaluation.device import (
    Resources,
    available_memory,
    batch_size_of,
    halving,
    rows_that_fit,
)
from mmtard_bench.evaluation.gradients import check_levels, check_precision
from mmtard_bench.models.clip import Clip
from mmtard_bench.records.schema import Flag
from mmtard_bench.tasks.retrieval import RetrievalScorer
from mmtard_bench.tasks.samples import TaskData
from mmtard_bench.tasks.scoring import Verdict, ZeroShotScorer
from mmtard_bench.types import Surface

PROBES = 32
"""How many samples the checks of the model use."""

LARGEST_BATCH = 512
"""The largest batch of the checks: the default on a GPU."""

COPIES = 4
"""How many copies of the images of a block an attack holds at least."""


class Bench:
    """A zero-shot classifier, or a retrieval scorer, and the samples that it is scored on.

    The caller runs every method within ``full_float32``. ``data`` has passed ``understood``.
    ``block`` images must fit in memory at once.
    """

    def __init__(
        self, clip: Clip, data: TaskData, surface: Surface, resources: Resources, *, block: int = 1
    ) -> None:
        self.clip, self.data, self.surface = clip, data, surface
        self.processes = resources.processes
        self.workers = worker_count(resources.workers)
        self.device = resources.device
        clip.to(self.device)
        scorer = RetrievalScorer if data.task.metric == "retrieval" else ZeroShotScorer
        self.scorer = scorer(clip, data, self.device)
        first = self.image(0).to(self.device)
        fit = self._rows_that_fit(first, block)
        self.batch_size = batch_size_of(resources.batch_size, fit, self.device)
        # Two, as the checks compare images with each other.
        count = min(PROBES, len(self.scorer.labels), max(fit, 2))
        others = [self.image(row).to(self.device) for row in range(1, count)]
        self.probes = torch.stack([first, *others])

    def _rows_that_fit(self, image: Tensor, block: int) -> int:
        """The largest batch size, measured once for a model and a size of images.

        Raises ModelError if the images of a block alone do not fit in memory.
        """
        available = available_memory(self.device)
        if self.device.type == "cpu":
            available /= self.processes.world
        count = min(block, len(self.scorer.labels))
        needed = COPIES * image.nbytes * count
        if needed > available:
            raise ModelError(
                f"The images alone need at least {needed / 2**30:.1f} GiB ({count} at once, of "
                f"{image.shape[2]} x {image.shape[1]} pixels); {available / 2**30:.1f} GiB are "
                "available. Use the surface 'model', the engine fast, or a suite with a smaller "
                "block."
            )
        key = (image.shape, self.device)
        found = self.clip.cache.batch_sizes
        if key not in found:
            found[key] = rows_that_fit(self.scorer.classifier, image, available)
        return found[key]

    def image(self, row: int) -> Tensor:
        """The clean image of a row of the manifest, (3, H, W)."""
        return self.data.image(row, surface=self.surface, preprocess=self.clip.preprocess)

    def images(self, rows: Sequence[int]) -> Tensor:
        """The clean images of rows of the manifest, (N, 3, H, W), on the device."""
        return torch.stack([self.image(row) for row in rows]).to(self.device)

    def inspect(self) -> list[Flag]:
        """Check the model on the first samples of the manifest."""

        def inspect(count: int) -> list[Flag]:
            probes = self.probes[:count]
            largest = min(self.batch_size, len(self.scorer.labels), LARGEST_BATCH)
            if count < len(self.probes):  # memory did not suffice
                largest = min(largest, count)
            found = inspect_model(
                self.scorer.classifier,
                probes,
                self.scorer.labels[:count],
                classes=self.scorer.columns,
                scale=float(self.clip.scale()),
                largest=largest,
            )
            with torch.no_grad():
                logits, embeddings = (
                    self.scorer.classifier(probes),
                    self.clip.image_features(probes),
                )
            precise = check_precision(self.clip, probes)
            return [*found, *check_levels(logits, embeddings), *([precise] if precise else [])]

        found, _ = halving(inspect, len(self.probes), least=min(2, len(self.probes)))
        return [*found, *self.scorer.doubts()]

    def judge(
        self,
        images: Tensor,
        rows: Sequence[int],
        *,
        size: int | None = None,
        names: Sequence[str | None] = (),
    ) -> list[Verdict]:
        """The answers of the model to images in the places of some rows, ``size`` at a time.

        Without ``size`` that is the batch size, which halves where it does not fit in memory.
        """
        verdicts, fit = halving(
            lambda size: self.scorer.judge(images, rows, size=size, names=names),
            size or min(self.batch_size, len(rows)),
        )
        if size is None and fit < min(self.batch_size, len(rows)):
            self.batch_size = fit
        return verdicts

    def clean(self) -> list[Verdict]:
        """The answers of the model to every clean image."""
        found: list[Verdict] = []
        for rows in self.chunks():
            found += self.judge(self.images(rows), rows)
        return found

    def chunks(self) -> list[range]:
        """All rows of the manifest, a batch at a time."""
        count, size = len(self.data.manifest.ids), self.batch_size
        return [range(i, min(i + size, count)) for i in range(0, count, size)]
