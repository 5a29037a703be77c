"""Training images: the order of the samples, and how images are loaded."""

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
"""A data set of at most so many bytes of pixels is decoded once and kept in memory."""


BLOCK = 256
"""The batch size with which a teacher embeds the whole data set."""


class Order:
    """The samples of each step: epochs in a new random order, determined by (seed, step) alone."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count = count
        self.batch = batch
        self.seed = seed
        self._epochs: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Tensor:
        """The positions (batch,) in the data set of the global batch of a step."""
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
    """The 8-bit images of a task by position, all of one size.

    With the surface "native" the images keep their own size; with "model" they have the student's
    input size. A data set of at most ``IN_MEMORY`` bytes is decoded once and stays in memory;
    otherwise the worker processes of the loader decode each image when it is needed.

    Raises:
        InputError: If the surface is "native" and the images have several sizes.
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
        """One image (3, H, W), uint8. Raises InputError for a damaged image, with its sample."""
        return self._decode(position) if self._kept is None else self._kept[position]

    def _decode(self, position: int) -> Tensor:
        pixels = self.data.dataset.image(self.data.manifest.indices[position])
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        if self.surface == "model":
            resized = self.preprocess.resize(image[None].float() / 255)[0]
            image = (resized * 255).round().to(torch.uint8)
        if self._shape is not None and image.shape != self._shape:
            raise InputError(
                f"{self.data.task.data} has images of several sizes (sample "
                f"'{self.data.manifest.ids[position]}'). The surface 'native' needs one size. Set "
                'surface = "model" in the recipe to resize every image.'
            )
        return image

    def __getitems__(self, positions: list[int]) -> Tensor:
        """Several images (N, 3, H, W), uint8. The loader calls this for each batch."""
        if self._kept is not None:
            return self._kept[positions]
        return torch.stack([self[position] for position in positions])

    def batches(self, positions: list[list[int]], workers: int) -> Iterator[Tensor]:
        """Batches of images (N, 3, H, W), uint8, decoded in advance by ``workers`` processes."""
        loader: DataLoader[Tensor] = DataLoader(
            self,
            batch_sampler=positions,
            num_workers=0 if self._kept is not None else workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            # A generator of its own, so that iterators do not change the random numbers of dropout.
            generator=torch.Generator(),
        )
        try:
            yield from loader
        except InputError as error:
            # The error of a worker arrives wrapped in the traceback of the worker.
            last = str(error).strip().splitlines()[-1]
            raise InputError(
                last.removeprefix(f"{InputError.__module__}.{type(error).__name__}: ")
            ) from error


def learn_by_heart(
    teacher: Teacher, images: Images, workers: int, accelerator: Accelerator
) -> Tensor:
    """A teacher's embeddings (N, D) of all clean images, on the CPU, gathered over all processes.

    Images are embedded in the order of the data set and in fixed blocks, so that the embeddings are
    identical in every run, whichever step sees a sample first.
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
    """Positions of at most ``count`` samples, spread over the classes as evenly as possible.

    The first sample of every class comes first, then the second sample of every class, and so on.
    """
    seen: dict[int, int] = {}
    turns = []
    for position, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        turns.append((seen[label], label, position))
    return [position for _, _, position in sorted(turns)[:count]]
