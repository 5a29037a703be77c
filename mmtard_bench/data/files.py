"""Data from outside: parquet files, image folders, the hub."""

import glob
import hashlib
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import datasets
from pyarrow import ArrowException, parquet

from mmtard_bench.data.base import CaptionedDataset, few, local_path
from mmtard_bench.data.folder import open_folder
from mmtard_bench.data.hub_parquet import open_repository
from mmtard_bench.data.table import (
    TableDataset,
    as_dataset,
    load_table,
    require_one_naming,
    silent,
    split_of,
)
from mmtard_bench.errors import InputError, first_line
from mmtard_bench.hub import resolve_commit
from mmtard_bench.types import Task


@silent
def open_outside(task: Task) -> CaptionedDataset:
    """Open ``task.data``, which is not ``wds:``. Raises InputError."""
    scheme, _, where = task.data.partition(":")
    kinds = {
        "parquet": _open_parquet,
        "imagefolder": open_folder,
        "saved": _open_saved,
        "hub": _open_hub,
    }
    return kinds[scheme](task, where)


def _open_parquet(task: Task, where: str) -> TableDataset:
    files = _parquet_files(task, where)
    before, digest = _stamps(files), _digest(files)
    # The library would know a file by its path and time, which another file can have as well.
    cache = Path(datasets.config.HF_DATASETS_CACHE, "mmtard_bench", digest)
    footers = _footers(task, files)
    rows = sum(footer.num_rows for footer in footers)
    # It takes each name for a pattern, and fails at a file without rows.
    filled = zip(files, footers, strict=True)
    names = [glob.escape(name) for name, footer in filled if footer.num_rows]
    loaded = load_table(task, "parquet", data_files=names, cache_dir=str(cache))
    table = loaded[split_of(task, loaded)]
    if _stamps(files) != before or len(table) != rows:
        shutil.rmtree(cache, ignore_errors=True)
        raise InputError(
            f"{task.data}: the files hold {rows} rows, of which {len(table)} were read, or they "
            "changed meanwhile; run the same command again."
        )
    features = (datasets.Features.from_arrow_schema(f.schema.to_arrow_schema()) for f in footers)
    require_one_naming(task, zip(files, features, strict=True))
    return as_dataset(task, table, f"sha256:{digest}")


def _footers(task: Task, files: Iterable[str]) -> "list[parquet.FileMetaData]":
    """Read rows and columns from the footers of files. Raises InputError if there is no row."""
    try:
        found = [parquet.read_metadata(name) for name in files]
    except (ArrowException, OSError) as error:
        raise InputError(
            f"{task.data} could not be read: {first_line(error)} Check the files."
        ) from error
    if not any(footer.num_rows for footer in found):
        raise InputError(f"{task.data} is empty: expected at least one image.")
    return found


def _parquet_files(task: Task, where: str) -> list[str]:
    """The files of a list of names and patterns, in its order. Raises InputError."""
    names = [str(local_path(name, task.data)) for name in where.split(",")]
    found = [_matching(name) for name in names]
    files = [*chain.from_iterable(found)]
    missing = [name for name, some in zip(names, found, strict=True) if not some]
    missing += [name for name in files if not Path(name).is_file()]
    if missing:
        raise InputError(
            f"{task.data}: there is no file {', '.join(missing)}; give one or more "
            "parquet files, separated by commas, or a pattern."
        )
    twice = [name for name, count in Counter(files).items() if count > 1]
    if twice:
        raise InputError(f"{task.data} names {few(twice)} twice; name each file once.")
    return files


def _matching(name: str) -> Sequence[str]:
    if Path(name).is_file() or not glob.has_magic(name):
        return [name]
    return sorted(glob.glob(name, recursive=True))  # noqa: PTH207


def _stamps(files: Iterable[str]) -> list[tuple[int, int, int]]:
    """Facts that change whenever a file changes, even if its modification time is reset."""
    found = [Path(name).stat() for name in files]
    return [(stat.st_ino, stat.st_size, stat.st_ctime_ns) for stat in found]


def _digest(files: Iterable[str]) -> str:
    """A hash of the contents of files, in order."""
    sha = hashlib.sha256()
    for name in files:
        with Path(name).open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()


def _open_saved(task: Task, where: str) -> TableDataset:
    """Open a data set or a dictionary of splits that ``save_to_disk`` of ``datasets`` wrote."""
    folder = local_path(where, task.data)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets, arrow and system errors have no common base
        raise InputError(
            f"{task.data} could not be read: {first_line(error)} Expected a directory that "
            "save_to_disk of the package datasets wrote."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        split = split_of(task, loaded)
        loaded, folder = loaded[split], folder / split
    files = [file["filename"] for file in loaded.cache_files]
    outside = [name for name in files if Path(name).resolve().parent != folder.resolve()]
    if outside:
        raise InputError(f"{task.data} names files outside of {folder}: {few(outside)}.")
    if not len(loaded):
        raise InputError(f"{task.data} is empty: expected at least one image.")
    return as_dataset(task, loaded, f"sha256:{_digest(files)}")


def _open_hub(task: Task, where: str) -> CaptionedDataset:
    name, _, revision = where.partition("@")
    if Path(name).exists():
        # The library would take the folder, and the record would call it the hub's.
        raise InputError(
            f"{task.data}: there is a local '{name}' here, which would be read in place of the "
            "hub's; run in another directory, or use parquet: or imagefolder:."
        )
    return open_repository(task, name, resolve_commit(task.data, name, revision))
