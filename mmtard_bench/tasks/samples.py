"""Load a task: open its data set, check its class names, draw its samples."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, cast

from mmtard_bench import registry
from mmtard_bench.data.base import (
    OUTSIDE,
    CaptionedDataset,
    Dataset,
    Pixels,
    checked_pixels,
    few,
)
from mmtard_bench.data.manifest import Manifest, draw_manifest, sample_list
from mmtard_bench.data.threads import in_order, worker_count
from mmtard_bench.errors import DamagedImageError, InputError
from mmtard_bench.tasks.naming import check_labels, class_names, labels_at
from mmtard_bench.types import Metric, Surface, Task

if TYPE_CHECKING:  # torch takes seconds to import: names of tasks are checked without it
    from torch import Tensor

    from mmtard_bench.models.clip import Preprocess

DEFAULT_TEMPLATE = "a photo of a {}."

KEPT = 2**29
"""The most bytes of decoded images in the cache of a ``TaskData``. Others are decoded again."""


def default_templates(data: str, metric: Metric = "zero-shot classification") -> tuple[str, ...]:
    """The templates of a task without its own: those of its data set, else the default template.

    In retrieval the template is "{}", which leaves captions as they are.
    """
    if metric == "retrieval":
        return ("{}",)
    return () if data.startswith("wds:") else (DEFAULT_TEMPLATE,)


def find_task(name: str) -> Task:
    """A registered task, or a data spec with the default templates and its own class names."""
    if name.partition(":")[0] in OUTSIDE:
        return Task(name=name, data=name, templates=default_templates(name))
    return registry.tasks.get(name)


@dataclass(frozen=True)
class TaskData:
    """The samples of a task that an evaluation uses, in the order of the manifest.

    In retrieval ``classes`` are the captions of the gallery, ``matches`` has the gallery indices of
    each sample's own captions, and the label is the first of them. ``notes`` go into the record,
    for example which samples were left out.
    """

    task: Task
    revision: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    manifest: Manifest
    labels: tuple[int, ...]
    dataset: Dataset
    matches: tuple[tuple[int, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def at(self, rows: Sequence[int]) -> "TaskData":
        """The same task with some of its samples, in the given order."""
        indices, ids = self.manifest.indices, self.manifest.ids
        manifest = Manifest(tuple(indices[i] for i in rows), tuple(ids[i] for i in rows))
        labels = tuple(self.labels[i] for i in rows)
        matches = tuple(self.matches[i] for i in rows) if self.matches else ()
        return replace(self, manifest=manifest, labels=labels, matches=matches)

    def prompted(self, notes: Sequence[str], matches: tuple[tuple[int, ...], ...]) -> "TaskData":
        """The same samples with more notes, and other matches; decoded images are shared."""
        changed = replace(self, notes=(*self.notes, *notes), matches=matches)
        changed.__dict__["_kept"] = self._kept
        return changed

    def pixels(self, row: int) -> Pixels:
        """The image of a sample, 8-bit. Raises InputError if it is unusable."""
        found = self._kept.images.get(row)
        if found is None:
            given = self.dataset.image(self.manifest.indices[row])
            what = f"{self.task.data}: the image of sample '{self.manifest.ids[row]}'"
            found = checked_pixels(given, what)
            self._kept.keep(row, found)
        return found

    @cached_property
    def _kept(self) -> "_Kept":
        return _Kept()

    def image(self, row: int, *, surface: Surface, preprocess: "Preprocess") -> "Tensor":
        """An image, (3, H, W) in [0, 1], at the resolution that the attack works on."""
        import torch

        pixels = torch.from_numpy(self.pixels(row)).permute(2, 0, 1)
        # One copy: an image of the largest size takes 800 MB here.
        image = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return preprocess.resize(image[None])[0] if surface == "model" else image

    def images(
        self, rows: Sequence[int], *, surface: Surface, preprocess: "Preprocess"
    ) -> "Tensor":
        """Some images, (N, 3, H, W) in [0, 1]; see ``image``."""
        import torch

        return torch.stack(
            [self.image(row, surface=surface, preprocess=preprocess) for row in rows]
        )

    def _inspect(self, workers: int | None) -> "_Findings":
        """Decode every image, once."""

        def look(row: int) -> tuple[int, ...] | str:
            try:
                return self.pixels(row).shape
            except DamagedImageError as error:
                return str(error)

        if self._kept.findings is None:
            count = worker_count(workers)
            seen = list(in_order(range(len(self.labels)), look, workers=count))
            self._kept.findings = _Findings(
                [shape for shape in seen if not isinstance(shape, str)],
                {row: said for row, said in enumerate(seen) if isinstance(said, str)},
            )
        return self._kept.findings

    def require_images(self, surface: Surface, *, workers: int | None = None) -> None:
        """Decode every image once. For the native surface, require that all have one size.

        Raises InputError with the names of unusable samples.
        """
        findings = self._inspect(workers)
        shapes, damaged = findings.shapes, findings.damaged
        if damaged:
            named = [self.manifest.ids[row] for row in damaged]
            others = f" ({len(named)} of {len(self.labels)} images are damaged: {few(named)}.)"
            raise DamagedImageError(
                f"{next(iter(damaged.values()))}{others if len(named) > 1 else ''} Get the data "
                "again, or leave such samples out: skip_damaged = true in the suite."
            )
        first = shapes[0]
        for sample, shape in zip(self.manifest.ids, shapes, strict=True):
            if surface == "native" and shape != first:
                raise InputError(
                    f"{self.task.data} mixes image sizes: sample '{self.manifest.ids[0]}' is "
                    f"{first[1]}x{first[0]}, sample '{sample}' is {shape[1]}x"
                    f"{shape[0]}. The surface 'native' needs one size; use the surface "
                    "'model', which resizes every image first."
                )

    def without_damaged(self) -> "TaskData":
        """The samples whose images can be read, with a note on the others.

        Raises DamagedImageError if none can.
        """
        findings = self._inspect(None)
        damaged = findings.damaged
        if not damaged:
            return self
        if not findings.shapes:
            self.require_images("model")
        named = ", ".join(self.manifest.ids[row] for row in damaged)
        note = (
            f"{len(damaged)} of {len(self.labels)} samples were left out, their images are "
            f"damaged: {named}"
        )
        kept = self.at([row for row in range(len(self.labels)) if row not in damaged])
        return replace(kept, notes=(*self.notes, note))


@dataclass(frozen=True)
class _Findings:
    """The shapes of readable images, and the errors of the other rows."""

    shapes: list[tuple[int, ...]]
    damaged: dict[int, str]


class _Kept:
    """The cache of a ``TaskData``: decoded images, as far as they fit, and their errors."""

    def __init__(self) -> None:
        self.images: dict[int, Pixels] = {}
        self.bytes = 0
        self.findings: _Findings | None = None

    def keep(self, row: int, image: Pixels) -> None:
        """Cache an image if it fits. Concurrent threads may exceed the limit by one image each."""
        if self.bytes + image.nbytes <= KEPT and row not in self.images:
            self.images[row] = image
            self.bytes += image.nbytes


def load_task(task: Task, *, n: int | None, seed: int, skip_damaged: bool = False) -> TaskData:
    """Open a task's data and draw samples to score. Raises InputError for anything unusable.

    With ``skip_damaged``, samples with damaged images are left out, and a note names them.
    """
    _require_labels(task)
    dataset = open_data(task)
    # An empty table has neither classes nor labels: say that first.
    build = _gallery if task.metric == "retrieval" else _assemble
    data = build(task, dataset, _draw(task, dataset, n=n, seed=seed))
    kept = data.without_damaged() if skip_damaged else data
    if kept is data or task.metric != "retrieval":
        return kept
    # Of the gallery, captions go with their images.
    return replace(_gallery(task, dataset, kept.manifest), notes=kept.notes)


def load_others(task: Task, known: Collection[str], *, n: int, seed: int) -> TaskData | None:
    """At most ``n`` samples of a task's data that are not ``known``, drawn by the seed.

    A list of samples that the task names (``samples_file``) does not limit the draw. Returns None
    if there are none. Raises InputError for anything unusable; for classification only.
    """
    dataset = open_data(task)
    ids, but = dataset.ids, set(known)
    rest = [place for place, name in enumerate(ids) if name not in but]
    drawn = random.Random(f"{seed}|{task.name}|others").sample(rest, min(n, len(rest)))
    if not drawn:
        return None
    return _assemble(task, dataset, Manifest(tuple(drawn), tuple(ids[i] for i in drawn)))


def load_manifest(task: Task, *, n: int | None, seed: int) -> Manifest:
    """The samples that ``load_task`` draws. From a hub only the necessary files are fetched."""
    return _draw(task, open_data(task), n=n, seed=seed)


def _draw(task: Task, dataset: Dataset, *, n: int | None, seed: int) -> Manifest:
    among = None if task.samples_file is None else sample_list(task.samples_file, task.name)
    return draw_manifest(dataset, n=n, seed=seed, among=among)


def load_training_data(task: Task, *, labelled: bool) -> TaskData:
    """Open a task's data for training: every sample, in the order of the source.

    If ``labelled`` is false, data without labels (an empty ``label_column``) and without class
    names is accepted; its labels are -1. Raises InputError for anything unusable.
    """
    if task.metric == "retrieval":
        raise InputError(
            f"The task '{task.name}' is retrieval, which nothing here learns from; name a task of "
            "classification."
        )
    if labelled:
        _require_labels(task)
    dataset = open_data(task)
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


def open_data(task: Task) -> Dataset:
    """Open a task's data. Raises InputError if it is not available."""
    scheme = task.data.partition(":")[0]
    # Imported on use: the libraries take a second, and the embedded data needs none of them.
    if scheme == "wds":
        from mmtard_bench.data.webdataset import open_webdataset

        return open_webdataset(task)
    if scheme in OUTSIDE:
        from mmtard_bench.data.files import open_outside

        return open_outside(task)
    made = registry.made(registry.datasets, task.data)
    missing = {"revision", "ids", "labels", "class_names", "image"}.difference(dir(made))
    if missing:
        raise InputError(
            f"The data set '{task.data}' is registered with a function that returned a "
            f"{type(made).__name__} without {', '.join(sorted(missing))}; expected a Dataset."
        )
    return made


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
    return TaskData(
        task, dataset.revision, tuple(places), task.templates, manifest, labels, dataset, matches
    )


def _assemble(task: Task, dataset: Dataset, manifest: Manifest) -> TaskData:
    """Samples with their classes, templates and labels, checked against each other."""
    classes, notes = class_names(task, dataset)
    templates = task.templates or tuple(getattr(dataset, "templates", ()))
    if not templates:
        raise InputError(
            f"{task.data} brings no prompt templates; give templates = [...] in the task."
        )
    every = dataset.labels  # once: a data set may make them up each time
    labels = labels_at(task, dataset, every, manifest)
    if task.label_column:
        notes += check_labels(task, dataset, every, classes)
    return TaskData(
        task, dataset.revision, classes, templates, manifest, labels, dataset, notes=notes
    )
