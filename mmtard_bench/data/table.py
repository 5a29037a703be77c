"""A table of Hugging Face ``datasets`` as a data set: images, with labels or captions."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.compute

from mmtard_bench.data.base import Pixels, captions_in, few, sample_ids
from mmtard_bench.data.decode import decode
from mmtard_bench.errors import DamagedImageError, InputError
from mmtard_bench.hub import cache_failure
from mmtard_bench.muted import Muted
from mmtard_bench.types import Task

_LOG = logging.getLogger("datasets")


@dataclass(frozen=True)
class TableDataset:
    """A ``datasets`` table with images and labels or captions.

    Implements ``Dataset``, or ``CaptionedDataset`` where ``task.label_column`` holds captions.
    """

    table: "datasets.Dataset"
    task: Task
    revision: str
    ids: Sequence[str]
    roots: Sequence[str | Path] = ()
    """The folders in which images may be files that the table names."""

    @cached_property
    def labels(self) -> Sequence[int]:
        if not self.task.label_column:
            return [-1] * len(self.table)
        values: list[int] = _raw(self.table, self.task.label_column).to_pylist()
        if self._named:
            places: dict[Any, int] = {name: place for place, name in enumerate(self.class_names)}
            values = [places.get(value, value) for value in values]
        for i, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(
                    f"{self.task.data}: the label of sample '{self.ids[i]}' is {value!r}; "
                    "expected whole numbers from 0, or names of classes."
                )
        return values

    def captions(self, index: int) -> tuple[str, ...]:
        """A list of strings, or one string with a caption a line."""
        value = _raw(self.table, self.task.label_column)[index].as_py()
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
            raise InputError(
                f"{self.task.data}: the captions of sample '{self.ids[index]}' are {value!r}; "
                "expected a string, or a list of strings."
            )
        return captions_in(given, f"{self.task.data}: sample '{self.ids[index]}'")

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        feature = self.table.features.get(self.task.label_column)
        if self._named:
            found = set(_raw(self.table, self.task.label_column).to_pylist()) - {None, ""}
            # In the order of the task where it knows all names, else sorted.
            return self.task.classes if found <= {*self.task.classes} else tuple(sorted(found))
        return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()

    @property
    def _named(self) -> bool:
        """Whether the labels are names of classes."""
        feature = self.table.features.get(self.task.label_column)
        return getattr(feature, "dtype", None) in ("string", "large_string")

    def image(self, index: int) -> Pixels:
        value = _raw(self.table, self.task.image_column)[index].as_py()
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise DamagedImageError(f"{self._sample(index)} is missing.")
        data = value["bytes"]
        if data is None:
            data = self._read(value["path"], self._sample(index))
        return decode(data, self._sample(index), convert_rgb=self.task.convert_rgb)

    def _read(self, path: str, what: str) -> bytes:
        parents = Path(path).parents
        if ".." in Path(path).parts or not any(Path(root) in parents for root in self.roots):
            # Whoever wrote the table would choose what is read here, and a pipe never ends.
            raise InputError(
                f"{what} is not in the data, which names the file {path!r} in its place. Only "
                "bytes in the data are read: make it again with the images in it."
            )
        try:
            return Path(path).read_bytes()
        except OSError as error:
            # A file that is gone is damage; a drive that does not answer is not.
            kind = DamagedImageError if isinstance(error, FileNotFoundError) else InputError
            raise kind(f"{what} cannot be read: {error}.") from error

    def _sample(self, index: int) -> str:
        return f"{self.task.data}: the image of sample '{self.ids[index]}'"


def names_in(table: "datasets.Dataset") -> list[str] | None:
    """What a table's column "id" holds; None if there is none."""
    return [*map(str, _raw(table, "id").to_pylist())] if "id" in table.column_names else None


def _raw(table: "datasets.Dataset", column: str) -> Any:
    """A column as it is stored: ``datasets`` would decode images, of every column of a row."""
    return table.data.column(column)


def as_dataset(
    task: Task,
    table: "datasets.Dataset",
    revision: str,
    ids: Sequence[str] | None = None,
    *,
    roots: Sequence[str | Path] = (),
) -> TableDataset:
    """A table as a data set; its ids, unless given, follow from it. Raises InputError.

    Images may be files that the table names in the folders ``roots``; else their bytes are in it.
    """
    for column in (task.image_column, task.label_column):
        if column and column not in table.column_names:
            raise InputError(
                f"{task.data} has no column '{column}'; it has {', '.join(table.column_names)}. "
                "Name the columns with image_column and label_column in the task."
            )
    if not isinstance(table.features[task.image_column], datasets.Image):
        table = _cast_image(task, table)
    # Files stay encoded until a sample is used, so that a damaged one can be named.
    table = table.cast_column(task.image_column, datasets.Image(decode=False))
    if ids is None:
        ids = sample_ids(len(table), names_in(table))
    return TableDataset(table, task, revision, ids, roots)


def _cast_image(task: Task, table: "datasets.Dataset") -> "datasets.Dataset":
    _require_8_bits(task, table)
    try:
        return table.cast_column(task.image_column, datasets.Image(decode=False))
    except Exception as error:
        raise InputError(
            f"{task.data}: the column '{task.image_column}' holds no images: {error}"
        ) from error


def _require_8_bits(task: Task, table: "datasets.Dataset") -> None:
    """See that pixels that are lists of numbers fit 8 bits: the library drops the bits above."""
    for chunk in _raw(table, task.image_column).chunks:
        values = getattr(chunk, "storage", chunk)  # of a type of the library's own
        while hasattr(values.type, "value_type"):
            values = values.flatten()
        if pyarrow.types.is_integer(values.type):
            bounds = pyarrow.compute.min_max(values).as_py()
            if not 0 <= (bounds["min"] or 0) <= (bounds["max"] or 0) <= 255:
                raise InputError(
                    f"{task.data}: the column '{task.image_column}' holds numbers from "
                    f"{bounds['min']} to {bounds['max']}; expected pixels of 8 bits, 0 to 255. "
                    "Scale them to 8 bits before you use them."
                )


def _silence() -> tuple[int, bool]:
    before = _LOG.level, datasets.are_progress_bars_disabled()
    _LOG.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    return before


def _speak(before: tuple[int, bool]) -> None:
    level, disabled = before
    _LOG.setLevel(level)
    if not disabled:
        datasets.enable_progress_bars()


silent = Muted(_silence, _speak)
"""Without the bars of ``datasets``, and what it logs before it raises, which says nothing more."""


def require_one_naming(task: Task, files: Iterable[tuple[str, "datasets.Features"]]) -> None:
    """Raise InputError if a file names the classes otherwise than the first does.

    The library takes the names of the first file, or that there are none, for the labels of all.
    """
    first: tuple[str, list[str]] | None = None
    for file, features in files:
        feature = features.get(task.label_column)
        names = feature.names if isinstance(feature, datasets.ClassLabel) else []
        first = first or (file, names)
        if names and names != first[1]:
            raise InputError(
                f"{task.data}: {file} and {first[0]} name the classes differently "
                f"({few(names)}; {few(first[1]) or 'not at all'}), so one label may mean two "
                "classes. Write both with one list of names, or use one of them."
            )


@silent
def load_table(task: Task, builder: str, **arguments: Any) -> Any:
    """``datasets.load_dataset`` for files that are here. Raises InputError."""
    try:
        return datasets.load_dataset(builder, **arguments)
    except Exception as error:  # datasets, arrow and system errors have no common base
        unwritten = cache_failure(task.data, datasets.config.HF_DATASETS_CACHE, error)
        # The library's own error says only that something failed.
        said = " ".join(str(error.__cause__ or error).split())
        raise unwritten or InputError(
            f"{task.data} could not be read: {said[:300]}. Check the files."
        ) from error


def split_of(task: Task, found: Iterable[object], alias: str | None = None) -> str:
    """The split that a task is about, of those that there are; ``alias`` is another name for it.

    Raises InputError.
    """
    splits = [str(split) for split in found]
    split = alias or task.split or (splits[0] if len(splits) == 1 else "")
    if split not in splits:
        raise InputError(
            f"{task.data} has the splits {', '.join(splits)}; "
            f"choose one with split = ... in the task (given: {task.split!r})."
        )
    return split
