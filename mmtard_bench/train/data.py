"""Training images: which samples a step sees, and how they get there."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmtard_bench.attacks.base import sample_generator
from mmtard_bench.errors import InputError
from mmtard_bench.models.clip import Preprocess
from mmtard_bench.tasks.samples import TaskData
from mmtard_bench.train.towers import Teacher
from mmtard_bench.types import Surface

IN_MEMORY = 2 * 1024**3
"""Bytes of pixels up to which a data set of one image size is decoded once and kept."""


BLOCK = 256
"""Images that a teacher sees at a time when it looks at all of them."""


class Order:
    """Which samples each step sees: reshuffled epochs, a function of (seed, step) alone."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count = count
        self.batch = batch
        self.seed = seed
        self._epochs: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Tensor:
        """Positions in the data set of the global batch of a step, (batch,)."""
        places = torch.arange(step * self.batch, (step + 1) * self.batch)
        epochs = places // self.count
        parts = []
        for epoch in torch.unique(epochs).tolist():
            parts.append(self._epoch(epoch)[places[epochs == epoch] % self.count])
        return torch.cat(parts)

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            generator = sample_generator(self.seed, "order", epoch)
            self._epochs = {k: v for k, v in self._epochs.items() if k >= epoch - 1}
            self._epochs[epoch] = torch.randperm(self.count, generator=generator)
        return self._epochs[epoch]


class Images(Dataset[Tensor]):
    """The images of a task by position, 8-bit, at one size.

    With the surface "native" that is their own, with "model" the student's input size. Where they
    fit they are decoded once and stay in memory, else the loader's workers decode them each time.
    Raises InputError for images of several sizes on the native surface.
    """

    def __init__(self, data: TaskData, preprocess: Preprocess, surface: Surface) -> None:
        self.data = data
        self.preprocess = preprocess
        self.surface = surface
        self._kept: Tensor | None = None
        self._shape: torch.Size | None = None
        first = self[0]
        self._shape = first.shape
        if first.numel() * len(self) <= IN_MEMORY:
            kept = torch.empty((len(self), *first.shape), dtype=torch.uint8)
            for position in range(len(self)):
                kept[position] = self[position]
            self._kept = kept

    def __len__(self) -> int:
        return len(self.data.manifest.indices)

    def __getitem__(self, position: int) -> Tensor:
        """One image, (3, H, W), uint8. Raises InputError, naming the sample, if it is unusable."""
        return self._decode(position) if self._kept is None else self._kept[position]

    def _decode(self, position: int) -> Tensor:
        pixels = self.data.dataset.image(self.data.manifest.indices[position])
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        if self.surface == "model":
            resized = self.preprocess.resize(image[None].float() / 255)[0]
            image = (resized * 255).round().to(torch.uint8)
        if self._shape is not None and image.shape != self._shape:
            raise InputError(
                f"{self.data.task.data} mixes image sizes (sample "
                f"'{self.data.manifest.ids[position]}'); the surface 'native' needs one. Set "
                'surface = "model" in the recipe to have every image resized first.'
            )
        return image

    def __getitems__(self, positions: list[int]) -> Tensor:
        """Several at once, (N, 3, H, W): how the loader asks for a batch."""
        if self._kept is not None:
            return self._kept[positions]
        return torch.stack([self[position] for position in positions])

    def batches(self, positions: list[list[int]], workers: int) -> Iterator[Tensor]:
        """Batches of images (N, 3, H, W), uint8, decoded ahead by so many worker processes."""
        loader: DataLoader[Tensor] = DataLoader(
            self,
            batch_sampler=positions,
            num_workers=0 if self._kept is not None else workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            # Its own stream: an iterator more or less must not shift that of dropout.
            generator=torch.Generator(),
        )
        try:
            yield from loader
        except InputError as error:
            # A worker's error arrives with the worker's traceback around it.
            last = str(error).strip().splitlines()[-1]
            raise InputError(
                last.removeprefix(f"{InputError.__module__}.{type(error).__name__}: ")
            ) from error


def learn_by_heart(
    teacher: Teacher, images: Images, workers: int, accelerator: Accelerator
) -> Tensor:
    """A teacher's embeddings of all clean images, (N, D), on the CPU, shared by all processes.

    In the order of the data set and in fixed blocks: on which step of which run a sample is seen
    first must not change a bit of it.
    """
    count = len(images)
    blocks = [list(range(i, min(i + BLOCK, count))) for i in range(0, count, BLOCK)]
    mine = blocks[accelerator.process_index :: accelerator.num_processes]

    def embed(batch: Tensor) -> Tensor:
        with accelerator.autocast():
            return teacher(batch.to(accelerator.device).float() / 255).embedding.cpu()

    known = torch.zeros(count, embed(images[0][None]).shape[1])
    for rows, batch in zip(mine, images.batches(mine, workers), strict=True):
        known[rows] = embed(batch)
    if accelerator.num_processes > 1:
        known = accelerator.reduce(known.to(accelerator.device), "sum").cpu()
    return known


def _as_it_is(batch: Any) -> Any:
    return batch


def spread_over_classes(labels: tuple[int, ...], count: int) -> list[int]:
    """Positions of at most ``count`` samples, as evenly over the classes as they allow.

    The first of every class, in order, then the second of every class, and so on.
    """
    seen: dict[int, int] = {}
    turns = []
    for position, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        turns.append((seen[label], label, position))
    return [position for _, _, position in sorted(turns)[:count]]
