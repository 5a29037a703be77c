"""Parquet repositories of the hub, shard by shard: those without a sample in use stay there.

The index of a split says how many rows each file has, what the columns are and, where one is called
"id", what is in it. It is read in parts of the files (their footers, and that column), and kept in
the hub's cache of assets by commit, since what a commit holds never changes.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, BinaryIO, Self
from urllib.parse import quote

import datasets
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.table import table_cast
from huggingface_hub import constants
from pyarrow import ArrowInvalid
from pyarrow.parquet import ParquetFile
from pydantic import Field, ValidationError, field_validator, model_validator

from mmtard_bench.data.base import CaptionedDataset, LazyLabels, Pixels, sample_ids
from mmtard_bench.hub import look
from mmtard_bench.strict import Strict


class Shard(Strict):
    """A file of a split, its rows, and what its column "id" holds, if there is one."""

    file: str
    rows: Annotated[int, Field(ge=0)]
    names: list[str] | None


class Index(Strict):
    """The columns of a split, as ``datasets`` writes features, and its shards in their order."""

    columns: dict[str, Any]
    shards: list[Shard]

    @field_validator("columns")
    @classmethod
    def _readable(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            datasets.Features.from_dict(value)
        except Exception as error:  # the library checks nothing
            raise ValueError("no features of datasets") from error
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for shard in self.shards:
            if (shard.rows if "id" in self.columns else None) != (
                None if shard.names is None else len(shard.names)
            ):
                raise ValueError(f"{shard.file} has other ids than rows")
        return self

    @property
    def features(self) -> "datasets.Features":
        return datasets.Features.from_dict(self.columns)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def ids(self) -> list[str]:
        """The ids of all samples, in their order."""
        names = chain.from_iterable(shard.names or () for shard in self.shards)
        return sample_ids(self.rows, names if "id" in self.columns else None)


def index_place(repository: str, commit: str, split: str | None) -> Path:
    """Where the index of a split is kept, or of the only one.

    As ``huggingface_hub.cached_assets_path`` has it, which would make the folder.
    """
    assets = Path(constants.HF_ASSETS_CACHE, "mmtard_bench", repository.replace("/", "--"))
    return assets / commit / f"split-{quote(split or '', safe='')}.json"


def read_index(place: Path) -> Index | None:
    """An index as it was kept; None if there is none, or it is damaged: it can be made again."""
    try:
        return Index.model_validate_json(place.read_bytes())
    except (OSError, ValidationError):
        return None


def shard_files(builder: "datasets.DatasetBuilder", root: str) -> dict[str, list[str]] | None:
    """The files of each split where they are parquet below ``root``, of which all rows count."""
    if not isinstance(builder, Parquet) or builder.config.filters or builder.config.columns:
        return None
    splits = {str(split): list(urls) for split, urls in builder.config.data_files.items()}
    for url in chain.from_iterable(splits.values()):
        if not url.startswith(root) or not url.endswith(".parquet"):
            return None
    return {split: [url.removeprefix(root) for url in urls] for split, urls in splits.items()}


def make_index(
    spec: str,
    repository: str,
    commit: str,
    files: Sequence[str],
    features: "datasets.Features | None",
) -> Index:
    """Read the index of these files. ``features`` are those that the repository states, if any.

    Raises InputError.
    """
    shards = []
    for file in files:
        read = partial(_read_shard, file, features)
        shard, features = look(spec, repository, file, commit, read)
        shards.append(shard)
    return Index(columns=features.to_dict() if features else {}, shards=shards)


def _read_shard(
    file: str, features: "datasets.Features | None", opened: BinaryIO
) -> tuple[Shard, "datasets.Features"]:
    """What the index says of a file, and the features: as given or, without, as in this file."""
    try:
        with ParquetFile(opened) as table:
            features = features or datasets.Features.from_arrow_schema(table.schema_arrow)
            names = None
            if "id" in features:
                column = table.read(columns=["id"], use_threads=False)
                column = table_cast(column, datasets.Features(id=features["id"]).arrow_schema)
                names = [str(name) for name in column["id"].to_pylist()]
            return Shard(file=file, rows=table.metadata.num_rows, names=names), features
    except ArrowInvalid as error:
        raise ValueError(f"{file} is no whole parquet file ({error}).") from error


class ShardedDataset:
    """Samples in shards that are opened when one of theirs is needed; implements ``Dataset``.

    ``open_shard`` makes the data set of a shard, whose samples have the ids that it is given.
    Images may be asked for by several threads.
    """

    def __init__(
        self,
        index: Index,
        revision: str,
        class_names: tuple[str, ...],
        open_shard: Callable[[Shard, Sequence[str]], CaptionedDataset],
    ) -> None:
        self.revision = revision
        self.class_names = class_names
        self.ids: Sequence[str] = index.ids()
        self._shards = index.shards
        self._starts = [0, *accumulate(shard.rows for shard in index.shards)]
        self._open_shard = open_shard
        self._opened: dict[int, CaptionedDataset] = {}
        self._lock = Lock()

    @property
    def labels(self) -> Sequence[int]:
        return LazyLabels(len(self.ids), self._label)

    def image(self, index: int) -> Pixels:
        shard, row = self._find(index)
        return shard.image(row)

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample: asks for its shard."""
        shard, row = self._find(index)
        return shard.captions(row)

    def _label(self, index: int) -> int:
        shard, row = self._find(index)
        return shard.labels[row]

    def _find(self, index: int) -> tuple[CaptionedDataset, int]:
        """The shard of a sample, opened, and the sample's row in it."""
        number = bisect_right(self._starts, index) - 1
        first, end = self._starts[number : number + 2]
        with self._lock:
            if number not in self._opened:
                ids = self.ids[first:end]
                self._opened[number] = self._open_shard(self._shards[number], ids)
            return self._opened[number], index - first
