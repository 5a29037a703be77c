"""What a run says about itself: figures of a step, held-out accuracy, the history on disk."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from mmtard_bench.files import write_atomically
from mmtard_bench.models.clip import Preprocess
from mmtard_bench.schema import Strict, explained
from mmtard_bench.tasks.samples import TaskData
from mmtard_bench.train.checkpoint import storage
from mmtard_bench.train.data import spread_over_classes
from mmtard_bench.train.loop import Learned, Trainer, accuracy, uniform_start
from mmtard_bench.train.methods.base import CROSS_ENTROPY
from mmtard_bench.train.towers import Head, Output

Figures = dict[str, float]
DECILES = torch.linspace(0, 1, 11)


@torch.no_grad()
def figures_of(trainer: Trainer, learned: Learned) -> tuple[Figures, dict[str, Tensor]]:
    """Loss terms, training accuracies, agreement with teachers; and weights of all processes.

    Agreement is the share of images on which student and teacher name the same class, on clean
    images and on adversarial ones. All of it in evaluation mode, with the updated student.
    """
    batch = learned.batch
    trainer.tower.eval()
    local: dict[str, Tensor] = {
        f"loss/{name}": term.detach().float() for name, term in learned.loss.terms.items()
    }
    with trainer.accelerator.autocast():
        for view, images in batch.images.items():
            if not len(trainer.head.embeddings):
                continue
            student = Output(trainer.tower(images).float(), trainer.head)
            if bool((batch.labels >= 0).all()):
                local[f"train/{view}"] = accuracy(student, batch.labels)
            for role in trainer.teachers:
                teacher = batch.teacher(role, view).logits
                if teacher.shape == student.logits.shape:
                    same = teacher.argmax(1) == student.logits.argmax(1)
                    local[f"agreement/{role}/{view}"] = same.float().mean()
    means = trainer.accelerator.reduce(torch.stack(list(local.values())), "mean").tolist()
    weights = {
        name: trainer.accelerator.gather(values.detach().float()).cpu()
        for name, values in learned.loss.weights.items()
    }
    return dict(zip(local, means, strict=True)), weights


def deciles(weights: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The deciles of each weight over the global batch, smallest to largest, 11 numbers."""
    return {name: torch.quantile(values, DECILES).tolist() for name, values in weights.items()}


class Validator:
    """Clean and robust accuracy on held-out samples, the same ones every time.

    Raises InputError for images that cannot be used.
    """

    def __init__(
        self, data: TaskData, count: int, *, head: Head, preprocess: Preprocess, trainer: Trainer
    ) -> None:
        # All of them on every process, so that all refuse them together.
        self.data = data.at(spread_over_classes(data.labels, count))
        self.data.require_images(trainer.recipe.surface)
        self.total = len(self.data.labels)
        share = trainer.accelerator
        self.rows = range(share.process_index, self.total, share.num_processes)
        self.head = head
        self.preprocess = preprocess
        self.trainer = trainer

    def __call__(self) -> Figures:
        """Accuracies under "validation/clean" and "validation/robust"; PGD on cross-entropy."""
        trainer, size = self.trainer, 256
        right = torch.zeros(2, device=trainer.accelerator.device)
        for begin in range(0, len(self.rows), size):
            right += self._count(self.rows[begin : begin + size])
        clean, robust = (trainer.accelerator.reduce(right, "sum") / self.total).tolist()
        return {"validation/clean": clean, "validation/robust": robust}

    def _count(self, rows: range) -> Tensor:
        trainer = self.trainer
        device = trainer.accelerator.device
        images = self.data.images(
            rows, surface=trainer.recipe.surface, preprocess=self.preprocess
        ).to(device)
        labels = torch.tensor([self.data.labels[row] for row in rows], device=device)
        start = torch.cat(
            [
                uniform_start(
                    (1, *images.shape[1:]),
                    trainer.recipe.attack,
                    key=("validation", sample),
                    device=device,
                )
                for sample in (self.data.manifest.ids[row] for row in rows)
            ]
        )
        found = trainer.perturb(images, start, labels, head=self.head, guide=CROSS_ENTROPY)
        with torch.no_grad():
            counts = [
                (Output(trainer.tower(points).float(), self.head).logits.argmax(1) == labels)
                for points in (images, found)
            ]
        return torch.stack([counts[0].sum(), (counts[0] & counts[1]).sum()]).float()


_DAMAGED = (
    "Restore the file, or delete the line; its figures will be missing from plots and curves."
)


class _Line(Strict):
    """A line of the history: figures by name, and deciles of weights."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | list[float]]
    step: int = Field(ge=1)
    seconds: float = Field(ge=0)


class History:
    """The figures of a run, one JSON line a step that was looked at: ``history.jsonl``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "history.jsonl"

    def start(self, step: int) -> None:
        """Keep what lies before a step: what came after it is made again."""
        lines = [line for line in self.read() if line["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def append(self, line: Mapping[str, object]) -> None:
        """Add a line. Raises StorageError if the disk does not take it."""
        with storage(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> Iterator[dict[str, float]]:
        """All whole lines. Raises InputError with the number of one that is damaged."""
        if not self.path.exists():
            return
        # The last one has no end where the process was killed while it wrote.
        for number, text in enumerate(self.path.read_bytes().split(b"\n")[:-1], 1):
            with explained(f"{self.path}, line {number} is damaged", _DAMAGED):
                _Line.model_validate_json(text)
            yield json.loads(text)
