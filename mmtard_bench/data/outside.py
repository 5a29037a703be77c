"""Data from outside through Hugging Face ``datasets``: parquet files, image folders, the hub."""

import glob
import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets

from mmtard_bench.data.base import (
    CaptionedDataset,
    Pixels,
    captions_in,
    local_path,
    sample_ids,
    sample_list,
)
from mmtard_bench.data.decode import decode
from mmtard_bench.data.hub_parquet import (
    Index,
    Shard,
    ShardedDataset,
    index_place,
    make_index,
    read_index,
    shard_files,
)
from mmtard_bench.errors import DamagedImageError, InputError
from mmtard_bench.hub import (
    cached_files,
    check_cache,
    download,
    require_sound,
    resolve_commit,
    run,
)
from mmtard_bench.records import write_atomically
from mmtard_bench.types import Task


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


def open_outside(task: Task) -> CaptionedDataset:
    """Open ``task.data`` (``parquet:``, ``imagefolder:`` or ``hub:``). Raises InputError."""
    datasets.disable_progress_bars()
    # What it logs before it raises says nothing more.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    scheme, _, where = task.data.partition(":")
    open_it = {"parquet": _open_parquet, "imagefolder": _open_folder, "hub": _open_hub}[scheme]
    return open_it(task, where)


def _dataset(
    task: Task, table: "datasets.Dataset", revision: str, ids: Sequence[str] | None = None
) -> TableDataset:
    """A table as a data set; its ids, unless given, are its column "id". Raises InputError."""
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
        ids = sample_ids(len(table), table["id"] if "id" in table.column_names else None)
    return TableDataset(table, task, revision, ids)


def _cast_image(task: Task, table: "datasets.Dataset") -> "datasets.Dataset":
    try:
        return table.cast_column(task.image_column, datasets.Image(decode=False))
    except Exception as error:
        raise InputError(
            f"{task.data}: the column '{task.image_column}' holds no images: {error}"
        ) from error


def _load(task: Task, builder: str, **arguments: Any) -> Any:
    try:
        return datasets.load_dataset(builder, **arguments)
    except Exception as error:  # datasets, arrow and system errors have no common base
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{task.data} could not be read: {lines[0]} Check the files.") from error


def _split_of(task: Task, found: Iterable[object]) -> str:
    """The split that a task is about, of those that there are."""
    splits = [str(split) for split in found]
    split = task.split or (splits[0] if len(splits) == 1 else "")
    if split not in splits:
        raise InputError(
            f"{task.data} has the splits {', '.join(splits)}; "
            f"choose one with split = ... in the task (given: {task.split!r})."
        )
    return split


def _open_parquet(task: Task, where: str) -> TableDataset:
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
    loaded = _load(task, "parquet", data_files=files)
    return _dataset(task, loaded[_split_of(task, loaded)], f"sha256:{sha.hexdigest()}")


def _open_folder(task: Task, where: str) -> TableDataset:
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
    loaded = _load(task, "imagefolder", data_dir=str(folder))
    table = loaded[_split_of(task, loaded)]
    ids = None
    if task.image_column in table.column_names:
        encoded = table.cast_column(task.image_column, datasets.Image(decode=False))
        # The folder resolved, the file not: images may well be links to somewhere else.
        ids = [
            os.path.relpath(value["path"], folder.resolve()).replace(os.sep, "/")
            for value in encoded[task.image_column]
        ]
    return _dataset(task, table, f"sha256:{sha.hexdigest()}", ids)


def _open_hub(task: Task, where: str) -> CaptionedDataset:
    name, _, revision = where.partition("@")
    if Path(name).exists():
        # The library would take the folder, and the record would call it the hub's.
        raise InputError(
            f"{task.data}: there is a local '{name}' here, which would be read in place of the "
            "hub's; run in another directory, or use parquet: or imagefolder:."
        )
    commit = resolve_commit(task.data, name, revision)
    pinned = f"{name}@{commit}"
    place = index_place(name, commit, task.split)
    found = read_index(place) or _look_up(task, name, commit, place)
    if not isinstance(found, Index):
        return _dataset(task, found, pinned)
    # A table without rows: what is wrong with the columns shows before a shard is downloaded.
    columns = _dataset(task, datasets.Dataset(found.features.arrow_schema.empty_table()), pinned)
    open_shard = partial(_open_shard, task, name, commit, place, found.features)
    return ShardedDataset(found, pinned, columns.class_names, open_shard)


def _look_up(task: Task, name: str, commit: str, place: Path) -> "Index | datasets.Dataset":
    """The index of a task's split, also written to ``place``; of no parquet, the data itself."""
    known = cached_files(name)
    try:
        builder = run(task.data, lambda: datasets.load_dataset_builder(name, revision=commit))
        files = shard_files(builder, f"hf://datasets/{name}@{commit}/")
        if files is None:
            loaded = run(task.data, lambda: _whole(builder))
            table = loaded[_split_of(task, loaded)]
            _require_sound(task, name, known, table)
            return table
        split = _split_of(task, files)
        index = make_index(task.data, name, commit, files[split], builder.info.features)
        _require_sound(task, name, known, None)
    except InputError:
        # Wrong bytes may well be what the library stumbled over.
        _require_sound(task, name, known, None)
        raise
    stated = (builder.info.splits or {}).get(split)
    if stated and stated.num_examples != index.rows:
        raise InputError(
            f"{task.data}: its card says that the split '{split}' has {stated.num_examples} rows, "
            f"but its files hold {index.rows}. Use a revision whose files are whole."
        )
    write_atomically(place, index.model_dump_json())
    return index


def _whole(builder: "datasets.DatasetBuilder") -> Any:
    builder.download_and_prepare()
    return builder.as_dataset()


def _open_shard(
    task: Task,
    name: str,
    commit: str,
    place: Path,
    features: "datasets.Features",
    shard: Shard,
    ids: Sequence[str],
) -> TableDataset:
    """A file of a repository, downloaded if it must be. Raises InputError."""
    path = download(task.data, name, shard.file, commit)
    table = _load(task, "parquet", data_files=[str(path)], features=features, split="train")
    if len(table) != shard.rows:
        place.unlink(missing_ok=True)
        raise InputError(
            f"{task.data}: {shard.file} has {len(table)} rows, but its index says {shard.rows}. "
            "The index was removed; check the file with mmtard-bench fetch, which also makes a new "
            "index, and run the same command again."
        )
    return _dataset(task, table, f"{name}@{commit}", ids)


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
