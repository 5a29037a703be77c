"""Repositories of the hub that ``datasets`` reads: parquet by the file, others as a whole.

Of parquet, only files with a sample in use are downloaded. The index of a split says how many rows
each file has, what the columns are and what the one called "id" holds. It is read in parts of the
files (their footers, and that column), and kept in the hub's cache of assets by commit: what a
commit holds never changes.
"""

import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, BinaryIO, Self, TypeVar
from urllib.parse import quote

import datasets
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.table import table_cast
from huggingface_hub import DatasetCard, constants
from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile
from pydantic import Field, ValidationError, model_validator

from mmtard_bench.data.base import CaptionedDataset, LazyLabels, Pixels, few, sample_ids
from mmtard_bench.data.decode import IMAGE_EXTENSIONS
from mmtard_bench.data.table import (
    TableDataset,
    as_dataset,
    load_table,
    names_in,
    require_one_naming,
    split_of,
)
from mmtard_bench.errors import InputError, first_line
from mmtard_bench.files import write_atomically
from mmtard_bench.hub import (
    cached_files,
    check_cache,
    download,
    file_names,
    from_hub,
    look,
    require_sound,
    run,
)
from mmtard_bench.schema import Strict
from mmtard_bench.types import Task

T = TypeVar("T")


class Shard(Strict):
    """A file of a split, and how many rows it has."""

    file: str
    rows: Annotated[int, Field(ge=0)]


class Index(Strict):
    """A split: its columns, as ``datasets`` writes features, its files and its column "id"."""

    columns: dict[str, Any]
    shards: list[Shard]
    names: list[str] | None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        try:
            datasets.Features.from_dict(self.columns)
        except Exception as error:  # the library checks nothing
            raise ValueError("no features of datasets") from error
        if self.names is not None and len(self.names) != self.rows:
            raise ValueError("other ids than rows")
        return self

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)


class ShardedDataset:
    """Samples in files that are opened when one of theirs is needed; implements ``Dataset``.

    The index was not checked, so what it says of a file is compared with the file, which was.
    Images may be asked for by several threads.
    """

    def __init__(self, task: Task, repository: str, commit: str, index: Index) -> None:
        self.revision = f"{repository}@{commit}"
        self.ids: Sequence[str] = sample_ids(index.rows, index.names)
        self._task, self._repository, self._commit, self._index = task, repository, commit, index
        self._features = datasets.Features.from_dict(index.columns)
        self._starts = [0, *accumulate(shard.rows for shard in index.shards)]
        self._opened: dict[int, TableDataset] = {}
        self._lock = Lock()
        # A table without rows: what is wrong with the columns shows before a file is downloaded.
        empty = datasets.Dataset(self._features.arrow_schema.empty_table())
        self.class_names = as_dataset(task, empty, self.revision).class_names

    @property
    def labels(self) -> Sequence[int]:
        return LazyLabels(len(self.ids), self._label, self._known_labels)

    def image(self, index: int) -> Pixels:
        shard, row = self._find(index)
        return shard.image(row)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample: asks for its file."""
        shard, row = self._find(index)
        return shard.captions(row)

    def _label(self, index: int) -> int:
        shard, row = self._find(index)
        return shard.labels[row]

    def _known_labels(self) -> Iterator[tuple[str, int]]:
        for shard in self._opened.values():
            yield from zip(shard.ids, shard.labels, strict=True)

    def _find(self, index: int) -> tuple[TableDataset, int]:
        """The file of a sample, opened, and the sample's row in it."""
        number = bisect_right(self._starts, index) - 1
        with self._lock:
            if number not in self._opened:
                self._opened[number] = self._open(number)
            return self._opened[number], index - self._starts[number]

    def _open(self, number: int) -> TableDataset:
        shard = self._index.shards[number]
        path = download(self._task.data, self._repository, shard.file, self._commit)
        given = {"data_files": [str(path)], "features": self._features, "split": "train"}
        try:
            table = load_table(self._task, "parquet", **given)
        except InputError:
            # Perhaps what was whole when it arrived no longer is.
            others = cached_files(self._repository) - {path}
            _require_sound(self._task, self._repository, others, None)
            raise
        rows = slice(*self._starts[number : number + 2])
        names = None if self._index.names is None else self._index.names[rows]
        if (len(table), names_in(table)) != (shard.rows, names):
            index_place(self._repository, self._commit, self._task.split).unlink(missing_ok=True)
            raise InputError(
                f"{self._task.data}: {shard.file} has {len(table)} rows, and its index has "
                f"{shard.rows}, or other ids. The index was removed; run the same command again, "
                "which makes a new one."
            )
        return as_dataset(self._task, table, self.revision, self.ids[rows])


def open_repository(task: Task, repository: str, commit: str) -> CaptionedDataset:
    """Open a commit of a hub repository. Raises InputError."""
    place = index_place(repository, commit, task.split)
    try:
        # A damaged one can be made again.
        index = Index.model_validate_json(place.read_bytes())
    except (OSError, ValidationError):
        found = _look_up(task, repository, commit)
        if not isinstance(found, Index):
            # Of a folder of images, the table has the paths in the caches.
            named = found.info.builder_name == "imagefolder"
            caches = (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE) if named else ()
            return as_dataset(task, found, f"{repository}@{commit}", roots=caches)
        index = found
        write_atomically(place, index.model_dump_json())
    return ShardedDataset(task, repository, commit, index)


def index_place(repository: str, commit: str, split: str | None) -> Path:
    """Where the index of a split is kept, or of the only one.

    As ``huggingface_hub.cached_assets_path`` has it, which would make the folder.
    """
    assets = Path(constants.HF_ASSETS_CACHE, "mmtard_bench", repository.replace("/", "--"))
    return assets / commit / f"split-{quote(split or '', safe='')}.json"


def _look_up(task: Task, repository: str, commit: str) -> "Index | datasets.Dataset":
    """The index of a task's split or, of other files than parquet, the split itself."""
    known = cached_files(repository)
    found: Index | datasets.Dataset | None = None
    try:
        builder = run(task.data, lambda: datasets.load_dataset_builder(repository, revision=commit))
        root = f"hf://datasets/{repository}@{commit}/"
        _require_all(task, repository, commit, builder, root)
        files = _parquet_files(builder, root)
        if files is not None:
            found = _make_index(task, repository, commit, builder.info, files)
        else:
            loaded = run(task.data, lambda: datasets.load_dataset(repository, revision=commit))
            found = loaded[split_of(task, loaded)]
    except InputError:
        # Wrong bytes may well be what the library stumbled over.
        _require_sound(task, repository, known, found)
        raise
    _require_sound(task, repository, known, found)
    return found


def _require_all(
    task: Task, repository: str, commit: str, builder: "datasets.DatasetBuilder", root: str
) -> None:
    """See that every file is in a split, where the library made these up from the files' names.

    It takes "test" in the name of some for a split, and leaves the others out. Raises InputError.
    """
    kinds = ((ImageFolder, IMAGE_EXTENSIONS), (Parquet, {"parquet"}))
    ends = {end for kind, ends in kinds if isinstance(builder, kind) for end in ends}
    if not ends:
        # Kinds without split words in file names, and what the library made of files offline.
        return
    every = file_names(task.data, repository, commit)
    used = {url.removeprefix(root) for urls in builder.config.data_files.values() for url in urls}
    left = [name for name in every if name.rpartition(".")[2].lower() in ends and name not in used]
    if not left:
        return
    if "README.md" in every:
        card = DatasetCard.load(download(task.data, repository, "README.md", commit))
        if card.data.to_dict().get("configs"):
            return
    raise InputError(
        f"{task.data}: {len(left)} of its files are in no split ({few(left)}): datasets takes "
        "words such as 'test' in a name for a split, and leaves the other files out. State the "
        "files of each split in its card, or download it and use imagefolder: or parquet:."
    )


def _parquet_files(builder: "datasets.DatasetBuilder", root: str) -> dict[str, list[str]] | None:
    """The files of each split where they are parquet below ``root``, of which all rows count."""
    settings = builder.config
    if not isinstance(builder, Parquet) or settings.filters or settings.columns:
        return None
    splits = {str(split): list(urls) for split, urls in settings.data_files.items()}
    for url in chain.from_iterable(splits.values()):
        if not url.startswith(root) or not url.endswith(".parquet"):
            return None
    return {split: [url.removeprefix(root) for url in urls] for split, urls in splits.items()}


def _make_index(
    task: Task,
    repository: str,
    commit: str,
    info: "datasets.DatasetInfo",
    files: dict[str, list[str]],
) -> Index:
    """Read the index of a task's split. Raises InputError."""

    def read_in(file: str, read: Callable[[ParquetFile], T]) -> T:
        return look(task.data, repository, file, commit, partial(_read, file, read))

    split = split_of(task, files)
    # Where the repository does not state them, the library takes those of its first file.
    first = next(iter(files.values()))[0]
    features = info.features or read_in(first, _features)
    read = [(file, *read_in(file, partial(_rows, features))) for file in files[split]]
    own = [(file, features) for file, _, _, features in read]
    require_one_naming(task, own if info.features else [(first, features), *own])
    names = [*chain.from_iterable(names for _, _, names, _ in read)] if "id" in features else None
    index = Index(
        columns=features.to_dict(),
        shards=[Shard(file=file, rows=rows) for file, rows, _, _ in read],
        names=names,
    )
    stated = (info.splits or {}).get(split)
    if stated and stated.num_examples != index.rows:
        raise InputError(
            f"{task.data}: its card says that the split '{split}' has {stated.num_examples} rows, "
            f"but its files hold {index.rows}. Use a revision whose files are whole."
        )
    return index


def _read(file: str, read: Callable[[ParquetFile], T], opened: BinaryIO) -> T:
    try:
        with ParquetFile(opened) as table:
            return read(table)
    except (ArrowException, OSError) as error:
        if from_hub(error):
            raise
        raise ValueError(f"{file} is no whole parquet file ({first_line(error)}).") from error


def _features(table: ParquetFile) -> "datasets.Features":
    return datasets.Features.from_arrow_schema(table.schema_arrow)


def _rows(
    features: "datasets.Features", table: ParquetFile
) -> tuple[int, list[str], "datasets.Features"]:
    """How many rows a file has, what its column "id" holds, if wanted, and its own features."""
    names = None
    if "id" in features:
        column = table.read(columns=["id"], use_threads=False)
        column = table_cast(column, datasets.Features(id=features["id"]).arrow_schema)
        names = names_in(datasets.Dataset(column))
    return table.metadata.num_rows, names or [], _features(table)


def _require_sound(
    task: Task, repository: str, known: set[Path], found: "Index | datasets.Dataset | None"
) -> None:
    """Raise InputError if a file not ``known`` is not what the hub's checksum says; forget it."""
    damaged = check_cache(repository, known=known)[1]
    if damaged and isinstance(found, datasets.Dataset):
        for made in found.cache_files:
            # What the library made of the files.
            shutil.rmtree(Path(made["filename"]).parent, ignore_errors=True)
    require_sound(task.data, damaged)
