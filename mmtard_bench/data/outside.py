"""Data from outside through Hugging Face ``datasets``: parquet files, image folders, the hub."""

import glob
import hashlib
import io
import logging
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import HfApi
from PIL import Image

from mmtard_bench.data.base import CaptionedDataset, Pixels, split_captions
from mmtard_bench.errors import InputError
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
        found = tuple(line for text in given for line in split_captions(text))
        if not found:
            raise InputError(f"{self.task.data}: sample '{self.ids[index]}' has no caption.")
        return found

    @property
    def class_names(self) -> tuple[str, ...]:
        feature = self.table.features.get(self.task.label_column)
        return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()

    def image(self, index: int) -> Pixels:
        value = self.table[index][self.task.image_column]
        if value is None or (value["bytes"] is None and value["path"] is None):
            raise InputError(f"{self._sample(index)} is missing.")
        data = value["bytes"]
        if data is None:
            try:
                data = Path(value["path"]).read_bytes()
            except OSError as error:
                raise InputError(f"{self._sample(index)} cannot be read: {error}.") from error
        return decode(data, self._sample(index), convert_rgb=self.task.convert_rgb)

    def _sample(self, index: int) -> str:
        return f"{self.task.data}: the image of sample '{self.ids[index]}'"


def decode(data: bytes, what: str, *, convert_rgb: bool) -> Pixels:
    """Decode an image file to (H, W, 3) uint8.

    Raises InputError if it is damaged or, unless ``convert_rgb``, anything but 8-bit RGB.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            mode = "16-bit" if _png_depth(data) == 16 else image.mode
            if mode == "RGB" or convert_rgb:
                return np.array(image.convert("RGB"), dtype=np.uint8)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and others
        raise InputError(f"{what} is damaged or no image: {error}") from error
    kind = {"L": "grey", "LA": "grey", "1": "black and white", "P": "a palette image"}
    kind |= {"RGBA": "RGBA", "I;16": "16-bit", "I": "16-bit", "CMYK": "CMYK"}
    raise InputError(
        f"{what} is {kind.get(mode, mode)}; expected 8-bit RGB. Convert it, or set "
        "convert_rgb = true in the task to have it converted as Pillow does."
    )


def _png_depth(data: bytes) -> int | None:
    """The bits a channel of a PNG file: Pillow reads 16-bit colour as 8-bit without a word."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 25:
        return None
    return int(struct.unpack(">B", data[24:25])[0])


def open_outside(task: Task) -> CaptionedDataset:
    """Open ``task.data`` (``parquet:``, ``imagefolder:`` or ``hub:``). Raises InputError."""
    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
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
    except Exception as error:  # datasets, arrow and network errors have no common base
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(
            f"{task.data} could not be read: {lines[0]} Check the name, the files and, for hub "
            "names, the network; with HF_HUB_OFFLINE=1 only what is in the cache can be used."
        ) from error
    splits = list(loaded)
    split = task.split or (splits[0] if len(splits) == 1 else "")
    if split not in splits:
        raise InputError(
            f"{task.data} has the splits {', '.join(map(str, splits))}; "
            f"choose one with split = ... in the task (given: {task.split!r})."
        )
    return loaded[split]


def _open_parquet(task: Task, where: str) -> tuple["datasets.Dataset", str]:
    files = sorted(glob.glob(where)) if glob.has_magic(where) else where.split(",")  # noqa: PTH207
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
    folder = Path(where)
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
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
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        try:
            revision = str(HfApi().dataset_info(name, revision=revision or None).sha)
        except Exception as error:  # network, offline, missing and gated repositories, bad names
            lines = str(error).splitlines() or [type(error).__name__]
            raise InputError(
                f"{task.data} could not be looked up on the hub: {lines[0]} Check the name and "
                "the network; offline, name a commit that is in the cache: hub:ORG/NAME@COMMIT."
            ) from error
    return _load(task, name, revision=revision), f"{name}@{revision}"
