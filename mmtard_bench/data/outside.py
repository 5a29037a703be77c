"""Data from outside through Hugging Face ``datasets``: parquet files, image folders, the hub."""

import glob
import hashlib
import os
from pathlib import Path

import datasets

from mmtard_bench.data.base import CaptionedDataset, local_path, sample_list
from mmtard_bench.data.hub_parquet import open_repository
from mmtard_bench.data.table import TableDataset, as_dataset, load_table, silent, split_of
from mmtard_bench.errors import InputError
from mmtard_bench.hub import resolve_commit
from mmtard_bench.types import Task


@silent
def open_outside(task: Task) -> CaptionedDataset:
    """Open ``task.data`` (``parquet:``, ``imagefolder:`` or ``hub:``). Raises InputError."""
    scheme, _, where = task.data.partition(":")
    open_it = {"parquet": _open_parquet, "imagefolder": _open_folder, "hub": _open_hub}[scheme]
    return open_it(task, where)


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
    loaded = load_table(task, "parquet", data_files=files)
    return as_dataset(task, loaded[split_of(task, loaded)], f"sha256:{sha.hexdigest()}")


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
    loaded = load_table(task, "imagefolder", data_dir=str(folder))
    table = loaded[split_of(task, loaded)]
    ids = None
    if task.image_column in table.column_names:
        encoded = table.cast_column(task.image_column, datasets.Image(decode=False))
        # The folder resolved, the file not: images may well be links to somewhere else.
        ids = [
            os.path.relpath(value["path"], folder.resolve()).replace(os.sep, "/")
            for value in encoded[task.image_column]
        ]
    return as_dataset(task, table, f"sha256:{sha.hexdigest()}", ids)


def _open_hub(task: Task, where: str) -> CaptionedDataset:
    name, _, revision = where.partition("@")
    if Path(name).exists():
        # The library would take the folder, and the record would call it the hub's.
        raise InputError(
            f"{task.data}: there is a local '{name}' here, which would be read in place of the "
            "hub's; run in another directory, or use parquet: or imagefolder:."
        )
    return open_repository(task, name, resolve_commit(task.data, name, revision))
