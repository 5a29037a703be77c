"""Images and labels in memory as a data set."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtard_bench import registry
from mmtard_bench.data.base import Pixels, few, sample_ids
from mmtard_bench.errors import InputError
from mmtard_bench.tasks.samples import DEFAULT_TEMPLATE
from mmtard_bench.types import Task

_EXPECTED = (
    "expected images of 8 bits: a list of PIL images or of numpy arrays (H, W, 3), or one array or "
    "tensor (N, H, W, 3) or (N, 3, H, W), all of uint8 from 0 to 255"
)


@dataclass(frozen=True)
class MemoryDataset:
    """Implements ``Dataset``; the revision hashes images, labels and class names."""

    revision: str
    ids: Sequence[str]
    labels: Sequence[int]
    class_names: tuple[str, ...]
    pixels: Sequence[Pixels]

    def image(self, index: int) -> Pixels:
        return self.pixels[index]


def task_of(
    name: str,
    images: Any,
    labels: Sequence[int] | Sequence[str] | Any,
    *,
    classes: Sequence[str],
    templates: Sequence[str] = (DEFAULT_TEMPLATE,),
) -> Task:
    """A task whose data is in memory, for ``evaluate`` and ``run``.

    Args:
        name: The name of the task in records.
        images: A list of N PIL images or arrays (H, W, 3), or one array or tensor (N, H, W, 3) or
            (N, 3, H, W); uint8, from 0 to 255.
        labels: N whole numbers from 0, or N class names.
        classes: The class names, the first one for the label 0.
        templates: Prompts with one {} for the class name; their embeddings are averaged.

    Returns:
        A task. Its data has a revision that follows from the content: the same images, labels and
        names give records that can be compared.

    Raises:
        InputError: If images, labels and classes do not fit together.

    Examples:
        >>> images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        >>> task = mb.task_of("mine", images, ["cat", "dog"], classes=["cat", "dog"])
        >>> mb.evaluate("tiny-clip", task=task, threat="pgd-2", eps="1/255").results.n
        2
    """
    names = tuple(classes)
    pixels = _pixels(images)
    numbers = _numbers(labels, names)
    if len(numbers) != len(pixels) or not pixels:
        raise InputError(
            f"There are {len(pixels)} images and {len(numbers)} labels; expected one each."
        )
    digest = hashlib.sha256(repr((names, numbers)).encode())
    for image in pixels:
        digest.update(repr(image.shape).encode())
        digest.update(image.tobytes())
    revision = f"sha256:{digest.hexdigest()}"
    data = f"memory.{digest.hexdigest()[:32]}"
    if data not in registry.datasets:
        made = MemoryDataset(revision, sample_ids(len(pixels), None), numbers, names, pixels)
        registry.register_dataset(data)(lambda: made)
    return Task(name=name, data=data, templates=tuple(templates))


def _pixels(images: Any) -> list[Pixels]:
    if hasattr(images, "detach"):  # a tensor of torch, which may be on a GPU
        images = images.detach().cpu().numpy()
    if isinstance(images, np.ndarray) and images.ndim == 4:
        first, last = images.shape[1] == 3, images.shape[3] == 3
        if first and last:
            raise InputError(
                f"Images of shape {images.shape} have channels first or last; {_EXPECTED}."
            )
        images = images.transpose(0, 2, 3, 1) if first else images
    if isinstance(images, str | bytes) or not hasattr(images, "__iter__"):
        raise InputError(f"The images are {type(images).__name__}; {_EXPECTED}.")
    return [_one(image, place) for place, image in enumerate(images)]


def _one(image: Any, place: int) -> Pixels:
    mode = getattr(image, "mode", "RGB")
    found: NDArray[Any] = np.asarray(image)
    if mode != "RGB" or found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] != 3:
        kind = f"of mode {mode}" if mode != "RGB" else f"{found.dtype} of shape {found.shape}"
        raise InputError(f"Image {place} is {kind}; {_EXPECTED}.")
    return np.array(found)  # a copy: the caller may change theirs


def _numbers(labels: Any, names: tuple[str, ...]) -> list[int]:
    found = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if found and all(isinstance(label, str) for label in found):
        places = {name: place for place, name in enumerate(names)}
        unknown = sorted({label for label in found if label not in places})
        if unknown:
            raise InputError(
                f"The labels {few(map(repr, unknown))} are none of the classes {few(names)}."
            )
        return [places[label] for label in found]
    try:
        if any(isinstance(label, bool) for label in found):
            raise TypeError
        return [index(label) for label in found]
    except TypeError:
        raise InputError(
            "The labels are neither whole numbers nor class names; expected one kind of them, one "
            "for each image."
        ) from None
