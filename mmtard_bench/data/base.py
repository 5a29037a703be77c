"""What a data set is to the rest of the package, and which of its samples an evaluation uses."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmtard_bench.errors import InputError

OUTSIDE = ("parquet", "imagefolder", "hub")
"""What the data spec of a task from outside begins with, before a colon."""

Pixels = NDArray[np.uint8]
"""One image, (H, W, 3), 8 bits a channel."""


class Dataset(Protocol):
    """Labelled images, addressed by position and named by id.

    ``revision`` pins the content: two data sets of one revision hold the same bytes under the
    same ids. ``class_names`` is empty where the source does not name its classes.
    """

    @property
    def revision(self) -> str: ...
    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Sequence[int]: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    def image(self, index: int) -> Pixels:
        """The image at a position. Raises InputError, naming the sample, if it is unusable."""
        ...


class CaptionedDataset(Dataset, Protocol):
    """A data set for retrieval: images with captions; nobody asks for its labels."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of an image, at least one. Raises InputError, naming the sample."""
        ...


def split_captions(text: str) -> tuple[str, ...]:
    """One caption a line, as in the text members of WebDataset retrieval shards."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


@dataclass(frozen=True)
class Manifest:
    """Which samples an evaluation uses, in their order: positions in the data set and ids."""

    indices: tuple[int, ...]
    ids: tuple[str, ...]


def draw_manifest(dataset: Dataset, *, n: int | None, seed: int) -> Manifest:
    """Draw ``n`` samples (all of them for None), from (revision, seed, n) alone.

    Samples are ranked by a hash of (revision, seed, id), so the draw depends neither on the
    order in which the source lists them nor on anything about the run, and a smaller draw is
    the beginning of a larger one.

    Raises InputError if the data set is empty, holds an id twice, or has fewer than n samples.
    """
    ids = dataset.ids
    if not ids:
        raise InputError("The data set is empty: expected at least one labelled image.")
    if len(set(ids)) != len(ids):
        raise InputError("The data set uses one sample id twice; ids must be unique.")
    if n is not None and not 1 <= n <= len(ids):
        raise InputError(
            f"n = {n} samples were asked for, but the data set holds {len(ids)}; "
            f"ask for 1 to {len(ids)}."
        )
    prefix = f"{dataset.revision}|{seed}|"
    ranks = [hashlib.sha256((prefix + sample).encode()).digest() for sample in ids]
    order = sorted(range(len(ids)), key=ranks.__getitem__)[:n]
    return Manifest(indices=tuple(order), ids=tuple(ids[i] for i in order))
