"""Data from outside through Hugging Face ``datasets``: parquet files, image folders, the hub."""

import glob
import hashlib
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets

from mmtard_bench.data.base import CaptionedDataset, Pixels, captions_in, local_path, sample_list
from mmtard_bench.data.decode import decode
from mmtard_bench.errors import DamagedImageError, InputError
from mmtard_bench.hub import cached_files, check_cache, require_sound, resolve_commit, run
from mmtard_bench.types import Task


@dataclass(frozen=True)
class TableDataset:
    """A ``datasets`` table with images and labels or captions.

    Implements ``Dataset``, or ``CaptionedDataset`` where ``task.label_column`` holds captions.
    """

    table: "datasets.Dataset"
    task: Task
    revision: str

    @cached_property
    def ids(self) -> Sequence[str]:
        """The column "id"; a later sample of the same id gets "#2", "#3" behind it.

        CIFAR-100 holds an image twice, with two labels; both are samples.
        """
        if "id" in self.table.column_names:
            seen: dict[str, int] = {}
            names = []
            for name in map(str, self.table["id"]):
                seen[name] = seen.get(name, 0) + 1
                names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
            return names
        return [f"{i:08d}" for i in range(len(self.table))]

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


def open_outside(task: Task) -> CaptionedDataset:
    """Open ``task.data`` (``parquet:``, ``imagefolder:`` or ``hub:``). Raises InputError."""
    datasets.disable_progress_bars()
    # What it logs before it raises says nothing more.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    scheme, _, where = task.data.partition(":")
    open_it = {"parquet": _open_parquet, "imagefolder": _open_folder, "hub": _open_hub}[scheme]
    table, revision = open_it(task, where)
    for column in (task.image_column, task.label_column):
        if column and column not in table.column_names:
            raise InputError(
                f"{task.data} has no column '{column}'; it has {', '.join(table.column_names)}. "
                "Name the columns with image_column and label_column in the task."
            )
    if not isinstance(table.features[task.image_column], datasets.Image):
        table = _cast_image(task, table)
    # Files stay encoded until a sample is used, so that a damaged one can be named.
    return TableDataset(
        table.cast_column(task.image_column, datasets.Image(decode=False)), task, revision
    )


def _cast_image(task: Task, table: "datasets.Dataset") -> "datasets.Dataset":
    try:
        return table.cast_column(task.image_column, datasets.Image(decode=False))
    except Exception as error:
        raise InputError(
            f"{task.data}: the column '{task.image_column}' holds no images: {error}"
        ) from error


def _load(task: Task, builder: str, **arguments: Any) -> "datasets.Dataset":
    try:
        loaded = datasets.load_dataset(builder, **arguments)
    except Exception as error:  # datasets, arrow and system errors have no common base
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{task.data} could not be read: {lines[0]} Check the files.") from error
    return _split(task, loaded)


def _split(task: Task, loaded: Any) -> "datasets.Dataset":
    splits = list(loaded)
    split = task.split or (splits[0] if len(splits) == 1 else "")
    if split not in splits:
        raise InputError(
            f"{task.data} has the splits {', '.join(map(str, splits))}; "
            f"choose one with split = ... in the task (given: {task.split!r})."
        )
    return loaded[split]


def _open_parquet(task: Task, where: str) -> tuple["datasets.Dataset", str]:
    names = [str(local_path(name, task.data)) for name in where.split(",")]
    files = sorted(glob.glob(names[0])) if glob.has_magic(where) else names  # noqa: PTH207
    missing = [name for name in files if not Path(name).is_file()]
    if missing or not files:
        raise InputError(
            f"{task.data}: there is no file {', '.join(missing) or where}; give one or more "
            "parquet files, separated by commas, or a pattern."
        )
    sha = hashlib.sha256()
    for name in files:
        with Path(name).open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return _load(task, "parquet", data_files=files), f"sha256:{sha.hexdigest()}"


def _open_folder(task: Task, where: str) -> tuple["datasets.Dataset", str]:
    folder = local_path(where, task.data)
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
    if task.samples_file is not None:
        # What the others hold can change nothing, and ImageNet is 6 GB.
        listed = set(sample_list(task.samples_file, task.name))
        files = [path for path in files if path.relative_to(folder).as_posix() in listed]
    if not files:
        raise InputError(
            f"{task.data}: there is no such folder, or it is empty; expected one folder of "
            "images a class."
        )
    sha = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(folder).as_posix()
        sha.update(f"{name} {digest}\n".encode(errors="surrogateescape"))
    table = _load(task, "imagefolder", data_dir=str(folder))
    if task.image_column in table.column_names:
        encoded = table.cast_column(task.image_column, datasets.Image(decode=False))
        # The folder resolved, the file not: images may well be links to somewhere else.
        names = [
            os.path.relpath(value["path"], folder.resolve()).replace(os.sep, "/")
            for value in encoded[task.image_column]
        ]
        if "id" in encoded.column_names:
            encoded = encoded.remove_columns("id")
        table = encoded.add_column("id", names)
    return table, f"sha256:{sha.hexdigest()}"


def _open_hub(task: Task, where: str) -> tuple["datasets.Dataset", str]:
    name, _, revision = where.partition("@")
    if Path(name).exists():
        # The library would take the folder, and the record would call it the hub's.
        raise InputError(
            f"{task.data}: there is a local '{name}' here, which would be read in place of the "
            "hub's; run in another directory, or use parquet: or imagefolder:."
        )
    commit = resolve_commit(task.data, name, revision)
    known = cached_files(name)
    try:
        table = _split(task, run(task.data, lambda: datasets.load_dataset(name, revision=commit)))
        _require_sound(task, name, known, table)
    except InputError:
        # Wrong bytes may well be what the library stumbled over.
        _require_sound(task, name, known, None)
        raise
    return table, f"{name}@{commit}"


def _require_sound(
    task: Task, name: str, known: set[Path], table: "datasets.Dataset | None"
) -> None:
    """Raise InputError if what was downloaded is not what the hub's checksums say; forget it."""
    damaged = check_cache(name, known=known)[1]
    if not damaged:
        return
    for made in table.cache_files if table else []:
        # What the library made of the files.
        shutil.rmtree(Path(made["filename"]).parent, ignore_errors=True)
    require_sound(task.data, damaged)
