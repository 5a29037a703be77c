"""Draw the samples that an evaluation uses."""

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mmtard_bench.data.base import Dataset, local_path
from mmtard_bench.errors import InputError
from mmtard_bench.files import lines_in, read_text

ROBUSTBENCH_LIST = "ROBUSTBENCH_IMAGENET_LIST"
"""The environment variable that names RobustBench's list of 5,000 ImageNet images."""


@dataclass(frozen=True)
class Manifest:
    """The samples of an evaluation in order: their positions in the data set and their ids."""

    indices: tuple[int, ...]
    ids: tuple[str, ...]


def draw_manifest(
    dataset: Dataset, *, n: int | None, seed: int, among: Collection[str] | None = None
) -> Manifest:
    """Draw ``n`` samples (all of them for None), from (revision, seed, n) alone.

    ``among`` names the samples that may be drawn; all of them if None.

    Samples are ranked by a hash of (revision, seed, id), so the draw depends neither on the
    order in which the source lists them nor on anything about the run, and a smaller draw is
    the beginning of a larger one.

    Raises InputError if the data set is empty, holds an id twice, lacks one of ``among``, or has
    fewer than n samples.
    """
    ids = dataset.ids
    if not len(ids):
        raise InputError("The data set is empty: expected at least one labelled image.")
    if not all(isinstance(sample, str) for sample in ids):
        raise InputError(f"The data set has sample ids like {ids[0]!r}; expected text.")
    if len(set(ids)) != len(ids):
        raise InputError("The data set uses one sample id twice; ids must be unique.")
    chosen = range(len(ids)) if among is None else _positions(ids, among)
    if n is not None and not 1 <= n <= len(chosen):
        raise InputError(
            f"n = {n} samples were asked for, but the data set holds {len(chosen)}; "
            f"ask for 1 to {len(chosen)}."
        )
    prefix = f"{dataset.revision}|{seed}|"
    ranks = {i: hashlib.sha256((prefix + ids[i]).encode()).digest() for i in chosen}
    order = sorted(chosen, key=ranks.__getitem__)[:n]
    return Manifest(indices=tuple(order), ids=tuple(ids[i] for i in order))


def _positions(ids: Sequence[str], among: Collection[str]) -> Sequence[int]:
    wanted = set(among)
    chosen = [i for i, sample in enumerate(ids) if sample in wanted]
    if len(chosen) != len(wanted):
        missing = sorted(wanted.difference(ids))
        raise InputError(
            f"{len(missing)} of the {len(wanted)} samples that the task lists are not in the data "
            f"set, '{missing[0]}' for one; its ids look like '{ids[0]}'. Check that the list "
            "belongs to the data, and that the data is whole."
        )
    return chosen


def sample_list(text: str, what: str) -> tuple[str, ...]:
    """The ids in a ``samples_file``, one a line. Raises InputError if it cannot be read.

    "robustbench" stands for RobustBench's 5,000 ImageNet images: the file that the environment
    variable ROBUSTBENCH_IMAGENET_LIST names, or the one in the installed package.
    """
    path = local_path(text, what)
    if text == "robustbench":
        path = _robustbench_list(what)
    try:
        lines = lines_in(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what}: the list of samples cannot be read: {error}.") from error
    ids = tuple(line.strip() for line in lines if line.strip())
    if not ids or len(set(ids)) != len(ids):
        raise InputError(f"{what}: the list of samples {path} is empty or names one twice.")
    return ids


def _robustbench_list(what: str) -> Path:
    named = os.environ.get(ROBUSTBENCH_LIST)
    if named:
        return Path(named)
    package = find_spec("robustbench")
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder) / "helper_files" / "imagenet_test_image_ids.txt"
        if path.is_file():
            return path
    raise InputError(
        f"{what} uses RobustBench's list of ImageNet images, and no installed package holds it: "
        f"set {ROBUSTBENCH_LIST} to the file imagenet_test_image_ids.txt of RobustBench's "
        "repository (lines such as n01440764/ILSVRC2012_val_00009111.JPEG)."
    )
