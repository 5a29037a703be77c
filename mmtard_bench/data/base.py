"""What a data set is to the rest of the package, and which of its samples an evaluation uses."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmtard_bench.errors import InputError

OUTSIDE = ("parquet", "imagefolder", "hub", "wds")
"""What the data spec of a task from outside begins with, before a colon."""

ROBUSTBENCH_LIST = "ROBUSTBENCH_IMAGENET_LIST"
"""The environment variable that names RobustBench's list of 5,000 ImageNet images."""

Pixels = NDArray[np.uint8]
"""One image, (H, W, 3), 8 bits a channel."""


class Dataset(Protocol):
    """Labelled images, addressed by position and named by id.

    ``revision`` pins the content: two data sets of one revision hold the same bytes under the
    same ids. ``class_names`` is empty where the source does not name its classes. A data set that
    carries prompts has them in ``templates``, with {} for the class. ``labels`` may be looked up
    one by one: only those of the samples that are used are asked for.
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
    """An image as a data set gave it. Raises InputError, with ``what`` is something else."""
    kind = type(image).__name__
    if isinstance(image, np.ndarray):
        kind += f" of {image.dtype}, {image.shape}"
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return np.ascontiguousarray(image)  # torch takes no view that runs backwards
    raise InputError(
        f"{what} is {kind}; expected a numpy array of uint8, (H, W, 3), from 0 to 255."
    )


class CaptionedDataset(Dataset, Protocol):
    """A data set for retrieval: images with captions; nobody asks for its labels."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of an image, at least one. Raises InputError, naming the sample."""
        ...


class LazyLabels(Sequence[int]):
    """``count`` labels by position, looked up when they are asked for.

    ``known`` gives the ids and labels that came along so far: of all samples of a file that was
    opened for one of them.
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

    A later sample of the same name gets "#2", "#3" behind it: CIFAR-100 holds an image twice, with
    two labels; both are samples.
    """
    if names is None:
        return [f"{i:08d}" for i in range(count)]
    seen: dict[str, int] = {}
    ids = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        ids.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return ids


def is_text(name: str) -> bool:
    """Whether a name from outside is one line that JSON can hold: no control, no broken UTF-8."""
    return not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)


def few(names: Iterable[str]) -> str:
    """The first of some names, for a message."""
    first = list(islice(names, 6))
    return ", ".join(first[:5]) + (", ..." if len(first) > 5 else "")


def lines_in(text: str) -> list[str]:
    """The lines of a text, without empty ones at its end.

    Not ``splitlines``, which takes more letters for ends of lines: names would be shifted.
    """
    text = text.rstrip()
    return re.split(r"\r\n|\r|\n", text) if text else []


def read_text(path: Path) -> str:
    """A text file, without a mark at its start. Raises OSError, or UnicodeDecodeError."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")  # a pipe would never end
    return path.read_text("utf-8-sig")


def split_captions(text: str) -> tuple[str, ...]:
    """One caption a line, as in the text members of WebDataset retrieval shards."""
    return tuple(line.strip() for line in lines_in(text) if line.strip())


def captions_in(texts: Iterable[str], what: str) -> tuple[str, ...]:
    """The captions in some texts. Raises InputError, with ``what`` has none, if there is none."""
    found = tuple(caption for text in texts for caption in split_captions(text))
    if not found:
        raise InputError(f"{what} has no caption.")
    return found


@dataclass(frozen=True)
class Manifest:
    """Which samples an evaluation uses, in their order: positions in the data set and ids."""

    indices: tuple[int, ...]
    ids: tuple[str, ...]


def draw_manifest(
    dataset: Dataset, *, n: int | None, seed: int, among: Collection[str] | None = None
) -> Manifest:
    """Draw ``n`` samples (all of them for None), from (revision, seed, n) alone.

    ``among`` names the samples that may be drawn; all of them if None.

    Samples are ranked by a hash of (revision, seed, id), so the draw depends neither on the
    order in which the source lists them nor on anything about the run, and a smaller draw is
    the beginning of a larger one.

    Raises InputError if the data set is empty, holds an id twice, lacks one of ``among``, or has
    fewer than n samples.
    """
    ids = dataset.ids
    if not len(ids):
        raise InputError("The data set is empty: expected at least one labelled image.")
    if not all(isinstance(sample, str) for sample in ids):
        raise InputError(f"The data set has sample ids like {ids[0]!r}; expected text.")
    if len(set(ids)) != len(ids):
        raise InputError("The data set uses one sample id twice; ids must be unique.")
    chosen = range(len(ids)) if among is None else _positions(ids, among)
    if n is not None and not 1 <= n <= len(chosen):
        raise InputError(
            f"n = {n} samples were asked for, but the data set holds {len(chosen)}; "
            f"ask for 1 to {len(chosen)}."
        )
    prefix = f"{dataset.revision}|{seed}|"
    ranks = {i: hashlib.sha256((prefix + ids[i]).encode()).digest() for i in chosen}
    order = sorted(chosen, key=ranks.__getitem__)[:n]
    return Manifest(indices=tuple(order), ids=tuple(ids[i] for i in order))


def _positions(ids: Sequence[str], among: Collection[str]) -> Sequence[int]:
    wanted = set(among)
    chosen = [i for i, sample in enumerate(ids) if sample in wanted]
    if len(chosen) != len(wanted):
        missing = sorted(wanted.difference(ids))
        raise InputError(
            f"{len(missing)} of the {len(wanted)} samples that the task lists are not in the data "
            f"set, '{missing[0]}' for one; its ids look like '{ids[0]}'. Check that the list "
            "belongs to the data, and that the data is whole."
        )
    return chosen


def local_path(text: str, what: str) -> Path:
    """A path; one that begins with $NAME begins with what that environment variable says.

    So a suite can be the same on every machine, and a record holds no path of the one it was
    made on. Raises InputError, with ``what`` needs it, if the variable is not set.
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


def sample_list(text: str, what: str) -> tuple[str, ...]:
    """The ids in a ``samples_file``, one a line. Raises InputError if it cannot be read.

    "robustbench" stands for RobustBench's 5,000 ImageNet images: the file that the environment
    variable ROBUSTBENCH_IMAGENET_LIST names, or the one in the installed package.
    """
    path = local_path(text, what)
    if text == "robustbench":
        path = _robustbench_list(what)
    try:
        lines = lines_in(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what}: the list of samples cannot be read: {error}.") from error
    ids = tuple(line.strip() for line in lines if line.strip())
    if not ids or len(set(ids)) != len(ids):
        raise InputError(f"{what}: the list of samples {path} is empty or names one twice.")
    return ids


def _robustbench_list(what: str) -> Path:
    named = os.environ.get(ROBUSTBENCH_LIST)
    if named:
        return Path(named)
    package = find_spec("robustbench")
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder) / "helper_files" / "imagenet_test_image_ids.txt"
        if path.is_file():
            return path
    raise InputError(
        f"{what} uses RobustBench's list of ImageNet images, and no installed package holds it: "
        f"set {ROBUSTBENCH_LIST} to the file imagenet_test_image_ids.txt of RobustBench's "
        "repository (lines such as n01440764/ILSVRC2012_val_00009111.JPEG)."
    )
