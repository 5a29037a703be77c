"""The interface of data sets."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmtard_bench.errors import InputError
from mmtard_bench.files import lines_in

OUTSIDE = ("parquet", "imagefolder", "saved", "hub", "wds")
"""The prefixes of data specs, before the colon."""


Pixels = NDArray[np.uint8]
"""One image, (H, W, 3), 8 bits per channel."""


class Dataset(Protocol):
    """Labelled images, addressed by position and named by id.

    ``revision`` identifies the content: data sets with the same revision hold the same bytes under
    the same ids. ``class_names`` is empty if the source does not name its classes. ``templates``
    are the data set's own prompts, with {} for the class, if it has any. ``labels`` may be loaded
    on access: only labels of used samples are read.
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


def checked_pixels(image: object, what: str) -> Pixels:
    """Check an image of a data set. Raises InputError, which names ``what``, for anything else."""
    kind = type(image).__name__
    if isinstance(image, np.ndarray):
        kind += f" of {image.dtype}, {image.shape}"
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return np.ascontiguousarray(image)  # torch takes no view that runs backwards
    raise InputError(
        f"{what} is {kind}; expected a numpy array of uint8, (H, W, 3), from 0 to 255."
    )


class CaptionedDataset(Dataset, Protocol):
    """A data set for retrieval: images with captions. Its labels are not used."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of an image, at least one. Raises InputError, naming the sample."""
        ...


class LazyLabels(Sequence[int]):
    """``count`` labels by position, loaded on access.

    ``known`` returns the ids and labels loaded so far: those of all samples of every opened file.
    """

    def __init__(
        self,
        count: int,
        label: Callable[[int], int],
        known: Callable[[], Iterator[tuple[str, int]]],
    ) -> None:
        self._places = range(count)
        self._label = label
        self.known = known

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        where = self._places[index]
        return [*map(self._label, where)] if isinstance(where, range) else self._label(where)


def sample_ids(count: int, names: Iterable[str] | None) -> list[str]:
    """The ids of the ``count`` rows of a table: their names or, for None, their positions.

    If a name occurs again, "#2", "#3", ... is appended: CIFAR-100 has one image twice, with two
    labels, and both are samples.
    """
    if names is None:
        return [f"{i:08d}" for i in range(count)]
    seen: dict[str, int] = {}
    ids = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        ids.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return ids


def few(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    first = list(islice(names, 6))
    return ", ".join(first[:5]) + (", ..." if len(first) > 5 else "")


def split_captions(text: str) -> tuple[str, ...]:
    """One caption a line, as in the text members of WebDataset retrieval shards."""
    return tuple(line.strip() for line in lines_in(text) if line.strip())


def captions_in(texts: Iterable[str], what: str) -> tuple[str, ...]:
    """The captions in texts. Raises InputError, which names ``what``, if there is none."""
    found = tuple(caption for text in texts for caption in split_captions(text))
    if not found:
        raise InputError(f"{what} has no caption.")
    return found


def local_path(text: str, what: str) -> Path:
    """Expand $NAME at the beginning of a path to the value of that environment variable.

    A suite can therefore be the same on every machine, and a record holds no path of the machine.
    Raises InputError, which names ``what``, if the variable is not set.
    """
    if not text.startswith("$"):
        return Path(text)
    name, _, rest = text[1:].partition("/")
    value = os.environ.get(name)
    if not value:
        raise InputError(
            f"{what} is where the environment variable {name} says, which is not set. Set it to "
            "the folder or file, and run the same command again."
        )
    return Path(value, rest) if rest else Path(value)
