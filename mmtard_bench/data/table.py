"""A table of Hugging Face ``datasets`` as a data set: images, with labels or captions."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets

from mmtard_bench.data.base import Pixels, captions_in, sample_ids
from mmtard_bench.data.decode import decode
from mmtard_bench.errors import DamagedImageError, InputError, first_line
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

    @cached_property
    def labels(self) -> Sequence[int]:
        if not self.task.label_column:
            return [-1] * len(self.table)
        values = list(self.table[self.task.label_column])
        for i, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(
                    f"{self.task.data}: the label of sample '{self.ids[i]}' is {value!r}; "
                    "expected whole numbers from 0."
                )
        return values

    def captions(self, index: int) -> tuple[str, ...]:
        """A list of strings, or one string with a caption a line."""
        value = self.table[self.task.label_column][index]
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
            raise InputError(
                f"{self.task.data}: the captions of sample '{self.ids[index]}' are {value!r}; "
                "expected a string, or a list of strings."
            )
        return captions_in(given, f"{self.task.data}: sample '{self.ids[index]}'")

    @property
    def class_names(self) -> tuple[str, ...]:
        feature = self.table.features.get(self.task.label_column)
        return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()

    def image(self, index: int) -> Pixels:
        value = self.table[index][self.task.image_column]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise DamagedImageError(f"{self._sample(index)} is missing.")
        data = value["bytes"]
        if data is None:
            try:
                data = Path(value["path"]).read_bytes()
            except OSError as error:
                # A file that is gone is damage; a drive that does not answer is not.
                kind = DamagedImageError if isinstance(error, FileNotFoundError) else InputError
                raise kind(f"{self._sample(index)} cannot be read: {error}.") from error
        return decode(data, self._sample(index), convert_rgb=self.task.convert_rgb)

    def _sample(self, index: int) -> str:
        return f"{self.task.data}: the image of sample '{self.ids[index]}'"


def names_in(table: "datasets.Dataset") -> list[str] | None:
    """What a table's column "id" holds; None if there is none."""
    return [*map(str, table["id"])] if "id" in table.column_names else None


def as_dataset(
    task: Task, table: "datasets.Dataset", revision: str, ids: Sequence[str] | None = None
) -> TableDataset:
    """A table as a data set; its ids, unless given, follow from it. Raises InputError."""
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
    return TableDataset(table, task, revision, ids)


def _cast_image(task: Task, table: "datasets.Dataset") -> "datasets.Dataset":
    try:
        return table.cast_column(task.image_column, datasets.Image(decode=False))
    except Exception as error:
        raise InputError(
            f"{task.data}: the column '{task.image_column}' holds no images: {error}"
        ) from error


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


@silent
def load_table(task: Task, builder: str, **arguments: Any) -> Any:
    """``datasets.load_dataset`` for files that are here. Raises InputError."""
    try:
        return datasets.load_dataset(builder, **arguments)
    except Exception as error:  # datasets, arrow and system errors have no common base
        raise InputError(
            f"{task.data} could not be read: {first_line(error)} Check the files."
        ) from error


def split_of(task: Task, found: Iterable[object]) -> str:
    """The split that a task is about, of those that there are. Raises InputError."""
    splits = [str(split) for split in found]
    split = task.split or (splits[0] if len(splits) == 1 else "")
    if split not in splits:
        raise InputError(
            f"{task.data} has the splits {', '.join(splits)}; "
            f"choose one with split = ... in the task (given: {task.split!r})."
        )
    return split
