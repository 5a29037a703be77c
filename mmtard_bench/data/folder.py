"""Folders of images: one folder a class, or tables ``metadata.*`` that say what each image shows.

Images are listed here and not by ``datasets``, which takes "train", "val" or "test" in a name for a
split and leaves the other files out. Every file is used, is of a kind that is ignored, or is named
in an error.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath as Place
from typing import Any

import datasets
import pyarrow
from pyarrow import csv, json, parquet

from mmtard_bench.data.base import few, local_path
from mmtard_bench.data.decode import FORMATS, IMAGE_EXTENSIONS
from mmtard_bench.data.manifest import sample_list
from mmtard_bench.data.table import TableDataset, as_dataset, split_of
from mmtard_bench.errors import InputError, first_line
from mmtard_bench.files import is_text
from mmtard_bench.types import Task

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""What folders of splits are called, and what ``datasets`` calls these splits."""

COMPANIONS = frozenset(("txt", "md", "json", "jsonl", "xml", "csv", "tsv", "parquet", "db", "ini"))
"""How the names of files that may lie beside images end."""

_LINES = csv.ParseOptions(newlines_in_values=True)
READERS = {
    "metadata.csv": lambda path: csv.read_csv(path, parse_options=_LINES),
    "metadata.jsonl": json.read_json,
    "metadata.parquet": parquet.read_table,
}
"""Tables of what the images beside and below them show, a row an image, and how they are read."""

Columns = dict[str, list[Any]]


def open_folder(task: Task, where: str) -> TableDataset:
    """Open ``imagefolder:DIR``; the ids of its samples are paths relative to DIR.

    Raises InputError for a file that is neither used nor of a kind that is ignored.
    """
    folder = local_path(where, task.data).absolute()
    with _readable(task):
        files = sorted(_walk(task, folder, folder, ()), key=lambda place: place.parts)
    if not files:
        raise InputError(
            f"{task.data}: there is no such folder, or it is empty; expected one folder of "
            "images a class."
        )
    shown = [place for place in files if not _is_hidden(place)]
    images = [place for place in shown if _ending(place) in IMAGE_EXTENSIONS]
    _require_known(task, [place for place in shown if len(place.parts) > 1])
    splits = _splits(task, images)
    chosen = splits[split_of(task, splits, SPLITS.get(task.split or ""))]
    tables = [place for place in shown if place.name in READERS]
    if tables:
        chosen, columns, features = _by_tables(task, folder, chosen, tables, whole=len(splits) == 1)
    else:
        columns, features = _by_class(task, chosen, splits)
    columns["image"] = [{"bytes": None, "path": str(folder / place)} for place in chosen]
    features["image"] = datasets.Image(decode=False)
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    ids = [str(place) for place in chosen]
    with _readable(task):
        revision = _revision(task, folder, files)
    return as_dataset(task, table, revision, ids, roots=(folder,))


@contextmanager
def _readable(task: Task) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{task.data} cannot be read: {error}. Check the folder.") from error


def _walk(task: Task, root: Path, folder: Path, above: Sequence[Path]) -> Iterator[Place]:
    """Every file below a folder, relative to the root, through links to folders as well."""
    if not folder.is_dir():
        return
    real = folder.resolve()
    if real in above:
        raise InputError(f"{task.data}: the link {folder} leads back to a folder that holds it.")
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    where = Place(folder.relative_to(root).as_posix())
    if above and not _is_hidden(where) and all(entry.name[0] == "." for entry in entries):
        raise InputError(
            f"{task.data}: the folder '{where}' is empty. Where a folder is a class, names and "
            "labels follow from all of them: put its images there, or remove it."
        )
    for entry in entries:
        place = where / entry.name
        if entry.is_dir():
            yield from _walk(task, root, root / place, (*above, real))
        elif entry.is_file() and is_text(entry.name):
            yield place
        elif not _is_hidden(place):
            raise InputError(
                f"{task.data}: {str(place)!r} is a broken link, not a regular file, or has a name "
                "that is not text. Put a file there, or remove it."
            )


def _revision(task: Task, folder: Path, files: Iterable[Place]) -> str:
    """A hash of names and contents; of a list of samples only those count."""
    if task.samples_file is not None:
        # What the others hold can change nothing, and ImageNet is 6 GB.
        listed = set(sample_list(task.samples_file, task.name))
        files = [place for place in files if str(place) in listed]
    sha = hashlib.sha256()
    for place in files:
        with (folder / place).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sha.update(f"{place} {digest}\n".encode())
    return f"sha256:{sha.hexdigest()}"


def _ending(place: Place) -> str:
    return place.suffix[1:].lower()


def _is_hidden(place: Place) -> bool:
    """Whether it is the system's or a program's, and nobody's sample: .DS_Store, __MACOSX/."""
    inside = any(part.startswith("__") for part in place.parts[:-1])
    return inside or any(part.startswith(".") for part in place.parts)


def _require_known(task: Task, places: Iterable[Place]) -> None:
    known = IMAGE_EXTENSIONS | COMPANIONS
    unknown = [str(place) for place in places if _ending(place) not in known]
    if unknown:
        raise InputError(
            f"{task.data}: {len(unknown)} files are no images that can be read ({few(unknown)}). "
            f"Convert them to one of {', '.join(FORMATS)}, or take them out of the folder."
        )


def _splits(task: Task, images: Sequence[Place]) -> dict[str, list[Place]]:
    """The images of each split: by top folder where all of these are named like splits."""
    tops = {place.parts[0] for place in images}
    if not tops or not tops <= SPLITS.keys():
        return {"train": list(images)}
    found: dict[str, list[Place]] = {}
    for top in sorted(tops):
        if SPLITS[top] in found:
            raise InputError(
                f"{task.data} has two folders for the split '{SPLITS[top]}', of which one is "
                f"called '{top}'; leave one of them."
            )
        found[SPLITS[top]] = [place for place in images if place.parts[0] == top]
    return found


def _by_class(
    task: Task, chosen: Sequence[Place], splits: Mapping[str, Sequence[Place]]
) -> tuple[Columns, dict[str, Any]]:
    """Labels by folder; the classes are those of all splits, in alphabetical order."""
    if task.label_column != "label":
        return {}, {}
    names = set()
    for images in splits.values():
        folders = {place.parent for place in images}
        if len({(folder.parent, len(folder.parts)) for folder in folders}) > 1:
            depths = sorted(images, key=lambda place: len(place.parts))
            raise InputError(
                f"{task.data}: images are not in one folder a class: '{depths[0]}' and "
                f"'{depths[-1]}', for example. Expected DIR/CLASS/IMAGE or, with folders called "
                "train, val or test, DIR/SPLIT/CLASS/IMAGE."
            )
        if len(folders) > 1:
            names |= {folder.name for folder in folders}
    known = sorted(names)
    if not {place.parent.name for place in chosen} <= names:
        raise InputError(
            f"{task.data}: all images lie in one folder, so their labels are not known; expected "
            "DIR/CLASS/IMAGE or DIR/SPLIT/CLASS/IMAGE with two classes or more, or metadata.csv."
        )
    labels = {name: label for label, name in enumerate(known)}
    columns = {"label": [labels[place.parent.name] for place in chosen]}
    return columns, {"label": datasets.ClassLabel(names=known)}


def _by_tables(
    task: Task,
    folder: Path,
    chosen: Sequence[Place],
    tables: Sequence[Place],
    *,
    whole: bool,
) -> tuple[list[Place], Columns, dict[str, Any]]:
    """The images in the order of the tables, and their other columns.

    ``whole``: there are no folders of splits, each of which has tables of its own.
    """
    top = "" if whole or not chosen else chosen[0].parts[0]
    own = [table for table in tables if not top or table.parts[0] == top]
    try:
        read = [READERS[table.name](folder / table) for table in own]
        joined = pyarrow.concat_tables(read, promote_options="default")
    except Exception as error:  # arrow and system errors have no common base
        raise InputError(
            f"{task.data}: {few(map(str, own)) or few(map(str, tables))} cannot be read for this "
            f"split: {first_line(error)} Expected one table in each folder of a split."
        ) from error
    if "file_name" not in joined.column_names or "image" in joined.column_names:
        raise InputError(
            f"{task.data}: {own[0]} has the columns {', '.join(joined.column_names)}; expected "
            "'file_name' and what the images show, and no column 'image'."
        )
    named = [
        table.parent / str(name)
        for table, rows in zip(own, read, strict=True)
        for name in rows["file_name"].to_pylist()
    ]
    _require_same(task, chosen, named)
    rest = joined.drop_columns(["file_name"])
    return named, rest.to_pydict(), dict(datasets.Features.from_arrow_schema(rest.schema))


def _require_same(task: Task, images: Sequence[Place], named: Sequence[Place]) -> None:
    """See that a table names every image once, and nothing else."""
    twice = [place for place, count in Counter(named).items() if count > 1]
    here = set(images)
    for places, what in (
        (twice, "named by several rows"),
        ([place for place in named if place not in here], "named, but not among the images"),
        (sorted(here.difference(named)), "images that no row names"),
    ):
        if places:
            raise InputError(
                f"{task.data}: the metadata does not fit the images: {len(places)} are {what} "
                f"({few(map(str, places))}). Expected one row for each image."
            )
