"""From a task to what an evaluation needs: the data set, the class names, the samples."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor

from mmtard_bench import registry
from mmtard_bench.data.base import (
    OUTSIDE,
    CaptionedDataset,
    Dataset,
    Manifest,
    Pixels,
    draw_manifest,
)
from mmtard_bench.errors import InputError
from mmtard_bench.models.clip import Preprocess
from mmtard_bench.types import Surface, Task

DEFAULT_TEMPLATE = "a photo of a {}."


def find_task(name: str) -> Task:
    """A registered task, or a data spec with the default template and its own class names."""
    if name.partition(":")[0] in OUTSIDE:
        return Task(name=name, data=name, templates=(DEFAULT_TEMPLATE,))
    return registry.tasks.get(name)


@dataclass(frozen=True)
class TaskData:
    """The samples of a task that an evaluation uses, in the manifest's order.

    In retrieval ``classes`` are the captions of the gallery and ``matches`` has the places of each
    sample's own captions in it; its label is the first of them.
    """

    task: Task
    revision: str
    classes: tuple[str, ...]
    manifest: Manifest
    labels: tuple[int, ...]
    dataset: Dataset
    matches: tuple[tuple[int, ...], ...] = ()

    def at(self, rows: Sequence[int]) -> "TaskData":
        """The same task with some of its samples, in the order given."""
        indices, ids = self.manifest.indices, self.manifest.ids
        manifest = Manifest(tuple(indices[i] for i in rows), tuple(ids[i] for i in rows))
        labels = tuple(self.labels[i] for i in rows)
        matches = tuple(self.matches[i] for i in rows) if self.matches else ()
        return replace(self, manifest=manifest, labels=labels, matches=matches)

    @cached_property
    def pixels(self) -> list[Pixels]:
        """The images, 8-bit; decoded once. Raises InputError for the first unusable one."""
        return [self.dataset.image(i) for i in self.manifest.indices]

    def images(self, rows: Sequence[int], *, surface: Surface, preprocess: Preprocess) -> Tensor:
        """Some images, (N, 3, H, W) in [0, 1], at the resolution that the attack works on."""
        tensors = [
            torch.from_numpy(np.ascontiguousarray(self.pixels[i].transpose(2, 0, 1))).float() / 255
            for i in rows
        ]
        if surface == "model":
            tensors = [preprocess.resize(image[None])[0] for image in tensors]
        return torch.stack(tensors)

    def require_images(self, surface: Surface) -> None:
        """Decode every image, and for the native surface see that all have one size.

        Raises InputError, naming the first sample that will not do.
        """
        first = self.pixels[0].shape
        if surface == "model":
            return
        for sample, image in zip(self.manifest.ids, self.pixels, strict=True):
            if image.shape != first:
                raise InputError(
                    f"{self.task.data} mixes image sizes: sample '{self.manifest.ids[0]}' is "
                    f"{first[1]}x{first[0]}, sample '{sample}' is {image.shape[1]}x"
                    f"{image.shape[0]}. The surface 'native' needs one size; use the surface "
                    "'model', which resizes every image first."
                )


def load_task(task: Task, *, n: int | None, seed: int) -> TaskData:
    """Open a task's data and draw samples to score. Raises InputError for anything unusable."""
    _require_labels(task)
    dataset = _open(task)
    # An empty table has neither classes nor labels: say that first.
    manifest = draw_manifest(dataset, n=n, seed=seed)
    return (_gallery if task.metric == "retrieval" else _assemble)(task, dataset, manifest)


def load_training_data(task: Task, *, labelled: bool) -> TaskData:
    """Open a task's data to learn from: every sample, in the order of the source.

    Unless ``labelled``, data without labels (an empty ``label_column``) will do: its labels are
    -1, and it need not name classes. Raises InputError for anything unusable.
    """
    if task.metric == "retrieval":
        raise InputError(
            f"The task '{task.name}' is retrieval, which nothing here learns from; name a task of "
            "classification."
        )
    if labelled:
        _require_labels(task)
    dataset = _open(task)
    ids = tuple(dataset.ids)
    if not ids:
        raise InputError(f"{task.data} is empty: expected at least one image.")
    return _assemble(task, dataset, Manifest(tuple(range(len(ids))), ids))


def _require_labels(task: Task) -> None:
    if not task.label_column:
        raise InputError(
            f"The task '{task.name}' has no labels (label_column is empty), but they are needed "
            "here; name the column that holds them."
        )


def _open(task: Task) -> Dataset:
    if task.data.partition(":")[0] in OUTSIDE:
        # Imported on use: the library takes a second, and the embedded data needs none of it.
        from mmtard_bench.data.outside import open_outside

        return open_outside(task)
    return registry.datasets.get(task.data)()


def _gallery(task: Task, dataset: Dataset, manifest: Manifest) -> TaskData:
    """Samples for retrieval, with their distinct captions in the order of their first occurrence.

    Captions of the same text are one caption, which matches every image that has it.
    """
    captioned = cast("CaptionedDataset", dataset)
    if not hasattr(dataset, "captions"):
        raise InputError(f"{task.data} has no captions, which the task '{task.name}' needs.")
    places: dict[str, int] = {}
    matches = tuple(
        tuple(dict.fromkeys(places.setdefault(text, len(places)) for text in captions))
        for captions in map(captioned.captions, manifest.indices)
    )
    labels = tuple(own[0] for own in matches)
    return TaskData(task, dataset.revision, tuple(places), manifest, labels, dataset, matches)


def _assemble(task: Task, dataset: Dataset, manifest: Manifest) -> TaskData:
    """Samples with their classes and labels, checked against each other."""
    classes = task.classes or dataset.class_names
    if not classes and task.label_column:
        raise InputError(
            f"{task.data} does not name its classes; give classes = [...] or classes_file = ... "
            "in the task, one name a label."
        )
    every = dataset.labels
    labels = tuple(every[i] for i in manifest.indices)
    for sample, label in zip(dataset.ids, every, strict=True) if task.label_column else ():
        if not 0 <= label < len(classes):
            raise InputError(
                f"{task.data}: sample '{sample}' has the label {label}, but there are "
                f"{len(classes)} classes; labels go from 0 to {len(classes) - 1}."
            )
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if twice:
        warnings.warn(
            f"{task.name}: class names occur more than once ({', '.join(twice[:5])}); their "
            "logits are equal, and the lower label wins.",
            stacklevel=2,
        )
    return TaskData(task, dataset.revision, classes, manifest, labels, dataset)
